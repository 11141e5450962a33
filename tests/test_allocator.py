"""Freed memory that is kept is used again, and can be given back."""

from __future__ import annotations

import subprocess
import sys

import pytest

from rrcli import allocator

SCRIPT = """
import resource, sys
import torch
from rrcli import allocator
if "keep" in sys.argv:
    assert allocator.keep_freed_memory()

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        a = torch.ones(2**23)  # 32 MiB
        b = a + 1
        del a, b
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20

faults()
print(faults())
kept = resident()
allocator.return_freed_memory()
print(kept - resident())
"""


def measured(*arguments: str) -> list[float]:
    done = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    return [float(line) for line in done.stdout.split()]


@pytest.mark.skipif(allocator._glibc() is None, reason="malloc is not glibc's")
def test_tensors_take_the_memory_that_others_freed():
    (stock, _), (kept, returned) = measured(), measured("keep")
    assert kept < stock / 10
    assert returned > 32
