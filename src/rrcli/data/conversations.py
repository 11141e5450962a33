"""Documents of training data: plain text, or a conversation of which only some parts are learned.

A row of a source is, by the fields of the file's first row,

- text: the field `--text-field`; every token is learned;
- `prompt` and `completion`: two texts; the completion is learned;
- `messages`: `[{"role": ..., "content": ...}, ...]`; the turns of the assistant are learned.

All rows of a file are of one kind. `rendering` turns them into tokens.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from rrcli.errors import RRError

# A text, or the row of a conversation: {"prompt", "completion"} or {"messages"}.
Document = str | dict[str, Any]

# What a chat template may refuse: the roles of the turns in their order, and the keys of each.
Form = tuple[tuple[str, ...], ...]
# Conversations of more forms than these are tried when they are drawn.
MOST_FORMS = 1000

TEXT, COMPLETION, MESSAGES = "text", "completion", "messages"
FIELDS = {COMPLETION: ("prompt", "completion"), MESSAGES: ("messages",)}
ASSISTANT = "assistant"
_HINTS = {
    COMPLETION: 'Write {"prompt": "...", "completion": "..."}; conversations of several turns are "messages".',
    MESSAGES: 'Write {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}.',
}


def kind_of(names: Collection[str], field: str) -> str:
    """Return the kind of a file's rows from the fields of its first row. The text field takes precedence."""
    if field in names:
        return TEXT
    return next((kind for kind, needed in FIELDS.items() if set(needed) <= set(names)), TEXT)


def conversation(row: dict[str, Any], kind: str, place: str) -> Document:
    """Return a row of the kind COMPLETION or MESSAGES with the fields of that kind only.

    Raises:
        RRError: a field is missing, empty or of another type; names the place.
    """
    found = {name: row.get(name) for name in FIELDS[kind]}
    if kind == COMPLETION:
        wrong = next((name for name, value in found.items() if not isinstance(value, str) or not value.strip()), None)
        reason = f"no '{wrong}' that is text" if wrong else ""
    else:
        reason = _fault(found["messages"])
    if reason:
        raise RRError(f"{place}: {reason}", _HINTS[kind])
    if kind == MESSAGES:
        # Tables store a null for a key that a message does not have.
        found["messages"] = [{k: v for k, v in m.items() if v is not None} for m in found["messages"] or ()]
    try:
        json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise RRError(f"{place}: half of a surrogate pair, which is no character", "Write the character whole.") from (
            error
        )
    except TypeError as error:
        raise RRError(f"{place}: {error}", _HINTS[kind]) from error
    return found


def noting_forms(documents: Iterable[Document], forms: dict[Form, Document]) -> Iterator[Document]:
    """Yield the documents, and put the first conversation of each form into `forms`, up to MOST_FORMS."""
    for document in documents:
        if isinstance(document, dict) and "messages" in document and len(forms) < MOST_FORMS:
            forms.setdefault(tuple((m["role"], *sorted(m)) for m in document["messages"]), document)
        yield document


def question_of(document: Document) -> str:
    """Return the text that decides on which side of the split a document is: a plain text itself, or what is asked.

    Therefore all answers to one question are on the same side, and a conversation that asks a problem of a task is on
    that problem's side.
    """
    if isinstance(document, str):
        return document
    if "prompt" in document:
        return str(document["prompt"]).strip()
    messages = document["messages"]
    asked = next((m for m in messages if m["role"] == "user"), messages[0])
    return str(asked["content"]).strip()


def _fault(messages: Any) -> str:
    """Return what is wrong with a list of messages, or '' if nothing is."""
    if not isinstance(messages, list) or not messages:
        return "'messages' is not a list of messages"
    for number, message in enumerate(messages, start=1):
        for name in ("role", "content"):
            if not isinstance(message, dict) or not isinstance(message.get(name), str):
                return f"message {number} has no '{name}' that is text"
    if not any(m["role"] == ASSISTANT and m["content"].strip() for m in messages):
        return "no message of the assistant to learn from"
    return ""
