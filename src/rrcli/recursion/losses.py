"""What training minimises. One function for vanilla and recursive: vanilla is depth 0.

    final_ce    cross-entropy of the last pass, all loss-bearing tokens
    masked_ce   the same of passes 0..d-1, on a sampled share of the windows of text (deep supervision)
    halt        the boundary head's BCE; label 1 where the next pass gains no more than a margin; weighted by how far
                the gain is from the margin, mean within each example, so that it does not matter how a batch is cut
    ponder      expected number of passes, Σ_k Π_{j<k} (1 - p_j), differentiable
    stability   mean SiLU(CE(k) - CE(k-1)): a later pass may not be worse
    total       their weighted sum

The boundary head reads detached states: it learns to judge the passes, it does not bend them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from rrcli.recursion.calibration import MARGIN
from rrcli.recursion.chunk_metrics import ChunkTotals, teacher_forced_chunks
from rrcli.recursion.readout import Readout


@dataclass(frozen=True)
class LossWeights:
    """The weight of each loss in the total; `margin` is in nats, `share` the sampled share of positions."""

    final: float = 1.0
    masked: float = 0.5
    halt: float = 0.05
    ponder: float = 0.01
    stability: float = 0.01
    margin: float = MARGIN
    share: float = 0.5


@dataclass
class LossTerms:
    """The losses of one batch part, each already divided by the step's count of tokens.

    Attributes:
        total: what to call `backward` on.
        parts: the named losses, detached.
        depth_ce: this part's share of the mean cross-entropy of each pass at the sampled positions, in nats.
        chunks: totals of the chunk metrics; feedback_norm: see `Passes`.
    """

    total: Tensor
    parts: dict[str, Tensor]
    depth_ce: list[Tensor]
    chunks: ChunkTotals
    feedback_norm: Tensor


def compute_losses(
    readout: Readout,
    input_ids: Tensor,
    attention_mask: Tensor,
    labels: Tensor,
    weights: LossWeights,
    tokens_in_step: int,
    chunk_width: int,
    sampled: Tensor,
    sampled_in_step: int,
    position_ids: Tensor | None = None,
    examples: Tensor | None = None,
) -> LossTerms:
    """Run the model at its current depth and return the losses.

    Args:
        input_ids, attention_mask: `[batch, position]`; labels: the same shape, -100 where there is no loss; label t is
            what position t should predict next (already shifted).
        tokens_in_step: loss-bearing tokens of the whole optimiser step, over all parts and processes. Sums are divided
            by it, so that parts with few tokens do not weigh as much as parts with many.
        sampled: `[batch, position]`, what intermediate passes learn from; see `sample_windows`.
        sampled_in_step: how many positions are sampled in the whole optimiser step.
        position_ids, examples: `[batch, position]`, where rows are packed: positions within each example, and numbers
            of the examples. The model then tells them apart by the positions, in place of the mask.
    """
    packed = position_ids is not None
    passes = readout.passes(input_ids, None if packed else attention_mask, position_ids)
    depth = len(passes.hidden) - 1
    loss_bearing = labels.ne(-100)
    targets = labels[loss_bearing]

    final, final_prediction = readout.token_losses(passes.hidden[-1][loss_bearing], targets, predict=depth > 0)
    parts = {"final_ce": final.sum() / tokens_in_step}
    if depth == 0:
        total = weights.final * parts["final_ce"]
        mean = [parts["final_ce"].detach()]
        return LossTerms(total, _detached(parts, total), mean, ChunkTotals(), passes.feedback_norm)

    example = _examples(loss_bearing, examples)
    windows = _windows(example, chunk_width)
    index = sampled[loss_bearing].nonzero().squeeze(1)
    scale = 1 / sampled_in_step
    earlier, predictions = [], []
    for hidden in passes.hidden[:-1]:
        ce, prediction = readout.token_losses(hidden[loss_bearing][index], targets[index])
        earlier.append(ce)
        predictions.append(prediction)
    ce_by_pass = torch.stack([*earlier, final[index]])
    predictions.append(final_prediction[index])

    logits = readout.recursion.head(torch.stack([s[loss_bearing][index].detach() for s in passes.states[:-1]])).float()
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
    chunks = teacher_forced_chunks(torch.stack(predictions), logits.sigmoid(), targets[index], windows[index])
    means = [ce.detach().sum() * scale for ce in ce_by_pass]
    return LossTerms(total, _detached(parts, total), means, chunks, passes.feedback_norm)


def sample_windows(
    labels: Tensor, width: int, share: float, generator: torch.Generator, examples: Tensor | None = None
) -> Tensor:
    """Draw the positions that intermediate passes learn from: whole windows, so that they give the chunk metrics too.

    Drawn once for the whole step, before it is cut into parts, and the same however its examples lie in rows.

    Args:
        labels: `[batch, position]`, -100 where there is no loss. generator: on the CPU.
        examples: `[batch, position]` numbers of the examples where rows are packed.

    Returns:
        `[batch, position]` booleans, at least one true where any label bears loss.
    """
    loss_bearing = labels.ne(-100)
    windows = _windows(_examples(loss_bearing, examples), width)
    if not len(windows):
        return loss_bearing
    chosen = torch.rand(int(windows.max()) + 1, generator=generator).to(windows.device) < share
    if not chosen[windows].any():
        chosen[0] = True
    return loss_bearing.masked_scatter(loss_bearing, chosen[windows])


def _examples(loss_bearing: Tensor, examples: Tensor | None) -> Tensor:
    """Return `[n]`: the example of each loss-bearing position, which is its row unless rows are packed."""
    return loss_bearing.nonzero()[:, 0] if examples is None else examples[loss_bearing]


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
