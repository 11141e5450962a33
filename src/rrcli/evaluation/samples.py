"""The file `<stage>_samples.jsonl`, in which an evaluation logs each measurement, so that it can go on after a stop.

The first line says what is being measured. Each later line is one entry of one part (a batch of windows, a problem at a
depth, a prompt). An evaluation that finds an unfinished log with its own key takes the entries as done and measures the
rest. Parts run their batches in a fixed order, so an evaluation that went on gives the same numbers as one that never
stopped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from rrcli.errors import RRError
from rrcli.files import SCHEMA, make_folder, mismatch, unwritable, write_text
from rrcli.schemas import ENTRIES, SamplesHead

END = "end"
HINT = "The file is damaged: delete it, and the evaluation starts again."


class SampleLog:
    """The entries of an evaluation by part, on disk as soon as `append` returns.

    Args:
        path: the file; None to log nothing. key: a hash of weights, tokenizer, data, tasks and settings.
        extends: the keys of evaluations that this one begins like: what a complete one of them logged is taken as done.
        known: entries that are taken as done, by part, where another process reads the file.

    Raises:
        RRError: the file cannot be read or written.
    """

    def __init__(
        self,
        path: Path | None = None,
        key: str = "",
        *,
        extends: Collection[str] = (),
        known: Mapping[str, list[dict[str, Any]]] | None = None,
    ) -> None:
        self._done = {part: list(entries) for part, entries in (known or {}).items()}
        self._file: IO[str] | None = None
        self._path = path
        if path is None:
            return
        make_folder(path.parent)
        try:
            head = _line({"schema": SCHEMA, "kind": "samples", "key": key})
            kept = _unfinished(path, key)
            if not kept and (kept := _complete(path, extends)):
                write_text(path, head + "".join(map(_line, kept)))
            for entry in kept:
                self._done.setdefault(entry["part"], []).append(entry)
            if not kept:
                if path.exists():
                    path.replace(path.with_name(path.name + ".bak"))
                path.write_text(head, encoding="utf-8")
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise unwritable(path, error) from error

    @classmethod
    def following(cls, known: Mapping[str, list[dict[str, Any]]]) -> SampleLog:
        """Return the log of a process that measures the same as the one that writes: it knows what was found there."""
        return cls(known=known)

    @property
    def known(self) -> dict[str, list[dict[str, Any]]]:
        """What an earlier, interrupted evaluation has logged, by part."""
        return self._done

    def __enter__(self) -> SampleLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    @property
    def found(self) -> int:
        """How many entries an earlier, interrupted evaluation has logged."""
        return sum(map(len, self._done.values()))

    def done(self, part: str, fits: Callable[[int, dict[str, Any]], bool]) -> list[dict[str, Any]]:
        """Return the entries of a part that an earlier, interrupted evaluation logged, in their order.

        Args:
            fits: tells whether an entry is what this evaluation would have logged at its place, counted from 0.

        Raises:
            RRError: an entry does not fit.
        """
        entries = list(self._done.get(part, ()))
        for place, entry in enumerate(entries):
            if not fits(place, entry):
                raise RRError(f"{self._path}: entry {place + 1} of its {part} does not belong to this evaluation", HINT)
        return entries

    def append(self, part: str, entries: Iterable[dict[str, Any]]) -> None:
        """Log entries of a part. They are on disk when this returns.

        Raises:
            RRError: the file cannot be written, for example because the disk is full.
        """
        lines = [_line({"part": part, **entry}) for entry in entries]
        if self._file is None or self._path is None or not lines:
            return
        try:
            self._file.write("".join(lines))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            with suppress(OSError):  # closing writes what is left, which fails too
                self._file.close()
            raise unwritable(self._path, error) from error

    def end(self) -> None:
        """Mark the evaluation as complete, so that the next one begins a new log."""
        self.append(END, [{}])


def _unfinished(path: Path, key: str) -> list[dict[str, Any]]:
    """Return the entries of an unfinished log with this key, after cutting off a last line that is incomplete."""
    entries, size = _entries(path, (key,))
    if not entries or entries[-1]["part"] == END:
        return []
    with path.open("r+b") as file:
        file.truncate(size)
    return entries


def _complete(path: Path, keys: Collection[str]) -> list[dict[str, Any]]:
    """Return the entries of a complete log with one of these keys, without its end."""
    entries, _ = _entries(path, keys)
    return entries[:-1] if entries and entries[-1]["part"] == END else []


def _entries(path: Path, keys: Collection[str]) -> tuple[list[dict[str, Any]], int]:
    """Return the entries of a log with one of these keys, and how many bytes its complete lines have."""
    whole = path.read_bytes() if keys and path.is_file() else b""
    whole = whole[: whole.rfind(b"\n") + 1]
    lines = whole.splitlines()
    if not lines:
        return [], 0
    head = _read_line(path, 1, lines[0], SamplesHead)
    if head["key"] not in keys or head["schema"] != SCHEMA:
        return [], 0
    return [_read_line(path, number, line, None) for number, line in enumerate(lines[1:], start=2)], len(whole)


def _read_line(path: Path, number: int, line: bytes, kind: Any) -> dict[str, Any]:
    """Return one line, checked against a type; that of an entry is found by its part.

    Raises:
        RRError: it is no JSON object, or has a field that the type does not allow.
    """
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RRError(f"{path}, line {number}: no JSON: {error}", HINT) from error
    if kind is None and isinstance(value, dict):
        kind = ENTRIES.get(value["part"]) if isinstance(value.get("part"), str) else None
        if kind is None:
            raise RRError(f"{path}, line {number}: its part is {value.get('part')!r}", HINT)
    if problem := mismatch(value, kind or dict[str, Any]):
        raise RRError(f"{path}, line {number}: {problem}", HINT)
    return dict(value)


def _line(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"
