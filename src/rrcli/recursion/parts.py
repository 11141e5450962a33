"""Models in parts: each process holds a part of the weights, and all run the same forwards at the same time.

So no process may decide for itself what it runs. A process that runs out of memory ends the command, as the others are
waiting for it in the middle of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

MARK = "in_parts"
_waiting: list[bool] = []


def mark(model: Any, whole: Sequence[str]) -> None:
    """Note that a model is in parts, and which of its modules are put together for longer than they run."""
    model.__dict__[MARK] = tuple(whole)
    _waiting.append(True)


def in_parts(model: Any) -> bool:
    """Tell whether this process holds only a part of a model."""
    return MARK in getattr(model, "__dict__", ())


def others_wait() -> bool:
    """Tell whether this process has a part of a model, so that others wait for it wherever it stops."""
    return bool(_waiting)


def most(model: Any, value: int) -> int:
    """Return the greatest value of all processes for a model in parts, and the value itself for any other."""
    if not in_parts(model):
        return value
    found = torch.tensor(value, dtype=torch.int64, device=next(model.parameters()).device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return int(found)


@contextmanager
def in_step(model: Any) -> Iterator[None]:
    """While it is entered, processes with parts of a model may call it a different number of times.

    Before each call they count those that are still inside. One that has left first runs along, with calls on a single
    token, until the last has left. Each call has to run the same layers: no drafts, no exits.
    """
    device = next(model.parameters()).device

    def inside(one: int) -> bool:
        count = torch.tensor(one, device=device)
        dist.all_reduce(count)
        return int(count) > 0

    # Before the hooks with which FSDP puts weights together.
    hook = model.register_forward_pre_hook(lambda *_: (inside(1), None)[1], prepend=True)
    try:
        yield
    finally:
        hook.remove()
    while inside(0):
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False)


@torch.no_grad()
def settle(model: Any, *, trains: bool) -> None:
    """Run a model in parts once, which FSDP needs before parts of it may be called, and leave it ready for its use.

    Weights outside of the layers stay whole where nothing of the model trains. Where it trains, they are cut again, so
    that the optimiser finds parts; a forward puts them together.
    """
    device = next(model.parameters()).device
    model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Losses are divided by the counts of the whole step, so gradients are summed and not averaged.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    for name in vars(model)[MARK]:
        module = model.get_submodule(name)
        if isinstance(module, FSDPModule):
            module.set_reshard_after_backward(trains)
    if trains:
        cut_again(model)


@contextmanager
def together(model: Any) -> Iterator[None]:
    """While it is entered, what lies outside of the layers is whole, for forwards that no backward pass follows."""
    if not in_parts(model):
        yield
        return
    for name in vars(model)[MARK]:
        module = model.get_submodule(name)
        if isinstance(module, FSDPModule):
            module.unshard()
    try:
        yield
    finally:
        cut_again(model)


def cut_again(model: Any) -> None:
    """Cut what a forward without a backward pass has left whole, before anything reads or changes the weights."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def hold_masters(model: Any) -> None:
    """Convert the parts of a model's weights to fp32, in which they train, and note the format of each.

    Each process converts its own parts, so the whole model never exists in fp32. FSDP allows this before the first
    forward.
    """
    model.__dict__["computes_in"] = model.dtype
    formats = {}
    for name, parameter in model.named_parameters():
        formats[f"model.{name}"] = parameter.dtype
        parameter.data = parameter.data.float()
    model.__dict__["formats"] = formats


def kind_of(module: nn.Module) -> type:
    """Return the class of a module; of one that FSDP has given a class of its own, the class that it had before."""
    kind = type(module)
    return kind.__bases__[-1] if isinstance(module, FSDPModule) else kind


def plain(tensors: Any) -> list[Any]:
    """Return those tensors that every process holds whole."""
    return [tensor for tensor in tensors if not isinstance(tensor, DTensor)]
