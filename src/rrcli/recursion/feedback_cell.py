"""The feedback cell: what a recursion adds to the span's input before each pass after pass 0.

parameter        shape                 init
norm.weight      [hidden]              ones
w_in.weight      [width, hidden]       normal, std 1/sqrt(hidden)
step.weight      [max_steps, width]    normal, std 0.02
w_out.weight     [hidden, width]       ZERO, so that a fresh cell adds nothing. No other weight is zero: a zero gate
                                       times a zero projection would have no gradient
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FeedbackCell(nn.Module):
    """What pass k adds to the span's input: `W_out · act(W_in · RMSNorm(h(k-1)) + step_k)`.

    It works on each position alone, so it is causal in every model.
    """

    def __init__(self, hidden: int, width: int, max_steps: int, generator: torch.Generator) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden, eps=1e-6)
        self.w_in = nn.Linear(hidden, width, bias=False)
        self.step = nn.Embedding(max_steps, width)
        self.w_out = nn.Linear(width, hidden, bias=False)
        with torch.no_grad():
            self.w_in.weight.normal_(std=1 / math.sqrt(hidden), generator=generator)
            self.step.weight.normal_(std=0.02, generator=generator)
            self.w_out.weight.zero_()

    def forward(self, hidden: Tensor, step: int) -> Tensor:
        """Return the feedback of pass `step` (1-based) from `h(step-1)`, both `[batch, position, hidden]`.

        A step beyond `max_steps` has no embedding of its own: it uses the last one.
        """
        own = self.step.weight[min(step, len(self.step.weight)) - 1]
        return self.w_out(F.silu(self.w_in(self.norm(hidden.to(self.w_in.weight.dtype))) + own))
