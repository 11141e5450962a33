"""The lookup baseline, and data in which each document and problem counts once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import rrcli
from rrcli.data.problem_files import FileTask
from rrcli.data.tasks import Problem, Task
from rrcli.demo import defaults
from rrcli.evaluation.evaluate import evaluate_model
from rrcli.evaluation.held_out import EvalData, distinct, held_out_data
from rrcli.evaluation.lookup import look_up, nearest_answers
from rrcli.evaluation.metrics import from_records, metrics_of
from rrcli.reporting import Silent
from rrcli.settings import EvalSettings


class Noting(Silent):
    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


def file_task(folder: Path, rows: list[tuple[str, Any]], options: str = "") -> FileTask:
    (folder / "train.jsonl").write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in rows))
    (folder / "test.jsonl").write_text(json.dumps({"question": "unused", "answer": 1}))
    return FileTask(f"test.jsonl:held_out=all,examples=train.jsonl{options}", folder)


ROWS = [
    ("Take 3 steps from: 0 0 0 0 0 0", "a"),
    ("Take 3 steps from: 0 1 0 0 0 0", "b"),
    ("Take 3 steps from: 0 1 1 1 1 0", "c"),
    ("Tom has apples and gives Ann some of them.", "d"),
    ("A train leaves the station at noon and drives north.", "e"),
]


@pytest.mark.parametrize(
    ("question", "nearest"),
    [
        ("Take 3 steps from: 0 1 1 0 0 1", "c"),
        ("take 3 steps from 0 1 0 1 1 1", "b"),
        ("Take 3 steps from: 0 0 1 1 1 1", "a"),
        ("Take 3 steps from: 0 1 1 1 1 0", "c"),
        ("Some apples were given to Ann. Tom had them.", "d"),
        ("At noon a train drives north; which station does it leave?", "e"),
    ],
)
def test_the_nearest_problem_shares_the_beginning_or_else_words(tmp_path: Path, question: str, nearest: str) -> None:
    task = file_task(tmp_path, ROWS)
    assert nearest_answers([task], [Problem(task.spec, question, "x")]) == [nearest]
    assert look_up([task], [Problem(task.spec, question, nearest)]) == [True]
    assert look_up([task], [Problem(task.spec, question, "x")]) == [False]


def test_where_there_is_nothing_to_look_up(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": "q", "answer": 1}))
    task = FileTask("test.jsonl:held_out=all", tmp_path)
    assert look_up([task], task.all) == [None]
    assert look_up([], []) == []
    unknown = Problem(file_task(tmp_path, ROWS).spec, "!", "x")
    assert len(nearest_answers([file_task(tmp_path, ROWS)], [unknown])) == 1


def test_a_twin_of_a_test_question_is_not_looked_up(tmp_path: Path) -> None:
    task = file_task(tmp_path, [("What is 3 + 4 of them?", 7), ("What is 5 of them?", 5)])
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": "what is 4 + 3 of them", "answer": 7}))
    task = FileTask(task.spec, tmp_path)
    assert nearest_answers([task], task.all) == ["5"]


def test_a_lookup_answers_few_of_the_embedded_problems() -> None:
    """When the question's own words decided, it answered 72 % of the 4-step rows."""
    tasks = [Task(spec) for spec in defaults.TASKS]
    for task, most in zip(tasks, (0.05, 0.15, 0.05), strict=True):
        found = look_up([task], task.problems(100, 0, side="test"))
        assert sum(map(bool, found)) <= most * 100


def test_the_lookup_is_reported_beside_the_scores() -> None:
    model, tokenizer = rrcli.load("default")
    tasks = tuple(Task(spec) for spec in defaults.TASKS)
    problems = tuple(p for task in tasks for p in task.problems(3, 0, side="test"))
    settings = EvalSettings(max_new_tokens=4, skip_performance=True)
    found = evaluate_model(model, tokenizer, EvalData(tasks=tasks, problems=problems), settings=settings)
    entry = found["metrics"]["reasoning_accuracy_lookup"]
    assert entry["n"] == 9
    assert 0 <= entry["low"] <= entry["value"] <= entry["high"] <= 100
    assert found["metrics"]["reasoning_accuracy_lookup/row_add"]["n"] == 3
    names = [metric.name for metric in metrics_of(found["metrics"]) if metric.compared]
    assert names.index("reasoning_accuracy_lookup") == names.index("reasoning_accuracy/row_add") + 1
    validation = EvalData(tasks=tasks, problems=problems, side="validation")
    found = evaluate_model(model, tokenizer, validation, settings=settings)
    assert "reasoning_accuracy_lookup" not in found["metrics"]
    assert from_records(found["records"])["reasoning_accuracy"]["n"] == 9


# -- each document and problem counts once -----------------------------------------------------------------------------


def test_repeats_count_once_everywhere() -> None:
    """Perplexity counted a repeated text once, the number of documents and its interval twice."""
    model, tokenizer = rrcli.load("default")
    texts = ["Tom has a red ball.", "Ann has a blue ball.", "Tom has a red ball."]
    settings, reporter = EvalSettings(skip_performance=True), Noting()
    found = evaluate_model(model, tokenizer, texts, settings=settings, reporter=reporter)
    once = evaluate_model(model, tokenizer, texts[:2], settings=settings)
    assert found["metrics"] == once["metrics"]
    assert found["records"] == once["records"]
    assert found["metrics"]["perplexity"]["n"] == 2
    assert reporter.notes[0] == "left out, because they repeat others: 1 document"


def test_problems_and_prompts_count_once_too() -> None:
    task = Task("chain_sum")
    first, second = task.problems(2, 0, side="test")
    data = EvalData(documents=("a", "b"), tasks=(task,), problems=(first, second, first), prompts=("x", "x"))
    kept = distinct(data, rrcli.load("default")[1], EvalSettings())
    assert (kept.documents, kept.problems, kept.prompts) == (("a", "b"), (first, second), ("x",))
    assert kept.notice == "left out, because they repeat others: 1 problem and 1 prompt"
    assert distinct(kept, rrcli.load("default")[1], EvalSettings()) is kept


def test_the_notice_of_a_file_tells_of_its_repeats(tmp_path: Path) -> None:
    lines = [json.dumps({"question": f"What is {n % 60} and more?", "answer": n % 60}) for n in range(90)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    data = held_out_data(EvalSettings(task=("a.jsonl",)), tmp_path, 100)
    assert data.notice == "a.jsonl: 30 repeated questions were left out"
    assert len({p.question for p in data.problems}) == len(data.problems)
