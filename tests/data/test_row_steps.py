"""The embedded task of rows: its rule, its scorer, and how it is asked for by name."""

from __future__ import annotations

import pytest

from rrcli.data.tasks import Task
from rrcli.demo.row_steps import evolve
from rrcli.errors import UsageError


def test_one_cell_grows_into_the_triangle_of_rule_30():
    row = [1, 0, 0, 0, 0, 0, 0, 0, 0]
    assert [evolve(row, steps) for steps in range(5)] == [
        [1, 0, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0, 0, 0],
        [1, 1, 0, 1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0, 0, 0, 1],
    ]


def test_a_cell_depends_on_nothing_behind_it():
    row = [1, 0, 1, 1, 0, 0, 1]
    assert evolve([*row, 1, 1], 4)[: len(row)] == evolve(row, 4)


def test_steps_add_up():
    row = [1, 0, 1, 1, 0, 0, 1]
    assert evolve(evolve(row, 2), 3) == evolve(row, 5)


def test_the_question_holds_steps_and_row_and_the_answer_follows_from_them():
    for problem in Task("row_steps:min_steps=2,max_steps=5,length=7").problems(40, 0, side="test"):
        steps = problem.entry["metadata"]["difficulty"]["steps"]
        row = problem.question.split("from: ")[1]
        assert 2 <= steps <= 5
        assert f"Take {steps} steps" in problem.question
        assert problem.difficulty == f"row_steps, steps {steps}"
        assert problem.answer == " ".join(map(str, evolve([int(cell) for cell in row.split()], steps)))


def test_only_the_whole_row_is_right():
    task = Task("row_steps")
    problem = task.problems(1, 0, side="test")[0]
    assert task.score(f"  {problem.answer}\n", problem) == 1
    for wrong in ("", problem.answer[:-2], f"{problem.answer} 0", problem.answer.replace(" ", "")):
        assert task.score(wrong, problem) == 0


@pytest.mark.parametrize("options", ["min_steps=3,max_steps=2", "min_steps=0", "max_steps=10", "length=1"])
def test_options_that_make_no_problem_are_refused(options):
    with pytest.raises(UsageError, match="refused its options"):
        Task(f"row_steps:{options}")
