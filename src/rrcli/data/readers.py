"""Readers: each turns one kind of file, or the hub, into a stream of documents (see `conversations`), piece by piece.

Whatever cannot be read is an error that names the file and the line or row. The error of a single row is given to
`bad`, which raises it, or counts it so that the next row is read. The readers of lines take the decoded lines of a
file, the name that errors show, and the field that holds the text.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rrcli.data.conversations import FIELDS, MESSAGES, SHAREGPT, TEXT, TOOLS, Document, conversation, json_type, kind_of
from rrcli.data.lines import OnBadRow, json_objects, refuse
from rrcli.errors import RRError, UsageError, first_line

HUB = "hf://"
PARQUET_ROWS = 1024


def paragraphs(lines: Iterable[str], name: str, field: str, bad: OnBadRow = refuse) -> Iterator[str]:
    """Yield the texts between blank lines. `field` and `bad` are not used: plain text has no fields."""
    held: list[str] = []
    for line in lines:
        line = line.removesuffix("\n").removesuffix("\r")
        if line.strip(" \t"):
            held.append(line)
        elif held:
            yield "\n".join(held)
            held = []
    if held:
        yield "\n".join(held)


def json_lines(lines: Iterable[str], name: str, field: str, bad: OnBadRow = refuse) -> Iterator[Document]:
    """Yield the text field of the object on each line, or the conversation in it; the first line decides which."""
    kind = ""
    for place, value in json_objects(lines, name, bad):
        kind = kind or kind_of(value, field)
        try:
            document = conversation(value, kind, place) if kind not in ("", TEXT) else _text(value, field, place)
        except RRError as error:
            bad(error)
        else:
            yield document


def _text(row: dict[str, Any], field: str, place: str) -> str:
    """Return the text of a row.

    Raises:
        RRError: there is none; names the place and the field.
    """
    if field not in row:
        texts = [key for key, entry in row.items() if isinstance(entry, str)]
        raise RRError(f"{place}: no object with a '{field}' (it has {_listed(row)})", _other(texts))
    if not isinstance(row[field], str):
        kind = json_type(row[field])
        raise RRError(f"{place}: no object with a '{field}' that is text (it is {kind})", "Texts stand in quotes.")
    return _encodable(row[field], place)


def csv_rows(lines: Iterable[str], name: str, field: str, bad: OnBadRow = refuse) -> Iterator[Document]:
    """Yield the text column of each record, or its prompt and completion.

    The first line names the columns. A text in quotes may hold line breaks.
    """
    csv.field_size_limit(2**31 - 1)  # a document may be longer than the module's 128 KiB
    rows = csv.reader(lines, strict=True)
    begins = 1
    try:
        header = next(rows, None)
        if not header:
            raise RRError(f"{name}, line 1: no header", "The first line names the columns.")
        kind = kind_of(header, field) or TEXT
        if kind in (MESSAGES, SHAREGPT):
            raise RRError(f"{name}, line 1: a table has no messages", "Write them to a .jsonl or .parquet file.")
        if kind == TEXT and header.count(field) != 1:
            wrong = "two columns" if field in header else "no column"
            raise RRError(f"{name}, line 1: {wrong} '{field}' (it has {_listed(header)})", _other(header))
        while True:
            begins = rows.line_num + 1
            row = next(rows, None)
            if row is None:
                return
            if row and len(row) != len(header):
                columns = f"{len(row)} columns, the header has {len(header)}"
                hint = "Put texts with commas or line breaks in double quotes."
                bad(RRError(f"{name}, line {begins}: {columns}", hint))
            elif row:
                values = dict(zip(header, row, strict=True))
                try:
                    document = values[field] if kind == TEXT else conversation(values, kind, f"{name}, line {begins}")
                except RRError as error:
                    bad(error)
                else:
                    yield document
    except csv.Error as error:
        raise RRError(
            f"{name}: the record that begins in line {begins} is not valid CSV ({error})",
            'A quoted text ends with a double quote; one inside it is written "".',
        ) from error


def parquet_rows(path: Path, field: str, bad: OnBadRow = refuse) -> Iterator[Document]:
    """Yield the text column of each row, or its conversation. Rows are read in pieces; a null is an empty text."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise _missing(str(path), "parquet") from None
    row = 0
    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            texts = [item.name for item in schema if _is_text(item.type, pyarrow)]
            kind = kind_of(schema.names, field) or TEXT
            if kind == TEXT and field not in schema.names:
                raise RRError(f"{path}: no column '{field}' (it has {_listed(schema.names)})", _other(texts))
            if kind == TEXT and field not in texts:
                raise RRError(f"{path}: column '{field}' holds {schema.field(field).type}, not text", _other(texts))
            columns = [*FIELDS.get(kind, (field,)), *[TOOLS] * (kind != TEXT and TOOLS in schema.names)]
            for batch in file.iter_batches(PARQUET_ROWS, columns=columns):
                for values in batch.to_pylist():
                    row += 1
                    try:
                        place = f"{path}, row {row}"
                        document = values[field] or "" if kind == TEXT else conversation(values, kind, place)
                    except RRError as error:
                        bad(error)
                    else:
                        yield document
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        where = f"{path}, row {row}" if row else str(path)
        raise RRError(f"cannot read {where}: {first_line(error)}", "Is the file whole? Make or fetch it again.") from (
            error
        )


