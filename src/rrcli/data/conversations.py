"""Documents of training data: plain text, or a conversation of which only some parts are learned.

A row of a source is, by the fields of the file's first row,

- text: the field `--text-field`; every token is learned;
- `prompt` and `completion`: two texts, or two lists of messages; the completion is learned;
- `messages`: `[{"role": ..., "content": ...}, ...]`; the turns of the assistant are learned. `tools`, if there are any,
  go into the chat template;
- `conversations`: the same in ShareGPT's words, `[{"from": "human", "value": ...}, ...]`.

A content may be a list of parts that are texts, and null where the assistant calls tools, as in the API of OpenAI. All
rows of a file are of one kind. `rendering` turns them into tokens.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from rrcli.errors import RRError

# A text, or the row of a conversation: {"prompt", "completion"} or {"messages"}, and perhaps "tools".
Document = str | dict[str, Any]
Message = dict[str, Any]

# What a chat template may refuse: the roles of the turns in their order, and the keys of each; and whether there are
# tools.
Form = tuple[tuple[str, ...], ...]
# Conversations of more forms than these are tried when they are drawn.
MOST_FORMS = 1000

TEXT, COMPLETION, MESSAGES, SHAREGPT = "text", "completion", "messages", "conversations"
FIELDS = {COMPLETION: ("prompt", "completion"), MESSAGES: ("messages",), SHAREGPT: ("conversations",)}
TOOLS = "tools"
USER, ASSISTANT = "user", "assistant"
# Who says a message, in ShareGPT's words.
SPEAKERS = {"human": USER, "observation": "tool", "function_response": "tool"}
SPEAKERS |= dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model"), ASSISTANT)
_HINTS = {
    COMPLETION: 'Write {"prompt": "...", "completion": "..."}; conversations of several turns are "messages".',
    MESSAGES: 'Write {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}.',
    SHAREGPT: 'Write {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}.',
}


def kind_of(names: Collection[str], field: str) -> str:
    """Return the kind of a file's rows from the fields of its first row, or '' if they are of none.

    The text field takes precedence.
    """
    if field in names:
        return TEXT
    return next((kind for kind, needed in FIELDS.items() if set(needed) <= set(names)), "")


def conversation(row: dict[str, Any], kind: str, place: str) -> Document:
    """Return a row of the kind COMPLETION, MESSAGES or SHAREGPT in one form: with `role`, and `content` as a text.

    Raises:
        RRError: a field is missing, empty or of another type; names the place and the field.
    """
    try:
        found = _pair(row) if kind == COMPLETION else {"messages": _messages(row.get(kind), kind)}
        if kind != COMPLETION and not any(map(_says_something, found["messages"])):
            raise ValueError("no message of the assistant to learn from")
        if row.get(TOOLS):
            found[TOOLS] = _tools(row[TOOLS])
        json.dumps(found, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError as error:
        raise RRError(f"{place}: half of a surrogate pair, which is no character", "Write the character whole.") from (
            error
        )
    except (ValueError, TypeError) as error:
        raise RRError(f"{place}: {error}", _HINTS[kind]) from error
    return found


def noting_forms(
    documents: Iterable[tuple[Document, int]], forms: dict[Form, Document]
) -> Iterator[tuple[Document, int]]:
    """Yield (document, number), and put the first conversation of each form into `forms`, up to MOST_FORMS."""
    for document, number in documents:
        if isinstance(document, dict) and not isinstance(document.get("prompt"), str) and len(forms) < MOST_FORMS:
            turns = tuple((m["role"], *sorted(m)) for m in messages_of(document)[0])
            forms.setdefault((*turns, (TOOLS,) * (TOOLS in document)), document)
        yield document, number


def messages_of(document: dict[str, Any]) -> tuple[list[Message], int]:
    """Return the messages of a conversation, and the number of the first one that may be learned."""
    if "messages" in document:
        return document["messages"], 0
    return [*document["prompt"], *document["completion"]], len(document["prompt"])


def asked(document: Document) -> list[str]:
    """Return what a document asks, first things first: the turns of the user; of a plain text, the text itself.

    The first one decides on which side of the split a document is, unless it is too common (see `openings`). Therefore
    all answers to one question are on the same side, and a conversation that asks a problem of a task is on that
    problem's side.
    """
    if isinstance(document, str):
        return [document]
    if isinstance(document.get("prompt"), str):
        return [document["prompt"].strip()]
    messages, _ = messages_of(document)
    turns = [m["content"].strip() for m in messages if m["role"] == USER]
    return turns or [messages[0]["content"].strip()]


def identity(document: Document) -> str:
    """Return all that a document says, by which repeats are recognised."""
    return document if isinstance(document, str) else json.dumps(document, sort_keys=True)


def _pair(row: dict[str, Any]) -> dict[str, Any]:
    """Return prompt and completion, both as texts or both as messages.

    Raises:
        ValueError: says what is wrong.
    """
    found: dict[str, Any] = {name: row.get(name) for name in FIELDS[COMPLETION]}
    if all(isinstance(value, list) for value in found.values()):
        found = {name: _messages(value, name) for name, value in found.items()}
        if not any(map(_says_something, found["completion"])):
            raise ValueError("'completion' has no message of the assistant to learn from")
        return found
    for name, value in found.items():
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"no '{name}' that is text{_but(value)}")
    return found


def _messages(value: Any, name: str) -> list[Message]:
    """Return a list of messages in one form.

    Raises:
        ValueError: says what is wrong, and in which message.
    """
    if not isinstance(value, list) or not value:
        raise ValueError(f"'{name}' is not a list of messages{_but(value)}")
    of = f" of '{name}'" if name in FIELDS[COMPLETION] else ""
    return [_message(message, f"message {number}{of}") for number, message in enumerate(value, start=1)]


def _message(message: Any, place: str) -> Message:
    if not isinstance(message, dict):
        raise ValueError(f"{place} has no 'role' that is text{_but(message)}")
    # Tables store a null for a key that a message does not have.
    found = {key: value for key, value in message.items() if value is not None}
    role, content = "role", "content"
    if role not in found and "from" in found:
        role, content = "from", "value"
        speaker = found.pop("from")
        found["role"] = SPEAKERS.get(speaker, speaker) if isinstance(speaker, str) else speaker
        if content in found:
            found["content"] = found.pop(content)
    if not isinstance(found.get("role"), str):
        raise ValueError(f"{place} has no '{role}' that is text{_but(found.get('role'))}")
    calls = found.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise ValueError(f"{place}: 'tool_calls' is not a list of calls")
    if "content" not in found and calls and found["role"] == ASSISTANT:
        found["content"] = ""
    if isinstance(found.get("content"), list):
        found["content"] = "".join(_part(part, place) for part in found["content"])
    if not isinstance(found.get("content"), str):
        raise ValueError(f"{place} has no '{content}' that is text{_but(message.get(content))}")
    return found


def _part(part: Any, place: str) -> str:
    """Return one part of a content, which has to be text."""
    kind = part.get("type", "text") if isinstance(part, dict) else "text"
    text = part.get("text") if isinstance(part, dict) else part
    if kind != "text" or not isinstance(text, str):
        raise ValueError(f"{place}: a part of its 'content' is no text (its type is '{kind}')")
    return text


def _tools(value: Any) -> list[Any]:
    """Return the tools of a conversation; some files hold them as JSON in a text.

    Raises:
        ValueError: it is no list of objects.
    """
    tools = json.loads(value) if isinstance(value, str) else value
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError("'tools' is not a list of tools")
    return tools


def _says_something(message: Message) -> bool:
    return message["role"] == ASSISTANT and bool(message["content"].strip() or message.get("tool_calls"))


def _but(value: Any) -> str:
    """Say of which type a value is instead."""
    return f" (it is {json_type(value)})" if value is not None else ""


def json_type(value: Any) -> str:
    """Return the name of a value's type, in the words of JSON."""
    names = {"bool": "true or false", "int": "a number", "float": "a number", "str": "a text", "list": "a list"}
    names |= {"dict": "an object", "NoneType": "null"}
    return names.get(type(value).__name__, type(value).__name__)
