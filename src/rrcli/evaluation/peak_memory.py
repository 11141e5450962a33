"""The most memory that a process held, and how much of it was there before: CUDA's counter, or the resident set."""

from __future__ import annotations

import contextlib
import re
import resource
import sys
from pathlib import Path

import psutil
import torch

from rrcli.allocator import return_freed_memory
from rrcli.errors import CheckFailed

MIB = 2**20


class PeakMemory:
    """The peak since this object was made; for a peak of its own, a model is loaded in a process that has no other.

    Args:
        device: where the model will be. On CUDA torch's counter of allocated memory is read; elsewhere the process's
            resident set, which is all that a CPU has and what MPS shares with it.
    """

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device) / MIB
        else:
            reset_peak_resident()
            self.before = psutil.Process().memory_info().rss / MIB

    def above(self) -> float:
        """Return the peak in MB, without what was there before.

        Raises:
            CheckFailed: the peak is below what was there before.
        """
        cuda = self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self.device) / MIB if cuda else peak_resident_mb()
        if peak < self.before:
            raise CheckFailed(
                f"the peak memory ({peak:.0f} MB) is below what there was before the model ({self.before:.0f} MB)",
                "What the system says of this process's memory cannot be used. Use --skip-performance.",
            )
        return peak - self.before

    def free(self) -> float:
        """Return how many MB other processes can still have."""
        if self.device.type == "cuda":
            return int(torch.cuda.mem_get_info(self.device)[0]) / MIB
        return float(psutil.virtual_memory().available) / MIB


def reset_peak_resident() -> None:
    """Begin a new peak of the resident set, where the system can (Linux); elsewhere it is that of the whole process."""
    return_freed_memory()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_resident_mb() -> float:
    """Return the peak of the resident set in MB: since the last reset on Linux, of the whole process elsewhere."""
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text()
        return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / MIB if sys.platform == "darwin" else peak / 2**10
