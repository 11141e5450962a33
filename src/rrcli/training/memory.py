"""The device's memory in training: how much of it is used, giving some back, and the errors where it is too small."""

from __future__ import annotations

import gc
from typing import Any

import psutil
import torch

from rrcli.errors import RRError


def memory_use(device: Any) -> tuple[float, float]:
    """Return the bytes in use (CUDA's peak, the process's own on a CPU) and the used share of what there is, 0 to 1."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        # What the allocator holds in reserve is not used up.
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.max_memory_allocated(device), 1 - (free + idle) / total
    memory = psutil.virtual_memory()
    return psutil.Process().memory_info().rss, 1 - memory.available / memory.total


def give_back() -> None:
    """Free what a failed attempt left behind, so that a smaller one can use it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def too_large(step: int, rows: int) -> RRError:
    """Return the error for a step (from 0) of which not even `rows` examples at a time fit."""
    return RRError(
        f"out of memory in step {step + 1}, even with {'one example' if rows == 1 else f'{rows} examples'} at a time",
        "Try --gradient-checkpointing, a lower --max-length, --phase a or b, or --dtype bfloat16."
        if rows == 1
        else "Try a higher --gradient-accumulation, or --gradient-checkpointing.",
    )


def too_large_for_the_optimizer(step: int) -> RRError:
    """Return the error for a step (from 0) whose gradients fit, but not the optimiser's state."""
    return RRError(
        f"out of memory in the optimiser's part of step {step + 1}, which is not saved",
        "AdamW keeps 8 bytes for each weight that trains: try --phase a or b, or a smaller model.",
    )
