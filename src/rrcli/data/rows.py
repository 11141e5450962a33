"""Rows: reads a file or a data set of the hub as rows of named values, piece by piece, and names each row's place.

All that is made from rows comes through here: documents (see `readers`) and problems (see `problem_rows`). What cannot
be read is an error that names the file and the line or row. The error of a single row is given to `bad`, which raises
it, or counts it so that the next row is read.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from rrcli.data.hub import HubName, hub_entries
from rrcli.data.lines import OnBadRow, file_lines, json_objects
from rrcli.errors import RRError, UsageError, first_line

TABLES = (".jsonl", ".csv", ".parquet")
PARQUET_ROWS = 1024

# A row, after its place: 'FILE, line 3'.
Placed = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class Rows:
    """The rows of one source, which can be read once.

    Attributes:
        name: what errors call the source, or the place of its header.
        fields: the names of its columns; None of JSON lines, where every row has names of its own.
        types: of columns that do not hold text, what they hold, as far as that is known before reading.
        flat: whether a value is always a text, as in a table of CSV.
        read: yields the rows with at least the columns that are named (all by default), and gives errors to `bad`.
    """

    name: str
    fields: list[str] | None
    types: dict[str, str]
    flat: bool
    read: Callable[[Sequence[str] | None, OnBadRow], Iterator[Placed]]

    def require(self, field: str, hint: str) -> None:
        """Refuse a table that has no column of this name, or two of them.

        Raises:
            RRError: names the source, the column and those that there are.
        """
        if self.fields is not None and self.fields.count(field) != 1:
            wrong = "two columns" if field in self.fields else "no column"
            raise RRError(f"{self.name}: {wrong} '{field}' (it has {listed(self.fields)})", hint)

    @property
    def texts(self) -> list[str]:
        """The columns that may hold text."""
        return [name for name in self.fields or () if name not in self.types]


def listed(names: Iterable[str]) -> str:
    """Return names for an error."""
    return ", ".join(map(str, names)) or "none"


def file_rows(path: Path) -> Rows:
    """Return the rows of a .jsonl, .csv or .parquet file.

    Raises:
        UsageError: the extra that it needs is not installed. RRError: it cannot be read, or has no header.
    """
    if path.suffix == ".parquet":
        return parquet_rows(path)
    if path.suffix == ".csv":  # after a line that is not UTF-8 it is not known where the next record begins
        return csv_rows(file_lines(path), str(path))
    return json_rows(lambda bad: file_lines(path, bad), str(path))


def json_rows(lines: Callable[[OnBadRow], Iterable[str]], name: str) -> Rows:
    """Return the object on each line.

    Args:
        lines: returns the decoded lines; the error of one that is not UTF-8 is given to its argument.
    """
    return Rows(name, None, {}, False, lambda _, bad: json_objects(lines(bad), name, bad))


def csv_rows(lines: Iterable[str], name: str) -> Rows:
    """Return the records of a table whose first line names the columns. A text in quotes may hold line breaks.

    Raises:
        RRError: there is no header.
    """
    csv.field_size_limit(2**31 - 1)  # a text may be longer than the module's 128 KiB
    rows = csv.reader(lines, strict=True)

    def record() -> list[str] | None:
        begins = rows.line_num + 1
        try:
            return next(rows, None)
        except csv.Error as error:
            raise RRError(
                f"{name}: the record that begins in line {begins} is not valid CSV ({error})",
                'A quoted text ends with a double quote; one inside it is written "".',
            ) from error

    header = record()
    if not header:
        raise RRError(f"{name}, line 1: no header", "The first line names the columns.")

    def read(_: Sequence[str] | None, bad: OnBadRow) -> Iterator[Placed]:
        while True:
            place = f"{name}, line {rows.line_num + 1}"
            row = record()
            if row is None:
                return
            if row and len(row) != len(header):
                columns = f"{len(row)} columns, the header has {len(header)}"
                bad(RRError(f"{place}: {columns}", "Put texts with commas or line breaks in double quotes."))
            elif row:
                yield place, dict(zip(header, row, strict=True))

    return Rows(f"{name}, line 1", header, {}, True, read)


def parquet_rows(path: Path) -> Rows:
    """Return the rows of a table, which are read in pieces.

    Raises:
        UsageError: the extra `parquet` is not installed. RRError: it cannot be read.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UsageError(f"{path} needs the extra 'parquet'", "pip install 'rrcli[parquet]'") from None

    def refused(error: Exception, where: str) -> RRError:
        return RRError(f"cannot read {where}: {first_line(error)}", "Is the file whole? Make or fetch it again.")

    try:
        schema = parquet.read_schema(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise refused(error, str(path)) from error

    def read(columns: Sequence[str] | None, bad: OnBadRow) -> Iterator[Placed]:
        row = 0
        try:
            with parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(PARQUET_ROWS, columns=columns):
                    for values in batch.to_pylist():
                        row += 1
                        yield f"{path}, row {row}", values
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise refused(error, f"{path}, row {row}" if row else str(path)) from error

    types = {item.name: str(item.type) for item in schema if not _is_text(item.type, pyarrow)}
    return Rows(str(path), list(schema.names), types, False, read)


def hub_rows(source: HubName, directory: Path, *, streaming: bool) -> Rows:
    """Return the rows of a split of a data set.

    Raises:
        UsageError: the extra `datasets` is not installed. RRError: it cannot be read.
    """
    entries = hub_entries(source, directory, streaming=streaming)
    first = next(entries, None)
    whole = entries if first is None else chain([first], entries)

    def read(_: Sequence[str] | None, bad: OnBadRow) -> Iterator[Placed]:
        for number, entry in enumerate(whole, start=1):
            yield f"{source.spec}, row {number}", entry

    return Rows(source.spec, None if first is None else list(first), {}, False, read)


def is_json_object(line: bytes) -> bool:
    """Tell whether a line is a JSON object, as the first line of a .jsonl file is."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _is_text(kind: Any, pyarrow: Any) -> bool:
    types = pyarrow.types
    kind = kind.value_type if types.is_dictionary(kind) else kind
    return any(is_kind(kind) for is_kind in (types.is_string, types.is_large_string, types.is_string_view))
