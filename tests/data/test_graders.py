"""What each grader takes for right: as a whole (strictly), or as the final answer of a longer text (flexibly)."""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from rrcli.data.problem_files import FileTask
from rrcli.errors import RRError, UsageError
from rrcli.evaluation.judging import judge

STRICT, FLEXIBLE, WRONG = (True, True), (False, True), (False, False)


def verdict(folder: Path, grade: str, answer: Any, output: str, **fields: Any) -> tuple[bool, bool]:
    """Return (strict, correct) of an output to a problem that expects this answer."""
    row = {"question": "How?", "answer": answer, **fields}
    (folder / "a.jsonl").write_text(json.dumps(row))
    options = ",".join(f"{name}={name}" for name in fields if name == "choices")
    task = FileTask("a.jsonl:" + ",".join(filter(None, (options, f"grade={grade}"))), folder)
    found = judge(task, task.all[0], output)
    return found.strict, found.correct


@pytest.mark.parametrize(
    ("answer", "output", "expected"),
    [
        ("New York", " New York\n", STRICT),
        ("New York", "new york", WRONG),
        ("New York", "New  York", WRONG),
        ("7", "7.0", WRONG),
        ("New York", "I think. The answer is New York.", FLEXIBLE),
        ("New York", "So \\boxed{New York}", FLEXIBLE),
        ("New York", "<answer>New York</answer>", STRICT),
        ("7", "It is so.\n#### 7", STRICT),
    ],
)
def test_exact(tmp_path: Path, answer: str, output: str, expected: tuple[bool, bool]) -> None:
    assert verdict(tmp_path, "exact", answer, output) == expected


@pytest.mark.parametrize(
    ("answer", "output", "expected"),
    [
        ("42 apples", "42", STRICT),
        ("$1,200.50 in all", "1200.5", STRICT),
        ("so\n#### 18 dollars", "9 * 2 = 18", FLEXIBLE),
        (0.5, "1/2", STRICT),
        (-4, "\u22124", STRICT),
        (1000000, "1e6", STRICT),
        (42, "42 apples", FLEXIBLE),
        (42, "41", WRONG),
        (3, "1,2,3", WRONG),
        (2, "2x", WRONG),
        (2, "The answer is 2x.", WRONG),
        (5, "5km", FLEXIBLE),
        ("5km", "5", STRICT),
    ],
)
def test_number(tmp_path: Path, answer: Any, output: str, expected: tuple[bool, bool]) -> None:
    assert verdict(tmp_path, "number", answer, output) == expected


def test_a_term_is_no_number_that_could_be_expected(tmp_path: Path) -> None:
    with pytest.raises(RRError, match="the answer '2x' is not one number"):
        verdict(tmp_path, "number", "2x", "2")


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("B", STRICT),
        (" b ", STRICT),
        ("(B)", STRICT),
        ("B.", STRICT),
        ("B) Paris", STRICT),
        ("**B**", STRICT),
        ("\\boxed{\\text{B}}", STRICT),
        ("Paris", STRICT),
        ("The answer is (B).", FLEXIBLE),
        ("The answer is B, because A is wrong.", FLEXIBLE),
        ("A is wrong, C is wrong. Answer: B", FLEXIBLE),
        ("The capital is the choice (B)", FLEXIBLE),
        ("First (A), but no: (B)", FLEXIBLE),
        ("The answer is Paris.", FLEXIBLE),
        ("A", WRONG),
        ("Bern", WRONG),
        ("Because of that", WRONG),
        ("A city is a city", WRONG),
        ("The answer is A, not B", WRONG),
        ("", WRONG),
        ("E", WRONG),
    ],
)
def test_choice(tmp_path: Path, output: str, expected: tuple[bool, bool]) -> None:
    choices = ["Bern", "Paris", "Rome", "Oslo"]
    assert verdict(tmp_path, "choice", 1, output, choices=choices) == expected


@pytest.mark.parametrize(
    ("pattern", "output", "expected"),
    [
        (r"#### (-?[0-9.,]+)", "no 3\n#### 1,000\nmore 5", STRICT),
        (r"#### (-?[0-9.,]+)", "1000", WRONG),
        (r"is (\d+)", "it is 3, then it is 1000", STRICT),
        (r"is (\d+)", "it is 1000, then it is 3", WRONG),
        (r"\d{4}", "a 1000 b", STRICT),
        (r"x|(y)", "x", WRONG),
        (r"x=(\d+), y=\d", "x=1000, y=2", STRICT),
    ],
)
def test_regex(tmp_path: Path, pattern: str, output: str, expected: tuple[bool, bool]) -> None:
    assert verdict(tmp_path, f"regex:{pattern}", 1000, output) == expected


def test_a_pattern_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"grade=regex:\(\\d is no regular expression"):
        verdict(tmp_path, r"regex:(\d", 1, "1")


def test_a_grader_that_there_is_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no grader 'exakt'") as caught:
        verdict(tmp_path, "exakt", 1, "1")
    assert "exact" in caught.value.hint


# -- functions of the user's own ---------------------------------------------------------------------------------------


