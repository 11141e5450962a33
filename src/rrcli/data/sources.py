"""Reads text sources: from what `--data` names to a stream of documents, each of them once.

A source is one of

- `default`: the embedded stories;
- a `.txt` file, whose documents are separated by blank lines;
- a `.jsonl`, `.csv` (with a header) or `.parquet` file, with the text in the field or column `--text-field`, or with
  conversations (see `conversations`) where it has no such field;
- a folder of such files;
- `hf://NAME[@REVISION][:CONFIG[:SPLIT]]`: a data set of the hub (see `hub`), streamed by the extra `datasets`; the
  split is `train` unless named;
- `-`: standard input, read once; JSON lines if its first line is a JSON object, else text.

Files are read piece by piece, so they may be larger than memory. A row that cannot be read is an error that names the
file and the line or row; if that is asked for, it is left out and counted. Repeated and empty documents are left out
and counted.
"""

from __future__ import annotations

import functools
import hashlib
import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rrcli.data.conversations import Document, identity
from rrcli.data.hub import FORM, HUB, hub_name
from rrcli.data.lines import OnBadRow, decoded_lines, file_lines, refuse
from rrcli.data.openings import decided
from rrcli.data.readers import documents, paragraphs
from rrcli.data.rows import TABLES, file_rows, hub_rows, is_json_object, json_rows
from rrcli.data.splits import Side, side_of
from rrcli.demo import defaults
from rrcli.errors import RRError, UsageError
from rrcli.files import combine

SUFFIXES = (".txt", *TABLES)
STDIN = "-"
TEXT_FIELD = "text"


@dataclass
class Notes:
    """What there is to say about a source after it was read.

    Attributes:
        empty, repeated: documents that were left out. bad: rows that could not be read and were left out.
        first_bad: what was wrong with the first of these.
        common: sentences about what many rows have in common; see `openings`.
    """

    empty: int = 0
    repeated: int = 0
    bad: int = 0
    first_bad: str = ""
    common: list[str] = field(default_factory=list)

    def leave_out(self, error: RRError) -> None:
        """Count a row that could not be read."""
        self.bad += 1
        self.first_bad = self.first_bad or error.message

    def notice(self, spec: str) -> str:
        """Return sentences that say what was left out and what is common, or '' if there is nothing to say."""
        counts = [f"{count:,} {name}" for name, count in (("empty", self.empty), ("repeated", self.repeated)) if count]
        name = "standard input" if spec == STDIN else spec
        said = [f"{name}: {' and '.join(counts)} documents were left out"] if counts else []
        if self.bad:
            rows = "1 row that cannot be read was" if self.bad == 1 else f"{self.bad:,} rows that cannot be read were"
            said.append(f"{name}: {rows} left out (the first: {self.first_bad})")
        return "\n".join([*said, *self.common])


def read_documents(
    spec: str, directory: Path, text_field: str = TEXT_FIELD, notes: Notes | None = None, *, on_bad_row: str = "error"
) -> Iterator[Document]:
    """Yield every document of a source once, in order; see `read_split`."""
    for document, _ in read_split(spec, directory, text_field, notes, on_bad_row=on_bad_row):
        yield document


def read_split(
    spec: str, directory: Path, text_field: str = TEXT_FIELD, notes: Notes | None = None, *, on_bad_row: str = "error"
) -> Iterator[tuple[Document, Side]]:
    """Yield every document of a source once, in order, with the side of the split that it is on; see `read_decided`."""
    for document, deciding in read_decided(spec, directory, text_field, notes, on_bad_row=on_bad_row):
        yield document, side_of(deciding)


