"""Reads text sources: from what `--data` names to a stream of documents, each of them once.

A source is one of

- `default`: the embedded stories;
- a `.txt` file, whose documents are separated by blank lines;
- a `.jsonl`, `.csv` (with a header) or `.parquet` file, with the text in the field or column `--text-field`, or with
  conversations (see `conversations`) where it has no such field;
- a folder of such files;
- `hf://NAME[:CONFIG[:SPLIT]]`: a data set of the hub (NAME is owner/name, or a local folder that begins with `/` or
  `.`), streamed by the extra `datasets`; the split is `train` unless named;
- `-`: standard input, read once; JSON lines if its first line is a JSON object, else text.

Files are read piece by piece, so they may be larger than memory. Broken data are never skipped: they are an error that
names the file and the line or row. Repeated and empty documents are left out and counted.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rrcli.data import readers
from rrcli.data.conversations import Document
from rrcli.data.lines import decoded_lines, file_lines
from rrcli.demo import defaults
from rrcli.errors import RRError, UsageError
from rrcli.files import combine

SUFFIXES = (".txt", ".jsonl", ".csv", ".parquet")
STDIN = "-"
TEXT_FIELD = "text"


@dataclass
class Dropped:
    """What was left out of a source while it was read."""

    empty: int = 0
    repeated: int = 0

    def notice(self, spec: str) -> str:
        """Return a sentence that says what was left out, or '' if nothing was."""
        counts = [f"{count:,} {name}" for name, count in vars(self).items() if count]
        name = "standard input" if spec == STDIN else spec
        return f"{name}: {' and '.join(counts)} documents were left out" if counts else ""


def read_documents(
    spec: str, directory: Path, text_field: str = TEXT_FIELD, dropped: Dropped | None = None
) -> Iterator[Document]:
    """Yield every document of a source once, in order; texts come without surrounding white space.

    Repeats are recognised by hashes, which take about 100 bytes of memory for each document while the source is read.

    Args:
        directory: where relative paths start. dropped: counts what is left out.

    Raises:
        UsageError: the source does not exist, is of an unknown kind, or needs an extra that is not installed.
        RRError: it is empty, or a part of it cannot be read; names the file and the line or row.
    """
    dropped = dropped if dropped is not None else Dropped()
    seen: set[bytes] = set()
    for document in _documents(spec, directory, text_field):
        document = document.strip() if isinstance(document, str) else document
        identity = document if isinstance(document, str) else json.dumps(document, sort_keys=True)
        digest = hashlib.blake2b(identity.encode(), digest_size=16).digest()
        if document and digest not in seen:
            seen.add(digest)
            yield document
        elif document:
            dropped.repeated += 1
        else:
            dropped.empty += 1
    if not seen:
        raise RRError(f"the data {spec} is empty", "It needs at least one document.")


def fingerprint(spec: str, directory: Path, text_field: str = TEXT_FIELD) -> str:
    """Return a hash of the bytes of a source's files or of standard input; of a data set of the hub, of its name."""
    if spec.startswith(readers.HUB):
        return combine(spec, text_field)
    if spec == STDIN:
        return combine(hashlib.sha256(_stdin()).hexdigest(), text_field)
    stats = [(file, file.stat()) for file in source_files(spec, directory)]
    fields = [text_field] if any(file.suffix != ".txt" for file, _ in stats) else []
    return combine([_sha256(file, stat.st_size, stat.st_mtime_ns) for file, stat in stats], *fields)


def refuse_stdin(spec: str, command: str) -> None:
    """Raise an error if a source is standard input; for commands that read it in more than one process.

    Raises:
        UsageError: the source is standard input.
    """
    if spec == STDIN:
        raise UsageError(
            f"--data - is standard input, which 'rr {command}' cannot read again for every stage",
            "Write it to a file first: --data text.jsonl.",
        )


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
    known = (
        f"{', '.join(SUFFIXES)} files, a folder of them, {readers.HUB}NAME[:CONFIG[:SPLIT]] for the hub, - for stdin"
    )
    if not path.exists():
        raise UsageError(f"the data {path} does not exist", f"Known: {known}.")
    if path.suffix not in SUFFIXES:
        raise UsageError(f"the data {path} is of an unknown kind", f"Known: {known}.")
    return [path]


def _documents(spec: str, directory: Path, field: str) -> Iterator[Document]:
    if spec.startswith(readers.HUB):
        yield from readers.hub_rows(spec, directory, field)
    elif spec == STDIN:
        name, lines = "standard input", functools.partial(io.BytesIO, _stdin())
        first = next((line for line in lines() if line.strip()), b"")
        read = readers.json_lines if readers.is_json_object(first) else readers.paragraphs
        yield from read(decoded_lines(lines(), name), name, field)
    else:
        for path in source_files(spec, directory):
            yield from _file(path, field)


def _file(path: Path, field: str) -> Iterator[Document]:
    if path.suffix == ".parquet":
        yield from readers.parquet_rows(path, field)
        return
    read = {".jsonl": readers.json_lines, ".csv": readers.csv_rows}.get(path.suffix, readers.paragraphs)
    yield from read(file_lines(path), str(path), field)


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
