"""Fixtures shared by the tests. The tiny models themselves are built in `families.py`."""

from __future__ import annotations

import logging as standard
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Two workers on two cores: one thread each, for this process and for the `rr` that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# xdist names a width of 80 columns; what is tested is what a user's pipe gets.
os.environ.pop("COLUMNS", None)

import pytest
import torch
from hypothesis import HealthCheck, settings
from tensorboard.summary.writer import event_file_writer
from transformers.utils import logging

# A busy machine must not fail a property: no limit of time for an example.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


def _strict(log: standard.Logger, message: Any, *args: Any, **kwargs: Any) -> None:
    """Log what transformers says once, unless it says that something is deprecated which `rrcli` itself uses."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("transformers", "functools"):
        frame = frame.f_back
    caller = frame.f_globals.get("__name__", "") if frame is not None else ""
    if "deprecated" in str(message) and caller.split(".")[0] == "rrcli":
        raise DeprecationWarning(f"{caller}: {message}")
    _said_once(log, message, *args, **kwargs)


# Event files that one process makes in one second are told apart by a counter in their names, and are read in the order
# of their names: a counter whose number of digits stays the same keeps them in order.
_files_made = event_file_writer._global_uid
_files_made._value = max(_files_made._value, 1000)

# Some deprecations are logged, not warned about.
_said_once = standard.Logger.warning_once  # type: ignore[attr-defined]
standard.Logger.warning_once = _strict  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Make every test start from the same random state, whatever ran before it."""
    logging.set_verbosity_error()
    torch.manual_seed(0)
    yield
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model in several shards with an index."""
    import rrcli

    folder = tmp_path_factory.mktemp("sharded") / "model"
    model, tokenizer = rrcli.load("default")
    model.save_pretrained(folder, max_shard_size=model.get_memory_footprint() // 3)
    tokenizer.save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture(scope="module")
def operated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace after surgery on the embedded model, shared by the tests of a file: each names its own runs."""
    from rrcli.reporting import Silent
    from rrcli.services.surgery import surgery
    from rrcli.settings import SurgerySettings

    folder = tmp_path_factory.mktemp("operated")
    surgery(SurgerySettings(), folder, Silent())
    return folder


@pytest.fixture
def model(shards: Path, tmp_path: Path) -> Path:
    """A copy of the sharded model that a test may break."""
    return Path(shutil.copytree(shards, tmp_path / "model"))
