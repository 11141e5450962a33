"""Several processes that work on one model: which one this is, what they exchange, and which gradients they add up.

Every process makes the same global batch and computes its own rows of it. Losses are divided by the counts of the whole
step, so the gradients and logged values of the step are sums over the processes, however the batch is cut.

Gradients are added up once, after the last backward pass of a step, in flat buckets. DDP's wrapper is not used for two
reasons. It communicates in the middle of a backward pass, where a process that runs out of memory would leave the
others waiting; and it needs a single forward of a single module, whereas a step calls a backbone and heads. The price
is that communication does not overlap with the backward pass.

`accelerate` reads what the launcher (`accelerate launch`, `torchrun`, or `launching`) has set up. Importing this loads
no torch.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from rrcli.errors import RRError, UsageError
from rrcli.models.loading import pick_device
from rrcli.models.placement import Parallel
from rrcli.training.launching import MEETING_PLACE

if TYPE_CHECKING:
    from torch import Tensor

# How long a process waits for the others. Writing a large checkpoint can take longer than torch's 10 minutes.
TIMEOUT = timedelta(hours=6)
Value = TypeVar("Value")
# How many elements of gradients are added up in one call.
BUCKET = 2**24


@dataclass(frozen=True)
class Processes:
    """One process among `count`. For a single process, nothing here costs anything.

    Attributes:
        device: where this process computes, as a value of `--device`.
        rank: the number of this process, from 0.
        parallel: how they share the weights, where each holds only a part of them; then all run the same forwards.
    """

    device: str
    rank: int = 0
    count: int = 1
    parallel: Parallel | None = None

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes files and reports to the user."""
        return self.rank == 0

    @property
    def tensor(self) -> int:
        """How many processes work on the same rows (tensor parallelism)."""
        return 1 if self.parallel is None else self.parallel.tp

    @property
    def in_step(self) -> bool:
        """Whether each holds a part of the model, so that all have to run as many forwards as each other."""
        return self.parallel is not None and self.parallel.cuts

    @property
    def shares(self) -> int:
        """How many shares a batch is cut into."""
        return self.count // self.tensor

    @property
    def share(self) -> int:
        """The number of this process's share of a batch, from 0."""
        return self.rank // self.tensor

    def rows(self, examples: int) -> slice:
        """Return the rows of a global batch that this process computes; all have as many where that divides evenly."""
        return slice(self.share * examples // self.shares, (self.share + 1) * examples // self.shares)

    def gather(self, value: Any) -> list[Any]:
        """Return the value of every process, in their order, to all of them."""
        if self.count == 1:
            return [value]
        from torch import distributed as dist

        values = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def from_main(self, value: Any) -> Any:
        """Return the main process's value to all of them."""
        if self.count == 1:
            return value
        from torch import distributed as dist

        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def on_main(self, work: Callable[[], object]) -> None:
        """Let the main process do something while the others wait; if it raises an RRError, all of them raise it."""
        self.decided(lambda: (work(), None)[1])

    def decided(self, work: Callable[[], Value]) -> Value:
        """Return to all what the main process finds, which the others wait for; an RRError is raised in all of them."""
        if self.count == 1:
            return work()
        found: tuple[RRError | None, Any] = (None, None)
        if self.main:
            try:
                found = (None, work())
            except RRError as error:
                found = (error, None)
        failed, value = self.from_main(found)
        if failed is not None:
            raise failed
        return cast(Value, value)

    def add_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace the gradients by their sums over all shares of the batch, for tensors that every process holds whole.

        A parameter for which no process has a gradient stays without one. The sums have the same bits in every process,
        so the weights stay equal. Processes that work on the same rows have the same gradients: they count once.
        """
        if self.count == 1:
            return
        import torch
        from torch import distributed as dist

        from rrcli.recursion.parts import plain

        parameters = plain(parameters)
        if not parameters:
            return
        have = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=parameters[0].device)
        dist.all_reduce(have, op=dist.ReduceOp.MAX)
        used = [p for p, has in zip(parameters, have.tolist(), strict=True) if has]
        with torch.no_grad():
            for parameter in used:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            for bucket in _buckets([p.grad for p in used if p.grad is not None]):
                flat = torch.cat([gradient.flatten() for gradient in bucket])
                dist.all_reduce(flat)
                if self.tensor > 1:
                    flat /= self.tensor
                for gradient, summed in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                    gradient.copy_(summed.view_as(gradient))

    def leave(self) -> None:
        """Leave the process group."""
        if self.count == 1:
            return
        from torch import distributed as dist

        from rrcli.upstream import leave_process_group

        if dist.is_initialized():
            leave_process_group()


def join(device: str, parallel: Parallel | None = None) -> Processes:
    """Join the processes that a launcher started, or be the only one.

    Args:
        device: the value of `--device`; of several processes on GPUs, each takes its own.
        parallel: how they are to share the weights; by default as an accelerate configuration says (FSDP 2), or not.

    Raises:
        UsageError: several processes cannot work on this device, or are another number than `parallel` needs.
        RRError: the launcher asks for what is not supported.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    parallel = parallel or _asked_parts(count)
    if parallel is not None and parallel.processes != count:
        raise UsageError(
            f"--parallel {parallel} needs {parallel.processes} processes, {count} were started",
            "Start as many, or leave the launcher out: rr starts them itself.",
        )
    if count == 1:
        return Processes(device)
    kind = pick_device(device).partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise UsageError(f"several processes cannot work on '{kind}'", "Use --device cpu, or cuda with a GPU each.")
    for feature in ("DEEPSPEED", "MEGATRON_LM"):
        if _asked_for(feature):
            raise RRError(f"accelerate's configuration asks for {feature}", "Use plain data parallelism, or FSDP 2.")
    import torch
    from accelerate import PartialState

    there = torch.accelerator.current_accelerator()
    if parallel is not None and there is not None and there.type != kind:
        raise UsageError(
            f"a model in parts lies on this machine's {there.type} devices, --device is {device}",
            "Set CUDA_VISIBLE_DEVICES to nothing to use the CPU.",
        )
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if kind == "cuda" and local >= torch.cuda.device_count():
        raise UsageError(
            f"process {local} finds {torch.cuda.device_count()} GPUs", "Start as many processes as there are GPUs."
        )
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    state = PartialState(cpu=kind == "cpu", timeout=TIMEOUT, **_meeting())
    return Processes(str(state.device), state.process_index, state.num_processes, parallel)


def _asked_parts(count: int) -> Parallel | None:
    """Return the sharding that an accelerate configuration asks for; None where it asks for none, or of one process.

    Raises:
        RRError: it asks for what is not supported.
    """
    if "RANK" not in os.environ or not _asked_for("FSDP"):
        return None
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise RRError("accelerate's configuration asks for FSDP 1", "Set fsdp_version: 2 in its fsdp_config.")
    if os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true":
        raise RRError("accelerate's configuration asks for offloading", "Set fsdp_offload_params: false.")
    return Parallel(fsdp=count) if count > 1 else None


# How many groups this process has joined so far. All processes of a launch join the same groups in the same order, and
# each group has a file of its own.
_joined = itertools.count(1)


def _meeting() -> dict[str, Any]:
    """Return how processes that `launching` started find each other; other launchers tell torch themselves."""
    place = os.environ.get(MEETING_PLACE)
    if place is None:
        return {}
    ranks = {"rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}
    return {"init_method": f"{Path(place).as_uri()}-{next(_joined)}", **ranks}


def _asked_for(feature: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{feature}", "false").lower() == "true"


def _buckets(tensors: list[Tensor]) -> Iterable[list[Tensor]]:
    """Group tensors, in their order, by dtype and device, with at most `BUCKET` elements in a group of several."""
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
