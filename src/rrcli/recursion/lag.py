"""Passes that lag: tokens that left early have not gone through the later passes yet, and catch up when they must.

A token of pass k attends to what pass k made of all earlier tokens. Where those left before pass k, they go through it
together with the first later token that needs it, in one forward, and each token goes through a pass once at most. So
what a pass computes never depends on where tokens left.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rrcli import upstream
from rrcli.recursion import caches
from rrcli.recursion.abilities import layers_return_states


def can_lag(recursion: Any, cache: Any) -> bool:
    """Tell whether passes may see tokens later than pass 0 does.

    Not where windows or states forget, since their caches cannot be taken back to any length; nor where layers after
    the span cache what the last pass gave them; nor where layers return more than a hidden state.
    """
    whole = recursion.end == len(recursion.layers) and all(map(upstream.remembers_all, cache.layers))
    return bool(whole and layers_return_states(recursion))


class Lag:
    """Which columns of the rows' tokens each pass has seen, and what passes need to catch up.

    Attributes:
        seen: how many columns each pass has seen, pass 0 first; none has seen more than the one before it.
        entries: `[row, position, hidden]` the span's input, of the columns that pass 0 has seen and the last has not.
        states: for each pass k but the last, `[row, position, hidden]` h(k) of the columns that pass k has seen and
            pass k + 1 has not.

    Args:
        cache: with the caches of the passes. seen: how many columns are in all of these already.
    """

    def __init__(self, recursion: Any, cache: Any, seen: int) -> None:
        self.recursion, self.cache = recursion, cache
        self.seen = [seen] * (recursion.depth + 1)
        self.entries: Tensor | None = None
        self.states: list[Tensor | None] = [None] * recursion.depth

    def drafted(self, entries: Tensor, states: Tensor) -> None:
        """Note what pass 0 was given and has computed for the next columns, `[row, position, hidden]`."""
        self.seen[0] += entries.shape[1]
        self.entries, self.states[0] = _longer(self.entries, entries), _longer(self.states[0], states)

    def catch_up(
        self, run: Callable[..., Tensor], columns: Tensor, step: int, *, earliest: int, keep: int
    ) -> tuple[int, Tensor, Tensor]:
        """Run pass `step` over all that it has not seen; the passes before it have seen as much as pass 0.

        Passes up to `earliest` go in the same forward, if they have seen as little.

        Args:
            run: runs the model on ids, as `Rows.run` does.
            columns: `[row, position]` the tokens that pass 0 has seen, to the last.
            keep: how many of the last positions are asked about.

        Returns:
            The last pass that was run, its logits `[row, keep, vocabulary]` and its states `[row, keep, hidden]`.
        """
        end, count, last = self.seen[0], self.seen[0] - self.seen[step], step
        while last < earliest and self.seen[last + 1] == self.seen[step]:
            last += 1
        before = self.states[step - 1]
        assert self.entries is not None
        assert before is not None
        draft = caches.Snapshot(self.cache, draft=True)
        # The model has to find its own cache where that of the pass is.
        caches.forget(self.cache, [count])
        with self.recursion.refining((self.entries[:, -count:], before), first=step, last=last) as record:
            logits = run(columns[:, end - count : end], end, keep=keep)
        draft.restore(self.cache, draft=True)
        for k in range(step, last + 1):
            self.seen[k], self.states[k - 1] = end, None
        state = record.states[-1]
        if last < len(self.states):
            self.states[last] = _longer(self.states[last], state)
        else:
            self.entries = None
        return last, logits[:, -keep:], state[:, -keep:]

    def take_back(self, count: int) -> None:
        """Forget the last `count` columns, in the passes that have seen them."""
        if not count:
            return
        ran = sum(seen == self.seen[0] for seen in self.seen)
        caches.forget(self.cache, [count] * ran)
        self.seen[:ran] = [self.seen[0] - count] * ran
        self.entries = _shorter(self.entries, count)
        if ran <= len(self.states):
            self.states[ran - 1] = _shorter(self.states[ran - 1], count)

    def level(self) -> None:
        """Take all passes back to what the last has seen: then any forward can go on with the cache."""
        caches.forget(self.cache, [seen - self.seen[-1] for seen in self.seen])

    def select(self, rows: Tensor) -> None:
        """Keep some rows, by their numbers."""
        self.entries = None if self.entries is None else self.entries[rows]
        self.states = [None if state is None else state[rows] for state in self.states]


def _longer(kept: Tensor | None, more: Tensor) -> Tensor:
    return more if kept is None else torch.cat([kept, more.to(kept.device)], 1)


def _shorter(kept: Tensor | None, count: int) -> Tensor | None:
    return None if kept is None or kept.shape[1] == count else kept[:, :-count]
