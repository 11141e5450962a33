"""Reads numbers as people and models write them: one number exactly, or None where a text is not one number.

Forms: `-5`, `−5` (any minus sign or dash), `+5`, `1,234.50`, `.5`, `1/2`, `1 1/2`, `½`, `\\frac{1}{2}`, `1e6`,
`1.5 x 10^3`, `$5`, `7.50 %`, and these in `**...**`, `$...$`, `\\(...\\)` or `\\boxed{...}`; a full stop may follow.

- A comma belongs to a number only in thousands: `1,234`, not `1,2` and not `0,5`, which may be lists.
- A currency and a percent sign are units: they do not change the number, so `50 %` is 50.
- `007` is a row of digits, not a number; nor are `10:3`, `10-4`, `10^2` or `1.2.3`.
- In a longer text a unit may follow a number: any word after a space (`42 apples`), and what `UNITS` holds without one
  (`5km`, `3rd`). Other letters make a term of it: no number is taken out of `2x`, `3i`, `2\\pi` and `10k`.

Why not a library: math-verify 0.9 was tried. It reads `1,2,3` as 1.2 or 3, does not read `−4` and `1e6`, takes 12 ms
for an answer, and ends long computations (`9^9^9`) by the clock, with a signal. lm-eval's `minerva_math` uses it for
algebra (`--harness minerva_math`). Where formulas are expected, `grade=math` asks it (see `math_answers`).
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from functools import lru_cache

# More digits or a larger exponent than any answer has: such a text is not read as a number, so the time is bounded.
MAX_DIGITS, MAX_EXPONENT = 400, 999
# A longer text is not taken out of its wrappers: it is no short answer.
MAX_WRAPPED = 1000

# What may stand directly after a number: units whose symbols nobody takes for a variable, words, and endings.
_WORDS = """
    nm um mm cm dm m km in ft yd mi mg g kg t lb lbs oz ml cl dl l L ms s sec secs min mins h hr hrs yr yrs wk wks
    am pm mph kmh kph Hz kHz MHz GHz W kW MW kWh V mV mA mAh J kJ cal kcal C F Pa kPa hPa bit bits kB MB GB TB
    kbps Mbps Gbps usd eur gbp deg pct percent st nd rd th cents cent dollars dollar euros euro pounds pound
    degrees seconds minutes hours hour days day weeks week months month years year times inches inch feet foot
    miles mile meters meter metres metre grams gram liters liter litres litre points pts people
