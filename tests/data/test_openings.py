"""What is held out of a file in which many conversations ask the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import rrcli
from rrcli.data.openings import COMMON_ONE_IN, COMMON_ROWS
from rrcli.data.sources import Notes, read_split
from rrcli.data.splits import side_of
from rrcli.data.training_data import TrainingData
from rrcli.evaluation.held_out import held_out_data
from rrcli.settings import EvalSettings, TrainSettings

N = 1000
# One of the test side, one of the training side.
SIDES = [next(q for n in range(99) if side_of(q := f"Write story {n}.") == side) for side in ("test", "train")]


def pairs(prompt: str, count: int = N, first: int = 0) -> list[dict[str, Any]]:
    return [{"prompt": prompt, "completion": f" Story number {n}."} for n in range(first, first + count)]


def talks(*turns: str, count: int = N) -> list[dict[str, Any]]:
    """Return conversations with these turns, of the user first; {} stands for the row's number."""
    roles = ("user", "assistant")
    texts = [[turn.format(n) for turn in turns] for n in range(count)]
    return [{"messages": [{"role": roles[i % 2], "content": t} for i, t in enumerate(row)]} for row in texts]


def write(file: Path, rows: list[dict[str, Any]]) -> str:
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file.name


def held_out(folder: Path, name: str, notes: Notes | None = None) -> list[Any]:
    return [document for document, side in read_split(name, folder, notes=notes) if side == "test"]


@pytest.mark.parametrize("question", SIDES)
@pytest.mark.parametrize(
    "rows",
    [pairs, lambda q: talks(q, "Tale {}."), lambda q: talks(q, "What about?", "Cat {}.", "Once")],
    ids=["completions", "answers", "later questions"],
)
def test_rows_that_ask_the_same_are_split_by_what_differs(tmp_path: Path, rows: Any, question: str) -> None:
    name, notes = write(tmp_path / "a.jsonl", rows(question)), Notes()
    evaluated = held_out(tmp_path, name, notes)
    assert 0.07 * N < len(evaluated) < 0.13 * N
    assert notes.notice(name).startswith(f"a.jsonl: 1,000 of 1,000 conversations ask '{question}': ")
    settings = {"data": name, "task": ("chain_sum",)}
    data = held_out_data(EvalSettings(**settings), tmp_path, 1, reasoning=False)
    assert list(data.documents) == evaluated
    assert data.notice == notes.notice(name)
    training = TrainingData(TrainSettings(**settings), tmp_path, rrcli.load("default")[1])
    assert training.notice == data.notice
    validation = held_out_data(EvalSettings(**settings), tmp_path, 1, side="validation", reasoning=False).documents
    assert len(training.documents) == N - len(evaluated) - len(validation)
    assert not any(document in evaluated or document in validation for document in training.documents)


def test_a_later_question_decides_with_all_its_answers(tmp_path: Path) -> None:
    rows = [
        {"messages": [*talks("Hi", "Hello!", f"Cat {n}?", "")[0]["messages"][:3], {"role": "assistant", "content": a}]}
        for n in range(200)
        for a in ("Yes.", "No.")
    ]
    found = held_out(tmp_path, write(tmp_path / "a.jsonl", rows))
    assert found == [row for row in rows if side_of(row["messages"][2]["content"]) == "test"]


def test_a_question_with_few_answers_stays_whole(tmp_path: Path) -> None:
    """Both in absolute numbers and in a large file."""
    few = [row for question in SIDES for row in pairs(question, COMMON_ROWS - 1)]
    notes = Notes()
    assert held_out(tmp_path, write(tmp_path / "few.jsonl", few), notes) == few[: COMMON_ROWS - 1]
    assert notes.notice("few.jsonl") == ""
    others = [{"prompt": f"How many are {n}?", "completion": " So many."} for n in range(N)]
    rest = [row for row in others if side_of(row["prompt"]) == "test"]
    many = pairs(SIDES[0], N // COMMON_ONE_IN)
    assert held_out(tmp_path, write(tmp_path / "many.jsonl", [*many, *others])) == [*many, *rest]
    more = pairs(SIDES[0], N // (COMMON_ONE_IN - 1) + 1)
    found = held_out(tmp_path, write(tmp_path / "more.jsonl", [*more, *others]))
    assert found[-len(rest) :] == rest
    assert 0 < len(found) - len(rest) < 20


def test_a_folder_is_split_as_its_files_are(tmp_path: Path) -> None:
    folder = tmp_path / "all"
    write(folder / "a.jsonl", pairs(SIDES[1], 40))
    write(folder / "b.jsonl", [{"prompt": f"How many are {n}?", "completion": " So many."} for n in range(N)])
    write(folder / "c.jsonl", [{"text": f"Tale {n}."} for n in range(50)])
    single = [document for name in "abc" for document in held_out(folder, f"{name}.jsonl")]
    assert held_out(tmp_path, "all") == single
    assert {"prompt", "completion"} == set(single[0])


def test_no_training_sees_the_question_of_a_held_out_problem(tmp_path: Path) -> None:
    """Though so many conversations ask it that they are split by their answers."""
    problems = [{"question": SIDES[0], "answer": "1"}, {"question": SIDES[1], "answer": "2"}]
    write(tmp_path / "p.jsonl", problems)
    write(tmp_path / "a.jsonl", [*pairs(SIDES[0], 50), *pairs(SIDES[1], 50)])
    settings = TrainSettings(data="a.jsonl", task=("p.jsonl",), task_share=0.0)
    documents = TrainingData(settings, tmp_path, rrcli.load("default")[1]).documents
    assert {document["prompt"] for document in documents} == {SIDES[1]}
