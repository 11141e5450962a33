"""What a family that is in no table has to prove on a few tokens before a recursion is accepted.

    one list        every decoder layer runs exactly once in a forward, in order, on `[batch, position, hidden]`
    causal          an earlier position does not see a later one
    replay          running the span again with the same arguments computes what the stock model computes for the same
                    input: with the cell replaced by a constant c, depth 1 must equal the stock model with c added to
                    the input of the span's first layer, uncached and cached

The last one finds anything else that layers hand on than the hidden state: extra tensors, states kept in modules,
caches that are not known as caches.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rrcli.errors import RRError
from rrcli.recursion.facts import vocabulary
from rrcli.recursion.families import home_of, input_device
from rrcli.recursion.probing import decoded_logits, in_pieces
from rrcli.upstream import CACHE_NAMES, is_cache

BATCH, PROMPT, LENGTH = 2, 6, 9
# How many of the last tokens of a check are decoded one by one.
DECODED = 3
# Two ways to the same logits may differ by rounding, relative to the largest logit.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
LOW_PRECISION = 0.05


class _Constant(nn.Module):
    """Stands in for the cell: the same feedback at every position of every pass."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, hidden: Tensor, step: int) -> Tensor:
        return self.value.expand_as(hidden)


@torch.no_grad()
def prove(recursion: Any) -> None:
    """Compare a fresh recursion with the stock model.

    Raises:
        RRError: something does not hold; the message says what.
    """
    training, _ = recursion.model.training, recursion.model.eval()
    try:
        _prove(recursion)
    finally:
        recursion.model.train(training)


@torch.no_grad()
def self_check(recursion: Any, tokens: int = 8) -> None:
    """Prove on a few tokens that a fresh recursion changes nothing and that readouts are what the model computes.

    Looks at one forward without a cache, and at decoding the last tokens one by one with the model's own.

    Raises:
        RRError: the logits at some depth differ from the stock model's, or a readout does.
    """
    model = recursion.model
    family = model.config.model_type
    ids = (torch.arange(tokens, device=home_of(model.get_input_embeddings()))[None] * 37 + 11) % vocabulary(model)
    training, _ = model.training, model.eval()
    try:
        with recursion.at_depth(0):
            stock, decoded = model(input_ids=ids, use_cache=False).logits, decoded_logits(model, ids, DECODED)
        for depth in range(1, recursion.config.max_steps + 1):
            with recursion.at_depth(depth):
                same = torch.equal(model(input_ids=ids, use_cache=False).logits, stock)
                if not same or not torch.equal(decoded_logits(model, ids, DECODED), decoded):
                    raise RRError(
                        f"'{family}' models cannot be supported: a zero-initialised recursion changes the logits "
                        f"at depth {depth}{' when they are cached' if same else ''}",
                        f"Decoder layers were taken to be {type(recursion.layers[0]).__name__}.",
                    )
        hidden = recursion.passes(ids).hidden
        if not all(torch.equal(state, hidden[-1]) for state in hidden[:-1]):
            raise RRError(f"'{family}' models cannot be supported: what follows the decoder layers was not understood")
    finally:
        model.train(training)


