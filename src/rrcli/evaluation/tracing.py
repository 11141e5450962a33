"""Turns generated tokens into pieces of text that know how they came about. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rrcli.data.tokens import BROKEN, Detokenizer


@dataclass(frozen=True)
class Piece:
    """A piece of generated text: one token, or the tokens that make up one character.

    Attributes:
        passes: passes after pass 0 that were run before its last token was committed.
        changed: whether the last of these passes put another token in place of pass 0's.
    """

    text: str
    passes: int = 0
    changed: bool = False


class PieceBuilder:
    """Turns the tokens of one generation into pieces, token by token.

    Tokens are added until they make up whole characters. End, padding and start tokens give no text. The text ends
    before the first of the `stop` strings; an end of the text that may become one is held back until that is decided.

    Args:
        prompt: the ids that were gone on with. ends: the tokens that end a text, besides the tokenizer's own.
    """

    def __init__(
        self, tokenizer: Any, stop: Sequence[str] = (), *, prompt: Sequence[int] = (), ends: Iterable[int] = ()
    ) -> None:
        self.ids: list[int] = []
        self._stop = tuple(stop)
        self._detokenizer = Detokenizer(tokenizer, ends, stop)
        self._context = self._detokenizer.context(prompt)
        self._shown = ""
        self._next = Piece("")

    def add(self, token: int, passes: int = 0, changed: bool = False) -> Piece | None:
        """Take a token and return the piece that it completes, if it completes one."""
        self.ids.append(token)
        self._next = replace(self._next, passes=passes, changed=self._next.changed or changed)
        text = self._text()
        if text.endswith(BROKEN):  # the rest of this character is still to come
            return None
        return self._piece(text, len(text) - self._undecided(text))

    def finish(self) -> Piece | None:
        """Return what is still held back: no token follows."""
        text = self._text()
        return self._piece(text, len(text))

    def _text(self) -> str:
        return self._detokenizer.text(self.ids, self._context)

    def _undecided(self, text: str) -> int:
        """Return how many characters at the end of a text may be the beginning of a stop string."""
        lengths = (n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n]))
        return max(lengths, default=0)

    def _piece(self, text: str, end: int) -> Piece | None:
        """Return what is new in the first `end` characters of a text, or in what precedes a stop string."""
        text = text[: min((place for stop in self._stop if (place := text.find(stop)) >= 0), default=end)]
        if len(text) <= len(self._shown):
            return None
        piece = replace(self._next, text=text[len(self._shown) :])
        self._shown, self._next = text, Piece("")
        return piece


def pieces(
    tokenizer: Any,
    tokens: Iterable[tuple[int, int, bool]],
    *,
    stop: Sequence[str] = (),
    prompt: Sequence[int] = (),
    ends: Iterable[int] = (),
) -> list[Piece]:
    """Return the pieces of a whole generation.

    Args:
        tokens: id, passes after pass 0, and whether these changed it, of each token.
        stop, prompt, ends: see `PieceBuilder`.
    """
    builder = PieceBuilder(tokenizer, stop, prompt=prompt, ends=ends)
    found = [builder.add(*token) for token in tokens]
    return [piece for piece in (*found, builder.finish()) if piece is not None]
