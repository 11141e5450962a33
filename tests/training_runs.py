"""Looks at what a training left behind, and reporters that interfere with one at a chosen step."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rrcli.reporting import Silent


def events(folder: Path, run: str) -> EventAccumulator:
    """Return everything that a run logged, no histogram and no text left out."""
    return EventAccumulator(str(folder / "logs" / run), size_guidance={"histograms": 0, "tensors": 0}).Reload()


def curve(folder: Path, run: str, tag: str = "train/loss/total") -> list[float]:
    """Return the values of a scalar, in the order of steps."""
    return [event.value for event in events(folder, run).Scalars(tag)]


def texts(folder: Path, run: str, tag: str) -> list[str]:
    """Return the texts that were logged under a tag."""
    return [e.tensor_proto.string_val[0].decode() for e in events(folder, run).Tensors(f"{tag}/text_summary")]


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint, the trainer's state included, by file and name."""
    return {
        f"{file.relative_to(checkpoint)}:{name}": tensor
        for file in sorted(checkpoint.rglob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def assert_same_weights(a: Path, b: Path, tolerance: float = 0.0) -> None:
    """Assert that two checkpoints hold the same tensors, up to a tolerance, relative and absolute."""
    first, second = weights(a), weights(b)
    assert first
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=tolerance, atol=tolerance, msg=name)


class ActsAfter(Silent):
    """A reporter that does something, once, after a number of training steps; by default it stops the training."""

    def __init__(self, steps: int, act: Callable[[], None] = lambda: signal.raise_signal(signal.SIGTERM)) -> None:
        super().__init__()
        self.left, self.act = steps, act

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Count a step: only those come with a note."""
        if note:
            self.left -= 1
            if self.left == 0:
                self.act()
