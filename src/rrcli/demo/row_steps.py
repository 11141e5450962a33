"""A row of cells after some steps of one rule: three generators of problems, with the methods of reasoning-gym's.

    row_steps   in each step a cell becomes its left neighbour plus its own square, modulo 3
    row_shift   in each step a cell becomes its left neighbour
    row_add     in each step a cell becomes itself plus one, modulo 3

Cells outside the row are 0, so a cell depends on no cell after it. Under the first rule it depends on k + 1 cells after
k steps. The square makes this rule non-linear: its steps do not reduce to fewer, and each one more needs one more step
of computation. The steps of the other two add up: to one look k cells back, and to one sum. So `row_add` is a control:
as many steps, in the same form, that need neither depth nor a further look.

They are no part of reasoning-gym's registry: reading that takes a second, as sympy and matplotlib come with it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, ClassVar

STATES = 3
# Steps are counted in words: a digit would be one more cell to a model that finds what it reads by its token.
COUNTS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass
class RowConfig:
    """How many steps are asked for, and how many cells a row has."""

    min_steps: int = 1
    max_steps: int = 4
    length: int = 20
    seed: int = 0
    size: int = 500

    def validate(self) -> None:
        """Raise an error if these values make no problem."""
        assert 1 <= self.min_steps <= self.max_steps <= 9, "steps must be 1 to 9, min_steps at most max_steps"
        assert self.length >= 2, "length must be at least 2"


class Rows:
    """Problems of one rule by index. Only the whole row is right, written with spaces between its cells."""

    name: ClassVar[str]
    question: ClassVar[str]

    def __init__(self, config: RowConfig) -> None:
        config.validate()
        self.config, self.seed = config, config.seed

    @staticmethod
    def step(left: int, cell: int) -> int:
        """Return what a cell becomes in one step, given its left neighbour."""
        raise NotImplementedError

    @classmethod
    def evolve(cls, row: list[int], steps: int) -> list[int]:
        """Return the row after some steps."""
        for _ in range(steps):
            row = [cls.step(left, cell) for left, cell in zip([0, *row], row, strict=False)]
        return row

    def __getitem__(self, idx: int) -> dict[str, Any]:
        """Return problem `idx`."""
        rng = random.Random(self.seed + idx)
        steps = rng.randint(self.config.min_steps, self.config.max_steps)
        row = [rng.randrange(STATES) for _ in range(self.config.length)]
        return {
            "question": self.question.format(steps=COUNTS[steps], row=_text(row)),
            "answer": _text(self.evolve(row, steps)),
            "metadata": {"source_dataset": self.name, "source_index": idx, "difficulty": {"steps": steps}},
        }

    def score_answer(self, answer: str | None, entry: dict[str, Any]) -> float:
        """Return 1 for the row itself, else 0."""
        return float(answer is not None and answer.split() == entry["answer"].split())


class RowSteps(Rows):
    """A cell becomes its left neighbour plus its own square, modulo 3."""

    name = "row_steps"
    question = "Take {steps} steps of left plus square from: {row}"

    @staticmethod
    def step(left: int, cell: int) -> int:
        """Return the left neighbour plus the cell's square, modulo 3."""
        return (left + cell * cell) % STATES


class RowShift(Rows):
    """A cell becomes its left neighbour."""

    name = "row_shift"
    question = "Take {steps} steps of shift from: {row}"

    @staticmethod
    def step(left: int, cell: int) -> int:
        """Return the left neighbour."""
        return left


class RowAdd(Rows):
    """A cell becomes itself plus one, modulo 3."""

    name = "row_add"
    question = "Take {steps} steps of plus from: {row}"

    @staticmethod
    def step(left: int, cell: int) -> int:
        """Return the cell plus one, modulo 3."""
        return (cell + 1) % STATES


def _text(row: list[int]) -> str:
    return " ".join(map(str, row))


GENERATORS: dict[str, type[Rows]] = {rows.name: rows for rows in (RowSteps, RowShift, RowAdd)}
