"""Red flags: what a user should act on while a model trains. Each is one sentence, and is shown once.

Non-finite numbers are not among them: they stop the training (see `trainer`). Thresholds are in nats and steps. The
loss of a step of few examples is noisy, even more so where text and short answers are mixed, so means are compared with
their standard errors in mind.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

FEEDBACK_STEP = 20
SMOOTHING = 20
EXPLODED_FACTOR, EXPLODED_NATS, EXPLODED_ERRORS = 1.5, 1.0, 5.0
FIRST_JUDGEMENT = 50
STUCK_SHARE = 0.999
MEMORY_SHARE = 0.92
# By how much the last pass has to be worse than pass 0, in nats and in standard errors.
WORSE_NATS, WORSE_ERRORS = 0.15, 4.0

NOT_FALLING = "loss not falling"
EXPLODING = "loss exploding"
ALWAYS_MAX = "refine steps always at the maximum"
SILENTLY_OFF = "recursion silently off"
WORSE_PASS = "later passes are worse than pass 0"
MEMORY = "memory near the limit"


class RedFlags:
    """Looks at every step, and remembers which red flags it has raised.

    Args:
        steps: how many steps the training will have; trends are judged after half of them.
        raised: the red flags that this run has raised before it was resumed.
        guessing: the loss of guessing among all tokens, in nats, which no model should stay above.
    """

    def __init__(self, steps: int, raised: list[str] | None = None, guessing: float = math.inf) -> None:
        self.raised = list(raised or ())
        self._guessing = guessing
        self._judged_at = max(FIRST_JUDGEMENT, steps // 2)
        self._window = self._judged_at // 3
        self._losses: list[float] = []
        self._lowest, self._lowest_error = math.inf, 0.0
        self._at_maximum = 0
        # Of every step with passes: by how much the last one was worse than pass 0.
        self._behind: list[float] = []

    def observe(self, step: int, scalars: Mapping[str, float], depth: int, memory_share: float) -> list[str]:
        """Return the warnings that this step gives a reason for, each once in the life of a run.

        Args:
            step: counted from 1. scalars: by TensorBoard tag. depth: passes after pass 0 in this step.
            memory_share: used share of the device's memory, 0 to 1.
        """
        found: dict[str, str] = {}
        self._losses.append(scalars["train/loss/final_ce"])
        recent, error = _mean(self._losses[-SMOOTHING:])
        rise = recent - self._lowest
        enough = max(EXPLODED_NATS, EXPLODED_ERRORS * math.hypot(error, self._lowest_error))
        if len(self._losses) >= SMOOTHING and rise > enough and recent > EXPLODED_FACTOR * self._lowest:
            found[EXPLODING] = (
                f"it is {recent:.2f} nats, it was {self._lowest:.2f}: try a lower --lr, or more --warmup-steps"
            )
        # A learning rate that is far too high ruins a model before it has a low point to compare with.
        elif len(self._losses) >= SMOOTHING and recent > self._guessing + max(EXPLODED_NATS, EXPLODED_ERRORS * error):
            found[EXPLODING] = f"{recent:.2f} nats are more than a guess takes ({self._guessing:.2f}): try a lower --lr"
        if len(self._losses) >= SMOOTHING // 2 and recent < self._lowest:
            self._lowest, self._lowest_error = recent, error
        if len(self._losses) == self._judged_at and EXPLODING not in {*self.raised, *found}:
            (first, _), (last, _) = _mean(self._losses[: self._window]), _mean(self._losses[-self._window :])
            if last >= first:
                found[NOT_FALLING] = (
                    f"{first:.3f} nats at first, {last:.3f} in the last {self._window} steps: "
                    "try a higher --lr, and look at the data"
                )
        refine = scalars.get("train/generation/avg_refine_steps")
        if depth and refine is not None:
            self._at_maximum = self._at_maximum + 1 if refine >= STUCK_SHARE * depth else 0
            if step >= self._judged_at and self._at_maximum >= self._window:
                found[ALWAYS_MAX] = (
                    f"for {self._at_maximum} steps: it is not learning to halt; try a higher --ponder-weight, "
                    "--halt-weight or --commit-margin"
                )
        if depth and "train/depth_ce/0" in scalars:
            self._behind.append(scalars[f"train/depth_ce/{depth}"] - scalars["train/depth_ce/0"])
        behind, error = _mean(self._behind[-SMOOTHING:]) if self._behind else (0.0, 0.0)
        if len(self._behind) >= FIRST_JUDGEMENT and behind > max(WORSE_NATS, WORSE_ERRORS * error):
            found[WORSE_PASS] = (
                f"by {behind:.2f} nats in the last {SMOOTHING} steps, with a feedback of "
                f"{scalars.get('train/feedback_norm', 0.0):.2f} of the span's input: try a lower --sidecar-lr"
            )
        if step >= FEEDBACK_STEP and scalars.get("train/feedback_norm") == 0:
            found[SILENTLY_OFF] = f"the feedback is still exactly zero at step {step}: is --sidecar-lr 0?"
        if memory_share >= MEMORY_SHARE:
            found[MEMORY] = (
                f"{memory_share:.0%} in use: try a higher --gradient-accumulation, --gradient-checkpointing, "
                "or a lower --max-length"
            )
        new = [name for name in found if name not in self.raised]
        self.raised += new
        return [f"{name}: {found[name]}" for name in new]


def _mean(values: list[float]) -> tuple[float, float]:
    """Return the mean and its standard error."""
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1))
    return mean, spread / math.sqrt(len(values))
