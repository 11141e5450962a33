"""What a training knows of itself beside weights and optimiser: its costs, its best evaluation, what it has said."""

from __future__ import annotations

from dataclasses import dataclass, field

from rrcli.schemas import Best


@dataclass
class Spent:
    """What a run has cost so far.

    Attributes:
        positions: those of its batches, with padding.
        flops: forward and backward. uncounted: what ran and is not in `flops`; see `recursion/flops`.
    """

    steps: int = 0
    tokens: int = 0
    positions: int = 0
    seconds: float = 0.0
    flops: float = 0.0
    uncounted: list[str] = field(default_factory=list)


@dataclass
class DepthCost:
    """The FLOPs of the steps of one depth, of which some are counted and stand for the others.

    What a position costs differs by some percent between batches: longer rows have more pairs of positions, and not
    every position bears loss. So a step is counted when there have been 0, 1, 2, 4, 8, ... steps of its depth.

    Attributes:
        steps, positions: how many there were so far. counted_flops, counted_positions: of the steps that were counted.
    """

    steps: int = 0
    positions: int = 0
    counted_flops: float = 0.0
    counted_positions: int = 0

    @property
    def due(self) -> bool:
        """Whether the next step is to be counted."""
        return self.steps & (self.steps - 1) == 0 if self.steps else True

    @property
    def per_position(self) -> float:
        """FLOPs of a position, forward and backward."""
        return self.counted_flops / self.counted_positions

    @property
    def flops(self) -> float:
        """FLOPs of all steps."""
        return self.positions * self.per_position


@dataclass
class TrainingState:
    """What a checkpoint remembers beside the weights and the optimiser.

    Attributes:
        rows: how many rows of a batch are computed at a time (fewer than asked for after running out of memory).
        costs: the FLOPs of the steps, by depth.
        best: `step` and `perplexity` of the best evaluation so far; empty before the first one.
        raised: the red flags that were shown.
    """

    rows: int
    spent: Spent = field(default_factory=Spent)
    costs: dict[int, DepthCost] = field(default_factory=dict)
    best: Best = field(default_factory=Best)
    raised: list[str] = field(default_factory=list)