"""
UNITS = frozenset(_WORDS.split())

_CURRENCY = r"[$€£¥₹]"
_WHOLE = r"(?:[1-9]\d{0,2}(?:,\d{3})+|0|[1-9]\d*)"
_NUMBER = re.compile(
    rf"""(?P<sign>[-+]?)\s*{_CURRENCY}?\s*(?P<inner>[-+]?)
    (?: (?:(?P<mixed>[1-9]\d*)\s+)? (?P<over>0|[1-9]\d*)\s*/\s*(?P<under>[1-9]\d*)
      | (?P<decimal>(?:{_WHOLE}(?:\.\d*)?|\.\d+)) (?:e(?P<exponent>[-+]?\d+))?
        (?:\s*[*x×]\s*10\s*(?:\^|\*\*)\s*(?P<open>\{{)?(?P<power>[-+]?\d+)(?(open)\}}))?
    )\s*(?:%|percent|{_CURRENCY})?""",
    re.VERBOSE | re.IGNORECASE,
)
_DIGITS = r"(?:\d+(?:[.,]\d+)*|\.\d+)(?:[eE][-+]?\d+)?"
_ATOM = rf"(?:[-+]\s?)?(?:{_CURRENCY}\s?)?(?:\d+\s+\d+/\d+|{_DIGITS})"
_EXPRESSION = re.compile(rf"(?<![\w.]){_ATOM}(?:\s*(?:\*\*|[-+*/×÷^:]|x(?=\s*\d))\s*\{{?{_ATOM}\}}?)*(?:\s?%)?")
_BRACKETS = re.compile(r"[\[({]([^\[\](){}]{1,200})[\])}]")
_CELL = re.compile(rf"\s*[-+]?\s?{_CURRENCY}?[\d.]+(?:e[-+]?\d+)?\s*", re.IGNORECASE)
# Stands in for a list of numbers: the digits of a ratio, which are no number either.
_RATIO = " 0:0 "
# The letters right after a number, with the power of a unit (`m2`); a command of LaTeX is one of its letters.
_AFTER = re.compile(r"(?:\\(?!text|mathrm|mathbf|mbox|circ|quad|qquad|rm\b)[A-Za-z]+|[^\W\d_]+)[23]?(?!\w)")
_FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{([^{}]{1,60})\}\s*\{([^{}]{1,60})\}|(\d)\s*(\d))")
_SUPERSCRIPT = re.compile("[⁺⁻]?[⁰¹²³⁴-⁹]+")
_LATEX = (
    ("{,}", ","), ("\\,", ""), ("\\!", ""), ("\\;", " "), ("\\ ", " "), ("\\$", "$"), ("\\%", "%"), ("\\left", ""),
    ("\\right", ""), ("\\times", "*"), ("\\cdot", "*"), ("\\div", "÷"),
)  # fmt: skip
_MINUS = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63\uff0d"
_WRAPPERS = (("**", "**"), ("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("`", "`"), ('"', '"'), ("'", "'"))
BOXED = "\\boxed{"


def number(text: str) -> Fraction | None:
    """Return the number that a text denotes, or None if it does not denote exactly one."""
    return _value(unwrapped(plain(text)))


def last_number(text: str) -> str | None:
    """Return the last number of a text, as written; None if there is none, or if it is a part of something else.

    The last digits of a text may belong to a list, a ratio, a date or a computation: `1,2`, `10:3`, `2024-08`, `10^2`.
    No number is taken out of these.
    """
    found = _expressions(text)
    return found[-1] if found and _value(found[-1]) is not None else None


def first_number(text: str) -> str | None:
    """Return the first number of a text, under the rules of `last_number`."""
    found = _expressions(text)
    return found[0] if found and _value(found[0]) is not None else None


def boxed(text: str) -> str | None:
    """Return what stands in the last \\boxed{...} of a text, or None."""
    start = text.rfind(BOXED)
    if start < 0:
        return None
    depth = 1
    for end in range(start := start + len(BOXED), len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if not depth:
            return text[start:end]
    return None


def plain(text: str) -> str:
    """Return a text with one kind of minus sign and of digits, and without LaTeX that only sets it."""
    text = one_kind(text)
    if "\\" in text or "{,}" in text:
        for written, meant in _LATEX:
            text = text.replace(written, meant)
        text = _FRACTION.sub(lambda f: f" {f[1] or f[3]}/{f[2] or f[4]} ", text)
    return text


def one_kind(text: str) -> str:
    """Return a text with one kind of minus sign and of digits."""
    if text.isascii():
        return text
    text = _SUPERSCRIPT.sub(lambda found: "^" + unicodedata.normalize("NFKC", found.group()), text)
    return "".join(map(_plain_character, text))


def unwrapped(text: str) -> str:
    """Return a text without what only sets it apart: white space, bold, formula signs, \\boxed{}, a full stop."""
    before = None
    while text != before and len(text) <= MAX_WRAPPED:
        before = text = text.strip()
        if len(text) > 1 and text.endswith("."):
            text = text[:-1]
        if text.startswith(BOXED) and text.endswith("}") and boxed(text) == text[len(BOXED) : -1]:
            text = text[len(BOXED) : -1]
        for opened, closed in _WRAPPERS:
            if text.startswith(opened) and text.endswith(closed) and len(text) > len(opened) + len(closed):
                text = text[len(opened) : -len(closed)]
    return text


def _expressions(text: str) -> list[str]:
    """Return the numbers of a text and whatever else digits stand in, in plain characters."""
    text = plain(text)
    if _is_list(text.strip().removesuffix(".")):
        return []
    text = _BRACKETS.sub(lambda found: _RATIO if _is_list(found[1]) else found.group(), text)
    return [match.group().strip() + _variable(text, match.end()) for match in _EXPRESSION.finditer(text)]


def _variable(text: str, end: int) -> str:
    """Return what stands directly after a number and makes another thing of it (the x of `2x`), or ''."""
    found = _AFTER.match(text, end) if text[end - 1].isdigit() else None
    word = found.group().rstrip("23") if found else ""
    is_unit = word in UNITS or (len(word) > 1 and word.lower() in UNITS)
    return "" if found is None or is_unit else found.group()


def _is_list(text: str) -> bool:
    """Tell whether a text is two or more numbers with commas between them."""
    cells = text.replace(";", ",").split(",")
    return len(cells) > 1 and all(map(_CELL.fullmatch, cells)) and _value(text) is None


def _value(text: str) -> Fraction | None:
    """Return the number of a text in plain characters."""
    found = _NUMBER.fullmatch(text.strip()) if len(text) <= MAX_DIGITS else None
    if found is None or (found["sign"] and found["inner"]):
        return None
    if found["under"]:
        value = Fraction(int(found["over"]), int(found["under"]))
        if found["mixed"]:
            if value >= 1:
                return None
            value += int(found["mixed"])
    else:
        exponent = int(found["exponent"] or 0) + int(found["power"] or 0)
        if abs(exponent) > MAX_EXPONENT:
            return None
        value = Fraction(found["decimal"].replace(",", "").removesuffix(".")) * Fraction(10) ** exponent
    return -value if "-" in (found["sign"], found["inner"]) else value


@lru_cache(maxsize=1024)
def _plain_character(character: str) -> str:
    if character in _MINUS:
        return "-"
    if character == "\u2044":  # the fraction slash
        return "/"
    if unicodedata.category(character) == "Nd":
        return str(unicodedata.decimal(character))
    if unicodedata.category(character) == "No" and "\u2044" in (made := unicodedata.normalize("NFKC", character)):
        return f" {made} ".replace("\u2044", "/")
    if "\uff01" <= character <= "\uff5e":  # the wide forms of ASCII
        return chr(ord(character) - 0xFEE0)
    return " " if character.isspace() else character