def hub_rows(spec: str, directory: Path, field: str, bad: OnBadRow = refuse) -> Iterator[Document]:
    """Stream a data set: yield the text column of each row, or its conversation. A null is an empty text."""
    name, _, rest = spec.removeprefix(HUB).partition(":")
    config, _, split = rest.partition(":")
    if not name or ":" in split:
        raise UsageError(f"the data {spec} cannot be read", f"Write {HUB}NAME[:CONFIG[:SPLIT]].")
    try:
        import datasets
    except ImportError:
        raise _missing(spec, "datasets") from None
    if name.startswith((".", "/")):
        name = str((directory / name).resolve())
    row, kind = 0, ""
    try:
        for entry in datasets.load_dataset(name, config or None, split=split or "train", streaming=True):
            kind = kind or kind_of(entry, field) or TEXT
            if kind == TEXT and field not in entry:
                texts = [key for key, value in entry.items() if isinstance(value, str)]
                raise RRError(f"{spec}: no column '{field}' (it has {_listed(entry)})", _other(texts))
            row += 1
            place = f"{spec}, row {row}"
            try:
                document = (
                    _text_or_null(entry[field], field, place) if kind == TEXT else conversation(entry, kind, place)
                )
            except RRError as error:
                bad(error)
            else:
                yield document
    except RRError:
        raise
    except Exception as error:  # the library raises dozens of kinds: its own, httpx's, pyarrow's, fsspec's
        where = f"{spec}, row {row + 1}" if row else spec
        hint = "Check the name, the configuration and the split, and the connection (HF_HUB_OFFLINE forbids it)."
        raise RRError(f"cannot read {where}: {first_line(error)}", hint) from error


def _text_or_null(value: Any, field: str, place: str) -> str:
    if not isinstance(value, str | None):
        raise RRError(f"{place}: '{field}' holds {json_type(value)}, not text")
    return _encodable(value or "", place)


def _encodable(text: str, place: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RRError(f"{place}: half of a surrogate pair, which is no character", "Write the character whole.") from (
            error
        )
    return text


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


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(str, names)) or "none"


def _other(names: list[str]) -> str:
    if not names:
        return "No field holds text."
    named = f"--text-field {names[0]}" if len(names) == 1 else f"--text-field with one of {', '.join(names)}"
    return f"Name the field that holds the text: {named}."


def _missing(what: str, extra: str) -> UsageError:
    return UsageError(f"{what} needs the extra '{extra}'", f"pip install 'rrcli[{extra}]'")
