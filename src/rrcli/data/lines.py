"""Reads text line by line, as a stream. Each line comes with its place, so that an error can name it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from rrcli.errors import RRError

# What is done with an error in a line or row: it is raised, or the row is left out and counted.
OnBadRow = Callable[[RRError], None]


def refuse(error: RRError) -> None:
    """Raise the error of a bad row."""
    raise error


def decoded_lines(lines: Iterable[bytes], name: str, bad: OnBadRow = refuse) -> Iterator[str]:
    """Yield lines decoded from UTF-8, with their line ends and without a byte order mark.

    Args:
        lines: cut at line feeds only, because JSON strings and CSV fields may hold other separators.
        bad: gets the error of a line that is not UTF-8; a blank line is yielded in its place.

    Raises:
        RRError: a line is not UTF-8; names the line.
    """
    for number, line in enumerate(lines, start=1):
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            where = f"{name}, line {number}"
            bad(RRError(f"{where}: byte {line[error.start]:#04x} is not UTF-8", "Convert it to UTF-8."))
            text = "\n"
        yield text.removeprefix("\ufeff") if number == 1 else text


def placed(lines: Iterable[str], name: str) -> Iterator[tuple[str, str]]:
    """Yield (place, text) for each line that is not blank: 'NAME, line N', and the line without its end."""
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield f"{name}, line {number}", line.removesuffix("\n").removesuffix("\r")


def json_objects(lines: Iterable[str], name: str, bad: OnBadRow = refuse) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, object) for each line that is not blank.

    Args:
        bad: gets the error of a line that is no JSON object.

    Raises:
        RRError: a line is not a JSON object; names the line.
    """
    for place, text in placed(lines, name):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            bad(RRError(f"{place}: no JSON ({error})", "Each line is one JSON object."))
            continue
        if isinstance(value, dict):
            yield place, value
        else:
            bad(RRError(f"{place}: no JSON object", "Each line is one JSON object."))


def file_lines(path: Path, bad: OnBadRow = refuse) -> Iterator[str]:
    """Yield the lines of a file, with their line ends; see `decoded_lines`.

    Raises:
        RRError: the file cannot be read, or is not UTF-8.
    """
    try:
        with path.open("rb") as file:
            yield from decoded_lines(file, str(path), bad)
    except OSError as error:
        raise RRError(f"cannot read {path}: {error.strerror}") from error
