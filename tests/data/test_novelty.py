"""What is new about a problem: near-twins have one key, and stand on one side of the split."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import rrcli
from rrcli.data.novelty import MIN_CELLS, Questions, novelty
from rrcli.data.problem_files import trained_questions
from rrcli.data.splits import side_of
from rrcli.data.tasks import Task
from rrcli.data.training_data import TrainingData
from rrcli.demo import defaults
from rrcli.evaluation.held_out import held_out_data
from rrcli.settings import EvalSettings, TrainSettings

ROW = "Take 4 steps of rule 30, moved one cell to the right, from: 0 1 1 0 1 0 0 1 1 "


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is 3 + 4?", "what  IS 3+4 ?"),
        ("What is 3 + 4?", "What is 4 + 3"),
        ("6 - 5 + 2 =", "6 + 2 - 5 ="),
        ("What is 3 - 4?", "What is 3 \u2212 4?"),
        ("Find the GCD of 12, 18", "Find the GCD of 18,12."),
        ("\uff11\uff12 apples", "12 apples"),
        ("It\u2019s \u201cblue\u201d, he said.", 'it\'s "blue" he said'),
        ("ab\u200bc \u00ad d", "abc d"),
        ("He has 1,000 of 12 345", "he has 1000 of 345 12"),
        ("One line\nand another\n", "one line and another"),
        (ROW + "0 1 1 0 0", ROW + "0 1 1 0 1"),
        (ROW + "0 1 1 0 0", ROW + "1 0 0 1 1"),
        ("from: " + "1, 0, " * 7, "from: " + "1 0 " * 7),
    ],
)
def test_near_twins_have_one_key(one: str, other: str) -> None:
    assert novelty(one) == novelty(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is 3 + 4?", "What is 3 + 5?"),
        ("What is 12?", "What is 1 2?"),
        ("3 + 4", "3 * 4"),
        ("((()", "(())"),
        ("a.b", "a b"),
        ("Tom likes Ann", "Ann likes Tom"),
        (ROW + "0 1 1 0 0", ROW.replace("4 steps", "3 steps") + "0 1 1 0 0"),
        (ROW + "0 1 1 0 0", ROW.replace("0 0 1 1 ", "0 0 1 0 ") + "0 1 1 0 0"),
        ("0 1 0 1 1 0 1", "1 0 0 1 1 0 1"),
        ("", "?"),
    ],
)
def test_what_is_new_has_another_key(one: str, other: str) -> None:
    assert novelty(one) != novelty(other)


@given(st.text(max_size=60))
def test_case_and_space_never_make_a_text_new(text: str) -> None:
    assert novelty(f"  {text}\n") == novelty(text)
    if text.isascii():
        assert novelty(text.swapcase()) == novelty(text)
        assert novelty(text.replace(" ", " \t ")) == novelty(text)


@given(st.lists(st.integers(0, 999), min_size=2, max_size=6), st.randoms())
def test_the_order_of_terms_never_makes_a_sum_new(terms: list[int], order: random.Random) -> None:
    question = "What is {}?"
    swapped = order.sample(terms, len(terms))
    assert novelty(question.format(" + ".join(map(str, terms)))) == novelty(
        question.format("+".join(map(str, swapped)))
    )


@given(st.lists(st.integers(0, 1), min_size=14, max_size=14), st.lists(st.integers(0, 1), min_size=5, max_size=5))
def test_the_end_of_a_row_never_makes_it_new(cells: list[int], end: list[int]) -> None:
    rows = (" ".join(map(str, row)) for row in (cells, cells[:MIN_CELLS] + end))
    assert len({novelty(f"Take 3 steps from: {row}") for row in rows}) == 1


@pytest.mark.parametrize(
    "text", ["1 " * 10**5, "1," * 10**5, "\"'" * 10**5, "1.1" * 10**5, "\u0130 " * 10**5, "- " * 10**5]
)
def test_a_key_takes_little_time_whatever_the_text(text: str) -> None:
    begin = time.perf_counter()
    novelty(text)
    assert time.perf_counter() - begin < 2


@pytest.mark.parametrize("spec", [*defaults.TASKS, "chain_sum", "binary_matrix", "gcd", "word_sorting"])
def test_keys_do_not_lump_a_task_together(spec: str) -> None:
    """So each side gets its share."""
    problems = {entry["question"] for entry in Task(spec)._entries(0, 1500)}
    largest = max(Counter(map(novelty, problems)).values())
    assert largest <= 0.02 * len(problems)
    counts = Counter(map(side_of, problems))
    assert 0.05 < counts["test"] / len(problems) < 0.16
    assert 0.02 < counts["validation"] / len(problems) < 0.09


# -- near-twins of what is evaluated are never trained on --------------------------------------------------------------


def test_no_training_row_differs_from_a_test_row_in_the_last_cell_only() -> None:
    """Before, 85 % of the test rows had their twin in training, and looking it up answered 66 to 92 % of them."""
    for problem in Task("row_steps:min_steps=4,max_steps=4").problems(200, 0, side="test"):
        twin = problem.question[:-1] + ("0" if problem.question.endswith("1") else "1")
        assert side_of(twin) == "test"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return rrcli.load("default")[1]


TESTED = "How many legs have 3 cats and 4 dogs in the garden?"


def test_variants_of_a_test_question_are_never_trained_on(tmp_path: Path, tokenizer: Any) -> None:
    """Neither as problems, nor in conversations and texts, nor inside of them."""
    variants = [TESTED.upper(), TESTED.replace(" ", "  "), TESTED.removesuffix("?"), TESTED.replace("3", "4", 1)]
    variants[3] = "How many legs have 4 cats and 3 dogs in the garden?"
    others = [f"How many legs have {n} cows?" for n in range(60)]
    problems = [*variants, *others]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"question": q, "answer": 1}) + "\n" for q in problems))
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": TESTED, "answer": 28}) + "\n")
    rows = [{"prompt": q, "completion": " 1"} for q in (*variants, f"Tell me: {TESTED.lower()} Think first.", *others)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    specs = ("train.jsonl", "test.jsonl:held_out=all")
    settings = TrainSettings(data="data.jsonl", task=specs, task_share=0.5, batch_size=100, max_length=64)
    training = TrainingData(settings, tmp_path, tokenizer)
    shown = [tokenizer.decode(training.example(number)[0]) for number in range(300)]
    assert any("cows" in text for text in shown)
    assert not [text for text in shown if "cats" in text.lower()]
    trained = trained_questions(specs, tmp_path)
    assert not [q for q in variants if q in trained]
    texts = [{"text": f"A quiz.\n\n{TESTED.upper()}\n\nIt is 28."}, *({"text": q} for q in others)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, texts)))
    assert not [text for text in TrainingData(settings, tmp_path, tokenizer).documents if "QUIZ" in text.upper()]


def test_a_short_question_is_no_part_of_every_text() -> None:
    questions = Questions(["Why?", TESTED])
    assert "why" in questions
    assert not questions.asked_in(["Tom asked why the sky is blue."])
    assert questions.asked_in(["Tom asked.", "WHY"])
    assert questions.asked_in(["Tom asked: how many legs have 3 cats and 4 dogs in the garden? Nobody knew."])
    assert not questions.asked_in(["How many legs have 3 cats and 4 dogs in the house?"])
    assert not Questions().asked_in(["Why?"])


def test_a_held_out_question_of_a_generator_that_a_training_text_quotes_is_not_asked(tmp_path: Path) -> None:
    spec = "leg_counting:min_animals=3,max_animals=4"
    settings = EvalSettings(task=(spec,), data="texts.jsonl")
    asked = Task(spec).problems(12, 0, side="test")
    texts = [f"Text number {number} of a long day." for number in range(200)]
    on_train = [number for number, text in enumerate(texts) if side_of(text) == "train"]
    quotes = (f"Tom laughed {n} times. \u201c{asked[3].question.upper()}\u201d he said at last." for n in range(99))
    quoting = next(text for text in quotes if side_of(text) == "train")
    for quoted, known in ((texts[on_train[0]], 12), (quoting, 11)):
        lines = [*texts[: on_train[0]], quoted, *texts[on_train[0] + 1 :]]
        (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in lines))
        data = held_out_data(settings, tmp_path, 12)
        assert len(data.problems) == sum(data.sets) == known
        assert ("1 problems of generators are left out" in data.notice) == (known == 11)
    assert asked[3].key not in {problem.key for problem in data.problems}
