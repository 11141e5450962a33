"""What exit rules read of a pass: how sure it is, and what it changed. One value for each position.

The functions here see logits of the positions that are asked about, and no more: a caller with many positions gives
them in parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from rrcli.recursion.boundary_head import Top
from rrcli.recursion.exits import ExitRule, Signals


def look(
    recursion: Any,
    step: int,
    top: Top,
    *,
    state: Tensor,
    draw: Tensor,
    before: Signals | None = None,
) -> Signals:
    """Return the signals of pass `step` from what its logits and its state are.

    Args:
        top: how sure the pass is, as `top_of` returns it.
        state: `[..., hidden]` h(step). draw: as `draws` returns them.
        before: the signals of the pass before; without them, nothing is unchanged and every change is infinite.
    """
    prediction, probability, margin = top
    home = recursion.head.score.weight.device
    commit = recursion.head(state.to(home), Top(*(value.to(home) for value in top))).float().sigmoid()
    unchanged, change = torch.zeros_like(prediction, dtype=torch.bool), torch.full_like(probability, torch.inf)
    if before is not None:
        unchanged = prediction.eq(before.prediction)
        earlier = before.state.to(state.device).float()
        change = ((state.float() - earlier).norm(dim=-1) / earlier.norm(dim=-1).clamp_min(1e-12)).to(change.device)
    return Signals(
        step=step,
        prediction=prediction,
        probability=probability,
        margin=margin,
        state=state,
        commit=commit.to(probability.device),
        unchanged=unchanged,
        change=change,
        draw=draw,
    )


def top_of(logits: Tensor) -> Top:
    """Return how sure `[..., vocabulary]` logits are of their most likely token."""
    logits = logits.float()
    values = logits.topk(min(2, logits.shape[-1]), dim=-1).values
    return top_from(values, logits.argmax(-1), logits.logsumexp(-1))  # argmax names the first of equals


def top_from(values: Tensor, prediction: Tensor, normalizer: Tensor) -> Top:
    """Return how sure logits are from their two largest, `[..., 2]`, the place of the largest and their logsumexp."""
    share = (values.float() - normalizer[..., None]).exp()
    return Top(prediction, share[..., 0], share[..., 0] - share[..., 1] if share.shape[-1] > 1 else share[..., 0])


def joined_tops(parts: Sequence[Top]) -> Top:
    """Return the tops of rows that were looked at in parts."""
    return Top(*map(torch.cat, zip(*parts, strict=True)))


def joined(parts: Sequence[Signals]) -> Signals:
    """Return the signals of one pass at positions `[row, position]` that were looked at one after the other."""
    names = [item.name for item in fields(Signals) if item.name not in ("step", "right")]
    return Signals(
        step=parts[0].step, **{name: torch.cat([getattr(part, name) for part in parts], 1) for name in names}
    )


class Leaving:
    """Which pass each position of `[row, position]` leaves with, found out pass by pass.

    Attributes:
        passes: `[row, position]` the pass; -1 where it is not known yet.
        logits: `[row, position, vocabulary]` those of that pass, or of the last one that was looked at.
        seen: the signals of the last pass that was looked at, of the positions that were looked at.
    """

    def __init__(self, rule: ExitRule, depth: int, seen: Signals, logits: Tensor) -> None:
        self.rule, self.depth = rule, depth
        self.passes = torch.full_like(seen.prediction, -1)
        self.logits = logits.clone()
        self.look(seen, logits)

    def look(self, seen: Signals, logits: Tensor) -> None:
        """Take the signals and logits of the next pass, of the last positions or of all."""
        content = self.rule.leaves(seen) if seen.step < self.depth else seen.everywhere(True)
        last = slice(self.passes.shape[1] - logits.shape[1], None)
        undecided = self.passes[:, last] < 0
        self.logits[:, last] = torch.where(undecided[..., None], logits, self.logits[:, last])
        self.passes[:, last] = torch.where(undecided & content, seen.step, self.passes[:, last])
        self.seen = seen

    def undecided(self, draft: Tensor | None) -> Tensor:
        """Tell for each position whether another pass has to decide about it.

        Args:
            draft: `[row, position]` drafted tokens; after the first that is not the most likely token with which its
                position left, nothing has to be decided. None where tokens are not simply the most likely ones.
        """
        open_ones = self.passes < 0
        if draft is None:
            return open_ones
        agrees = self.logits.argmax(-1).eq(draft) | open_ones
        before = torch.cat([torch.ones_like(agrees[:, :1]), agrees[:, :-1]], 1).long().cumprod(1).bool()
        return open_ones & before


def last_of(seen: Signals, count: int) -> Signals:
    """Return the signals of the last `count` positions of `[row, position]`."""
    names = [item.name for item in fields(Signals) if item.name not in ("step", "right")]
    return Signals(step=seen.step, **{name: getattr(seen, name)[:, -count:] for name in names})


def exit_passes(rule: ExitRule, passes: Sequence[Signals]) -> Tensor:
    """Return at which pass each position leaves, long, in the shape of the positions; the last one is the latest."""
    found = torch.full_like(passes[0].prediction, len(passes) - 1)
    for seen in reversed(passes[:-1]):
        found = torch.where(rule.leaves(seen), seen.step, found)
    return found


def draws(rows: Tensor, positions: Tensor) -> Tensor:
    """Return a number in [0, 1) for each pair of a row's and a position's number; always the same one for a pair.

    A hash of both (Wellons' `lowbias32`), so that a random exit does not depend on chunks or batches.
    """
    mixed = (rows.long() * 0x9E3779B1 + positions.long() * 0x85EBCA77 + 0x27D4EB2F) & 0xFFFFFFFF
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        mixed = ((mixed ^ (mixed >> shift)) * factor) & 0xFFFFFFFF
    return mixed.double() / 2**32
