"""Graders: decide whether an answer is right, for the problems of files and of data sets of the hub.

A task names one with `grade=`:

- nothing: numbers and lists of numbers by their values, words without regard to case and white space;
- `exact`: the same characters;
- `number`: a number by its value; what is expected may have a unit, `42 apples`;
- `math`: formulas, by the library math-verify (extra `math`): `\\frac{1}{2}` is 0.5, `(x+1)^2` is `x^2+2x+1`;
- `choice`: one of several answers, by its letter;
- `regex:PATTERN`: what the pattern finds last in an output (its first group, if it has one), compared as without a
  grader;
- `MODULE:FUNCTION`: a function of the user's own, see `FunctionGrader`.

A grader says what is expected (`expected`), which part of an output is the answer (`extract`), how right that part is
as a whole (`score`), and what the final answer in it is, if it is longer (`final`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rrcli.data.final_answers import MARK, after_phrase, final_answer, tagged
from rrcli.data.math_answers import check_installed, same_formula
from rrcli.data.numbers import boxed, first_number, last_number, number, plain, unwrapped
from rrcli.data.tasks import Problem
from rrcli.errors import RRError, UsageError, suggest
from rrcli.plugins import load_function, plugin_file

NAMES = ("exact", "number", "math", "choice", "regex:PATTERN", "MODULE:FUNCTION")
REGEX = "regex:"
# How many answers a problem may offer.
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

# One letter as the whole answer, perhaps with the answer itself after it: `B`, `(B)`, `B.`, `B) Paris`.
_LETTER = re.compile(r"\(?\s*([A-Za-z])\s*(?:\)|[.:](?=\s|$)|$)")
# What is left out around a letter, and the letter after "the answer is".
_MARKUP = re.compile(r"\\text(?:bf)?|\*\*|[{}]")
_NAMED = re.compile(r"\W*([A-Z])(?![\w'])")
# A letter in brackets, or alone between other signs; `A` in a sentence is an article.
_BRACKETED = re.compile(r"\(([A-Z])\)|(?<![\w'])([B-HJ-Z])(?![\w'])")


class Grader:
    """Compares by value: numbers, lists of numbers, else words. The base of the other graders."""

    needs_row = False

    def expected(self, answer: str) -> str:
        """Return what a problem's answer means.

        Raises:
            ValueError: it is none that this grader can compare with; says why.
        """
        return answer

    def extract(self, output: str) -> str:
        """Return the part of an output that is the answer: after `####`, or between answer tags, or all of it."""
        return tagged(output.rpartition(MARK)[2])

    def score(self, answer: str, problem: Problem) -> float:
        """Return how right the answer is as a whole, in [0, 1]."""
        return float(value(answer) == value(problem.answer))

    def final(self, answer: str, problem: Problem) -> str | None:
        """Return the final answer in a longer text, or None where there is none."""
        return final_answer(answer, is_number=number(problem.answer) is not None)


class ExactGrader(Grader):
    """Compares character by character, but for white space around the answer."""

    def score(self, answer: str, problem: Problem) -> float:
        return float(answer.strip() == problem.answer.strip())

    def final(self, answer: str, problem: Problem) -> str | None:
        return final_answer(answer, is_number=False)


class NumberGrader(Grader):
    """Compares numbers by their values."""

    def expected(self, answer: str) -> str:
        first, last = first_number(answer), last_number(answer)
        if number(answer) is not None:
            return answer
        if first is None or last is None or number(first) != number(last):
            raise ValueError(f"the answer {answer[:40]!r} is not one number")
        return last


class MathGrader(Grader):
    """Compares formulas; see `math_answers`."""

    def __init__(self) -> None:
        check_installed()

    def expected(self, answer: str) -> str:
        return boxed(answer) or answer

    def score(self, answer: str, problem: Problem) -> float:
        return float(same_formula(problem.answer, answer))

    def final(self, answer: str, problem: Problem) -> str | None:
        found = final_answer(answer, is_number=number(problem.answer) is not None)
        formulas = re.findall(r"\$([^$]+)\$|\\\((.+?)\\\)", answer)
        return found if found is not None or not formulas else "".join(formulas[-1])


class ChoiceGrader(Grader):
    """Compares the letter of an answer, or the answer that stands at this letter, if that is known."""

    def expected(self, answer: str) -> str:
        letter = self._letter(answer)
        if not letter:
            raise ValueError(f"the answer {answer[:40]!r} is no letter")
        return letter

    def score(self, answer: str, problem: Problem) -> float:
        choices = problem.entry.get("choices") or ()
        letter = self._letter(answer)
        if not letter and choices:
            right = choices[LETTERS.index(problem.answer)]
            return float(value(answer) == value(right) and list(map(value, choices)).count(value(right)) == 1)
        return float(letter == problem.answer)

    def final(self, answer: str, problem: Problem) -> str | None:
        content = boxed(answer)
        rest = after_phrase(answer) if content is None else content
        if rest is not None:
            named = _NAMED.match(unwrapped(rest))
            return self._letter(rest) or (named[1] if named else unwrapped(rest))
        first = self._letter(answer.partition("\n")[0])
        found = _BRACKETED.findall(answer)
        return first or ("".join(found[-1]) if found else None)

    def _letter(self, answer: str) -> str:
        """Return the letter that an answer begins with, or ''."""
        text = _MARKUP.sub("", unwrapped(plain(answer)))
        found = _LETTER.match(text.strip())
        return found[1].upper() if found else ""


class RegexGrader(Grader):
    """Compares what a pattern finds last in an output.

    Raises:
        UsageError: it is no regular expression.
    """

    def __init__(self, pattern: str) -> None:
        try:
            self._pattern = re.compile(pattern)
        except re.error as error:
            raise UsageError(f"grade=regex:{pattern} is no regular expression: {error}") from error

    def extract(self, output: str) -> str:
        found = list(self._pattern.finditer(output))
        return (found[-1][min(1, self._pattern.groups)] or "").strip() if found else ""

    def final(self, answer: str, problem: Problem) -> str | None:
        return None


class FunctionGrader(Grader):
    """Asks a function of the user's own, which is imported and run: `function(output, answer, row)`.

    It gets the whole output, the expected answer, and the row that the problem was made of, and returns whether the
    answer is right, or how right it is, from 0 to 1. As a validation and a test of the same answer must agree, it
    should give the same result for the same arguments.

    Raises:
        UsageError: there is no such function.
    """

    needs_row = True

    def __init__(self, spec: str, directory: Path) -> None:
        self._spec = spec
        self._function: Callable[..., Any] = load_function(spec, directory, "grade=")

    def extract(self, output: str) -> str:
        return output

    def score(self, answer: str, problem: Problem) -> float:
        try:
            found = float(self._function(answer, problem.answer, problem.entry["row"]))
        except Exception as error:
            raise self._refused(problem, f"{type(error).__name__}: {error}") from error
        if not 0 <= found <= 1:
            raise self._refused(problem, f"it returned {found}")
        return found

    def final(self, answer: str, problem: Problem) -> str | None:
        return None

    def _refused(self, problem: Problem, why: str) -> RRError:
        return RRError(
            f"grade={self._spec} cannot grade an answer to {problem.question[:60]!r}: {why}",
            "It is called with (output, answer, row), and returns true or false, or a number from 0 to 1.",
        )


def make_grader(name: str, directory: Path) -> Grader:
    """Return the grader of this name; '' is the one that compares by value.

    Raises:
        UsageError: there is none of this name, or it needs an extra that is not installed.
    """
    if name.startswith(REGEX):
        return RegexGrader(name.removeprefix(REGEX))
    if ":" in name:
        return FunctionGrader(name, directory)
    known = {"": Grader, "exact": ExactGrader, "number": NumberGrader, "math": MathGrader, "choice": ChoiceGrader}
    if name not in known:
        raise UsageError(f"there is no grader '{name}'", suggest(name, NAMES))
    return known[name]()


def grader_file(name: str, directory: Path) -> Path | None:
    """Return the file of a function of the user's own; None for another grader, or where it has none."""
    return plugin_file(name, directory) if ":" in name and not name.startswith(REGEX) else None


def value(answer: str) -> object:
    """Return what two answers are compared by: a number, the numbers of a list, or words."""
    if (found := number(answer)) is not None:
        return found
    text = unwrapped(plain(answer))
    parts = [number(part) for part in text.strip("[](){} ").split(",")]
    if len(parts) > 1 and None not in parts:
        return parts
    return " ".join(text.casefold().split())
