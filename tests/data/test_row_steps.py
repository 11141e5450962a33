"""The embedded tasks of rows: their rules, their scorer, and how they are asked for by name."""

from __future__ import annotations

import subprocess
import sys

import pytest

from rrcli.data.tasks import Task
from rrcli.demo.row_steps import COUNTS, RowAdd, RowShift, RowSteps
from rrcli.errors import UsageError

ROW = [1, 0, 2, 1, 0, 0, 2]


def test_a_cell_becomes_its_left_neighbour_plus_its_own_square():
    assert [RowSteps.evolve([2, 1, 0, 2, 2, 0], steps) for steps in range(4)] == [
        [2, 1, 0, 2, 2, 0],
        [1, 0, 1, 1, 0, 2],
        [1, 1, 1, 2, 1, 1],
        [1, 2, 2, 2, 0, 2],
    ]


def test_steps_of_the_other_rules_add_up_to_one_look_and_to_one_sum():
    assert RowShift.evolve(ROW, 3) == [0, 0, 0, 1, 0, 2, 1]
    assert RowAdd.evolve(ROW, 4) == [2, 1, 0, 2, 1, 1, 0]


@pytest.mark.parametrize("rows", [RowSteps, RowShift])
def test_a_cell_depends_on_nothing_behind_it_and_on_one_cell_more_with_each_step(rows):
    assert rows.evolve([*ROW, 1, 1], 4)[: len(ROW)] == rows.evolve(ROW, 4)
    others = [[(cell + (place == 0)) % 3 for place, cell in enumerate(ROW)], ROW]
    for steps in range(1, 5):
        changed, same = (rows.evolve(row, steps) for row in others)
        assert changed[steps] != same[steps]
        assert changed[steps + 1 :] == same[steps + 1 :]


@pytest.mark.parametrize("rows", [RowSteps, RowShift, RowAdd])
def test_steps_add_up(rows):
    assert rows.evolve(rows.evolve(ROW, 2), 3) == rows.evolve(ROW, 5)


def test_the_rule_is_not_linear():
    """A linear one would answer a sum of rows with the sum of the answers, and have shortcuts over several steps."""
    doubled = [2 * cell % 3 for cell in ROW]
    assert RowSteps.evolve(doubled, 2) != [2 * cell % 3 for cell in RowSteps.evolve(ROW, 2)]


@pytest.mark.parametrize(("name", "rows"), [("row_steps", RowSteps), ("row_shift", RowShift), ("row_add", RowAdd)])
def test_the_question_holds_steps_and_row_and_the_answer_follows_from_them(name, rows):
    for problem in Task(f"{name}:min_steps=2,max_steps=5,length=7").problems(40, 0, side="test"):
        steps = problem.entry["metadata"]["difficulty"]["steps"]
        row = problem.question.split("from: ")[1]
        assert 2 <= steps <= 5
        assert f"Take {COUNTS[steps]} steps" in problem.question
        assert problem.difficulty == f"{name}, steps {steps}"
        assert problem.answer == " ".join(map(str, rows.evolve([int(cell) for cell in row.split()], steps)))


def test_only_the_whole_row_is_right():
    task = Task("row_steps")
    problem = task.problems(1, 0, side="test")[0]
    assert len(problem.answer.split()) == 20
    assert task.score(f"  {problem.answer}\n", problem) == 1
    for wrong in ("", problem.answer[:-2], f"{problem.answer} 0", problem.answer.replace(" ", "")):
        assert task.score(wrong, problem) == 0


@pytest.mark.parametrize("options", ["min_steps=3,max_steps=2", "min_steps=0", "max_steps=10", "length=1"])
def test_options_that_make_no_problem_are_refused(options):
    with pytest.raises(UsageError, match="refused its options"):
        Task(f"row_steps:{options}")


def test_asking_for_them_loads_no_more_than_they_need():
    ask = "Task('row_add').problems(1, 0, side='test')"
    code = f"import sys; from rrcli.data.tasks import Task; {ask}; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert not {"reasoning_gym", "sympy", "matplotlib"} & set(found.stdout.split())
