"""The task `row_steps`: a row of cells after some steps of one simple rule, as a reasoning-gym generator.

In each step a cell becomes `far XOR (left OR cell)`, where `left` is its left neighbour and `far` the one before that;
cells outside the row are 0. This is the elementary cellular automaton of rule 30, moved one cell to the right, so that
a cell depends only on cells before it. One step needs a look at two neighbours; a cell after k steps depends on 2k + 1
cells. A linear rule would be too easy, as several of its steps reduce to one: eight steps of rule 60 are one XOR.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from reasoning_gym.dataset import ProceduralDataset
from reasoning_gym.factory import register_dataset

NAME = "row_steps"
QUESTION = "Take {steps} steps of rule 30, moved one cell to the right, from: {row}"


@dataclass
class RowStepsConfig:
    """How many steps are asked for, and how many cells a row has."""

    min_steps: int = 1
    max_steps: int = 6
    length: int = 14
    seed: int | None = None
    size: int = 500

    def validate(self) -> None:
        """Raise an error if these values make no problem."""
        assert 1 <= self.min_steps <= self.max_steps <= 9, "steps must be 1 to 9, min_steps at most max_steps"
        assert self.length >= 2, "length must be at least 2"


class RowStepsDataset(ProceduralDataset):  # type: ignore[misc]  # reasoning-gym has no types
    """Problems by index. Only the whole row is right, written with spaces between its cells."""

    def __init__(self, config: RowStepsConfig) -> None:
        super().__init__(config=config, seed=config.seed, size=config.size)

    def __getitem__(self, idx: int) -> dict[str, Any]:
        """Return problem `idx`."""
        rng = random.Random(self.seed + idx)
        steps = rng.randint(self.config.min_steps, self.config.max_steps)
        row = [rng.randrange(2) for _ in range(self.config.length)]
        return {
            "question": QUESTION.format(steps=steps, row=_text(row)),
            "answer": _text(evolve(row, steps)),
            "metadata": {"source_dataset": NAME, "source_index": idx, "difficulty": {"steps": steps}},
        }

    def score_answer(self, answer: str | None, entry: dict[str, Any]) -> float:
        """Return 1 for the row itself, else 0."""
        return float(answer is not None and answer.split() == entry["answer"].split())


def evolve(row: list[int], steps: int) -> list[int]:
    """Return the row after some steps."""
    for _ in range(steps):
        row = [far ^ (left | cell) for far, left, cell in zip([0, 0, *row], [0, *row], row, strict=False)]
    return row


def _text(row: list[int]) -> str:
    return " ".join(map(str, row))


register_dataset(NAME, RowStepsDataset, RowStepsConfig)
