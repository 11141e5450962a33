"""`--callback module:function`: a function of the user's own that is called after every step, for custom metrics.

    def my_metric(context):
        context.tracker.log_scalar("custom/my_metric", value, context.step)

The module is also looked up in the working directory. The function observes: it must not change what is trained. An
error in it stops the training after the step was saved, so that nothing is lost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rrcli.plugins import load_function


@dataclass(frozen=True)
class StepContext:
    """What a callback receives.

    Attributes:
        step: how many optimiser steps are done, from 1.
        losses: the losses of the step by name (`total`, `final_ce`, ...).
        model: the model after the step.
        tracker: what to log with.
    """

    step: int
    losses: dict[str, float]
    model: Any
    tracker: Any


def load_callback(spec: str, directory: Path) -> Callable[[StepContext], object] | None:
    """Return the function that `module:function` names, or None for an empty name.

    Raises:
        UsageError: no such module or function, or an error while importing it.
    """
    return load_function(spec, directory, "--callback") if spec else None
