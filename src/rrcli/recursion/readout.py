"""From hidden states to logits, a few rows at a time, for any family.

Logits of a whole batch are the largest tensor of language modelling (positions x vocabulary). A `Readout` runs the
backbone once and then the head on chosen rows only. The head is all that the model itself does after its backbone
(projection, bias, scaling, soft-cap): the model's own forward is called with a backbone that returns the given rows.

Text is scored in one of three ways: the first of them that agrees with the model's plain forward (`choose_way`).

    tiles   the projection too is replaced, by a tile of itself: logits of 512 rows x 2,048 tokens at a time
    rows    the head on chosen rows, all of the vocabulary
    plain   the model's plain forward at every depth, all of the positions
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.utils import ModelOutput

from rrcli.errors import RRError
from rrcli.recursion import tiles
from rrcli.recursion.boundary_head import Top
from rrcli.recursion.engine import Passes, at_depth
from rrcli.recursion.facts import text_config
from rrcli.recursion.families import find_layout, is_spread
from rrcli.recursion.parts import most
from rrcli.recursion.products import through_onednn
from rrcli.recursion.signals import joined_tops, top_from, top_of
from rrcli.upstream import attention_is_eager, patched

# Logits that exist at a time, in elements: 64 MiB in fp32.
LOGITS_AT_A_TIME = 2**24
# Rows and positions of the batch that a way is checked on, against logits of the plain forward.
CHECKED = (2, 16)
WAYS = ("tiles", "rows", "plain")


@dataclass
class _BackboneOutput(ModelOutput):
    """A backbone's output that holds hidden states and nothing else."""

    last_hidden_state: Tensor | None = None

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@dataclass
class Scores:
    """What the passes of a batch say about its n scored positions.

    Attributes:
        losses: `[passes, n]` cross-entropy in nats, fp32.
        states: `[n, hidden]` of every pass; none for a model without recursion. tops: how sure each pass is, `[n]`. The
            boundary head reads both.
    """

    losses: Tensor
    states: list[Tensor]
    tops: list[Top]

    @property
    def predictions(self) -> Tensor:
        """The most likely tokens, `[passes, n]`."""
        return torch.stack([top.prediction for top in self.tops])


