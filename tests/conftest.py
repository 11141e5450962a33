"""Fixtures shared by the tests. The tiny models themselves are built in `families.py`."""

from __future__ import annotations

from collections.abc import Iterator

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
