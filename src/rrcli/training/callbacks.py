"""`--callback module:function`: custom metrics of a training.

    def my_metric(context):
        context.tracker.log_scalar("custom/my_metric", value, context.step)

The function is called after every optimiser step. The module is looked up in the working directory too. It looks on: a
training must not depend on it. An error in it stops the training at a saved step, so that nothing is lost.
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
    """What a callback is told.

    Attributes:
        step: how many optimiser steps are done, from 1. losses: the step's losses by name (`total`, `final_ce`, ...).
        model: the model, after the step. tracker: where to log.
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
