"""Compares formulas by the library math-verify (extra `math`), and keeps from it what it reads wrongly.

Measured with math-verify 0.9: it reads `1e6` as 6 e, words as products of letters (`even` is `neve`), and computes
`9^9^9` until its clock stops it. So numbers, lists of numbers and words are compared here; numbers in formulas are
written out; powers and factorials that no answer has are not computed. Formulas are given to it as formulas (`$...$`):
in plain text it takes `1,2,3` for 1.2 or 3.
"""

from __future__ import annotations

import re
import threading
from typing import Any

from rrcli.data.numbers import BOXED, number, one_kind, unwrapped
from rrcli.errors import UsageError

# A longer text is no formula. Seconds after which a comparison is given up: the answer is not right then.
LONGEST, SECONDS = 1000, 5

_SCIENTIFIC = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)[eE]([+-]?\d+)(?!\w)")
_WORDS = re.compile(r"[^\W\d_]{2,}(?:\s+[^\W\d_]+)*")
_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}")
_COMMAND, _WORD = re.compile(r"\\[A-Za-z]+"), re.compile(r"[^\W\d_]{2,}")
_KNOWN = {"sin", "cos", "tan", "cot", "sec", "csc", "log", "ln", "exp", "sqrt", "pi", "max", "min", "and", "or", "inf"}
# Powers of powers of numbers, exponents of four digits, factorials of numbers of four digits.
_HUGE = re.compile(
    r"\d\s*\}?\s*(?:\^|\*\*)\s*\{?\s*\(?\s*\d+\s*(?:\^|\*\*|!)|(?:\^|\*\*)\s*\{?\s*\(?\s*-?\d{4,}|\d{4,}\s*!|!\s*!"
)


def check_installed() -> None:
    """Refuse to go on without the library.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import math_verify  # noqa: F401
    except ImportError:
        raise UsageError("grade=math needs the extra 'math'", "pip install 'rrcli[math]'") from None


def same_formula(expected: str, answer: str) -> bool:
    """Tell whether an answer is the formula that is expected, perhaps in another form."""
    first, second = _cleaned(expected), _cleaned(answer)
    if not first or not second or max(len(first), len(second)) > LONGEST:
        return False
    if first.split() == second.split():
        return True
    numbers = number(first), number(second)
    if None not in numbers and not ("%" in first) ^ ("%" in second):
        return numbers[0] == numbers[1]
    lists = _numbers(first), _numbers(second)
    if lists[0] and lists[1]:  # solutions, in any order
        return sorted(lists[0]) == sorted(lists[1])
    words = [_TEXT.sub(r"\1", text).strip() for text in (first, second)]
    if _WORDS.fullmatch(words[0]) or _WORDS.fullmatch(words[1]):
        return words[0].casefold().split() == words[1].casefold().split()
    if not _is_formula(first) or not _is_formula(second) or _HUGE.search(first) or _HUGE.search(second):
        return False
    import math_verify

    # Its clock is a signal, which only the main thread gets.
    seconds = SECONDS if threading.current_thread() is threading.main_thread() else None
    parsed = [_parsed(math_verify, text, seconds) for text in (first, second)]
    return all(parsed) and bool(math_verify.verify(*parsed, timeout_seconds=seconds))


def _is_formula(text: str) -> bool:
    """Tell whether a text is a formula and no sentence with one: words are functions, or a unit at the end."""
    bare = _COMMAND.sub(" ", _TEXT.sub(" ", text))
    words = [word for word in _WORD.finditer(bare) if word.group().casefold() not in _KNOWN]
    digits = [digit.end() for digit in re.finditer(r"\d", bare)]
    unit = len(words) <= 3 and bool(digits) and all(word.start() >= digits[-1] for word in words)
    return "$" not in text and BOXED not in text and (not words or unit)


def _parsed(library: Any, text: str, seconds: int | None) -> list[Any]:
    written = _SCIENTIFIC.sub(r"\1 \\cdot 10^{\2}", text)
    return list(library.parse(f"${written}$", parsing_timeout=seconds))


def _cleaned(text: str) -> str:
    """Return a formula without what only sets it apart, with one kind of signs and digits."""
    return unwrapped(one_kind(unwrapped(text)))


def _numbers(text: str) -> list[Any]:
    """Return the numbers of a list without brackets; none if it is anything else."""
    parts = [number(part) for part in re.split(r"[,;]|\band\b", text)]
    return parts if len(parts) > 1 and None not in parts else []
