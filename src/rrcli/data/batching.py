"""Turns lists of token ids into tensors: padded, masked, and cut into batches that fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import psutil
import torch
from torch import Tensor

from rrcli.data.dealing import ALONE, Team
from rrcli.errors import RRError
from rrcli.recursion.batch import IGNORED, Batch
from rrcli.recursion.families import input_device, is_spread
from rrcli.recursion.parts import others_wait
from rrcli.reporting import Reporter

# The largest batch that pays off on a CPU, in tokens: activations of larger ones no longer fit into its caches.
CPU_TOKENS = 512

Item = TypeVar("Item")
Result = TypeVar("Result")


def collate(examples: Sequence[tuple[list[int], list[int]]], pad: int) -> Batch:
    """Pad (ids, labels) pairs on the right into one batch."""
    width = max(len(ids) for ids, _ in examples)
    return Batch(
        torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in examples]),
        torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in examples]),
        torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in examples]),
    )


def padded(rows: Sequence[list[int]], device: Any, *, left: bool = False) -> tuple[Tensor, Tensor]:
    """Return `[row, position]` ids and mask (1 = a real token), padded on the right or on the left."""
    width = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        gap = width - len(row)
        ids.append([0] * gap + row if left else row + [0] * gap)
        mask.append([0] * gap + [1] * len(row) if left else [1] * len(row) + [0] * gap)
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def batches(items: Sequence[Any], budget: int, length: Any, *, unpadded: bool = False) -> Iterator[list[Any]]:
    """Cut items, longest first, into batches whose padded size stays within `budget` tokens (at least one item).

    Args:
        unpadded: items of different lengths never share a batch.
    """
    begin = 0
    while begin < len(items):
        size = length(items[begin])
        batch = list(items[begin : begin + max(1, budget // max(1, size))])
        if unpadded:
            batch = [item for item in batch if length(item) == size]
        yield batch
        begin += len(batch)


def halving(
    run: Callable[[list[Item]], Result], batch: list[Item], too_large: Callable[[Item], RRError]
) -> list[Result]:
    """Run a batch; if the device's memory cannot hold it, run its halves one after the other, and halves of these.

    Args:
        too_large: the error to raise where a single item does not fit.

    Returns:
        The results of the parts, in their order.

    Raises:
        RRError: `too_large` of that item; for a model in parts, of the whole batch, as the other processes run it too.
    """
    try:
        return [run(batch)]
    except torch.OutOfMemoryError as error:
        if len(batch) == 1 or others_wait():
            raise too_large(batch[0]) from error
    # After the handler has ended, as its traceback keeps the tensors of the failed run alive.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    middle = (len(batch) + 1) // 2
    return halving(run, batch[:middle], too_large) + halving(run, batch[middle:], too_large)


def affordable(model: Any, budget: int, bytes_per_token: int, reporter: Reporter, *, team: Team = ALONE) -> int:
    """Return a budget of tokens that pays off on a CPU and takes at most half of its available memory.

    Where layers lie on disk, reading them takes longest, once for each batch: then a larger batch always pays.

    A team takes the least budget of its processes, so that all cut the same batches.

    On other devices the budget stays: a GPU raises an error when it is out of memory, which can be handled, whereas on
    a CPU the system kills a process that takes too much.
    """
    if input_device(model).type != "cpu":
        return budget
    if not is_spread(model):
        budget = min(budget, CPU_TOKENS)
    available = min(team.gather(psutil.virtual_memory().available))
    lowered = budget
    while lowered > 1 and lowered * bytes_per_token > available // 2:
        lowered //= 2
    if lowered < budget:
        reporter.warn(
            f"batches have {lowered} tokens, not {budget}: {available / 2**30:.1f} GiB of memory are available and a "
            f"token takes about {bytes_per_token / 2**20:.2g} MiB"
        )
    return lowered
