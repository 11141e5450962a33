"""Fixtures shared by the tests. The tiny models themselves are built in `families.py`."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Two workers on two cores: one thread each, for this process and for the `rr` that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# xdist names a width of 80 columns; what is tested is what a user's pipe gets.
os.environ.pop("COLUMNS", None)

import pytest
import torch
from transformers.utils import logging


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Make every test start from the same random state, whatever ran before it."""
    logging.set_verbosity_error()
    torch.manual_seed(0)
    yield
    torch.manual_seed(0)
