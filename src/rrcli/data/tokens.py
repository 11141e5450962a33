"""Where texts begin and end as token ids, and which text generated ids stand for: the same rules for every command.

- A *prompt* begins with what the tokenizer itself puts before a text, and is never closed, even by a tokenizer that
  puts an end token or [SEP] after every text: a model that has read the end of a text does not go on with it.
- A *document* that is learned begins with the start token and is closed once, by the end token.
- A document that is *scored* follows the start token: BOS, else EOS (as in lm-eval), else what the tokenizer itself
  puts before a text. Where there is none of these, nothing predicts a document's first token: it is read, not scored.
- A *piece* that follows other text has the ids that it has there. Tokenizers in the form of Llama 2's put a space
  before every text that they are given, which a piece must not have.
- A text *ends* at every token that the tokenizer, the generation config or the config names as its end.
- The *text* of a continuation is what it adds to its prompt. Special tokens are part of it, such as `</think>` or
  `<|im_end|>`; the end, padding and start tokens alone are not.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, MutableMapping, Sequence
from itertools import chain, islice
from typing import Any
from weakref import WeakKeyDictionary

from rrcli.errors import RRError, first_line

# What a tokenizer is asked about, to see what it puts around texts, and texts that end in a token of their own.
PROBE, BEFORE_PROBE = "a", ("\n", "1")
OWN_WORDS = 20
# The tokens of a prompt that are looked at for how the text after them begins: the fewest of these that are enough. A
# character has at most four bytes, which may be tokens: one of four lengths begins with a whole character.
CONTEXT_LENGTHS = (8, 9, 10, 11, 32, 64)
# A tokenizer's own names of the tokens that begin, end or pad a text.
SILENT = ("bos_token", "eos_token", "pad_token", "cls_token", "sep_token")
# The character that stands for bytes which are not (yet) a character.
BROKEN = "\ufffd"
# What `_marks_beginnings` found of a tokenizer.
_MARKS_BEGINNINGS: MutableMapping[Any, bool] = WeakKeyDictionary()

# -- ids of texts ------------------------------------------------------------------------------------------------------


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of a text, with nothing around it.

    Raises:
        RRError: the tokenizer fails on it, as some do on words that they do not know.
    """
    try:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    except Exception as error:
        raise RRError(
            f"the tokenizer fails on the text {text[:40]!r}: {first_line(error)}",
            "Does it belong to this text? A tokenizer without an unknown token needs texts of words that it knows.",
        ) from error


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Return the ids of a prompt, with what the tokenizer puts before it (once) and without what it puts after it."""
    before, ids = _around(tokenizer)[0], text_ids(tokenizer, prompt)
    return ids if ids[: len(before)] == before else before + ids


def piece_ids(tokenizer: Any, before: str, piece: str) -> list[int]:
    """Return the ids of a text that follows the text `before`, which has ids of its own.

    For most tokenizers these are the ids of the text alone. A tokenizer that puts a space before every text gets both
    texts, and the ids of the first are left out. Where a token would reach across the border, the ids are those that
    the piece has after a text that it does not merge with.
    """
    alone = text_ids(tokenizer, piece)
    if not before or not piece or not _marks_beginnings(tokenizer):
        return alone
    found = (_after(tokenizer, text, piece) for text in (before, *BEFORE_PROBE))
    return next((ids for ids in found if ids is not None), alone)


def closed(tokenizer: Any, ids: list[int]) -> list[int]:
    """Return the ids of a document with the end token after them, which they may have already."""
    end = end_token(tokenizer)
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def closes_prompts(tokenizer: Any) -> bool:
    """Tell whether the tokenizer itself closes every text, prompts too, where nobody prevents it."""
    return bool(_around(tokenizer)[1])


def start_token(tokenizer: Any) -> int | None:
    """Return the token that texts are scored and learned after; None if the tokenizer has none (see above)."""
    named = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    found = next((token for token in named if token is not None), None)
    return next(reversed(_around(tokenizer)[0]), None) if found is None else int(found)


def end_token(tokenizer: Any) -> int | None:
    """Return the token that closes a document: EOS, else what the tokenizer itself puts after a text, else None."""
    found = tokenizer.eos_token_id
    return next(iter(_around(tokenizer)[1]), None) if found is None else int(found)


def scored_after(tokenizer: Any, ids: list[int]) -> tuple[list[int], list[int]]:
    """Return what a document's tokens are scored after, one token, and those of its tokens that are scored."""
    start = start_token(tokenizer)
    return ([start], ids) if start is not None else (ids[:1], ids[1:])


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return what the tokenizer itself puts before and after a text."""
    for text in chain((PROBE,), _own_words(tokenizer)):
        try:
            bare, whole = text_ids(tokenizer, text), list(tokenizer(text)["input_ids"])
        except Exception:  # some tokenizers fail on words that they have no id for: the next text is tried
            continue
        places = range(len(whole) - len(bare) + 1) if bare else ()
        begin = next((n for n in places if whole[n : n + len(bare)] == bare), None)
        if begin is not None:
            return whole[:begin], whole[begin + len(bare) :]
    return [], []


def _own_words(tokenizer: Any) -> Iterator[str]:
    """Yield the texts of some tokens, for a tokenizer that makes no token of the probe."""
    special = set(tokenizer.all_special_tokens)
    words = (token for token in sorted(tokenizer.get_vocab()) if token not in special)
    yield from (tokenizer.convert_tokens_to_string([token]) for token in islice(words, OWN_WORDS))


def _marks_beginnings(tokenizer: Any) -> bool:
    """Tell whether a text at the beginning has other ids than the same text after another one.

    A tokenizer is tried once: the five texts of the trial would cost more than an example of a small model's training.
    """
    if tokenizer not in _MARKS_BEGINNINGS:
        try:
            alone = text_ids(tokenizer, PROBE)
            found = any(_after(tokenizer, before, PROBE) not in (None, alone) for before in BEFORE_PROBE)
        except RRError:  # a tokenizer of words that it knows, which are the same everywhere
            found = False
        _MARKS_BEGINNINGS[tokenizer] = found
    return _MARKS_BEGINNINGS[tokenizer]


def _after(tokenizer: Any, before: str, piece: str) -> list[int] | None:
    """Return the ids that `piece` adds to those of `before`; None if both have a token in common."""
    first, both = text_ids(tokenizer, before), text_ids(tokenizer, before + piece)
    apart = first and both[: len(first)] == first and len(both) > len(first)
    return both[len(first) :] if apart else None


# -- ends of texts -----------------------------------------------------------------------------------------------------


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Return every token that ends a text of this model."""
    return set().union(*_named_ends(model, tokenizer).values())


