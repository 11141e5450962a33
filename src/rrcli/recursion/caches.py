"""A cache for each pass, stored on the caller's cache object.

When a forward first sees an empty cache, blank copies of it are made, one for each pass after pass 0, and stored on it.
Every later change of the caller's cache (crop, beam reorder, batch selection, reset) also changes the copies; they are
deep-copied together with it and freed together with it.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Collection, Sequence
from typing import Any

import torch

from rrcli.errors import RRError
from rrcli.upstream import POSITIONS, Cache, is_blank, window_of

# The methods of a cache that change what it holds, other than by running a layer.
MUTATORS = (
    "crop",
    "reorder_cache",
    "batch_repeat_interleave",
    "batch_select_indices",
    "reset",
    "activate_past_recording",
)


def is_empty(cache: Any) -> bool:
    """Tell whether no token went through `cache` yet."""
    if not isinstance(cache, Cache):
        return _length(cache) == 0
    return all(is_blank(layer) for layer in cache.layers)


def _length(cache: Any, layer: int | None = None) -> int:
    """Return how many tokens a cache that is not a class of transformers holds; for one layer if it can tell.

    Raises:
        RRError: it cannot tell, so a filled cache could be taken for an empty one.
    """
    try:
        return int(cache.get_seq_length() if layer is None else cache.get_seq_length(layer))
    except AttributeError:
        raise RRError(
            f"a cache of class {type(cache).__name__} cannot be used: it has no get_seq_length",
            "Call the model with use_cache=False, or with a cache of transformers.",
        ) from None
    except TypeError:
        if layer is None:
            raise
        return _length(cache)


def is_ready(cache: Any, depth: int) -> bool:
    """Tell at once whether `cache` holds what a forward at `depth` needs; if not, `prepare` has to look."""
    return isinstance(cache, Cache) and len(getattr(cache, "rr_passes", ())) == depth


@torch.compiler.disable  # type: ignore[untyped-decorator]
def prepare(cache: Any, depth: int, *, full: bool = True, start: int = 0) -> None:
    """Store one cache for each of the passes `1..depth` on `cache`, at the start of a forward at that depth.

    The caches of deeper passes are removed, since those passes do not see this forward's tokens.

    Args:
        full: whether the span ends with the last layer. If not, the layers after it have cached what the last pass gave
            them, and going on at a lower depth would mix two models.
        start: the first layer of the span.

    Raises:
        RRError: tokens went through the cache at a lower depth, so a deeper pass has no past; or a cache of another
            class than transformers' was changed by a method that is not known here.
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
    if passes and not isinstance(cache, Cache) and any(_length(p, start) != _length(cache, start) for p in passes):
        raise RRError(
            f"a {type(cache).__name__} was changed in a way that did not reach the caches of the passes",
            f"Start from a new cache, or change it with one of: {', '.join(MUTATORS)}.",
        )
    if passes is None:
        blanks = [_copied(cache) for _ in range(depth)]
        cache.__class__ = _mirrored(type(cache))  # type: ignore[arg-type]
        cache.rr_passes = blanks
    elif depth < have:
        del passes[depth:]
    else:
        passes.extend(_blank(cache) for _ in range(depth - have))


class Snapshot:
    """What a cache of transformers and the caches of its passes held at one moment; with `draft`, pass 0's cache alone.

    Attention layers grow by making new tensors, so the old tensors are kept without a copy. Recurrent and convolution
    states are written in place, so they are copied; they do not grow.
    """

    def __init__(self, cache: Any, *, draft: bool = False) -> None:
        parts = [cache] if draft else [cache, *cache.rr_passes]
        self._kept = [[_copies(vars(layer)) for layer in part.layers] for part in parts]

    def restore(self, cache: Any, *, draft: bool = False, layers: Collection[int] | None = None) -> None:
        """Take `cache` back to this snapshot; with `draft` only that of pass 0, with `layers` only those layers."""
        parts = [cache] if draft else [cache, *cache.rr_passes]
        for part, kept in zip(parts, self._kept, strict=False):
            for index, (layer, values) in enumerate(zip(part.layers, kept, strict=True)):
                if layers is None or index in layers:
                    layer.__dict__ = _copies(values)


