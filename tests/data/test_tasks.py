"""The split, and reasoning problems on both sides of it."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rrcli.data.novelty import novelty
from rrcli.data.splits import TEST_SHARE, VALIDATION_SHARE, content_hash, side_of
from rrcli.data.tasks import Problem, Task, parse_spec, prompt_of
from rrcli.demo import defaults
from rrcli.errors import UsageError

SPECS = ("chain_sum:min_terms=2,max_terms=3", *defaults.TASKS)
OTHERS = ("gcd", "spell_backward", "letter_counting", "number_sorting", "base_conversion", "sudoku")


# -- the split ---------------------------------------------------------------------------------------------------------


def test_about_one_text_in_ten_is_for_test_and_one_in_twenty_for_validation() -> None:
    n = 40_000
    counts = Counter(side_of(f"document number {i}") for i in range(n))
    for side, share, expected in (("test", TEST_SHARE, 0.1), ("validation", VALIDATION_SHARE, 0.05)):
        assert share == pytest.approx(expected, abs=0.002)
        assert counts[side] / n == pytest.approx(share, abs=4 * math.sqrt(share / n))


@given(st.text())
def test_the_split_depends_on_the_text_alone(text: str) -> None:
    assert content_hash(text) == hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    expected = hashlib.sha256(novelty(text).encode("utf-8", "surrogatepass")).digest()
    assert side_of(text) == ("test" if expected[0] < 26 else "validation" if expected[0] < 39 else "train")


def test_a_lone_surrogate_has_a_hash() -> None:
    assert content_hash("\ud800") != content_hash("\udfff")


# -- names and options -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "name", "options"),
    [
        ("chain_sum", "chain_sum", {}),
        (" chain_sum : min_terms = 2 , max_terms=3 ", "chain_sum", {"min_terms": 2, "max_terms": 3}),
        ("a:", "a", {}),
        ("a:x=1.5,y=True,z=None,w=word,v='quoted'", "a", {"x": 1.5, "y": True, "z": None, "w": "word", "v": "quoted"}),
        ("a:x=1=2", "a", {"x": "1=2"}),
        ("a:x=", "a", {"x": ""}),
    ],
)
def test_parse_spec(spec: str, name: str, options: dict[str, object]) -> None:
    assert parse_spec(spec) == (name, options)


def test_an_option_may_be_a_list() -> None:
    assert parse_spec("basic_arithmetic:operators=['+','-'],max_terms=3") == (
        "basic_arithmetic",
        {"operators": ["+", "-"], "max_terms": 3},
    )


@pytest.mark.parametrize(
    ("spec", "message", "hint"),
    [
        ("chian_sum", "unknown task 'chian_sum'", "Did you mean 'chain_sum'?"),
        ("", "unknown task ''", ""),
        ("chain_sum:min_term=2", "task 'chain_sum' has no option 'min_term'", "Did you mean 'min_terms'?"),
        ("chain_sum:min_terms", "option 'min_terms' .* has no value", "key=value"),
        ("chain_sum:seed=3", "has no option 'seed'", "min_terms"),
        ("chain_sum:size=3", "has no option 'size'", "min_terms"),
        ("chain_sum:min_terms=5,max_terms=2", "refused its options", ""),
        ("chain_sum:min_terms=two", "refused its options", ""),
    ],
)
def test_a_task_that_means_nothing_is_refused(spec: str, message: str, hint: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        Task(spec)
    assert caught.value.exit_code == 2
    assert hint in caught.value.hint


def test_options_reach_the_generator() -> None:
    for problem in Task("chain_sum:min_terms=4,max_terms=4,min_digits=1,max_digits=1").problems(20, 0, side="test"):
        assert sum(problem.question.count(sign) for sign in (" + ", " - ")) == 3


# -- problems ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS)
def test_training_and_evaluation_never_share_a_question(spec: str) -> None:
    task = Task(spec)
    evaluation = {problem.question for problem in task.problems(60, seed=0, side="test")}
    training = {p.question for seed in range(3) for p in task.stream(seed * 777, limit=700, side="train")}
    assert len(evaluation) == 60
    assert len(training) > 100
    assert not evaluation & training
    assert {side_of(question) for question in evaluation} == {"test"}
    assert {side_of(question) for question in training} == {"train"}


def test_all_sides_together_are_the_whole_stream() -> None:
    task = Task(SPECS[0])
    counts = {side: len(list(task.stream(5, limit=500, side=side))) for side in ("test", "validation", "train")}
    assert sum(counts.values()) == 500
    assert 20 < counts["test"] < 90
    assert 8 < counts["validation"] < 50


def test_validation_takes_what_there_is() -> None:
    task = Task("chain_sum:min_terms=2,max_terms=2,min_digits=1,max_digits=1")
    few = task.problems(400, 0, side="validation")
    assert 0 < len(few) < 40
    assert {side_of(problem.question) for problem in few} == {"validation"}


@pytest.mark.parametrize("spec", SPECS)
def test_the_same_seed_gives_the_same_problems(spec: str) -> None:
    first, again = (Task(spec).problems(15, 3, side="test") for _ in range(2))
    assert first == again
    assert [p.key for p in first] == [p.key for p in again]
    assert first != Task(spec).problems(15, 4, side="test")


def test_asking_for_more_keeps_the_first() -> None:
    task = Task(SPECS[0])
    assert task.problems(30, 0, side="test")[:10] == task.problems(10, 0, side="test")


@pytest.mark.parametrize("spec", SPECS)
def test_the_problems_of_two_seeds_are_apart(spec: str) -> None:
    """Generators make item i from seed + i: drawn so, seeds 0, 1 and 2 evaluated almost the same problems."""
    task = Task(spec)
    for side in ("test", "validation"):
        sets = [{p.key for p in task.problems(30, seed, side=side)} for seed in (0, 1, 2, 5, 15)]
        assert {len(keys) for keys in sets} == {30}
        assert len(set().union(*sets)) == 5 * 30
    assert task.draw(30, 15, side="test")[1] == 15


def test_large_seeds_draw_from_other_parts() -> None:
    task = Task("chain_sum:min_terms=5,max_terms=6,min_digits=3")
    sets = [{p.key for p in task.problems(30, seed, side="test")} for seed in (0, 16, 17, 42, 1234, 2**40)]
    assert len(set().union(*sets)) == 6 * 30


def test_the_blocks_of_a_small_generator_go_round() -> None:
    task = Task("chain_sum:min_terms=2,max_terms=2,min_digits=1,max_digits=1")
    owners = [task.draw(5, seed, side="test")[1] for seed in range(8)]
    count = max(owners) + 1
    assert 2 < count < 7
    assert owners == [seed % count for seed in range(8)]
    assert task.problems(5, count + 1, side="test") == task.problems(5, 1, side="test")


def test_problems_are_distinct_and_a_small_generator_says_how_few_it_has() -> None:
    task = Task("chain_sum:min_terms=2,max_terms=2,min_digits=1,max_digits=1")
    with pytest.raises(UsageError, match=r"yields only (\d+) distinct test problems, 400 were") as caught:
        task.problems(400, 0, side="test")
    assert "fewer" in caught.value.hint
    few = task.problems(5, 0, side="test")
    assert len({problem.question for problem in few}) == 5


def test_keys_tell_tasks_and_questions_apart() -> None:
    easy, same_but_named_otherwise = Task("chain_sum"), Task("chain_sum:min_terms=2")
    a = easy.problems(3, 0, side="test")
    b = same_but_named_otherwise.problems(3, 0, side="test")
    assert [p.question for p in a] == [p.question for p in b]
    assert len({p.key for p in a + b}) == 6


# -- scores ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS + OTHERS)
def test_a_scorer_accepts_its_own_answer_and_no_nonsense(spec: str) -> None:
    task = Task(spec)
    problems = list(itertools.islice(task.stream(1, limit=60, side="train"), 4))
    assert len(problems) == 4
    for problem in problems:
        assert task.score(problem.answer, problem) == 1
        for wrong in ("", "no idea", "[[1, 2", "-987654321"):
            assert 0 <= task.score(wrong, problem) < 1


@given(answer=st.text(max_size=40))
def test_any_answer_has_a_score(answer: str) -> None:
    for task, problem in ANSWERED:
        assert 0 <= task.score(answer, problem) <= 1


ANSWERED = [(task, task.problems(1, 0, side="test")[0]) for task in map(Task, defaults.TASKS)]


def test_an_answer_that_a_scorer_cannot_read_is_wrong() -> None:
    task = Task("prime_factorization")
    assert task.score("no idea", task.problems(1, 0, side="test")[0]) == 0


def test_the_prompt_ends_where_the_answer_begins() -> None:
    assert prompt_of("1 + 1 = ?") == "Question: 1 + 1 = ?\nAnswer:"


@pytest.mark.parametrize(("spec", "name"), [("chain_sum", "num_terms"), ("rotate_matrix:min_n=2,max_n=12", "n")])
def test_a_problem_states_how_hard_it_is_where_its_generator_does(spec, name):
    for problem in Task(spec).problems(5, 0, side="test"):
        stated = problem.entry["metadata"][name]
        assert problem.difficulty == f"{spec.partition(':')[0]}, {name} {stated}"
    assert Problem("file.jsonl", "1 + 1?", "2").difficulty is None