def _prove(recursion: Any) -> None:
    model = recursion.model
    if "input_ids" not in inspect.signature(recursion.backbone.forward).parameters:
        kind = type(recursion.backbone).__name__
        raise _refusal(model, f"the module that holds its layers ({kind}) is not given the tokens")
    size = vocabulary(model)
    ids = (torch.arange(BATCH * LENGTH, device=input_device(model)).view(BATCH, LENGTH) * 41 + 13) % size
    tolerance = TOLERANCE.get(model.dtype, LOW_PRECISION)
    with recursion.at_depth(0):
        plain, entry = _traced(recursion, ids)
        other = ids.clone()
        other[:, -1] = (other[:, -1] + 1) % size
        if not _close(_uncached(model, other)[:, :-1], plain[:, :-1], tolerance):
            raise _refusal(model, "it is not causal: a position sees the one after it")

    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(entry.shape[-1], generator=generator).to(entry)
    constant = noise * entry.float().pow(2).mean().sqrt().to(entry)
    for run, how in ((_uncached, "without a cache"), (_cached, "with a cache")):
        with recursion.at_depth(0), _added(recursion.layers[recursion.start], constant):
            disturbed = run(model, ids)
        with recursion.at_depth(1), _cell(recursion, _Constant(constant)):
            replayed = run(model, ids)
        if not _close(replayed, disturbed, tolerance):
            kind = type(recursion.layers[recursion.start]).__name__
            raise _refusal(
                model,
                f"running its layers ({kind}) again, {how}, does not compute what the model itself computes for "
                "the same input: its layers hand on something else than the hidden state",
            )


def _traced(recursion: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the stock logits and the span's input, having checked how the layers were called."""
    model, calls = recursion.model, []

    def note(index: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append((index, args[0] if args else kwargs.get("hidden_states")))

        return hook

    hooks = [layer.register_forward_pre_hook(note(i), with_kwargs=True) for i, layer in enumerate(recursion.layers)]
    try:
        logits = _uncached(model, ids)
    finally:
        for hook in hooks:
            hook.remove()
    order = [index for index, _ in calls]
    if order != list(range(len(recursion.layers))):
        raise _refusal(model, f"its layers do not run once each in order, but as {order}")
    width = recursion.cell.w_out.weight.shape[0]
    for _, hidden in calls:
        shape = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
        if shape != (*ids.shape, width):
            wanted = f"[batch, position, hidden] = {(*ids.shape, width)}"
            raise _refusal(model, f"its layers are called with {shape}, not {wanted}")
    return logits, calls[recursion.start][1]


def _uncached(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


def _cached(model: Any, ids: Tensor) -> Tensor:
    """Return the logits of a prompt and of the tokens after it one by one, or of the prompt if there is no cache."""
    parts = []
    # Some families start at position 0 again unless they are told the position.
    for output in in_pieces(model, ids, [PROMPT, *[1] * (LENGTH - PROMPT)], told=("attention_mask", "position_ids")):
        parts.append(output.logits)
        caches = [value for name, value in output.items() if name in CACHE_NAMES or is_cache(value)]
        if not caches:
            _refuse_memory(model, ids[:, PROMPT : PROMPT + 1])
        elif not is_cache(caches[0]):
            raise _refusal(model, f"its cache is a {type(caches[0]).__name__}, which is not known as a cache")
    return torch.cat(parts, 1)


def _refuse_memory(model: Any, token: Tensor) -> None:
    """Refuse a model that returns no cache, and yet computes something else from what it has seen before.

    Args:
        token: `[batch, 1]` the token after the first `PROMPT`, which the model has just seen.
    """
    after = {"input_ids": token}
    if "position_ids" in inspect.signature(model.forward).parameters:
        after["position_ids"] = torch.full_like(token, PROMPT)
    remembers, fresh = (model(use_cache=use, **after).logits for use in (True, False))
    if not _close(remembers, fresh, TOLERANCE.get(model.dtype, LOW_PRECISION)):
        raise _refusal(model, "it returns no cache, yet remembers what it saw: it keeps its state in its modules")


@contextmanager
def _added(layer: nn.Module, constant: Tensor) -> Iterator[None]:
    def add(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (args[0] + constant, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": kwargs["hidden_states"] + constant}

    hook = layer.register_forward_pre_hook(add, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _cell(recursion: Any, cell: nn.Module) -> Iterator[None]:
    before, recursion.cell = recursion.cell, cell
    try:
        yield
    finally:
        recursion.cell = before


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


def _refusal(model: Any, reason: str) -> RRError:
    return RRError(
        f"'{model.config.model_type}' models cannot be supported: {reason}", "Recursion needs another model."
    )
