"""What decoding with an exit rule costs, in FLOPs that were counted.

A single text is decoded a few times under the counter, with positions that leave at pass 0 and at pass 1. What it ran
is known: pass 0 over each position once, a later pass over each position that it has to see (the prompt too, once any
token needs the pass), and the head once for each pass that is looked at. So

    FLOPs = a0 · n0 + b0 · s0 + a · n + b · s + h · heads

where n0 and n count positions through pass 0 and through later passes, s0 and s the pairs that attention looks at
(new positions x all positions so far), and heads the runs of the head. The unknowns follow from the counts, and the
fit has to give back other counts. So the cost of any rule follows from where each token left, without decoding again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rrcli.errors import RRError
from rrcli.evaluation.decoding import GREEDY
from rrcli.evaluation.generation_settings import without_own_settings
from rrcli.recursion.chunked_decoding import ChunkedDecoding
from rrcli.recursion.engine import at_depth
from rrcli.recursion.exits import GREATEST, ExitRule
from rrcli.recursion.facts import context_length, vocabulary
from rrcli.recursion.families import input_device
from rrcli.recursion.flops import FlopCounter
from rrcli.recursion.lag import can_lag
from rrcli.upstream import cache_of

# Prompts and new tokens that are counted; of the last the fit has to give back the count.
COUNTED = ((8, 2), (24, 2), (24, 6), (40, 4), (16, 5))
# How far a count may be from the fit. Mixtures may differ a little: which experts run is not known beforehand.
TOLERANCE = 0.02


@dataclass(frozen=True)
class ExitCosts:
    """The FLOPs of each part of decoding; see the module's docstring. `notice` says what they leave out, or ''."""

    parts: tuple[float, ...]
    notice: str = ""

    def of(self, prompt: int, passes: Sequence[int]) -> float:
        """Return the FLOPs of decoding one text.

        Args:
            prompt: its tokens before the first new one. passes: with which pass each new token left.
        """
        return sum(part * count for part, count in zip(self.parts, _amounts(prompt, passes), strict=True))


def _amounts(prompt: int, passes: Sequence[int]) -> tuple[int, ...]:
    """Return how much there is of each part: n0, s0, n, s, heads."""
    positions = prompt + len(passes) - 1
    pairs = prompt * prompt + sum(range(prompt + 1, positions + 1))
    seen = [0] * max(passes, default=0)
    later_positions = later_pairs = 0
    for place, left in enumerate(passes, start=prompt):
        for k in range(left):
            later_positions += place - seen[k]
            later_pairs += (place - seen[k]) * place
            seen[k] = place
    return positions, pairs, later_positions, later_pairs, len(passes) + sum(passes)


@torch.no_grad()
def count_costs(model: Any) -> ExitCosts:
    """Count what the parts of decoding cost for a model with a recursion.

    Raises:
        RRError: the counts do not follow from the parts.
    """
    import numpy as np

    amounts, counts, notice = [], [], ""
    for prompt, new in COUNTED:
        if prompt + new > context_length(model):
            continue
        for left, rule in enumerate((ExitRule("depth", 0), ExitRule("contraction", GREATEST["contraction"]))):
            total, notice = _counted(model, prompt, new, rule)
            amounts.append(_amounts(prompt, [left] * new))
            counts.append(total)
    held_back = 2
    parts = np.linalg.lstsq(np.array(amounts[:-held_back], float), np.array(counts[:-held_back], float), rcond=None)[0]
    found = ExitCosts(tuple(map(float, parts)), notice)
    for amount, count in list(zip(amounts, counts, strict=True))[-held_back:]:
        fitted = sum(part * n for part, n in zip(found.parts, amount, strict=True))
        if abs(fitted - count) > TOLERANCE * count:
            raise RRError(
                f"the FLOPs of decoding do not follow from its parts: {count:.4g} were counted, {fitted:.4g} expected",
                "The exits of this model cannot be compared by FLOPs.",
            )
    return found


def saves(model: Any) -> bool:
    """Tell whether leaving early saves anything: passes may lag with the model's own cache."""
    ids = torch.zeros(1, 2, dtype=torch.long, device=input_device(model))
    with at_depth(model, 0):
        cache = cache_of(model(ids, use_cache=True))
    return cache is not None and can_lag(model.recursion, cache)


def _counted(model: Any, prompt: int, new: int, rule: ExitRule) -> tuple[int, str]:
    """Decode one text under the counter, and return its FLOPs and what they leave out."""
    ids = (torch.arange(prompt, device=input_device(model))[None] * 37 + 11) % vocabulary(model)

    def run() -> None:
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, eos_token_id=None, pad_token_id=0,
            custom_generate=ChunkedDecoding(1, rule), **GREEDY,
        )  # fmt: skip

    with without_own_settings(model):
        run()  # what has to be found out once about a model is not counted
        with FlopCounter() as counter:
            run()
    return counter.total, counter.notice()
