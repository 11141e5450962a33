"""Every error that a user can cause, and the exit code of each.

    RRError                     1  an expected failure: says what failed, where, and what to do next
    ├── UsageError              2  a command line, rr.toml key or value that cannot be understood
    ├── CheckFailed             3  a check or an invariant did not hold
    └── Interrupted           130  stopped by the user; the last good state is on disk

Services raise these errors; only the command line prints them and exits. Any other exception is a bug and keeps its
traceback.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class RRError(Exception):
    """An expected failure. `message` names the value and the place, `hint` the next step."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(RRError):
    """A request that cannot be understood: an unknown name, option, key or value."""

    exit_code = 2


class CheckFailed(RRError):
    """A check failed: one that the user asked for, or an invariant without which a result would mean nothing."""

    exit_code = 3


class Interrupted(RRError):
    """The user stopped the command. Everything published so far stays, and the hint says how to go on."""

    exit_code = 130


def suggest(name: str, known: Iterable[str]) -> str:
    """Return a hint that offers the closest of `known`, or lists them all when none is close."""
    known = list(known)
    close = get_close_matches(name, known, n=1, cutoff=0.6)
    return f"Did you mean '{close[0]}'?" if close else f"Known: {', '.join(known)}."


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