def end_notice(model: Any, tokenizer: Any) -> str:
    """Say that tokenizer, generation config and config name different end tokens; '' if they do not."""
    named = {place: ends for place, ends in _named_ends(model, tokenizer).items() if ends}
    if len(set(map(frozenset, named.values()))) < 2:
        return ""
    known = {place: ", ".join(_shown(tokenizer, token) for token in sorted(ends)) for place, ends in named.items()}
    listed = "; ".join(f"{place}: {tokens}" for place, tokens in known.items())
    return f"different end tokens are named, and each of them ends a text ({listed})"


def _named_ends(model: Any, tokenizer: Any) -> dict[str, set[int]]:
    config = model.config
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    own, generation = getattr(tokenizer, "eos_token_id", None), getattr(model, "generation_config", None)
    return {
        "tokenizer": _as_set(own),
        "generation_config": _as_set(getattr(generation, "eos_token_id", None)),
        "config": _as_set(getattr(config, "eos_token_id", None)) | _as_set(getattr(text_config, "eos_token_id", None)),
    }


def _as_set(ends: Any) -> set[int]:
    """Return the ids of a setting that is an id, a list of ids, or nothing."""
    listed = ends if isinstance(ends, (list, tuple)) else [ends]
    return {int(token) for token in listed if token is not None and token >= 0}


def _shown(tokenizer: Any, token: int) -> str:
    return f"{tokenizer.decode([token], skip_special_tokens=False)!r} ({token})"


# -- text of ids -------------------------------------------------------------------------------------------------------


class Detokenizer:
    """Turns generated ids into the text that they add to their prompt.

    Args:
        ends: tokens that end a text, besides the tokenizer's own: they give no text.
        stop: stop strings. A start or padding token that one of them names does give text, so that it can be found.

    Attributes:
        silent: the ids that give no text.
    """

    def __init__(self, tokenizer: Any, ends: Iterable[int] = (), stop: Collection[str] = ()) -> None:
        self._tokenizer = tokenizer
        self.silent = set(ends)
        for name in SILENT:
            text, token = getattr(tokenizer, name, None), getattr(tokenizer, f"{name}_id", None)
            if token is not None and not (text and any(text in wanted for wanted in stop)):
                self.silent.add(token)
        self._contexts: dict[tuple[int, ...], list[int]] = {}

    def context(self, prompt: Sequence[int]) -> list[int]:
        """Return the last ids of a prompt, as many as decide how the text after it begins."""
        key = tuple(prompt[-CONTEXT_LENGTHS[-1] :])
        if key not in self._contexts:
            self._contexts[key] = self._context(key)
        return self._contexts[key]

    def _context(self, prompt: Sequence[int]) -> list[int]:
        shown = self._visible(prompt)
        tails = (shown[-length:] for length in CONTEXT_LENGTHS)
        return next((tail for tail in tails if (text := self.decode(tail)) and BROKEN not in text), shown)

    def text(self, new: Sequence[int], context: Sequence[int] = ()) -> str:
        """Return what `new` ids add to the text of the `context`, which `context()` returned for their prompt."""
        before, whole = self.decode(context), self.decode([*context, *new])
        if whole.startswith(before):
            return whole[len(before) :]
        # The decoder wrote the end of the prompt in another way once more followed it.
        return whole[next((n for n, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(whole)) :]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without those that give none."""
        return str(self._tokenizer.decode(self._visible(ids), skip_special_tokens=False))

    def decode_all(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Return the text of each row of ids."""
        return list(self._tokenizer.batch_decode([self._visible(row) for row in rows], skip_special_tokens=False))

    def _visible(self, ids: Sequence[int]) -> list[int]:
        return [token for token in ids if token not in self.silent]
