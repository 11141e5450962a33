"""Weights in training of which each process has a part: put together to be saved, and cut to be resumed from.

Under `--parallel fsdp=N` each process holds a part of the weights, their gradients and the optimiser's state, by
torch's `fully_shard` (FSDP 2), as transformers sets it up where it reads the weights (see `recursion/parts`). A
checkpoint holds whole tensors, so that any number of processes can resume from it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from rrcli.training.processes import Processes


def clip_gradients(parameters: Iterable[Tensor], most: float) -> float:
    """Scale gradients down to a total norm of `most`, and return the norm that they had.

    Tensors in parts and whole ones are taken together; torch's own function takes either.
    """
    groups: dict[object, list[Tensor]] = {}
    for parameter in parameters:
        groups.setdefault(parameter.device_mesh if isinstance(parameter, DTensor) else None, []).append(parameter)
    if list(groups) == [None]:
        return float(nn.utils.clip_grad_norm_(groups[None], most))
    norms = []
    for group in groups.values():
        norm = nn.utils.get_total_norm([p.grad for p in group if p.grad is not None])
        norms.append(float(norm.full_tensor() if isinstance(norm, DTensor) else norm))
    total = math.hypot(*norms)
    if math.isfinite(total) and total > most:
        for group in groups.values():
            for parameter in group:
                assert parameter.grad is not None
                parameter.grad.mul_(most / (total + 1e-6))  # as torch does
    return total


def whole(tensors: dict[str, Tensor], processes: Processes) -> dict[str, Tensor]:
    """Put tensors together, one by one, in the main process; the others get an empty dictionary."""
    found = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor
        if processes.main:
            found[name] = full
    return found


def whole_state(module: nn.Module, dtype: torch.dtype, processes: Processes) -> dict[str, Tensor]:
    """Return a module's whole state dictionary in the main process, its parameters as `dtype`; see `whole`.

    Tied parameters share memory.
    """
    keys = {name: id(parameter) for name, parameter in module.named_parameters(remove_duplicate=False)}
    state = module.state_dict()
    first = {key: name for name, key in reversed(keys.items())}
    found = whole({name: t for name, t in state.items() if first.get(keys.get(name, 0), name) == name}, processes)
    found = {name: t.to(dtype) if name in keys else t for name, t in found.items()}
    return {name: found[first.get(keys.get(name, 0), name)] for name in state} if processes.main else {}


def cut_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Return this process's shard of a whole tensor, cut like a parameter; the tensor itself if that is not cut."""
    if not isinstance(parameter, DTensor) or not tensor.ndim:
        return tensor
    return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)
