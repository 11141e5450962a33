"""Calibration of the boundary head: its probability of committing against what the next pass really gained.

The label is the one it learned from: 1 where the next pass does not lower a token's cross-entropy by more than the
margin of its training. A head whose margin is not known is not measured: with another one, a perfect head looks wrong.
Training weighs tokens by how far their gain is from the margin, so there are two errors: one with the weights of
training, and one in which all tokens count alike. The expected calibration error is the mean distance, over bins of
equal width, of the mean probability and the share of labels that are 1 (Naeini et al. 2015).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BINS = 10
# Sums that are kept of a bin; see `Bins`.
BIN_SUMS = 6

# Sums over the tokens of a bin: count, probability, label; and the same three weighted.
Bins = list[list[float]]


@torch.no_grad()
def reliability(commit: Tensor, losses: Tensor, margin: float) -> Bins:
    """Sum up the tokens of each bin of the commit probability, all passes together.

    Args:
        commit: `[depth, n]` probability of stopping after passes 0..depth-1.
        losses: `[depth + 1, n]` cross-entropy of every pass, in nats.
        margin: the one that the head was trained with, in nats (`RecursionConfig.commit_margin`).
    """
    gain = (losses[:-1] - losses[1:]).double().flatten()
    probability = commit.double().flatten()
    label = (gain <= margin).double()
    weight = (gain - margin).abs().clamp(max=1.0)
    one = torch.ones_like(weight)
    values = torch.stack([one, probability, label, weight, weight * probability, weight * label], 1)
    place = (probability * BINS).long().clamp_max(BINS - 1)
    return values.new_zeros(BINS, values.shape[1]).index_add_(0, place, values).tolist()


def joined(first: Bins, second: Bins) -> Bins:
    """Add the sums of two batches; an empty one adds nothing."""
    if not first or not second:
        return first or second
    return [[a + b for a, b in zip(*rows, strict=True)] for rows in zip(first, second, strict=True)]


def errors(bins: Bins) -> dict[str, float]:
    """Return the expected calibration error of the commit probability: `commit_ece` and `commit_ece_weighted`."""
    found = {}
    for name, start in (("commit_ece", 0), ("commit_ece_weighted", 3)):
        total = sum(row[start] for row in bins)
        if total:
            found[name] = sum(abs(row[start + 1] - row[start + 2]) for row in bins) / total
    return found


def table(bins: Bins) -> list[dict[str, Any]]:
    """Return each bin that holds tokens: its limits, how many, what was predicted and what was observed."""
    return [
        {"low": i / BINS, "high": (i + 1) / BINS, "n": int(n), "predicted": p / n, "observed": label / n}
        for i, (n, p, label, *_) in enumerate(bins)
        if n
    ]