def _copies(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in value.items()}
        if isinstance(value, dict)
        else value
        for name, value in values.items()
    }


def forget(cache: Any, tokens: Sequence[int]) -> None:
    """Take the last `tokens[k]` positions out of pass k; passes for which the list has no entry keep theirs."""
    passes, cache.rr_passes = cache.rr_passes, []
    try:
        cache.crop(-tokens[0])
    finally:
        cache.rr_passes = passes
    for part, count in zip(passes, tokens[1:], strict=False):
        for layer in part.layers:
            if not is_blank(layer):
                layer.crop(-count)


def is_alignable(cache: Any) -> bool:
    """Tell whether `align` knows every layer of `cache`."""
    return all(type(layer) in POSITIONS for layer in cache.layers)


def align(cache: Any, drop: torch.Tensor, length: int) -> None:
    """Take the last `drop[row]` positions out of each row, and move what is left to the right.

    Rows that keep fewer positions than others are padded on the left; the attention mask has to hide that padding.

    Args:
        drop: `[batch]` how many positions to forget. length: how many positions the cache holds afterwards.
    """
    for part in (cache, *getattr(cache, "rr_passes", ())):
        for layer in part.layers:
            if is_blank(layer):
                continue
            for name, axis in POSITIONS[type(layer)].items():
                value = getattr(layer, name)
                if isinstance(value, dict):
                    for key, state in value.items():
                        value[key] = moved(state, drop, layer.conv_kernel_size[key], axis=axis)
                else:
                    setattr(layer, name, moved(value, drop, min(length, window_of(layer) or length), axis=axis))
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length = length


def moved(value: torch.Tensor, drop: torch.Tensor, length: int, *, axis: int) -> torch.Tensor:
    """Move each row of `[batch, ..., position, ...]` right by `drop[row]`, and keep the last `length` positions.

    Args:
        axis: that of the positions.
    """
    size = value.shape[axis]
    index = torch.arange(size - length, size, device=value.device)[None] - drop.to(value.device)[:, None]
    shape = [1] * value.dim()
    shape[0], shape[axis] = index.shape
    index = index.clamp_min(0).view(shape).expand(*value.shape[:axis], length, *value.shape[axis:][1:])
    return value.gather(axis, index)


def of_pass(cache: Any, step: int) -> Any:
    """Return the cache that pass `step` uses where the model was called with `cache`; pass 0 uses it as it is."""
    return cache.rr_passes[step - 1] if step else cache


def _blank(cache: Any) -> Any:
    passes, cache.rr_passes = cache.rr_passes, []
    try:
        blank = _copied(cache)
    finally:
        cache.rr_passes = passes
    blank.__class__ = type(cache).__bases__[0]
    del blank.rr_passes
    return blank


def _copied(cache: Any) -> Any:
    # Caches that offload hold a stream of their device, which cannot be copied and can be shared.
    return copy.deepcopy(cache, {id(part): part for part in vars(cache).values() if isinstance(part, torch.Stream)})


@functools.cache
def _mirrored(cls: type) -> type:
    """Return a subclass of a cache class whose mutators also act on the caches of the passes."""

    def mirror(name: str) -> Any:
        method = getattr(cls, name)

        @functools.wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            for twin in self.rr_passes:
                # Layers outside the span stay blank in the copies, and some kinds cannot crop nothing.
                targets = twin.layers if name == "crop" and isinstance(twin, Cache) else [twin]
                for target in targets:
                    if target is twin or not is_blank(target):
                        getattr(target, name)(*args, **kwargs)
            return method(self, *args, **kwargs)

        return call

    methods = {name: mirror(name) for name in MUTATORS if hasattr(cls, name)}
    return type(cls.__name__, (cls,), methods | {"__module__": cls.__module__})
