"""`<stage>_samples.jsonl`: what an evaluation measured, line by line as it goes; the record and the resume log.

The first line says what was being measured; each later line is one entry of one part (a batch of windows, a problem at
a depth, a prompt). An evaluation that finds a log of the same key, not ended, takes its entries for done and measures
the rest. Parts run their batches in a fixed order, so going on gives the numbers of never having stopped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from rrcli.errors import RRError
from rrcli.files import SCHEMA, make_folder

END = "end"


class SampleLog:
    """Entries by part, on disk as soon as `append` returns; in memory only if `path` is None.

    Args:
        path: the file. key: a hash of weights, tokenizer, data, tasks and settings.

    Raises:
        RRError: the file cannot be read or written.
    """

    def __init__(self, path: Path | None = None, key: str = "") -> None:
        self._done: dict[str, list[dict[str, Any]]] = {}
        self._file: IO[str] | None = None
        if path is None:
            return
        make_folder(path.parent)
        try:
            kept = _unfinished(path, key)
            if kept:
                for entry in kept:
                    self._done.setdefault(entry["part"], []).append(entry)
            else:
                if path.exists():
                    path.replace(path.with_name(path.name + ".bak"))
                path.write_text(_line({"schema": SCHEMA, "kind": "samples", "key": key}), encoding="utf-8")
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise RRError(f"cannot write {path}: {error.strerror}") from error

    def __enter__(self) -> SampleLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    @property
    def found(self) -> int:
        """How many entries an earlier, interrupted evaluation left."""
        return sum(map(len, self._done.values()))

    def done(self, part: str) -> list[dict[str, Any]]:
        """Return the entries of a part that an earlier, interrupted evaluation logged, in their order."""
        return list(self._done.get(part, ()))

    def append(self, part: str, entries: Iterable[dict[str, Any]]) -> None:
        """Log entries of a part; they are on disk when this returns."""
        lines = [_line({"part": part, **entry}) for entry in entries]
        if self._file is None or not lines:
            return
        self._file.write("".join(lines))
        self._file.flush()
        os.fsync(self._file.fileno())

    def end(self) -> None:
        """Say that the evaluation is complete: the next one begins anew."""
        self.append(END, [{}])


def _unfinished(path: Path, key: str) -> list[dict[str, Any]]:
    """Return the entries of a log of this key that was not ended, and cut off a last line that was torn."""
    if not path.is_file():
        return []
    whole = path.read_bytes()
    whole = whole[: whole.rfind(b"\n") + 1]
    try:
        head, *entries = [json.loads(line) for line in whole.splitlines()] or [{}]
    except ValueError:
        return []
    if head.get("key") != key or head.get("schema") != SCHEMA:
        return []
    if not entries or any("part" not in entry or entry["part"] == END for entry in entries):
        return []
    with path.open("r+b") as file:
        file.truncate(len(whole))
    return entries


def _line(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"
