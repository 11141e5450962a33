"""Problems from tables and from data sets of the hub: fields, choices, and splits of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from rrcli.data.novelty import novelty
from rrcli.data.problem_files import FileTask, open_task, task_fingerprints, trained_against_the_rule, trained_questions
from rrcli.data.problem_rows import is_file_task, problem_source
from rrcli.data.splits import side_of
from rrcli.errors import RRError, UsageError
from rrcli.evaluation.held_out import held_out_data
from rrcli.settings import EvalSettings


def table(file: Path, **columns: list[Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), file)
    return file


def birds(name: str, count: int) -> list[str]:
    return [f"How many {name} birds sit on {i} trees with {i + 3} birds each?" for i in range(count)]


def data_set(folder: Path, splits: dict[str, list[str]], config: str = "main") -> Path:
    """Write a data set in the shape of GSM8K, as a repository of the hub holds it."""
    for split, questions in splits.items():
        answers = [f"First think about {n}.\n#### {n}" for n, _ in enumerate(questions)]
        table(folder / config / f"{split}-00000-of-00001.parquet", question=questions, answer=answers)
    files = "".join(f"  - split: {split}\n    path: {config}/{split}-*\n" for split in splits)
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: {config}\n  data_files:\n{files}---\n")
    return folder


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "place", "options"),
    [
        ("a.jsonl", "a.jsonl", {}),
        (" data/a.csv:question=Q,answer=A ", "data/a.csv", {"question": "Q", "answer": "A"}),
        ("hf://openai/gsm8k:main", "hf://openai/gsm8k:main", {}),
        ("hf://a/b@v1:main:test:grade=number", "hf://a/b@v1:main:test", {"grade": "number"}),
        ("hf://a/b:question=q,train=aux", "hf://a/b", {"question": "q", "train": "aux"}),
        (
            r"a.parquet:question=q,grade=regex:(?:a=|b:) (\d+), then",
            "a.parquet",
            {"question": "q", "grade": r"regex:(?:a=|b:) (\d+), then"},
        ),
        ("a.csv:grade=my_grader:judge,answer=x", "a.csv", {"grade": "my_grader:judge", "answer": "x"}),
    ],
)
def test_a_task_is_taken_apart(spec: str, place: str, options: dict[str, str]) -> None:
    source = problem_source(spec)
    assert (source.place, source.options) == (place, options)
    assert is_file_task(spec)


def test_generators_are_no_files() -> None:
    assert not any(map(is_file_task, ("chain_sum", "chain_sum:min_terms=2", "basic_arithmetic:operators=['+']")))


# -- fields ------------------------------------------------------------------------------------------------------------


def test_every_kind_of_table_gives_the_same_problems(tmp_path: Path) -> None:
    rows = [{"Q": f"What is {i}?", "A": str(i), "more": "x"} for i in range(5)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "a.csv").write_text("Q,A,more\n" + "".join(f'"{r["Q"]}",{r["A"]},x\n' for r in rows))
    table(tmp_path / "a.parquet", **{name: [row[name] for row in rows] for name in rows[0]})
    table(tmp_path / "set" / "train.parquet", **{name: [row[name] for row in rows] for name in rows[0]})
    found = {}
    for place in ("a.jsonl", "a.csv", "a.parquet", "hf://./set"):
        task = FileTask(f"{place}:question=Q,answer=A", tmp_path)
        found[place] = {(problem.question, problem.answer) for problem in task.all}
        assert not task.own_splits, "a training split alone is split by the rule"
    assert set(map(frozenset, found.values())) == {frozenset((row["Q"], row["A"]) for row in rows)}


@pytest.mark.parametrize(
    ("columns", "options", "message", "hint"),
    [
        ({"q": ["x"], "answer": ["1"]}, "", r"no column 'question' \(it has q, answer\)", "a.parquet:question=FIELD"),
        ({"question": ["x"], "a": ["1"]}, "", r"no column 'answer' \(it has question, a\)", "a.parquet:answer=FIELD"),
        ({"question": ["x", None], "answer": ["1", "2"]}, "", "row 2: no 'question'", "question=FIELD"),
        ({"question": ["x"], "answer": [None]}, "", "row 1: no 'answer'", "answer=FIELD"),
        ({"question": ["x"], "answer": ["1"]}, "solution=work", "no column 'work'", "solution=FIELD"),
        (
            {"question": ["x"], "answer": ["Paris"]},
            "grade=number",
            "row 1: the answer 'Paris' is not one number",
            "grade",
        ),
        ({"question": ["x"], "answer": ["3 of 4"]}, "grade=number", "'3 of 4' is not one number", "grade"),
        ({"question": ["x"], "answer": ["Paris"]}, "grade=choice", "'Paris' is no letter", "grade"),
    ],
)
def test_a_row_that_is_no_problem_is_named_with_the_fields(
    tmp_path: Path, columns: dict[str, list[Any]], options: str, message: str, hint: str
) -> None:
    table(tmp_path / "a.parquet", **columns)
    with pytest.raises(RRError, match=message) as caught:
        FileTask(f"a.parquet:{options}" if options else "a.parquet", tmp_path)
    assert hint in caught.value.hint


def test_a_solution_and_fields_inside_of_others(tmp_path: Path) -> None:
    row = {"data": {"problem": "What is half of 3?"}, "answer": "1.5", "a.b": "no", "work": "3 / 2 = 1.5"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    [problem] = FileTask("a.jsonl:question=data.problem,solution=work", tmp_path).all
    assert (problem.question, problem.answer, problem.target) == ("What is half of 3?", "1.5", "3 / 2 = 1.5")
    [problem] = FileTask("a.jsonl:question=a.b", tmp_path).all
    assert problem.question == "no"


@pytest.mark.parametrize(
    ("choices", "answer", "letter"),
    [
        (["red", "blue", "green"], 1, "B"),  # as in MMLU
        (["red", "blue", "green"], "C", "C"),
        (["red", "blue", "green"], "green", "C"),
        (["red", "blue", "green"], "2", "C"),  # as in HellaSwag
        (["2", "1", "0"], "2", "A"),
        (["2", "1", "0"], 2, "C"),
        ({"text": ["red", "blue"], "label": ["A", "B"]}, "B", "B"),  # as in ARC
        ({"text": ["red", "blue", "green"], "label": ["1", "2", "3"]}, "2", "B"),
        ([{"text": "red", "label": "x"}, {"text": "blue", "label": "y"}], "y", "B"),
    ],
)
def test_choices_stand_below_the_question(tmp_path: Path, choices: Any, answer: Any, letter: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"question": "Which?", "options": choices, "answer": answer}))
    [problem] = FileTask("a.jsonl:choices=options,grade=choice", tmp_path).all
    assert problem.question.startswith(("Which?\nA. red\nB. blue", "Which?\nA. 2\nB. 1\nC. 0"))
    assert problem.answer == problem.target == letter


@pytest.mark.parametrize(("choices", "answer"), [(["a", "b"], 2), (["a", "b"], "c"), (["x", "x"], "x"), ("a, b", "a")])
def test_an_answer_that_is_no_choice_is_refused(tmp_path: Path, choices: Any, answer: Any) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"question": "Which?", "options": choices, "answer": answer}))
    with pytest.raises(RRError, match=r"a\.jsonl, line 1: "):
        FileTask("a.jsonl:choices=options,grade=choice", tmp_path)


# -- splits ------------------------------------------------------------------------------------------------------------


def test_own_splits_are_kept(tmp_path: Path) -> None:
    questions = {"train": birds("red", 120), "test": birds("blue", 30)}
    data_set(tmp_path / "set", questions)
    task = FileTask("hf://./set:main", tmp_path)
    assert task.own_splits
    assert not task.whole
    assert {p.question for p in task.on("test")} == set(questions["test"])
    validation = {q for q in questions["train"] if side_of(q) == "validation"}
    assert {p.question for p in task.on("validation")} == validation
    assert 0 < len(validation) < 20
    assert {p.question for p in task.on("train")} == set(questions["train"]) - validation
    assert task.examples(5)[0].question in questions["train"]
    trained = trained_questions([task.spec], tmp_path)
    assert all((q in trained) == (q not in validation) for q in questions["train"])
    against = trained_against_the_rule([task.spec], tmp_path)
    assert all((q in against) == (side_of(q) == "test") for q in questions["train"])


def test_what_stands_in_two_splits_counts_for_the_later_one(tmp_path: Path) -> None:
    shared = birds("blue", 3)
    train = [*birds("red", 40), shared[0], shared[1].upper(), "  " + shared[2]]
    data_set(tmp_path / "set", {"train": train, "validation": birds("green", 10), "test": birds("blue", 20)})
    task = FileTask("hf://./set", tmp_path)
    keys = [{novelty(p.question) for p in task.on(side)} for side in ("train", "validation", "test")]
    assert [len(k) for k in keys] == [40, 10, 20]
    assert len(set.union(*keys)) == 70
    assert (task.repeated, task.twins) == (2, 1)
    assert task.notice.endswith("2 repeated questions and 1 near-twins of problems on a later side were left out")


@pytest.mark.parametrize(
    ("splits", "spec", "counts"),
    [
        (("train", "validation"), "", (None, None, 20)),  # without a test split, validation is tested
        (("train", "dev", "validation", "test"), "", (20, 20, 20)),
        (("test",), "", (0, 0, 20)),
        (("validation", "test"), "", (0, 20, 20)),
        (("auxiliary", "train", "test"), ":train=auxiliary", (None, None, 20)),
        (("one", "two"), ":train=one,test=two", (None, None, 20)),
        (("train", "test"), ":held_out=all", (0, 0, 40)),
        (("train", "test"), ":main:test", (0, 0, 20)),
    ],
)
def test_which_split_is_for_what(
    tmp_path: Path, splits: tuple[str, ...], spec: str, counts: tuple[int | None, ...]
) -> None:
    data_set(tmp_path / "set", {name: birds(name, 20) for name in splits})
    task = FileTask(f"hf://./set{spec}", tmp_path)
    for side, count in zip(("train", "validation", "test"), counts, strict=True):
        assert count is None or len(task.on(side)) == count
    trained = sum(len(task.on(side)) for side in ("train", "validation"))
    assert trained == sum(counts[:2]) if None not in counts else trained == 20
    assert task.trains == (counts[0] != 0)


@pytest.mark.parametrize(
    ("splits", "spec", "message"),
    [
        (("one", "two"), "", "has the splits one, two"),
        (("train", "test"), ":test=tset", "has no split 'tset'"),
        (("train", "test"), ":main:train:test=test", "names a split, and then splits"),
        (("train", "test"), ":gold=answer", "has no option 'gold'"),
    ],
)
def test_splits_that_mean_nothing_are_refused(tmp_path: Path, splits: tuple[str, ...], spec: str, message: str) -> None:
    data_set(tmp_path / "set", {name: birds(name, 9) for name in splits})
    with pytest.raises(UsageError, match=message):
        FileTask(f"hf://./set{spec}", tmp_path)


def test_nothing_is_evaluated_that_a_training_split_asks(tmp_path: Path) -> None:
    train = birds("red", 150)
    data_set(tmp_path / "set", {"train": train, "test": birds("blue", 20)})
    against = [question for question in train if side_of(question) == "test"]
    assert len(against) > 3
    others = [f"A story about the number {i}." for i in range(80)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in [*others, *against[:3]]))
    settings = EvalSettings(data="texts.jsonl", task=("hf://./set",))
    data = held_out_data(settings, tmp_path, 50)
    assert len(data.problems) == 20
    assert set(data.documents) == {text for text in others if side_of(text) == "test"}
    assert "3 texts of texts.jsonl are left out, because training asks their questions" in data.notice
    # Of text of one's own nothing is trained on, so all of it stays.
    own = held_out_data(EvalSettings(data="default", eval_data="texts.jsonl", task=("hf://./set",)), tmp_path, 50)
    assert set(own.documents) == {*others, *against[:3]}


def test_the_identity_covers_rows_splits_fields_and_the_users_grader(tmp_path: Path) -> None:
    data_set(tmp_path / "set", {"train": birds("red", 20), "test": birds("blue", 9)})
    (tmp_path / "own_grader.py").write_text("def judge(output, answer, row):\n    return output == answer\n")
    spec = "hf://./set:grade=own_grader:judge"

    def identity(*, grading: bool = True) -> str:
        return str(task_fingerprints(spec, tmp_path, grading=grading))

    seen = [identity(), identity(grading=False)]
    (tmp_path / "own_grader.py").write_text("def judge(output, answer, row):\n    return answer in output\n")
    assert identity(grading=False) == seen[1]
    seen.append(identity())
    data_set(tmp_path / "set", {"train": birds("red", 21), "test": birds("blue", 9)})
    seen.append(identity())
    data_set(tmp_path / "set", {"train": birds("red", 9), "test": [*birds("blue", 9), *birds("red", 21)[9:]]})
    seen.append(identity())
    assert len(set(seen)) == len(seen)


def test_a_task_is_read_once_while_its_files_stay_the_same(tmp_path: Path) -> None:
    table(tmp_path / "a.parquet", question=birds("red", 60), answer=[1] * 60)
    first = open_task("a.parquet", tmp_path)
    assert open_task("a.parquet", tmp_path) is first
    table(tmp_path / "a.parquet", question=birds("red", 61), answer=[1] * 61)
    again = open_task("a.parquet", tmp_path)
    assert isinstance(again, FileTask)
    assert len(again.all) == 61
