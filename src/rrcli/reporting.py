"""How services say what they are doing, without knowing about a terminal: `ui` shows it, tests use `Silent`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int = 12) -> str:
    """Return the course of `values` as at most `width` bars; each stands for the mean of as many values."""
    if not values:
        return ""
    size = -(-len(values) // width)
    means = [sum(values[i : i + size]) / len(values[i : i + size]) for i in range(0, len(values), size)]
    low, high = min(means), max(means)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((mean - low) * scale)] for mean in means)


class Progress(Protocol):
    """One piece of work in progress."""

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Count units of work that are done; `note` replaces the words after the bar."""


class Reporter(Protocol):
    """What a service may say while it works. Its results are returned, not reported."""

    def note(self, message: str) -> None:
        """Say something that the user should know."""

    def warn(self, message: str) -> None:
        """Say something that the user should act on."""

    def progress(self, label: str, total: int, unit: str) -> AbstractContextManager[Progress]:
        """Show the progress of `total` units of work."""


class Silent:
    """A reporter that says nothing and keeps the warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def note(self, message: str) -> None:
        """Ignore it."""

    def warn(self, message: str) -> None:
        """Remember it."""
        self.warnings.append(message)

    @contextmanager
    def progress(self, label: str, total: int, unit: str) -> Iterator[Silent]:
        """Count nothing."""
        yield self

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Ignore it."""
