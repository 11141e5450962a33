"""Running a model over known tokens piece by piece with its own cache, as decoding does: what checks of caches use."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from rrcli.upstream import cache_argument, cache_of


def in_pieces(
    model: Any,
    ids: Tensor,
    lengths: Sequence[int],
    *,
    cache: Any = None,
    mask: Tensor | None = None,
    told: Collection[str] = (),
) -> Iterator[Any]:
    """Run a model on one piece of `ids` after the other, each with the cache of those before; yield each output.

    A cache is one object that grows: look at it before asking for the next output. A model that returns no cache has
    nothing to go on with: its first output is the only one.

    Args:
        ids: `[batch, position]`; lengths: how many positions each piece has. `[n - 3, 1, 1, 1]` is a prompt and three
            decoded tokens.
        cache: what the first piece goes on with, and then all others; the model makes its own if not given.
        mask: `[batch, position]` is 0 where a row has padding on the left; no padding if not given.
        told: of `attention_mask` and `position_ids`, what the model is given if its forward takes it.

    Raises:
        RRError: the model returns a cache, and none of its arguments can be told to take it.
    """
    told = set(told) & inspect.signature(model.forward).parameters.keys()
    mask = torch.ones_like(ids) if mask is None else mask
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    past, end = cache, 0
    for length in lengths:
        start, end = end, end + length
        options = {} if past is None else {cache_argument(model): past}
        if "attention_mask" in told:
            options["attention_mask"] = mask[:, :end]
        if "position_ids" in told:
            options["position_ids"] = positions[:, start:end]
        output = model(input_ids=ids[:, start:end], use_cache=True, **options)
        yield output
        past = cache_of(output) if cache is None else cache
        if past is None:
            return


def decoded_logits(model: Any, ids: Tensor, steps: int) -> Tensor:
    """Return `[batch, position, vocabulary]` logits of a prompt, and of the last `steps` tokens one by one.

    Those of the prompt alone where the model returns no cache.
    """
    lengths = [ids.shape[1] - steps, *[1] * steps]
    return torch.cat([output.logits for output in in_pieces(model, ids, lengths)], 1)
