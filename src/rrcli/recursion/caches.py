"""Every pass has its own cache, and it lives on the caller's cache object.

When a forward first sees an empty cache, blank copies of it are made, one for each pass after pass 0, and stored on it.
From then on whatever is done to the caller's cache (crop, beam reorder, batch selection, reset) is done to the copies
too; they are deep-copied with it and dropped with it.
"""

from __future__ import annotations

import copy
import functools
import inspect
from typing import Any

from transformers.cache_utils import Cache

from rrcli.errors import RRError

# The methods of a cache that change what it holds, other than by running a layer.
MUTATORS = (
    "crop",
    "reorder_cache",
    "batch_repeat_interleave",
    "batch_select_indices",
    "reset",
    "activate_past_recording",
)


def is_cache(value: object) -> bool:
    """Tell a cache by its type, since families pass it under different names and positions."""
    if isinstance(value, Cache):
        return True
    return type(value).__name__.endswith(("Cache", "CacheParams")) and hasattr(value, "__dict__")


def argument_of(model: Any) -> str:
    """Return the name under which a model takes its cache and gives it back."""
    takes = inspect.signature(model.forward).parameters
    return "past_key_values" if "past_key_values" in takes or "cache_params" not in takes else "cache_params"


def is_empty(cache: Any) -> bool:
    """Tell whether no token went through `cache` yet."""
    layers = getattr(cache, "layers", None)
    if layers is None:
        length = getattr(cache, "get_seq_length", None)
        return length is not None and int(length()) == 0
    return all(_is_blank(layer) for layer in layers)


def _is_blank(layer: Any) -> bool:
    """Tell whether no token went through one layer of a cache."""
    length = getattr(layer, "get_seq_length", None)
    if getattr(layer, "is_initialized", True) and length is not None and int(length()) > 0:
        return False
    previous = getattr(layer, "has_previous_state", False)
    return not (previous is True or (isinstance(previous, (list, dict)) and any(_values(previous))))


def prepare(cache: Any, depth: int, full: bool = True) -> None:
    """Make `cache` carry one cache for each of the passes `1..depth`, at the start of a forward at that depth.

    Copies for deeper passes are dropped: they will not see this forward's tokens.

    Args:
        full: whether the span ends with the last layer. If not, the layers behind it have cached what the passes so far
            gave them, and going on at a lower depth would mix two models.

    Raises:
        RRError: tokens went through the cache at a lower depth, so a deeper pass has no past.
    """
    passes = getattr(cache, "rr_passes", None)
    if passes is None and depth == 0:
        return
    have = len(passes or ())
    if (depth > have or (depth < have and not full)) and not is_empty(cache):
        raise RRError(
            f"this cache was filled at recursion depth {have}; it cannot go on at depth {depth}",
            "Start from a new cache, or keep the depth that the first tokens were run at.",
        )
    if passes is None:
        blanks = [copy.deepcopy(cache) for _ in range(depth)]
        cache.__class__ = _mirrored(type(cache))
        cache.rr_passes = blanks
    elif depth < have:
        del passes[depth:]
    else:
        passes.extend(_blank(cache) for _ in range(depth - have))


def of_pass(cache: Any, step: int) -> Any:
    """Return the cache that pass `step` uses where the model was called with `cache`; pass 0 uses it as it is."""
    return cache.rr_passes[step - 1] if step else cache


def _blank(cache: Any) -> Any:
    passes, cache.rr_passes = cache.rr_passes, []
    try:
        blank = copy.deepcopy(cache)
    finally:
        cache.rr_passes = passes
    blank.__class__ = type(cache).__bases__[0]
    del blank.rr_passes
    return blank


@functools.cache
def _mirrored(cls: type) -> type:
    """Return a subclass of a cache class whose mutators also act on the caches of the passes."""

    def mirror(name: str) -> Any:
        method = getattr(cls, name)

        @functools.wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            for twin in self.rr_passes:
                # Layers outside the span stay blank in the copies, and some kinds cannot crop nothing.
                targets = twin.layers if name == "crop" and hasattr(twin, "layers") else [twin]
                for target in targets:
                    if target is twin or not _is_blank(target):
                        getattr(target, name)(*args, **kwargs)
            return method(self, *args, **kwargs)

        return call

    methods = {name: mirror(name) for name in MUTATORS if hasattr(cls, name)}
    return type(cls.__name__, (cls,), methods | {"__module__": cls.__module__})


def _values(previous: Any) -> Any:
    return previous.values() if isinstance(previous, dict) else previous