class Readout:
    """The two halves of a causal language model: `passes` (backbone) and `logits` (head).

    Args:
        model: a causal language model of transformers, with or without a recursion attached.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.recursion: Any = getattr(model, "recursion", None)
        self.backbone = model.get_submodule(find_layout(model)[0].backbone)
        self.projection = model.get_output_embeddings()
        self.vocabulary = self.projection.weight.shape[0]
        self.way = "tiles" if tiles.can_be_tiled(self.projection) else "rows"

    def passes(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None = None,
        *,
        depth: int | None = None,
    ) -> Passes:
        """Return the hidden states of every pass; a model without recursion has pass 0 only. See `Recursion.passes`.

        A position does not depend on those after it, so padding on the right needs no mask. Without a mask attention is
        known to be causal, and does half of the work.
        """
        if attention_mask is not None and bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all()):
            attention_mask = None
        if self.recursion is not None:
            return self.recursion.passes(input_ids, attention_mask, position_ids, depth=depth)
        told = {} if position_ids is None else {"position_ids": position_ids}
        output = self.backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **told)
        hidden = output.last_hidden_state
        return Passes([], [hidden], torch.zeros((), device=hidden.device))

    def logits(self, rows: Tensor) -> Tensor:
        """Return `[n, vocabulary]` logits for `[n, hidden]` readouts."""
        with self._backbone_returning(rows[None]):
            ids = torch.zeros(1, rows.shape[0], dtype=torch.long, device=rows.device)
            return self.model(input_ids=ids, use_cache=False).logits[0]

    def _logits_by(self, rows: Tensor, projection: Callable[[Tensor], Tensor]) -> Tensor:
        with patched(self.projection, forward=projection):
            return self.logits(rows)

    def token_losses(self, rows: Tensor, targets: Tensor, *, predict: bool = True) -> tuple[Tensor, Top | None]:
        """Return each row's cross-entropy (nats, fp32) and how sure it is of its most likely token (no gradient).

        Works through the rows in chunks so that at most `LOGITS_AT_A_TIME` logits exist; with gradients on, a chunk's
        logits are recomputed in the backward pass instead of being kept.

        Args:
            rows: `[n, hidden]` readouts; targets: `[n]` token ids. predict: False leaves out the most likely tokens.
        """
        size = self._rows_at_a_time
        split = list(zip(rows.split(size), targets.split(size), strict=True))
        chunks = len(split) if predict else 0
        # Processes that hold parts of the head call it as often as each other; on no rows where one has fewer chunks.
        calls = most(self.model, len(split)) if torch.is_grad_enabled() else len(split)
        split += [(rows[:0], targets[:0])] * (calls - len(split))
        losses, tops = [], list[Top]()

        def losses_of(chunk: Tensor, target: Tensor) -> Tensor:
            logits = self.logits(chunk).float()
            loss = _cross_entropy(logits, target)
            if len(tops) < chunks:  # not when the logits are recomputed
                known = logits.detach()
                normalizer = loss.detach() + known.gather(1, target[:, None]).squeeze(1)
                values = known.topk(min(2, known.shape[-1]), dim=-1).values
                tops.append(top_from(values, known.argmax(-1), normalizer))
            return loss

        for chunk, target in split:
            if torch.is_grad_enabled() and calls > 1:
                losses.append(checkpoint(losses_of, chunk, target, use_reentrant=False))
            else:
                losses.append(losses_of(chunk, target))
        return torch.cat(losses), joined_tops(tops) if predict else None

    @torch.no_grad()
    def score(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        scored: Tensor,
        *,
        targets: Tensor,
        depth: int | None = None,
    ) -> Scores:
        """Score chosen positions of a batch at every depth up to `depth`, the way `way` says.

        Args:
            input_ids, attention_mask: `[batch, position]`; scored: the same shape, True at n positions.
            targets: `[n]` the token that follows each of them.
            depth: how many passes follow pass 0; the recursion's own depth if not given.
        """
        score = self._score_plain if self.way == "plain" else self._score_apart
        with through_onednn(self.model):
            return score(input_ids, attention_mask, scored, targets=targets, depth=self._depth(depth))

    @property
    def _rows_at_a_time(self) -> int:
        return max(1, LOGITS_AT_A_TIME // self.vocabulary)

    def _depth(self, depth: int | None) -> int:
        if self.recursion is None:
            return 0
        return self.recursion.depth if depth is None else depth

    def _score_apart(self, ids: Tensor, mask: Tensor, scored: Tensor, *, targets: Tensor, depth: int) -> Scores:
        passes = self.passes(ids, mask, depth=depth)
        losses, tops = [], []
        top: Top | None
        for hidden in passes.hidden:
            if self.way == "tiles":
                loss, top = tiles.token_losses(self.projection, self._logits_by, hidden[scored], targets=targets)
            else:
                loss, top = self.token_losses(hidden[scored], targets)
            assert top is not None
            losses.append(loss)
            tops.append(top)
        return Scores(torch.stack(losses), [state[scored] for state in passes.states], tops)

    @torch.no_grad()
    def choose_way(self, input_ids: Tensor, attention_mask: Tensor, *, depth: int | None = None) -> str | None:
        """Choose the first way that agrees with the model's plain forward on a batch, at every depth, up to rounding.

        Of a large batch, its first rows and positions are compared: enough to tell a head that is not what it seems.
        Where layers lie on disk, so that each forward reads all of them, one plain forward at depth 0 is all that is
        run, and only the head is compared, on what the backbone returned in it.

        Args:
            input_ids, attention_mask: `[batch, position]`.
            depth: the last depth that is compared; the recursion's own depth if not given.

        Returns:
            A warning for the user if a faster way cannot be used; else None.

        Raises:
            RRError: the plain logits are not finite.
        """
        height, width = CHECKED
        ids, mask = input_ids[:height, :width], attention_mask[:height, :width]
        first = self.way
        spread = is_spread(self.model)
        with self._one_forward(ids, mask) if spread else nullcontext():
            while self.way != "plain" and not self._agrees(ids, mask, 0 if spread else depth):
                self.way = WAYS[WAYS.index(self.way) + 1]
        if self.way == first:
            return None
        slower = "the head on whole rows" if self.way == "rows" else "its plain forward, in more time and memory"
        family = self.model.config.model_type
        return f"the logits of this '{family}' model differ when they are taken apart: it is scored by {slower}"

    def bytes_per_token(self, length: int, *, depth: int | None = None) -> int:
        """Estimate what a token of a batch takes while it is scored, in bytes; rows have `length` positions.

        Counted are the activations of one layer, the hidden states that each pass keeps, a row of the attention mask
        and, where attention is eager, of its scores; and plain logits in the way `plain`. Tiles do not grow with n.
        """
        config, size = text_config(self.model.config), self.model.dtype.itemsize
        hidden = self.model.get_input_embeddings().weight.shape[1]
        inner = getattr(config, "intermediate_size", None) or 4 * hidden
        inner = inner if isinstance(inner, int) else max(inner)
        depth = self._depth(depth)
        # Every pass has its state and its readout.
        kept = 2 * (depth + 1) if depth else 0
        eager = attention_is_eager(config)
        scores = 3 * getattr(config, "num_attention_heads", 0) if eager else 1
        logits = 3 * self.vocabulary if self.way == "plain" else 0
        return size * (12 * hidden + 4 * inner + kept * hidden + scores * length + logits)

    def _agrees(self, ids: Tensor, mask: Tensor, depth: int | None) -> bool:
        scored = mask.bool()
        # What follows the last position is not known; any token will do.
        targets = ids.roll(-1, 1)[scored]
        try:
            found = self.score(ids, mask, scored, targets=targets, depth=depth)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # a family's forward may fail in any way with a head or backbone that is not its own
            return False
        for k, (losses, predictions) in enumerate(zip(found.losses, found.predictions, strict=True)):
            logits = self._plain_logits(ids, mask, k)[scored].float()
            normalizer = logits.logsumexp(1)
            if not torch.isfinite(normalizer).all():
                family = self.model.config.model_type
                raise RRError(f"the logits of this '{family}' model are not finite", "The model cannot be measured.")
            expected = normalizer - logits.gather(1, targets[:, None]).squeeze(1)
            short = logits.amax(1) - logits.gather(1, predictions[:, None]).squeeze(1)
            worst = torch.maximum((losses - expected).abs(), short).max()
            scale = max(1.0, float(normalizer.abs().max()), float(expected.abs().max()))
            if not float(worst) <= max(1e-4, 4 * torch.finfo(self.model.dtype).eps) * scale:
                return False
        return True

    def _score_plain(self, ids: Tensor, mask: Tensor, scored: Tensor, *, targets: Tensor, depth: int) -> Scores:
        states = self.recursion.passes(ids, mask, depth=depth).states if depth else []
        size = self._rows_at_a_time
        losses, tops = [], []
        for k in range(depth + 1):
            logits = self._plain_logits(ids, mask, k)[scored]
            pairs = zip(logits.split(size), targets.split(size), strict=True)
            losses.append(torch.cat([_cross_entropy(part.float(), target) for part, target in pairs]))
            tops.append(joined_tops([top_of(part) for part in logits.split(size)]))
        return Scores(torch.stack(losses), [state[scored] for state in states], tops)

    def _plain_logits(self, ids: Tensor, mask: Tensor, depth: int) -> Tensor:
        with at_depth(self.model, depth):
            return self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits

    @contextmanager
    def _one_forward(self, ids: Tensor, mask: Tensor) -> Iterator[None]:
        """Run the plain forward at depth 0, once; while it is entered, hidden states and plain logits are its own."""
        seen: list[Any] = []
        hook = self.backbone.register_forward_hook(
            lambda *run: seen.append(getattr(run[-1], "last_hidden_state", None))
        )
        try:
            logits = self._plain_logits(ids, mask, 0)
        finally:
            hook.remove()
        passes = Passes([], seen[-1:], torch.zeros(()))
        with patched(self, passes=lambda *_, **__: passes, _plain_logits=lambda *_: logits):
            yield

    @contextmanager
    def _backbone_returning(self, hidden: Tensor) -> Iterator[None]:
        output = _BackboneOutput(last_hidden_state=hidden)
        with at_depth(self.model, 0), patched(self.backbone, forward=lambda *_, **__: output):
            yield


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of `[n, vocabulary]` logits (nats, fp32)."""
    if torch.is_grad_enabled():  # fused, which is faster; training does not need the sixth digit
        return F.cross_entropy(logits, targets, reduction="none")
    # On a CPU, torch's log_softmax is off by about 1e-5 nats over a vocabulary of 49,152; its logsumexp is not.
    return logits.logsumexp(1) - logits.gather(1, targets[:, None]).squeeze(1)
