"""Sharding: each process holds a part of the weights, gradients and optimiser state, by torch's `fully_shard` (FSDP2).

An accelerate configuration asks for it (`fsdp_config: fsdp_version: 2`). It is done with torch's own function:
accelerate's `prepare` does nothing on a CPU and needs a single forward of a single model. So tests on a CPU run the
same code as a GPU. Every decoder layer is a unit, which is put together whenever the recursion calls it; embeddings,
head and sidecar together are another unit. Gradients are summed, as the losses are divided by global counts. Every
process must run the same number of forwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from rrcli.recursion.families import find_layout
from rrcli.training.processes import Processes


def shard(root: nn.Module, model: Any, processes: Processes) -> None:
    """Cut the parameters of `root`, which holds the model and its sidecar, into shards, in place."""
    mesh = init_device_mesh(torch.device(processes.device).type, (processes.count,))
    for layer in model.get_submodule(find_layout(model)[0].layers):
        fully_shard(layer, mesh=mesh)
    fully_shard(root, mesh=mesh)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


@contextmanager
def unsharded(root: nn.Module) -> Iterator[None]:
    """Put together what lies outside of the layers, for forwards that do not go through that of `root`."""
    if not isinstance(root, FSDPModule):
        yield
        return
    root.unshard()
    try:
        yield
    finally:
        root.reshard()


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
