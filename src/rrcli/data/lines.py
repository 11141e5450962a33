"""Reads text line by line, as a stream. Each line comes with its place, so that an error can name it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rrcli.errors import RRError


def decoded_lines(lines: Iterable[bytes], name: str) -> Iterator[str]:
    """Yield lines decoded from UTF-8, with their line ends and without a byte order mark.

    Args:
        lines: cut at line feeds only, because JSON strings and CSV fields may hold other separators.

    Raises:
        RRError: a line is not UTF-8; names the line.
    """
    for number, line in enumerate(lines, start=1):
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise RRError(
                f"{name}, line {number}: byte {line[error.start]:#04x} is not UTF-8", "Convert it to UTF-8."
            ) from error
        yield text.removeprefix("\ufeff") if number == 1 else text


def placed(lines: Iterable[str], name: str) -> Iterator[tuple[str, str]]:
    """Yield (place, text) for each line that is not blank: 'NAME, line N', and the line without its end."""
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield f"{name}, line {number}", line.removesuffix("\n").removesuffix("\r")


def json_objects(lines: Iterable[str], name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, object) for each line that is not blank.

    Raises:
        RRError: a line is not a JSON object; names the line.
    """
    for place, text in placed(lines, name):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RRError(f"{place}: no JSON ({error})", "Each line is one JSON object.") from error
        if not isinstance(value, dict):
            raise RRError(f"{place}: no JSON object", "Each line is one JSON object.")
        yield place, value


def file_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a file, with their line ends.

    Raises:
        RRError: the file cannot be read, or is not UTF-8.
    """
    try:
        with path.open("rb") as file:
            yield from decoded_lines(file, str(path))
    except OSError as error:
        raise RRError(f"cannot read {path}: {error.strerror}") from error
