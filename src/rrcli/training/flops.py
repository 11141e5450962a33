"""FLOPs of a training: counted at the first step of each depth, and how many steps spend a given number of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch.utils.flop_counter import FlopCounterMode

from rrcli.recursion.products import FLOPS

if TYPE_CHECKING:
    from rrcli.training.trainer import Trainer

# How many batches stand for all when the mean size of a batch is estimated.
SAMPLED_BATCHES = 64


@contextmanager
def counted_flops() -> Iterator[FlopCounterMode]:
    """Count the FLOPs of what runs inside, forward and backward."""
    counter = FlopCounterMode(display=False, custom_mapping=FLOPS)
    # Not compiled: the compiler gives up, for good, on what it first sees under a counter.
    with torch.compiler.set_stance("force_eager"), counter:
        yield counter


def steps_for(trainer: Trainer, flops: float) -> int:
    """Return in how many steps a vanilla training spends `flops`, from the mean size of its first batches."""
    batch, plan = trainer.planned(0)
    known = trainer.state.flops_by_depth
    if plan.depth not in known:
        trainer.gradients(batch, plan, step=0)
        trainer.optimizer.forget_gradients()
    positions = sum(trainer.data.batch(step).positions for step in range(SAMPLED_BATCHES)) / SAMPLED_BATCHES
    return max(1, round(flops / (positions * known[plan.depth])))
