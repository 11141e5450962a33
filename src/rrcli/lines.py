"""Files that are read line by line: each line comes with its place, so that an error can name it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rrcli.errors import RRError


def text_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (place, text) for each line that is not blank; the place is 'FILE, line N'.

    Raises:
        RRError: it cannot be read, or is not UTF-8; names the line.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise RRError(f"cannot read {path}: {error.strerror}") from error
    # Not splitlines: it also cuts at separators that JSON strings may hold.
    for line, content in enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        place = f"{path}, line {line}"
        try:
            text = content.decode("utf-8").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise RRError(f"{place}: byte {content[error.start]:#04x} is not UTF-8", "Convert it to UTF-8.") from error
        if text.strip():
            yield place, text


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, object) for each line that is not blank.

    Raises:
        RRError: it cannot be read, is not UTF-8, or a line is no JSON object; names the line.
    """
    for place, text in text_lines(path):
        try:
            value = json.loads(text)
        except ValueError as error:
            raise RRError(f"{place}: no JSON ({error})", "Each line is one JSON object.") from error
        if not isinstance(value, dict):
            raise RRError(f"{place}: no JSON object", "Each line is one JSON object.")
        yield place, value
