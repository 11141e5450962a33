"""Functions of the user's own, named as `MODULE:FUNCTION`: they are imported, so their code runs.

A module is also looked up in the working directory.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rrcli.errors import UsageError


def load_function(spec: str, directory: Path, option: str) -> Callable[..., Any]:
    """Return the function that `MODULE:FUNCTION` names.

    Args:
        option: what it was named with, for errors.

    Raises:
        UsageError: no such module or function, or an error while importing it.
    """
    module_name, _, function_name = spec.partition(":")
    if not module_name or not function_name:
        raise UsageError(f"{option} is '{spec}'", "Write it as MODULE:FUNCTION, for example my_metrics:log.")
    with _looked_up_in(directory):
        try:
            module = importlib.import_module(module_name)
        except Exception as error:
            raise UsageError(
                f"{option} '{spec}': the module cannot be imported: {type(error).__name__}: {error}",
                f"It is looked up in {directory.resolve()} and where Python finds its modules.",
            ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UsageError(f"{option} '{spec}': {module_name} has no function '{function_name}'")
    return function


def plugin_file(spec: str, directory: Path) -> Path | None:
    """Return the file of the module that `MODULE:FUNCTION` names, without importing it; None where there is none."""
    with _looked_up_in(directory):
        try:
            found = importlib.util.find_spec(spec.partition(":")[0])
        except (ImportError, ValueError):
            return None
    return Path(found.origin) if found is not None and found.origin and Path(found.origin).is_file() else None


@contextmanager
def _looked_up_in(directory: Path) -> Iterator[None]:
    place = str(directory.resolve())
    sys.path.insert(0, place)
    try:
        yield
    finally:
        sys.path.remove(place)
