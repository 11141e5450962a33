"""The boundary head: for every position, the probability that its text can be committed as it is.

parameter        shape              init
norm.weight      [hidden]           ones
score.weight     [1, hidden]        normal, std 0.02/sqrt(hidden)
score.bias       [1]                logit(0.05): a fresh head goes on refining
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

INITIAL_COMMIT_PROBABILITY = 0.05


class BoundaryHead(nn.Module):
    """The logit of "commit here": the next pass would not lower this position's cross-entropy by more than a margin."""

    def __init__(self, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden, eps=1e-6)
        self.score = nn.Linear(hidden, 1)
        with torch.no_grad():
            self.score.weight.normal_(std=0.02 / math.sqrt(hidden), generator=generator)
            self.score.bias.fill_(math.log(INITIAL_COMMIT_PROBABILITY / (1 - INITIAL_COMMIT_PROBABILITY)))

    def forward(self, hidden: Tensor) -> Tensor:
        """Return `[..., ]` logits from `[..., hidden]` span outputs of one pass."""
        return self.score(self.norm(hidden.to(self.score.weight.dtype))).squeeze(-1)
