"""Turns problems and documents into the token ids that a model is shown, and marks which of them it learns.

Evaluation and training ask a question with the same function. It uses the tokenizer's chat template if there is one,
unless that is turned off, and otherwise plain text:

    Question: ...
    Answer: ...

Each learned part is tokenised separately from its prompt, because a model that answers sees the prompt tokenised alone.
`tokens` says what that means for each kind of tokenizer, and where texts begin and end.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from rrcli.data.conversations import ASSISTANT, TOOLS, Document, messages_of
from rrcli.data.tasks import Problem, prompt_of
from rrcli.data.tokens import closed, encode_prompt, piece_ids, start_token, text_ids
from rrcli.errors import RRError
from rrcli.settings import EvalSettings, TrainSettings

# Token ids, and for each whether a model learns to predict it.
Example = tuple[list[int], list[bool]]
# A part of a conversation's text, and whether it is learned; and the same as ids.
Segment = tuple[str, bool]
Part = tuple[list[int], bool]
Messages = Sequence[dict[str, Any]]


def chats(tokenizer: Any, settings: EvalSettings | TrainSettings) -> bool:
    """Tell whether questions and conversations go through a chat template.

    Raises:
        RRError: the tokenizer has several templates, and none of them is the default.
    """
    template = settings.chat_template and getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict) and "default" not in template:
        raise RRError(
            f"the tokenizer has several chat templates ({', '.join(sorted(template))}), and none is named 'default'",
            "Name one of them 'default' in its files, or leave templates out with --no-chat-template.",
        )
    return bool(template)


# -- problems ----------------------------------------------------------------------------------------------------------


def question_text(
    tokenizer: Any, question: str, examples: Sequence[Problem], settings: EvalSettings | TrainSettings
) -> str:
    """Return the prompt of a question, preceded by solved examples: as turns of the chat template, or as plain text."""
    if not chats(tokenizer, settings):
        solved = "".join(f"{prompt_of(example.question)} {example.target}\n\n" for example in examples)
        return solved + prompt_of(question)
    turns = []
    for example in examples:
        turns += [_user(example.question), _assistant(example.target)]
    return _through_template(tokenizer, [*turns, _user(question)], answer=True)


def encode_question(tokenizer: Any, text: str, settings: EvalSettings | TrainSettings) -> list[int]:
    """Return the ids of what `question_text` returned."""
    # A chat template writes the start token itself.
    return text_ids(tokenizer, text) if chats(tokenizer, settings) else encode_prompt(tokenizer, text)


def solved_problem(tokenizer: Any, problem: Problem, settings: TrainSettings) -> Example:
    """Return a problem as evaluation asks it, followed by its answer and the end token, which are learned."""
    text = question_text(tokenizer, problem.question, (), settings)
    answer = " " + problem.target
    if chats(tokenizer, settings):
        whole = _through_template(tokenizer, [_user(problem.question), _assistant(problem.target)])
        answer = whole.removeprefix(text) if whole.startswith(text) else problem.target
    prompt = encode_question(tokenizer, text, settings)
    ids = piece_ids(tokenizer, text, answer)
    return _joined(prompt, [(closed(tokenizer, ids) if _is_open(answer, problem.target) else ids, True)])


# -- documents ---------------------------------------------------------------------------------------------------------


def example_of(tokenizer: Any, document: Document, settings: TrainSettings) -> Example:
    """Return the ids of a document and which of them are learned; `conversations` says which parts that are.

    Raises:
        RRError: the chat template cannot render it, or the turns of the assistant cannot be located in the result.
    """
    if isinstance(document, str):
        return _joined(_start(tokenizer), [(closed(tokenizer, text_ids(tokenizer, document)), True)])
    if isinstance(document.get("prompt"), str):
        completion = closed(tokenizer, piece_ids(tokenizer, document["prompt"], document["completion"]))
        return _joined(encode_prompt(tokenizer, document["prompt"]), [(completion, True)])
    messages, first = messages_of(document)
    tools = document.get(TOOLS)
    if not chats(tokenizer, settings):
        return _joined(_start(tokenizer), _parts(tokenizer, _plain(messages, tools, first), closing=True))
    if "{% generation" in tokenizer.get_chat_template().replace("{%-", "{%"):
        return _marked(tokenizer, messages, tools, first)
    segments = _turns(tokenizer, messages, tools, first)
    last = next(m["content"] for m in reversed(messages) if m["role"] == ASSISTANT)
    parts = _parts(tokenizer, segments, closing=False)
    # A turn that only calls tools has no words after which an end could be missing.
    if last.strip() and _is_open(segments[-1][0], last):
        parts[-1] = (closed(tokenizer, parts[-1][0]), True)
    return _joined([], parts)


def text_of(tokenizer: Any, document: Document, settings: EvalSettings | TrainSettings) -> str:
    """Return the text of a document that perplexity is measured on, without the start token, which scoring adds."""
    if isinstance(document, str):
        return document
    if isinstance(document.get("prompt"), str):
        return str(document["prompt"] + document["completion"])
    messages, _ = messages_of(document)
    if not chats(tokenizer, settings):
        return "".join(text for text, _ in _plain(messages, document.get(TOOLS)))
    return _through_template(tokenizer, messages, tools=document.get(TOOLS)).removeprefix(tokenizer.bos_token or "")


def _plain(messages: Messages, tools: Any = None, first: int = 0) -> list[Segment]:
    """Return a conversation as plain text, with a blank line between turns; system messages stay as they are.

    Args:
        first: the number of the first message that may be learned.

    Raises:
        RRError: plain text has no form for a role, or for tools.
    """
    if tools or any(message.get("tool_calls") for message in messages):
        raise RRError(
            f"the conversation '{_begin(messages)}' uses tools and there is no template",
            "Train a model whose tokenizer has one, or leave such conversations out with --on-bad-row skip.",
        )
    segments, text = [], ""
    for number, message in enumerate(messages):
        content = message["content"].strip()
        if message["role"] == ASSISTANT:
            segments += [(f"{text}Answer:", False), (f" {content}", number >= first)]
            text = "\n\n"
        elif message["role"] in ("user", "system", "developer"):
            text += prompt_of(content).removesuffix("Answer:") if message["role"] == "user" else f"{content}\n\n"
        else:
            raise RRError(
                f"the conversation '{_begin(messages)}' has a role '{message['role']}' and there is no template",
                "Train a model whose tokenizer has one, or leave such conversations out with --on-bad-row skip.",
            )
    return segments


def _turns(tokenizer: Any, messages: Messages, tools: Any, first: int) -> list[Segment]:
    """Return a conversation through the chat template, cut where turns of the assistant begin and end.

    A turn is what the template writes after the prompt for an answer, including the mark of its end. What follows the
    last turn of the assistant is left out: nothing is learned there.

    Args:
        first: the number of the first message that may be learned.

    Raises:
        RRError: the template writes a turn in another way when others follow it, so that it cannot be located.
    """
    segments, done = [], 0
    whole = _through_template(tokenizer, messages, tools=tools)
    for number, message in enumerate(messages):
        if message["role"] != ASSISTANT or number < first:
            continue
        begin = _through_template(tokenizer, messages[:number], answer=True, tools=tools) if number else ""
        end = _through_template(tokenizer, messages[: number + 1], tools=tools)
        content = message["content"].strip()
        if content and not whole.startswith(end):
            # Some templates begin the last turn with an empty thought, and leave it out when other turns follow.
            end = begin + content + end.rpartition(content)[2]
        if not (whole.startswith(end) and end.startswith(begin)):
            raise RRError(
                f"the chat template writes turn {number + 1} of '{_begin(messages)}' in another way when others follow",
                "Give it {% generation %} marks around what the assistant says, or cut conversations to one answer.",
            )
        segments += [(whole[done : len(begin)], False), (whole[len(begin) : len(end)], True)]
        done = len(end)
    return segments


def _marked(tokenizer: Any, messages: Messages, tools: Any, first: int) -> Example:
    """Return a conversation through a template that marks what the assistant says; see `_turns`."""
    try:
        found = tokenizer.apply_chat_template(
            list(messages), tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
    except Exception as error:
        raise _refused(tokenizer, messages, error) from error
    prompt = _through_template(tokenizer, messages[:first], answer=True, tools=tools) if first else ""
    given = len(text_ids(tokenizer, prompt))
    return list(found["input_ids"]), [bool(own) and n >= given for n, own in enumerate(found["assistant_masks"])]


def _through_template(tokenizer: Any, messages: Messages, *, answer: bool = False, tools: Any = None) -> str:
    options = {"add_generation_prompt": answer, "tokenize": False, **({"tools": tools} if tools else {})}
    try:
        return str(tokenizer.apply_chat_template(list(messages), **options))
    except Exception as error:  # templates may raise anything: jinja's errors, TypeErrors, their own
        raise _refused(tokenizer, messages, error) from error


def _refused(tokenizer: Any, messages: Messages, error: Exception) -> RRError:
    message = f"the chat template refuses the conversation '{_begin(messages)}': {error}"
    hint = "Correct it, leave it out with --on-bad-row skip, or the template with --no-chat-template."
    if messages[0]["role"] in ("system", "developer") and len(messages) > 1:
        with suppress(Exception):  # whatever this template raises
            tokenizer.apply_chat_template(list(messages[1:]), tokenize=False)
            hint = "It has no system role: put those words before the user's first ones. " + hint
    return RRError(message, hint)


def _begin(messages: Messages) -> str:
    text = " ".join(messages[0]["content"].split())
    return text if len(text) <= 60 else f"{text[:60]}..."


# -- tokens ------------------------------------------------------------------------------------------------------------


def _joined(prompt: list[int], parts: Sequence[Part]) -> Example:
    ids, learned = list(prompt), [False] * len(prompt)
    for part, own in parts:
        ids += part
        learned += [own] * len(part)
    return ids, learned


def _parts(tokenizer: Any, segments: Sequence[Segment], *, closing: bool) -> list[Part]:
    """Return the ids of each segment of a text as they are after the segments before it.

    Args:
        closing: each learned segment is closed by the end token.
    """
    parts, before = [], ""
    for text, own in segments:
        ids = piece_ids(tokenizer, before, text)
        closes = closing and own
        parts.append((closed(tokenizer, ids) if closes else ids, own))
        before = text + (tokenizer.eos_token or "" if closes else "") or before
    return parts


def _start(tokenizer: Any) -> list[int]:
    token = start_token(tokenizer)
    return [] if token is None else [token]


def _is_open(text: str, answer: str) -> bool:
    """Tell whether a text still has to be closed: no chat template has put its own end mark after the answer."""
    return text.rstrip().endswith(answer.strip())


def _user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def _assistant(content: str) -> dict[str, str]:
    return {"role": ASSISTANT, "content": content}
