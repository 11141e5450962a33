"""What a recursion costs while decoding: cache and arithmetic of one token at every depth.

Both are measured on one decoded token after a short prompt, at depth 0, on the model itself or on its skeleton: on
torch's meta device the same operators run on shapes alone. A pass after pass 0 adds a cache of the span's layers, the
span's operators and the cell's; so

    cache(depth) = cache(0) + depth * cache of the span's layers
    FLOPs(depth) = FLOPs(0) + depth * (FLOPs of the span + FLOPs of the cell)

where FLOPs are those of `recursion.flops`. Of a mixture of experts, only the experts count that a token is routed to.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rrcli.errors import RRError
from rrcli.recursion.facts import text_config, vocabulary
from rrcli.recursion.families import input_device, is_skeleton
from rrcli.recursion.flops import FlopCounter
from rrcli.recursion.probing import in_pieces
from rrcli.upstream import cache_of, on_shapes, patched

PROMPT_TOKENS = 8
FLOPS_FORMULA = "products, convolutions and attention of one decoded token: FLOPs(0) + depth x (span + cell)"


@dataclass(frozen=True)
class Costs:
    """Index k of every list is depth k.

    Attributes:
        dtype: the number format the model computes in.
        cache_bytes_per_token: how much the caches of all passes grow by each token (until a sliding window is full).
        cache_bytes_constant: what they hold at any length: recurrent and convolution states, full windows.
        flops_per_token: operations to decode one token; `flops_formula` says which are counted.
    """

    dtype: str
    cache_bytes_per_token: list[int]
    cache_bytes_constant: list[int]
    flops_per_token: list[int]
    flops_formula: str = FLOPS_FORMULA


@dataclass(frozen=True)
class OneToken:
    """What it takes to decode one more token in each of some rows. Index k of every list is depth k.

    Attributes:
        held: bytes that the caches of all passes hold afterwards. growth: how many of them are new.
        flops: operations for all rows together.
    """

    held: list[int]
    growth: list[int]
    flops: list[int]


def measure(model: Any) -> Costs:
    """Measure the costs of `model`, which has a recursion attached; its weights may be on the meta device.

    Raises:
        RRError: the model returns no cache, or runs what cannot be counted. Exception: of any kind, where a family
            cannot run on the meta device.
    """
    found, tokens = decode_one(model, 1, PROMPT_TOKENS), PROMPT_TOKENS + 1
    return Costs(
        dtype=str(model.dtype).removeprefix("torch."),
        cache_bytes_per_token=found.growth,
        cache_bytes_constant=[held - rate * tokens for held, rate in zip(found.held, found.growth, strict=True)],
        flops_per_token=found.flops,
    )


@torch.no_grad()
def decode_one(model: Any, rows: int, prompt: int) -> OneToken:
    """Measure the token after a prompt of that many tokens; see `measure`."""
    recursion = model.recursion
    layers, span = recursion.layers, range(recursion.start, recursion.end)
    twins = _twins(model, layers)
    bare = is_skeleton(model)
    device = torch.device("meta") if bare else input_device(model)
    ids = (torch.arange(prompt + 1, device=device).expand(rows, -1) * 37 + 11) % vocabulary(model)
    counter = FlopCounter()
    shapes = on_shapes(model) if bare else nullcontext()
    with recursion.at_depth(0), shapes, _run_once(layers, twins):
        outputs = in_pieces(model, ids, [prompt, 1])
        cache = cache_of(next(outputs))
        if cache is None:
            raise RRError("the model returns no cache")
        before = _sizes(cache, twins)
        with _marks(layers, counter) as layer_flops, counter:
            cache = cache_of(next(outputs))
        after = _sizes(cache, twins)
    growth = [new - old for old, new in zip(before, after, strict=True)]
    with FlopCounter() as cell:
        weight = recursion.cell.w_in.weight
        recursion.cell(torch.zeros(rows, 1, weight.shape[1], dtype=weight.dtype, device=weight.device), 1)
    a_pass = sum(layer_flops[twins[index]] for index in span) + cell.checked()
    rest = counter.checked() - sum(layer_flops.values())
    stock = rest + sum(layer_flops[twin] for twin in twins)
    depths = range(recursion.config.max_steps + 1)

    def of_depths(bytes_of_layer: list[int]) -> list[int]:
        # A cache that is not kept by layer is one entry, and every pass has a whole one.
        again = sum(bytes_of_layer[span.start : span.stop] if len(bytes_of_layer) > 1 else bytes_of_layer)
        return [sum(bytes_of_layer) + depth * again for depth in depths]

    return OneToken(of_depths(after), of_depths(growth), [stock + depth * a_pass for depth in depths])


def _twins(model: Any, layers: list[Any]) -> list[int]:
    """Return for each layer the first one that equals it in class, type and shapes; on a real model, itself.

    A skeleton has shapes and no values, so equal layers cost the same, and it is enough to run one of each kind.
    Measuring then takes as long for 27 layers as for 4.
    """
    if not is_skeleton(model):
        return list(range(len(layers)))
    types = getattr(text_config(model.config), "layer_types", None) or [""] * len(layers)
    first: dict[Any, int] = {}
    kinds = [
        (type(layer), types[index], tuple((name, tensor.shape) for name, tensor in layer.state_dict().items()))
        for index, layer in enumerate(layers)
    ]
    return [first.setdefault(kind, index) for index, kind in enumerate(kinds)]


@contextmanager
def _run_once(layers: list[Any], twins: list[int]) -> Iterator[None]:
    """Let a layer that has an earlier twin return what the twin returned, without running."""
    outputs: dict[int, Any] = {}

    def keep(index: int, _: Any, __: Any, output: Any) -> None:
        outputs[index] = output

    def repeat(twin: int, *_: Any, **__: Any) -> Any:
        return outputs[twin]

    with ExitStack() as patches:
        for index, twin in enumerate(twins):
            if index == twin:
                hook = layers[index].register_forward_hook(functools.partial(keep, index))
                patches.callback(hook.remove)
            else:
                patches.enter_context(patched(layers[index], forward=functools.partial(repeat, twin)))
        yield


@contextmanager
def _marks(layers: list[Any], counter: Any) -> Iterator[dict[int, int]]:
    """Count the operations of every layer: filled while the model runs under `counter`."""
    flops: dict[int, int] = {}

    def enter(index: int, *_: Any) -> None:
        flops[index] = -counter.total

    def leave(index: int, *_: Any) -> None:
        flops[index] += counter.total

    hooks = [layer.register_forward_pre_hook(functools.partial(enter, i)) for i, layer in enumerate(layers)]
    hooks += [layer.register_forward_hook(functools.partial(leave, i)) for i, layer in enumerate(layers)]
    try:
        yield flops
    finally:
        for hook in hooks:
            hook.remove()


def _sizes(cache: Any, twins: list[int]) -> list[int]:
    """Return the bytes that a cache holds for every layer, or in all where it is not kept by layer."""
    layers = getattr(cache, "layers", None)
    if layers is None:
        return [held_bytes(cache, set())]
    # Layers at the end may share the cache of an earlier one and have none.
    return [held_bytes(layers[twin], set()) if index < len(layers) else 0 for index, twin in enumerate(twins)]


def held_bytes(value: Any, seen: set[int]) -> int:
    """Return the bytes of all tensors that are reachable from (a part of) a cache, each counted once."""
    if id(value) in seen:
        return 0
    seen.add(id(value))
    if isinstance(value, Tensor):  # states have a batch dimension; what has none is book-keeping
        return value.numel() * value.element_size() if value.dim() > 1 else 0
    if isinstance(value, (list, tuple)):
        return sum(held_bytes(part, seen) for part in value)
    if isinstance(value, dict):
        return sum(held_bytes(part, seen) for part in value.values())
    return held_bytes(vars(value), seen) if hasattr(value, "__dict__") and not callable(value) else 0
