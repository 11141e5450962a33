"""What a training knows of itself beside weights and optimiser: its costs, its best evaluation, what it has said."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Spent:
    """What a run has cost so far; `positions` are those of its batches, with padding."""

    steps: int = 0
    tokens: int = 0
    positions: int = 0
    seconds: float = 0.0
    flops: float = 0.0


@dataclass
class TrainingState:
    """What a checkpoint remembers beside the weights and the optimiser.

    Attributes:
        rows: how many rows of a batch are computed at a time (fewer than asked for after running out of memory).
        flops_by_depth: FLOPs for each position of a batch, forward and backward, by depth.
        best: `step` and `perplexity` of the best evaluation so far; empty before the first one.
        raised: the red flags that were shown.
    """

    rows: int
    spent: Spent = field(default_factory=Spent)
    flops_by_depth: dict[int, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    raised: list[str] = field(default_factory=list)