def read_decided(
    spec: str,
    directory: Path,
    text_field: str = TEXT_FIELD,
    notes: Notes | None = None,
    *,
    on_bad_row: str = "error",
    seen: set[bytes] | None = None,
) -> Iterator[tuple[Document, str]]:
    """Yield every document of a source once, in order, with the text that decides on which side of the split it is.

    Texts come without surrounding white space. Repeats are recognised by hashes, which take about 100 bytes of memory
    for each document while the source is read.

    Args:
        directory: where relative paths start. notes: counts what is left out.
        on_bad_row: 'error', or 'skip' to leave out rows that cannot be read.
        seen: the hashes of documents of other sources, which are repeats here; gets those of this one.

    Raises:
        UsageError: the source does not exist, is of an unknown kind, or needs an extra that is not installed.
        RRError: it is empty, or a part of it cannot be read; names the file and the line or row.
    """
    notes = notes if notes is not None else Notes()
    seen = seen if seen is not None else set()
    empty = True
    bad = notes.leave_out if on_bad_row == "skip" else refuse
    for name, found in _files(spec, directory, text_field, bad):
        stripped = (d.strip() if isinstance(d, str) else d for d in found)
        for document, deciding in decided(stripped, directory, name, notes.common):
            digest = hashlib.blake2b(identity(document).encode(), digest_size=16).digest()
            if document and digest not in seen:
                seen.add(digest)
                empty = False
                yield document, deciding
            elif document:
                empty = False
                notes.repeated += 1
            else:
                notes.empty += 1
    if empty and notes.bad:
        raise RRError(f"no row of the data {spec} can be read (the first: {notes.first_bad})", "Correct the data.")
    if empty:
        raise RRError(f"the data {spec} is empty", "It needs at least one document.")


def fingerprint(spec: str, directory: Path, text_field: str = TEXT_FIELD) -> str:
    """Return a hash of the bytes of a source's files or of standard input; of a data set of the hub, of its name."""
    if spec.startswith(HUB):
        return combine(spec, text_field)
    if spec == STDIN:
        return combine(hashlib.sha256(_stdin()).hexdigest(), text_field)
    stats = [(file, file.stat()) for file in source_files(spec, directory)]
    fields = [text_field] if any(file.suffix != ".txt" for file, _ in stats) else []
    return combine([_sha256(file, stat.st_size, stat.st_mtime_ns) for file, stat in stats], *fields)


def source_files(spec: str, directory: Path) -> list[Path]:
    """Return the files that a text source consists of, in the order in which they are read.

    Raises:
        UsageError: it does not exist, or holds no readable kind of file.
    """
    if spec == "default":
        return [defaults.TEXT_FILE]
    path = (directory / spec).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
        if not files:
            raise UsageError(f"the folder {path} holds no {' or '.join(SUFFIXES)} file")
        return files
    known = f"{', '.join(SUFFIXES)} files, a folder of them, {FORM} for the hub, - for stdin"
    if not path.exists():
        raise UsageError(f"the data {path} does not exist", f"Known: {known}.")
    if path.suffix not in SUFFIXES:
        raise UsageError(f"the data {path} is of an unknown kind", f"Known: {known}.")
    return [path]


def _files(spec: str, directory: Path, field: str, bad: OnBadRow) -> Iterator[tuple[str, Iterator[Document]]]:
    """Yield the name and the documents of each file of a source."""
    if spec.startswith(HUB):
        yield spec, documents(hub_rows(hub_name(spec), directory, streaming=True), field, bad)
    elif spec == STDIN:
        name, lines = "standard input", functools.partial(io.BytesIO, _stdin())
        first = next((line for line in lines() if line.strip()), b"")
        if is_json_object(first):
            yield name, documents(json_rows(lambda bad: decoded_lines(lines(), name, bad), name), field, bad)
        else:
            yield name, paragraphs(decoded_lines(lines(), name))
    else:
        for path in source_files(spec, directory):
            read = paragraphs(file_lines(path)) if path.suffix == ".txt" else documents(file_rows(path), field, bad)
            yield path.name, read


@functools.cache
def _stdin() -> bytes:
    """Return standard input, which can be read only once."""
    if sys.stdin.isatty():
        raise UsageError("--data - reads standard input, which is a terminal", "Pipe text into it, or name a file.")
    return sys.stdin.buffer.read()


@functools.lru_cache
def _sha256(file: Path, size: int, changed: int) -> str:
    """Return the SHA-256 of a file, which is read again only if its size or its time of change differs."""
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise RRError(f"cannot read {file}: {error.strerror}") from error
