"""The losses that training minimises. One function for vanilla and recursive training: vanilla is depth 0.

    final_ce    cross-entropy of the last pass at all loss-bearing positions
    masked_ce   the same of passes 0..d-1, at the positions of sampled windows (deep supervision)
    halt        the boundary head's BCE; label 1 where the next pass gains no more than a margin; weighted by how far
                the gain is from the margin and averaged within each example, so that it does not depend on how a batch
                is cut into parts
    ponder      expected number of passes, Σ_k Π_{j<k} (1 - p_j), differentiable
    stability   mean SiLU(CE(k) - CE(k-1)): a later pass may not be worse
    total       their weighted sum

The boundary head reads detached states, and how sure each pass is: it learns to judge the passes, and its losses do not
change them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from rrcli.recursion.batch import Batch
from rrcli.recursion.boundary_head import Top
from rrcli.recursion.chunk_metrics import ChunkTotals, teacher_forced_chunks
from rrcli.recursion.config import LossWeights
from rrcli.recursion.readout import Readout


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """What holds for every part of one optimiser step, in whichever parts and processes it is computed.

    Sums over positions are divided by the counts of the whole step, so that the losses and gradients of its parts add
    up, and a part with few tokens does not weigh as much as one with many.

    Attributes:
        depth: how many passes after pass 0 are run; 0 for a model without a recursion.
        weights: the weight of each loss.
        chunk_width: the window of the chunk metrics, in loss-bearing positions.
        tokens: how many positions of the step bear loss.
        sampled: how many of them intermediate passes learn from.
    """

    depth: int
    weights: LossWeights
    chunk_width: int
    tokens: int
    sampled: int


@dataclass
class LossTerms:
    """The losses of one part of a step, already divided by the counts of the whole step.

    Attributes:
        total: what to call `backward` on.
        parts: the named losses, detached.
        depth_ce: this part's share of the mean cross-entropy of each pass at the sampled positions, in nats.
        chunks: totals of the chunk metrics.
        feedback_norm: see `Passes`.
    """

    total: Tensor
    parts: dict[str, Tensor]
    depth_ce: list[Tensor]
    chunks: ChunkTotals
    feedback_norm: Tensor


def compute_losses(readout: Readout, batch: Batch, *, plan: StepPlan) -> LossTerms:
    """Run the model on a part of a step and return its losses.

    Args:
        batch: the part, on the model's device. Where its rows are packed, the model tells their examples apart by their
            positions, in place of the mask.
        plan: of the whole step.
    """
    weights, depth = plan.weights, plan.depth
    mask = batch.attention_mask if batch.position_ids is None else None
    passes = readout.passes(batch.input_ids, mask, batch.position_ids, depth=depth)
    loss_bearing = batch.loss_bearing
    targets = batch.labels[loss_bearing]

    final, final_top = readout.token_losses(passes.hidden[-1][loss_bearing], targets, predict=depth > 0)
    parts = {"final_ce": final.sum() / plan.tokens}
    if depth == 0:
        total = weights.final * parts["final_ce"]
        mean = [parts["final_ce"].detach()]
        return LossTerms(total, _detached(parts, total), mean, ChunkTotals(), passes.feedback_norm)

    example = _example_of_each(batch)
    windows = _windows(example, plan.chunk_width)
    sampled = loss_bearing if batch.sampled is None else batch.sampled
    index = sampled[loss_bearing].nonzero().squeeze(1)
    scale = 1 / plan.sampled
    assert final_top is not None
    earlier, tops = [], []
    for hidden in passes.hidden[:-1]:
        ce, top = readout.token_losses(hidden[loss_bearing][index], targets[index])
        assert top is not None
        earlier.append(ce)
        tops.append(top)
    ce_by_pass = torch.stack([*earlier, final[index]])
    predictions = torch.stack([*(top.prediction for top in tops), final_top.prediction[index]])

    states = torch.stack([state[loss_bearing][index].detach() for state in passes.states[:-1]])
    logits = readout.recursion.head(states, Top(*map(torch.stack, zip(*tops, strict=True)))).float()
    gain = (ce_by_pass[:-1] - ce_by_pass[1:]).detach()
    label = (gain <= weights.margin).float()
    importance = (gain - weights.margin).abs().clamp(max=1.0)
    bce = F.binary_cross_entropy_with_logits(logits, label, weight=importance, reduction="none").sum(0)
    positions = torch.bincount(example[index])
    per_example = torch.zeros(2, len(positions), device=bce.device)
    per_example = per_example.index_add(1, example[index], torch.stack([bce, importance.sum(0)]))
    going_on = (1 - logits.sigmoid()).cumprod(0)

    parts["masked_ce"] = ce_by_pass[:-1].sum() * scale / depth
    parts["halt"] = (per_example[0] / per_example[1].clamp_min(1e-6) * positions).sum() * scale
    parts["ponder"] = going_on.sum() * scale
    parts["stability"] = F.silu(ce_by_pass[1:] - ce_by_pass[:-1].detach()).sum() * scale / depth
    total = (
        weights.final * parts["final_ce"]
        + weights.masked * parts["masked_ce"]
        + weights.halt * parts["halt"]
        + weights.ponder * parts["ponder"]
        + weights.stability * parts["stability"]
    )
    chunks = teacher_forced_chunks(predictions, logits.sigmoid(), targets[index], windows[index])
    means = [ce.detach().sum() * scale for ce in ce_by_pass]
    return LossTerms(total, _detached(parts, total), means, chunks, passes.feedback_norm)


def sample_windows(batch: Batch, *, width: int, share: float, generator: torch.Generator) -> Tensor:
    """Draw the positions that intermediate passes learn from: whole windows, so that they give the chunk metrics too.

    They are drawn once for the whole step, before it is cut into parts, and do not depend on how its examples are laid
    into rows.

    Args:
        width: loss-bearing positions in a window. share: of the windows, 0 to 1. generator: on the CPU.

    Returns:
        `[row, position]` booleans, at least one True if any position bears loss.
    """
    windows = _windows(_example_of_each(batch), width)
    if not len(windows):
        return batch.loss_bearing
    chosen = torch.rand(int(windows.max()) + 1, generator=generator).to(windows.device) < share
    if not chosen[windows].any():
        chosen[0] = True
    return batch.loss_bearing.masked_scatter(batch.loss_bearing, chosen[windows])


def _example_of_each(batch: Batch) -> Tensor:
    """Return `[n]`: the example of each loss-bearing position, which is its row unless rows are packed."""
    if batch.examples is None:
        return batch.loss_bearing.nonzero()[:, 0]
    return batch.examples[batch.loss_bearing]


def _windows(example: Tensor, width: int) -> Tensor:
    """Return `[n]`: for each loss-bearing position the number of its window of `width` such positions in its example.

    Windows are numbered in the order of the examples' numbers.
    """
    counts = torch.bincount(example)
    order = example.argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    place -= (counts.cumsum(0) - counts)[example]
    per_example = -(-counts // width)
    return (per_example.cumsum(0) - per_example)[example] + place // width


def _detached(parts: dict[str, Tensor], total: Tensor) -> dict[str, Tensor]:
    return {"total": total.detach()} | {name: part.detach() for name, part in parts.items()}
