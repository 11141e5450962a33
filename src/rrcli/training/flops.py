"""FLOPs of a training: counted at the first step of each depth."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils.flop_counter import FlopCounterMode

from rrcli.recursion.products import FLOPS


@contextmanager
def counted_flops() -> Iterator[FlopCounterMode]:
    """Count the FLOPs of what runs inside, forward and backward."""
    counter = FlopCounterMode(display=False, custom_mapping=FLOPS)
    # Not compiled: the compiler gives up, for good, on what it first sees under a counter.
    with torch.compiler.set_stance("force_eager"), counter:
        yield counter
