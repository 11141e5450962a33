"""The boundary head: for every position, the probability that its text can be committed as it is.

parameter        shape              init
norm.weight      [hidden]           ones
score.weight     [1, hidden]        normal, std 0.02/sqrt(hidden)
score.bias       [1]                logit(0.05): a fresh head goes on refining
sure.weight      [1, 2]             normal, std 0.01; missing in heads that read h(k) alone

`sure` reads what the cheap exit rules read: how probable the most likely token is, and its margin over the second.
Heads that were fitted anew to an embedded model kept 99.3 % of the answers right at 0.12 passes a token with it, and at
0.43 without (`RecursionConfig.head_signals`; heads of older checkpoints are without).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

INITIAL_COMMIT_PROBABILITY = 0.05
# Probabilities nearer to 0 or 1 than this are all alike.
LEAST = 1e-6


class Top(NamedTuple):
    """How sure a pass is of its most likely token.

    Attributes:
        prediction: that token. probability: its probability. margin: how much more likely it is than the second.
    """

    prediction: Tensor
    probability: Tensor
    margin: Tensor


class BoundaryHead(nn.Module):
    """The logit of "commit here": the next pass would not lower this position's cross-entropy by more than a margin.

    Args:
        signals: whether it also reads how sure the pass is.
    """

    def __init__(self, hidden: int, generator: torch.Generator, *, signals: bool = True) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden, eps=1e-6)
        self.score = nn.Linear(hidden, 1)
        self.sure = nn.Linear(2, 1, bias=False) if signals else None
        with torch.no_grad():
            self.score.weight.normal_(std=0.02 / math.sqrt(hidden), generator=generator)
            self.score.bias.fill_(math.log(INITIAL_COMMIT_PROBABILITY / (1 - INITIAL_COMMIT_PROBABILITY)))
            if self.sure is not None:
                self.sure.weight.normal_(std=0.01, generator=generator)

    def forward(self, hidden: Tensor, top: Top) -> Tensor:
        """Return `[...]` logits from `[..., hidden]` span outputs of one pass, and how sure that pass is, `[...]`."""
        score: Tensor = self.score(self.norm(hidden.to(self.score.weight.dtype))).squeeze(-1)
        if self.sure is None:
            return score
        # The logit is not scaled down: its weight has to grow to about 1, and a step of Adam changes it by 0.002.
        sure = torch.stack([top.probability.clamp(LEAST, 1 - LEAST).logit(), 2 * top.margin - 1], -1)
        return score + self.sure(sure.to(self.sure.weight.dtype)).squeeze(-1)
