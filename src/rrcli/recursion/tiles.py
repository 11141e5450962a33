"""Cross-entropy over tiles of tokens x vocabulary, with an online logsumexp.

No `[n, vocabulary]` tensor ever exists: there is one tile of logits at a time, and each row keeps a running maximum,
the sum of exponentials relative to it, the target's logit and the most likely token (Milakov & Gimelshein 2018, Online
normalizer calculation for softmax). On a CPU a tile stays in the cache, which a stripe of whole rows does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rrcli.recursion.boundary_head import Top
from rrcli.recursion.parts import kind_of
from rrcli.recursion.products import linear
from rrcli.recursion.signals import joined_tops, top_from

ROWS = 512
COLUMNS = {"cpu": 2048}
# A GPU has too many units for a small tile; this one takes 32 MiB in fp32.
COLUMNS_ELSEWHERE = 16384


def can_be_tiled(head: Any) -> bool:
    """Tell whether a head is a plain linear layer whose weights are in memory."""
    return kind_of(head) is nn.Linear and head.weight.device.type != "meta"


@torch.no_grad()
def token_losses(
    head: nn.Linear, logits_by: Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor], rows: Tensor, *, targets: Tensor
) -> tuple[Tensor, Top]:
    """Return each row's cross-entropy (nats, fp32), and how sure it is of its most likely token, the first of equals.

    Args:
        head: the model's output projection, `[vocabulary, hidden]`.
        logits_by: `logits_by(rows, projection)` returns the model's `[n, k]` logits of `[n, hidden]` rows, with
            `projection`, which computes k logits, in place of its head. So scales and soft-caps are the model's own.
        rows: `[n, hidden]` readouts; targets: `[n]` token ids.
    """
    columns = COLUMNS.get(rows.device.type, COLUMNS_ELSEWHERE)
    losses, tops = [], []
    for part, target in zip(rows.split(ROWS), targets.split(ROWS), strict=True):
        # Not -inf: a tile that a model fills with -inf would give -inf - -inf.
        highest = torch.full((len(part),), torch.finfo(torch.float32).min, device=rows.device)
        second, total = highest.clone(), torch.zeros_like(highest)
        prediction = torch.zeros_like(target)
        for begin in range(0, len(head.weight), columns):
            tile = logits_by(part, _Projection(head, begin, columns)).float()
            top = tile.amax(1)
            # A later tile has to be strictly better, as argmax names the first of equals. Only for the few rows that
            # have such a tile the place is looked for: amax alone is several times as fast as a maximum with its place.
            better = (top > highest).nonzero().squeeze(1)
            prediction[better] = tile[better].argmax(1) + begin
            equal = tile == top[:, None]
            next_best = torch.where(equal.sum(1) > 1, top, tile.masked_fill(equal, torch.finfo(tile.dtype).min).amax(1))
            # Of two pairs in descending order, the second largest is one of these.
            second = torch.maximum(torch.minimum(highest, top), torch.maximum(second, next_best))
            new = torch.maximum(highest, top)
            total = total * (highest - new).exp() + tile.sub_(new[:, None]).exp_().sum(1)
            highest = new
        chosen = logits_by(part, _OwnTarget(head, target)).float().squeeze(1)
        losses.append(highest - chosen + total.log())
        tops.append(top_from(torch.stack([highest, second], 1), prediction, highest + total.log()))
    return torch.cat(losses), joined_tops(tops)


class _Projection:
    """A head cut down to `columns` tokens from `begin` on."""

    def __init__(self, head: nn.Linear, begin: int, columns: int) -> None:
        self.weight = head.weight[begin : begin + columns]
        self.bias = None if head.bias is None else head.bias[begin : begin + columns]

    def __call__(self, hidden: Tensor) -> Tensor:
        return linear(hidden, self.weight, self.bias)


class _OwnTarget:
    """A head that computes one logit for each row: that of its own target."""

    def __init__(self, head: nn.Linear, target: Tensor) -> None:
        self.weight = head.weight[target]
        self.bias = None if head.bias is None else head.bias[target]

    def __call__(self, hidden: Tensor) -> Tensor:
        # Summed in fp32 and rounded once, as a product does.
        logits = (hidden.float() * self.weight.float()).sum(-1)
        return (logits if self.bias is None else logits + self.bias)[..., None].to(hidden.dtype)
