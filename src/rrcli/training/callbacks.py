"""`--callback module:function`: a function of the user's own that is called after every step, for custom metrics.

    def my_metric(context):
        context.tracker.log_scalar("custom/my_metric", value, context.step)

The module is also looked up in the working directory. The function observes: it must not change what is trained. An
error in it stops the training after the step was saved, so that nothing is lost.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rrcli.errors import UsageError


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
    if not spec:
        return None
    module_name, _, function_name = spec.partition(":")
    if not module_name or not function_name:
        raise UsageError(f"--callback is '{spec}'", "Write it as MODULE:FUNCTION, for example my_metrics:log.")
    place = str(directory.resolve())
    sys.path.insert(0, place)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise UsageError(
            f"--callback '{spec}': the module cannot be imported: {type(error).__name__}: {error}",
            f"It is looked up in {place} and where Python finds its modules.",
        ) from error
    finally:
        sys.path.remove(place)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UsageError(f"--callback '{spec}': {module_name} has no function '{function_name}'")
    return function
