"""What the hooks of a recursion keep of one forward while it runs, and what they record of it."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

# The positional and keyword arguments that a layer was called with.
Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class Record:
    """What the passes of one or more forwards computed, in the order in which they ran.

    Attributes:
        states: the span's output of every pass that was run, `[batch, position, hidden]`.
        entries: the span's input of each forward, `[batch, position, hidden]`. Empty where layers return more than a
            hidden state: there the forwards cannot be refined without running pass 0 again.
        feedback: root mean square of each pass's feedback relative to the span's input.
    """

    states: list[Tensor] = field(default_factory=list)
    entries: list[Tensor] = field(default_factory=list)
    feedback: list[Tensor] = field(default_factory=list)


@dataclass
class Frame:
    """One forward that is running: its depth, how each layer was called, and what is recorded of it.

    Attributes:
        depth: how many passes follow pass 0.
        record: where states are recorded; None if nobody asked for them.
        prepares_caches: make the cache carry one copy for each pass up to `depth`, and no other. If not, it keeps the
            copies that it has: passes that this forward does not run see its tokens in a later one.
        first: the first pass after pass 0 that is run.
        before: the span's input and h(first - 1), where the passes before `first` were run in earlier forwards.
        stubs: while set, the layers before the span's end are stubs that return h(first - 1). Closing it puts the
            layers back.
        calls: the arguments of each layer from the span's first on.
    """

    depth: int
    record: Record | None = None
    prepares_caches: bool = True
    first: int = 1
    before: tuple[Tensor, Tensor] | None = None
    stubs: ExitStack | None = None
    calls: dict[int, Call] = field(default_factory=dict)


def hidden_of(call: Call) -> Tensor:
    """Return the hidden state among the arguments of a layer, `[batch, position, hidden]`."""
    args, kwargs = call
    return args[0] if args else kwargs["hidden_states"]


def with_hidden(call: Call, hidden: Tensor | None) -> Call:
    """Return the arguments of a layer with another hidden state."""
    args, kwargs = call
    return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})