def test_a_function_gets_the_output_the_answer_and_the_row(tmp_path: Path) -> None:
    (tmp_path / "grader_of_units.py").write_text(
        "def judge(output, answer, row):\n"
        "    return 1 if output == f' {answer} {row[\"unit\"]}' else 0.5 if answer in output else 0\n"
    )
    grade = "grader_of_units:judge"
    assert verdict(tmp_path, grade, 3, " 3 km", unit="km") == STRICT
    assert verdict(tmp_path, grade, 3, "3 m", unit="km") == WRONG
    assert verdict(tmp_path, grade, 3, "4 km", unit="km") == WRONG


@pytest.mark.parametrize(
    ("name", "body", "message"),
    [
        ("raises", "raise KeyError('x')", "KeyError: 'x'"),
        ("two", "return 2", r"it returned 2\.0"),
        ("nan", "return float('nan')", "it returned nan"),
        ("nothing", "return None", "TypeError"),
    ],
)
def test_a_function_that_fails_ends_the_evaluation(tmp_path: Path, name: str, body: str, message: str) -> None:
    (tmp_path / f"grader_{name}.py").write_text(f"def judge(output, answer, row):\n    {body}\n")
    with pytest.raises(RRError, match=f"grade=grader_{name}:judge cannot grade an answer to 'How\\?': {message}"):
        verdict(tmp_path, f"grader_{name}:judge", 1, "1")


def test_a_function_that_there_is_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="grade= 'no_such_module:judge': the module cannot be imported"):
        verdict(tmp_path, "no_such_module:judge", 1, "1")


# -- formulas ----------------------------------------------------------------------------------------------------------

FORMULAS = [
    ("\\frac{1}{2}", "0.5", STRICT),
    ("\\frac{1}{2}", "\\dfrac12", STRICT),
    ("1/3", "0.333", WRONG),
    ("(x+1)^2", "$x^2+2x+1$", STRICT),
    ("(x+1)^2", "Expanding gives \\boxed{x^2+2x+1}.", FLEXIBLE),
    ("\\frac{a+b}{2}", "(a+b)/2", STRICT),
    ("\\frac{a+b}{2}", "a+b/2", WRONG),
    ("So the sum is \\boxed{2\\sqrt{2}}.", "The answer is $\\sqrt{8}$.", FLEXIBLE),
    ("\\sqrt{8}", "We find that $x = 3$ and so the length is $2\\sqrt{2}$", FLEXIBLE),
    ("5\\text{ cm}", "5", STRICT),
    ("5", "5 cm", STRICT),
    ("50\\%", "0.5", STRICT),
    ("x=5", "5", STRICT),
    ("(1,2)", "(1, 2)", STRICT),
    ("(1,2)", "(2, 1)", WRONG),
    ("[0,1)", "[0,1]", WRONG),
    ("1,000", "1000", STRICT),
    # What math-verify alone gets wrong.
    ("1,2,3", "1, 2, 3", STRICT),
    ("1,2,3", "3, 1 and 2", STRICT),
    ("1,2,3", "3", WRONG),
    ("3", "1,2,3", WRONG),
    ("1.2", "1,2,3", WRONG),
    ("-4", "\u22124", STRICT),
    ("\u22124", "-4", STRICT),
    ("4", "\u22124", WRONG),
    ("-\\sqrt{2}", "\u2212\\sqrt{2}", STRICT),
    ("1000000", "1e6", STRICT),
    ("1e6", "10^6", STRICT),
    ("6", "1e6", WRONG),
    ("2\\pi\\cdot 1e3", "2000\\pi", STRICT),
    ("even", "neve", WRONG),
    ("even", "\\text{Even}", STRICT),
    ("2", "two", WRONG),
    ("5", "It is 5", FLEXIBLE),
    ("\\sqrt{2}", "It is \\sqrt{2}", WRONG),
    ("30\\text{ square meters}", "30 square meters", STRICT),
]


@pytest.mark.parametrize(("answer", "output", "expected"), FORMULAS)
def test_math(tmp_path: Path, answer: str, output: str, expected: tuple[bool, bool]) -> None:
    pytest.importorskip("math_verify")
    assert verdict(tmp_path, "math", answer, output) == expected


@pytest.mark.parametrize(
    "output", ["9^9^9", "9^{9^{9}}", "2^{123456}", "99999!", "9**9**9", "{" * 3000, "\\frac" * 300]
)
def test_a_formula_is_not_computed_for_long(tmp_path: Path, output: str) -> None:
    pytest.importorskip("math_verify")
    began = time.process_time()
    assert verdict(tmp_path, "math", "x+1", output) == WRONG
    assert time.process_time() - began < 4


def test_formulas_are_compared_in_a_thread_too(tmp_path: Path) -> None:
    pytest.importorskip("math_verify")
    found: list[tuple[bool, bool]] = []
    thread = threading.Thread(target=lambda: found.append(verdict(tmp_path, "math", "2x", "x+x")))
    thread.start()
    thread.join()
    assert found == [STRICT]


def test_without_the_library_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(UsageError, match="grade=math needs the extra 'math'") as caught:
        verdict(tmp_path, "math", 1, "1")
    assert caught.value.hint == "pip install 'rrcli[math]'"
