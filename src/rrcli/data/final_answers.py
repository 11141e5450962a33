"""Finds the answer in an output: what stands after `####`, between answer tags, in a box, or after "the answer is"."""

from __future__ import annotations

import re

from rrcli.data.numbers import boxed, first_number, last_number, plain, unwrapped

MARK = "####"

_PHRASE = re.compile(r"\banswer(?:\s+is\b|\s*:)\s*:?\s*", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?](?:\s|$)")


def tagged(output: str) -> str:
    """Return the text between `<answer>` tags, or the whole output, without white space around it."""
    _, begin, rest = output.partition("<answer>")
    inside, end, _ = rest.partition("</answer>")
    return (inside if begin and end else output).strip()


def final_answer(answer: str, *, is_number: bool) -> str | None:
    """Return the final answer in a longer text, or None where there is none.

    Args:
        is_number: whether a number is expected.
    """
    content = boxed(answer)
    if content is not None:
        return last_number(content) if is_number else content.strip()
    rest = after_phrase(answer)
    if rest is not None:
        if not is_number:
            return unwrapped(_SENTENCE_END.split(rest, maxsplit=1)[0])
        if any(character.isdigit() for character in plain(rest)):
            return first_number(rest)
    return last_number(answer) if is_number else None


def after_phrase(answer: str) -> str | None:
    """Return the rest of the line after the last "answer is" or "answer:"; None where there is no such phrase."""
    phrases = list(_PHRASE.finditer(answer))
    return answer[phrases[-1].end() :].partition("\n")[0] if phrases else None
