"""What a step trains beside its batch: depth, sampled windows, loss weights and the seed of what is drawn.

All of it follows from the settings and the step's number alone. So a resumed run continues exactly without any of it
being saved, and processes agree on it without telling one another.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random

import torch

from rrcli.recursion.batch import Batch
from rrcli.recursion.config import LossWeights, RecursionConfig
from rrcli.recursion.losses import StepPlan, sample_windows
from rrcli.settings import TrainSettings


def plan_step(
    batch: Batch, step: int, settings: TrainSettings, *, recursion: RecursionConfig | None
) -> tuple[Batch, StepPlan]:
    """Return a step's batch with its sampled positions, and what holds for all parts of it.

    Args:
        batch: the examples of the whole step, of all processes. step: counted from 0.
        recursion: of the model; None where it has none.
    """
    width = settings.chunk_width or (recursion.chunk_width if recursion else 1)
    generator = torch.Generator().manual_seed(step_seed(settings.seed, step))
    sampled = sample_windows(batch, width=width, share=settings.supervised_share, generator=generator)
    plan = StepPlan(
        depth=sampled_depth(settings.seed, step, deepest_pass(settings, recursion)),
        weights=loss_weights(settings, step),
        chunk_width=width,
        tokens=batch.tokens,
        sampled=int(sampled.sum()),
    )
    return replace(batch, sampled=sampled), plan


def sampled_depth(seed: int, step: int, deepest: int) -> int:
    """Return how many passes after pass 0 a step trains: uniform in 1..deepest, or 0 without a recursion."""
    return Random(f"depth/{seed}/{step}").randint(1, deepest) if deepest else 0


def deepest_pass(settings: TrainSettings, recursion: RecursionConfig | None) -> int:
    """Return the most passes after pass 0 that a step may train."""
    if recursion is None:
        return 0
    return settings.max_steps or recursion.max_steps


def step_seed(seed: int, step: int) -> int:
    """Return the seed of what a step draws: its windows, and dropout."""
    return seed * 1_000_003 + step


def loss_weights(settings: TrainSettings, step: int) -> LossWeights:
    """Return the weight of each loss in a step; that of ponder rises over the first quarter of the training.

    Passes must first be worth something before the boundary head is rewarded for leaving them out.
    """
    ponder_warmup = min(1.0, (step + 1) / max(1, settings.steps // 4))
    return LossWeights(
        final=settings.final_weight,
        masked=settings.masked_weight,
        halt=settings.halt_weight,
        ponder=settings.ponder_weight * ponder_warmup,
        stability=settings.stability_weight,
        margin=settings.commit_margin,
        share=settings.supervised_share,
    )
