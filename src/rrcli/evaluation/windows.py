"""Windows and stride: how documents that are longer than a row are cut so that every token is scored exactly once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rrcli.recursion.facts import context_length
from rrcli.reporting import Reporter
from rrcli.settings import EvalSettings

# Tokens of a window unless --max-length says otherwise; fewer where the model's context is shorter.
DEFAULT_LENGTH = 1024


@dataclass(frozen=True)
class Window:
    """A row of a batch: part of one document, of which the last tokens are scored.

    Attributes:
        ids: what the model reads.
        targets: the tokens that follow each of the last `len(targets)` ids; these are scored.
        document: the number of the document.
    """

    ids: list[int]
    targets: list[int]
    document: int


def rolling_windows(tokens: list[int], prefix: int, *, length: int, stride: int) -> list[tuple[list[int], int]]:
    """Cut a document into windows so that every token is scored exactly once.

    The first window scores up to `length` tokens from the prefix token on; each later one moves on by `stride` tokens,
    scores those, and sees the `length - stride` before them. The last one reaches back to a full window. These are the
    windows of lm-eval's `loglikelihood_rolling` when `stride == length`.

    Returns:
        (input ids, how many of the last positions are scored) for each window.
    """
    stream = [prefix, *tokens]
    first = min(length, len(tokens))
    windows = [(stream[:first], first)]
    done = first
    while done < len(tokens):
        scored = min(stride, len(tokens) - done)
        done += scored
        windows.append((stream[max(0, done - length) : done], scored))
    return windows


def windows_of(
    model: Any, documents: Sequence[tuple[list[int], list[int]]], *, settings: EvalSettings, reporter: Reporter
) -> list[Window]:
    """Return the windows of all documents, the longest first.

    Args:
        documents: for each the one token that it is scored after, and the tokens that are scored (`scored_after`).
        settings: `max_length` and `stride`, in tokens; 0 stands for the default length, and for a stride of a length.
            A length beyond the model's context is cut to it, which is said.
    """
    context = context_length(model)
    length = min(settings.max_length or DEFAULT_LENGTH, context)
    if settings.max_length > context:
        reporter.warn(
            f"--max-length is {settings.max_length}, but the model's context is {context} tokens: windows have those"
        )
    if settings.stride > length:
        reporter.warn(f"--stride is {settings.stride}, but windows have {length} tokens: they follow without a gap")
    stride = min(settings.stride or length, length)
    windows = []
    for number, (start, ids) in enumerate(documents):
        begin = 0
        for window, scored in rolling_windows(ids, start[0], length=length, stride=stride) if ids else ():
            windows.append(Window(window, ids[begin : begin + scored], number))
            begin += scored
    return sorted(windows, key=lambda window: -len(window.ids))
