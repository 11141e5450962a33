"""From hidden states to logits, a few rows at a time, for any family.

Logits of a whole batch are the largest tensor of language modelling (positions x vocabulary). A `Readout` runs the
backbone once and then the head on chosen rows only. The head is whatever the model itself does after its backbone
(projection, bias, scaling, soft-cap): the model's own forward is called with a backbone that returns the given rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.utils import ModelOutput

from rrcli.errors import RRError
from rrcli.recursion.engine import Passes
from rrcli.recursion.families import find_layout

# Logits that exist at a time, in elements: 64 MiB in fp32.
LOGITS_AT_A_TIME = 2**24


@dataclass
class _Rows(ModelOutput):
    """A backbone's output that holds hidden states and nothing else."""

    last_hidden_state: Tensor | None = None

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class Readout:
    """The two halves of a causal language model: `passes` (backbone) and `logits` (head).

    Args:
        model: a causal language model of transformers, with or without a recursion attached.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.recursion = getattr(model, "recursion", None)
        self.backbone = model.get_submodule(find_layout(model)[0].backbone)
        self.vocabulary = model.get_output_embeddings().weight.shape[0]

    def passes(self, input_ids: Tensor, attention_mask: Tensor) -> Passes:
        """Return the hidden states of every pass; a model without recursion has pass 0 only. See `Recursion.passes`."""
        if self.recursion is not None:
            return self.recursion.passes(input_ids, attention_mask)
        output = self.backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        hidden = output.last_hidden_state
        return Passes([], [hidden], torch.zeros((), device=hidden.device))

    def logits(self, rows: Tensor) -> Tensor:
        """Return `[n, vocabulary]` logits for `[n, hidden]` readouts."""
        with self._backbone_returning(rows[None]):
            ids = torch.zeros(1, rows.shape[0], dtype=torch.long, device=rows.device)
            return self.model(input_ids=ids, use_cache=False).logits[0]

    def token_losses(self, rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return each row's cross-entropy (nats, fp32) and its most likely token.

        Works through the rows in chunks so that at most `LOGITS_AT_A_TIME` logits exist; with gradients on, a chunk's
        logits are recomputed in the backward pass instead of being kept.

        Args:
            rows: `[n, hidden]` readouts; targets: `[n]` token ids.
        """
        size = max(1, LOGITS_AT_A_TIME // self.vocabulary)
        if len(rows) <= size:
            return self._losses(rows, targets)
        parts = []
        for chunk, target in zip(rows.split(size), targets.split(size), strict=True):
            if torch.is_grad_enabled():
                parts.append(checkpoint(self._losses, chunk, target, use_reentrant=False))
            else:
                parts.append(self._losses(chunk, target))
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    @torch.no_grad()
    def check(self, input_ids: Tensor, attention_mask: Tensor) -> None:
        """Compare both halves together with the model's plain forward.

        Raises:
            RRError: they disagree by more than rounding.
        """
        real = attention_mask.bool()
        plain = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits[real].float()
        halves = self.logits(self.passes(input_ids, attention_mask).hidden[-1][real]).float()
        tolerance = 1e-3 if self.model.dtype == torch.float32 else 0.1
        worst = float((plain - halves).abs().max())
        if not worst <= tolerance * max(1.0, float(plain.abs().max())):
            family = self.model.config.model_type
            reason = "are not finite" if not torch.isfinite(plain).all() else f"differ by {worst:.3g} when taken apart"
            raise RRError(f"the logits of this '{family}' model {reason}", "The model cannot be measured.")

    def _losses(self, rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.logits(rows).float()
        return F.cross_entropy(logits, targets, reduction="none"), logits.detach().argmax(-1)

    @contextmanager
    def _backbone_returning(self, hidden: Tensor) -> Iterator[None]:
        # An instance attribute shadows the class's forward; accelerate puts one there too, so keep what was there.
        before = self.backbone.__dict__.get("forward")
        depth = self.recursion.depth if self.recursion is not None else 0
        self.backbone.forward = lambda *args, **kwargs: _Rows(last_hidden_state=hidden)
        if self.recursion is not None:
            self.recursion.depth = 0
        try:
            yield
        finally:
            if self.recursion is not None:
                self.recursion.depth = depth
            if before is None:
                del self.backbone.forward
            else:
                self.backbone.forward = before
