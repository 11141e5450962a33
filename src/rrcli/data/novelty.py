"""Says what is new about a text or a problem: its novelty key. Near-twins have the same key, so they are on one side.

Two problems are near-twins where a model that has seen one of them has seen the other: the same words in other case,
spacing, punctuation or width of characters; the same terms of a sum in another order; the same row of cells but for its
end. The key of a text follows from the text alone:

1. Characters are normalised (NFKC), letters folded to one case. Dashes, minus signs and quotation marks become one kind
   each. Dropped are characters that are not seen, punctuation after words and at the end of the text, and commas in
   numbers such as 1,000. Spaces between tokens do not count, but '12' and '1 2' differ.
2. Of a long row of numbers or single letters the last third does not count, as long as MIN_CELLS are left.
3. Numbers and signs of arithmetic are sorted. They are left in order where there are more than MAX_SORTED numbers and
   most of them repeat, as in a grid of digits: there the order is all that tells problems apart.

Of a text with more than LONG letters and digits these alone are the key: such a text is no problem.

Paraphrases are not recognised, nor are problems that differ in a single number.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator

# A row of cells keeps two thirds of them, and at least this many.
MIN_CELLS = 9
# So many numbers are always sorted; more only if at least half of them are distinct.
MAX_SORTED = 6
# A text of more letters and digits is no problem; its key is cheaper.
LONG = 2000
# A question is looked for inside of longer texts if it has so many tokens; a shorter one is found in too many places.
MIN_QUOTED = 6

_NUMBER = r"\d+(?:\.\d+)?"
_SIGN = r"[-+*/×÷·]"
_TOKEN = re.compile(rf"{_NUMBER}|[^\W\d_]+|[^\w\s]|_")
_TERM = re.compile(rf"{_NUMBER}|{_SIGN}")
_WORD = re.compile(rf"[^\W\d_]+|(?!{_SIGN})[^\w\s]|_")
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_PUNCTUATION = re.compile(r"(?<=[^\W_])(?:[.,;:!?\"']+(?=\s|$)|[,;])|(?<!\S)[\"']+(?=[^\W_])")
_CELL = rf"(?:{_NUMBER}|[^\W\d_])(?![^\W_])"
_ROW = re.compile(rf"(?<![^\W_]){_CELL}(?:\s+{_CELL}){{{MIN_CELLS},}}")
_NEITHER = re.compile(r"[\W_]+")
_NEITHER_ASCII = dict.fromkeys(code for code in range(128) if not chr(code).isalnum())
_END = " \t\r\n.,;:!?=\"'"
_ONE_KIND = str.maketrans(
    dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212\u02d7\ufe58\ufe63\uff0d", "-")
    | dict.fromkeys("\u2018\u2019\u201a\u201b\u2032\u00b4`", "'")
    | dict.fromkeys("\u201c\u201d\u201e\u201f\u2033\u00ab\u00bb", '"')
    | dict.fromkeys("\u00ad\u200b\u200c\u200d\u200e\u200f\u2060\ufeff")
)


def novelty(text: str) -> str:
    """Return the novelty key of a text or of the question of a problem."""
    cased = _one_case(text)
    return _compact(cased) or _key(_folded(cased))


class Questions:
    """A set of questions that no training may see, in which near-twins are one question.

    Args:
        questions: as they are asked.
    """

    def __init__(self, questions: Iterable[str] = ()) -> None:
        self._keys: set[str] = set()
        self._quoted: dict[tuple[str, ...], list[tuple[list[str], str]]] = {}
        for question in questions:
            key, tokens = novelty(question), tokens_of(question)
            if key not in self._keys and len(tokens) >= MIN_QUOTED:
                self._quoted.setdefault(tuple(tokens[:MIN_QUOTED]), []).append((tokens, key))
            self._keys.add(key)

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, question: str) -> bool:
        return bool(self._keys) and novelty(question) in self._keys

    def asked_in(self, texts: Iterable[str]) -> bool:
        """Tell whether one of these texts is such a question, or has one in it, word for word (after step 1)."""
        return bool(self._keys) and any(text in self or next(self.quoted_in(text), None) for text in texts)

    def quoted_in(self, text: str) -> Iterator[str]:
        """Yield the novelty keys of the questions that stand in a text, word for word (after step 1)."""
        tokens = tokens_of(text) if self._quoted else []
        for start in range(len(tokens) - MIN_QUOTED + 1):
            for question, key in self._quoted.get(tuple(tokens[start : start + MIN_QUOTED]), ()):
                if tokens[start : start + len(question)] == question:
                    yield key


def tokens_of(text: str) -> list[str]:
    """Return the tokens of a text in their order, after step 1."""
    return _TOKEN.findall(_folded(_one_case(text)))


def _one_case(text: str) -> str:
    """Return a text in one case, with one kind of each character."""
    if text.isascii():
        return text.lower()
    # What NFKC makes of a character may be a capital letter, and folding may leave what NFKC would join.
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).translate(_ONE_KIND)


def _compact(cased: str) -> str:
    """Return the letters and digits of a long text, or '' if there are not more than LONG."""
    if len(cased) <= LONG:
        return ""
    compact = cased.translate(_NEITHER_ASCII) if cased.isascii() else _NEITHER.sub("", cased)
    return compact if len(compact) > LONG else ""


def _folded(cased: str) -> str:
    """Return a text in one case without what does not count: step 1 of the key."""
    folded = _THOUSANDS.sub(lambda found: found.group().replace(",", ""), cased)
    folded = _PUNCTUATION.sub(" ", folded)
    return folded.rstrip(_END) or folded


def _key(folded: str) -> str:
    """Return the key of a folded text: steps 2 and 3."""
    folded = _ROW.sub(_without_end, folded)
    terms = _TERM.findall(folded)
    numbers = [term for term in terms if term[0].isdigit()]
    if len(numbers) > MAX_SORTED and 2 * len(set(numbers)) < len(numbers):
        return " ".join(_TOKEN.findall(folded))
    return " ".join([*_WORD.findall(folded), "|", *sorted(terms)])


def _without_end(row: re.Match[str]) -> str:
    cells = row.group().split()
    return " ".join(cells[: max(MIN_CELLS, 2 * len(cells) // 3)])
