"""Readers: turn the rows of a file, or of a data set of the hub, into documents (see `conversations`), piece by piece.

A row that is no document is an error that names its place. The error is given to `bad`, which raises it, or counts it
so that the next row is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from rrcli.data.conversations import FIELDS, MESSAGES, SHAREGPT, TEXT, TOOLS, Document, conversation, json_type, kind_of
from rrcli.data.lines import OnBadRow, refuse
from rrcli.data.rows import Rows, listed
from rrcli.errors import RRError


def paragraphs(lines: Iterable[str]) -> Iterator[str]:
    """Yield the texts between blank lines."""
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


def documents(rows: Rows, field: str, bad: OnBadRow = refuse) -> Iterator[Document]:
    """Yield the text field of each row, or the conversation in it; the columns, or else the first row, decide which.

    In a table a null is an empty text.

    Raises:
        RRError: a table has neither.
    """
    table = rows.fields is not None
    kind = _kind_of_table(rows, field) if table else ""
    columns = [*FIELDS.get(kind, (field,)), *[TOOLS] * (kind != TEXT and TOOLS in (rows.fields or ()))]
    for place, row in rows.read(columns if table else None, bad):
        kind = kind or kind_of(row, field)
        try:
            if kind in ("", TEXT):
                document: Document = _text_or_null(row[field], field, place) if table else _text(row, field, place)
            else:
                document = conversation(_without_nulls(row) if table else row, kind, place)
        except RRError as error:
            bad(error)
        else:
            yield document


def _kind_of_table(rows: Rows, field: str) -> str:
    """Return the kind of a table's rows.

    Raises:
        RRError: it has neither the text field nor conversations.
    """
    kind = kind_of(rows.fields or (), field) or TEXT
    if kind in (MESSAGES, SHAREGPT) and rows.flat:
        raise RRError(f"{rows.name}: a table has no messages", "Write them to a .jsonl or .parquet file.")
    if kind == TEXT:
        rows.require(field, _other(rows.texts))
        if field in rows.types:
            raise RRError(f"{rows.name}: column '{field}' holds {rows.types[field]}, not text", _other(rows.texts))
    return kind


def _without_nulls(value: Any) -> Any:
    """Return a value of a table without the keys that hold nothing.

    In a column of objects every object has the keys of all of them; a chat template would write those of other rows.
    """
    if isinstance(value, dict):
        return {key: _without_nulls(entry) for key, entry in value.items() if entry is not None}
    return [_without_nulls(entry) for entry in value] if isinstance(value, list) else value


def _text(row: dict[str, Any], field: str, place: str) -> str:
    """Return the text of an object.

    Raises:
        RRError: there is none; names the place and the field.
    """
    if field not in row:
        texts = [key for key, entry in row.items() if isinstance(entry, str)]
        raise RRError(f"{place}: no object with a '{field}' (it has {listed(row)})", _other(texts))
    if not isinstance(row[field], str):
        kind = json_type(row[field])
        raise RRError(f"{place}: no object with a '{field}' that is text (it is {kind})", "Texts stand in quotes.")
    return _encodable(row[field], place)


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


def _other(names: list[str]) -> str:
    if not names:
        return "No field holds text."
    named = f"--text-field {names[0]}" if len(names) == 1 else f"--text-field with one of {', '.join(names)}"
    return f"Name the field that holds the text: {named}."
