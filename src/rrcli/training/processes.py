"""Several processes that train one model: which one this is, what they agree on, and what they add up.

Every process makes the same global batch and computes its own rows of it. Losses are divided by the counts of the whole
step, so gradients and logged values of the processes add up, and it does not matter how a batch is cut.

Gradients are added up once, after the last backward pass of a step, in flat buckets. Not by DDP's wrapper: it does so
in the middle of a backward pass, where a process that is out of memory would leave the others waiting, and it wants one
forward of one module, where a step has a backbone and heads. What this gives up is overlapping communication with the
backward pass.

`accelerate` finds out what the launcher (`accelerate launch`, `torchrun`, or `launching`) has set up.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from rrcli.errors import RRError, UsageError
from rrcli.models.loading import pick_device
from rrcli.training.launching import MEETING_PLACE
from rrcli.upstream import leave_process_group

# How long a process waits for the others: while one of them writes a large checkpoint, longer than torch's 10 minutes.
TIMEOUT = timedelta(hours=6)
# Gradients that are added up in one call, in elements.
BUCKET = 2**24


@dataclass(frozen=True)
class Processes:
    """One process among `count`; the default is the only one, for which nothing here costs anything.

    Attributes:
        rank: this one's number. device: where it computes, as an option's value.
        sharded: whether each holds a part of the weights only; see `sharding`.
    """

    device: str
    rank: int = 0
    count: int = 1
    sharded: bool = False

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.rank == 0

    def rows(self, examples: int) -> slice:
        """Return which rows of a global batch are this process's own: as many for each where they divide evenly."""
        return slice(self.rank * examples // self.count, (self.rank + 1) * examples // self.count)

    def gather(self, value: Any) -> list[Any]:
        """Return the value of every process, in their order, to all of them."""
        if self.count == 1:
            return [value]
        values = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def from_main(self, value: Any) -> Any:
        """Return the main process's value to all of them."""
        if self.count == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def on_main(self, work: Callable[[], object]) -> None:
        """Let the main process do something while the others wait; an expected error of it is raised by all of them."""
        error = None
        try:
            if self.main:
                work()
        except RRError as found:
            error = found
        if failed := self.from_main(error):
            raise error or failed

    @torch.no_grad()
    def add_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace the gradients of all processes by their sums; a parameter that none has a gradient of stays without.

        The sums have the same bits in every process, so the weights stay equal.
        """
        if self.count == 1:
            return
        parameters = list(parameters)
        have = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=parameters[0].device)
        dist.all_reduce(have, op=dist.ReduceOp.MAX)
        used = [p for p, has in zip(parameters, have.tolist(), strict=True) if has]
        for parameter in used:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets([p.grad for p in used if p.grad is not None]):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            dist.all_reduce(flat)
            for gradient, summed in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(summed.view_as(gradient))

    def leave(self) -> None:
        """End the group."""
        if dist.is_initialized():
            leave_process_group()


def join(device: str) -> Processes:
    """Join the processes that a launcher started, or be the only one.

    Args:
        device: the option's value; with several processes each GPU has its own.

    Raises:
        UsageError: a device that cannot be shared out. RRError: a launcher's feature that is not supported.
    """
    kind = pick_device(device)
    sharded = "RANK" in os.environ and _asked_for("FSDP")
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 and not sharded:
        return Processes(device)
    if kind not in ("cpu", "cuda"):
        raise UsageError(f"several processes cannot train on '{device}'", "Use --device cpu, or cuda with a GPU each.")
    for feature in ("DEEPSPEED", "MEGATRON_LM"):
        if _asked_for(feature):
            raise RRError(f"accelerate's configuration asks for {feature}", "Use plain data parallelism, or FSDP 2.")
    if sharded and os.environ.get("FSDP_VERSION", "1") != "2":
        raise RRError("accelerate's configuration asks for FSDP 1", "Set fsdp_version: 2 in its fsdp_config.")
    if sharded and os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true":
        raise RRError("accelerate's configuration asks for offloading", "Set fsdp_offload_params: false.")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if kind == "cuda" and local >= torch.cuda.device_count():
        raise UsageError(
            f"process {local} finds {torch.cuda.device_count()} GPUs", "Start as many processes as there are GPUs."
        )
    from accelerate import PartialState

    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    state = PartialState(cpu=kind == "cpu", timeout=TIMEOUT, **_meeting())
    return Processes(str(state.device), state.process_index, state.num_processes, sharded)


# How many groups this process has joined: those of one launch join them together, and each group has its own file.
_joined = itertools.count(1)


def _meeting() -> dict[str, Any]:
    """Return how the processes that `launching` started find each other; other launchers tell torch themselves."""
    place = os.environ.get(MEETING_PLACE)
    if place is None:
        return {}
    ranks = {"rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}
    return {"init_method": f"{Path(place).as_uri()}-{next(_joined)}", **ranks}


def _asked_for(feature: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{feature}", "false").lower() == "true"


def _buckets(tensors: list[Tensor]) -> Iterable[list[Tensor]]:
    """Cut tensors, in order, into groups of one dtype and device and of about `BUCKET` elements."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        other = bucket and (tensor.dtype, tensor.device) != (bucket[0].dtype, bucket[0].device)
        if other or (bucket and size + tensor.numel() > BUCKET):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket
