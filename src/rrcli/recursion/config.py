"""What a recursion is and how its losses are weighed, as values. Importing this loads no torch.

The defaults stand here and nowhere else: the options of `settings` take theirs from these classes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from rrcli.errors import UsageError, suggest

MAX_STEPS_LIMIT = 8


@dataclass(frozen=True)
class RecursionConfig:
    """The shape of a recursion.

    Attributes:
        max_steps: the most passes after pass 0, 1 to 8.
        span: the decoder layers `[start, end)` that are run again; None means all of them ("full depth").
        cell_width: inner width of the feedback cell; None means the model's hidden size.
        chunk_width: positions that are drafted and refined together; the window of the chunk metrics, in tokens.
        seed: seeds the initial weights of the cell (all but its zero output projection).
        head_signals: whether the boundary head also reads how sure a pass is; False for checkpoints that do not say.
        commit_margin: what the boundary head has learned to go on for: a gain of the next pass of more than this, in
            nats. Training notes it; None where there was none, or where the checkpoint does not say.
        relative_feedback: whether the feedback is a share of the span's input: multiplied, at each position, by the
            input's root mean square.

    Raises:
        UsageError: a value out of range.
    """

    max_steps: int = 2
    span: tuple[int, int] | None = None
    cell_width: int | None = None
    chunk_width: int = 16
    seed: int = 0
    head_signals: bool = True
    commit_margin: float | None = None
    relative_feedback: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.max_steps <= MAX_STEPS_LIMIT:
            raise UsageError(f"max_steps is {self.max_steps}", f"It must be between 1 and {MAX_STEPS_LIMIT}.")
        if self.span is not None and not 0 <= self.span[0] < self.span[1]:
            raise UsageError(f"span is {self.span[0]}:{self.span[1]}", "It must be START:END with 0 <= START < END.")
        if self.cell_width is not None and self.cell_width < 1:
            raise UsageError(f"cell_width is {self.cell_width}", "It must be at least 1.")
        if self.chunk_width < 1:
            raise UsageError(f"chunk_width is {self.chunk_width}", "It must be at least 1.")

    def resolve_span(self, layers: int) -> tuple[int, int]:
        """Return `[start, end)` for a model with that many decoder layers.

        Raises:
            UsageError: the span ends after the last layer.
        """
        start, end = self.span or (0, layers)
        if end > layers:
            raise UsageError(f"span {start}:{end} ends after the model's {layers} layers", f"Use at most 0:{layers}.")
        return start, end

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form; `from_dict` reads it back."""
        return asdict(self) | {"span": list(self.span) if self.span else None}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RecursionConfig:
        """Read the JSON form.

        Raises:
            UsageError: an unknown key, or a value out of range.
        """
        known = {field.name for field in fields(cls)}
        for key in values:
            if key not in known:
                raise UsageError(f"unknown recursion setting '{key}'", suggest(key, known))
        span = values.get("span")
        return cls(**({"head_signals": False} | values | {"span": (int(span[0]), int(span[1])) if span else None}))


@dataclass(frozen=True)
class LossWeights:
    """How much each loss counts in the total (see `losses`), and what decides the labels of the boundary head.

    Attributes:
        final, masked, halt, ponder, stability: the weight of the loss of that name.
        margin: what the next pass must gain at a position to be worth it, in nats.
        share: the share of loss-bearing positions that intermediate passes learn from, 0 to 1.
    """

    final: float = 1.0
    masked: float = 0.1
    halt: float = 0.05
    ponder: float = 0.01
    stability: float = 0.01
    margin: float = 0.02
    share: float = 0.5


def parse_span(text: str) -> tuple[int, int] | None:
    """Read `all` or `START:END`.

    Raises:
        UsageError: anything else.
    """
    if text == "all":
        return None
    start, colon, end = text.partition(":")
    if not colon or not start.strip().isdigit() or not end.strip().isdigit():
        raise UsageError(f"span '{text}' is not understood", "Write 'all' or START:END, for example 2:6.")
    return int(start), int(end)
