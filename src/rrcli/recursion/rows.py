"""The batch that chunked decoding works on: its rows with their caches, and the choice of tokens from logits."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers.generation import EosTokenCriteria, MaxLengthCriteria

from rrcli.recursion import caches
from rrcli.recursion.abilities import rows_may_part
from rrcli.recursion.lag import Lag
from rrcli.recursion.signals import draws
from rrcli.upstream import cache_argument


class Rows:
    """The rows of a batch that are still being decoded, aligned on the right, and their caches.

    The last column of `tokens` is each row's last committed token, which no pass has processed yet.

    Attributes:
        tokens: `[row, position]`; real: `[row]` how many of a row's positions are not padding.
        active: the numbers of these rows in the batch. new: the new tokens of every row of the batch.
        lag: which tokens each pass has not seen yet; None where every pass sees every token at once.
    """

    lag: Lag | None = None

    def __init__(
        self, model: Any, input_ids: Tensor, mask: Tensor | None, *, cache: Any, criteria: Any, streamer: Any
    ) -> None:
        self.model, self.cache, self.criteria, self.streamer = model, cache, criteria, streamer
        self.prompts, self.tokens = input_ids, input_ids
        self.real = torch.full_like(input_ids[:, 0], input_ids.shape[1]) if mask is None else mask.long().sum(1)
        self.active = list(range(len(input_ids)))
        self.new: list[list[int]] = [[] for _ in input_ids]
        self._accepts, self._cache_argument = inspect.signature(model.forward).parameters, cache_argument(model)
        self._ends = [c.eos_token_id for c in criteria if isinstance(c, EosTokenCriteria)]
        self._others = [c for c in criteria if not isinstance(c, EosTokenCriteria | MaxLengthCriteria)]

    def prefill(self) -> Tensor:
        """Run the part of the prompt that is not in the cache yet; return `[row, position, vocabulary]` logits."""
        ids = self.tokens if caches.is_empty(self.cache) else self.tokens[:, int(self.cache.get_seq_length()) :]
        return self.run(ids, self.tokens.shape[1], keep=1)

    def forward(self, ids: Tensor, offset: int = 0) -> Tensor:
        """Run `[row, position]` ids, which begin `offset` tokens after the first unprocessed one; return logits."""
        return self.run(ids, self.tokens.shape[1] - 1 + offset + ids.shape[1])

    def run(self, ids: Tensor, total: int, *, keep: int = 0) -> Tensor:
        """Run `[row, position]` ids, the last of `total` columns; return logits of the last `keep` (0 = all) of them.

        A model that cannot leave logits out returns all.
        """
        options: dict[str, Any] = {"logits_to_keep": keep} if keep and "logits_to_keep" in self._accepts else {}
        # The columns before a row's first real one are padding; drafted tokens after it change nothing about that.
        padding = self.tokens.shape[1] - self.real
        mask = (torch.arange(total, device=ids.device) >= padding[:, None]).long()
        if "attention_mask" in self._accepts:
            options["attention_mask"] = mask
        if "position_ids" in self._accepts:
            options["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        options |= {self._cache_argument: self.cache, "use_cache": True}
        return self.model(input_ids=ids, **options).logits

    def room(self, max_length: int | None, width: int) -> int:
        """Return the most tokens that a draft may have, at most `width`.

        More than the row that is furthest back may still get would be drafted in vain. And no row may be drafted beyond
        `max_length`, however short the others are: it may be the last position that the model knows.
        """
        if max_length is None:
            return width
        furthest_back = max_length - self.prompts.shape[1] - min(len(self.new[row]) for row in self.active)
        return max(1, min(width, furthest_back, max_length - int(self.real.max())))

    def draws(self, first: int, count: int) -> Tensor:
        """Return `[row, position]` a draw for each of `count` new tokens from the one numbered `first` on."""
        rows = torch.tensor(self.active, device=self.tokens.device)[:, None]
        done = torch.tensor([len(self.new[row]) for row in self.active], device=self.tokens.device)[:, None]
        return draws(rows, done + torch.arange(first, first + count, device=self.tokens.device))

    def may_part(self) -> bool:
        """Tell whether each row may commit as many tokens as it can: its cache moves, and padding takes up the rest."""
        movable = self.cache.is_croppable and caches.is_alignable(self.cache)
        return movable and (len(self.active) == 1 or rows_may_part(self.model.recursion))

    def sequence(self, row: int, *more: int) -> Tensor:
        """Return `[1, position]`: a row's prompt, padding included, its new tokens, and `more`."""
        tail = torch.tensor([[*self.new[row], *more]], dtype=self.prompts.dtype, device=self.prompts.device)
        return torch.cat([self.prompts[row : row + 1], tail], 1)

    def ended(self, draft: Tensor) -> Tensor:
        """Tell for each row whether its draft ends the text, so that more drafting is useless."""
        ended = torch.zeros(len(draft), dtype=torch.bool, device=draft.device)
        for ends in self._ends:
            ended |= torch.isin(draft[:, -1], ends.to(draft.device))
        for criterion in self._others:
            texts = [self.sequence(row, *draft[i].tolist()) for i, row in enumerate(self.active)]
            ended |= torch.cat([criterion(text, None) for text in texts]).to(ended)
        return ended

    def commit(self, new: list[list[int]], dropped: Tensor | None = None) -> None:
        """Append each row's tokens up to where it stops, take its caches back, and remove the rows that stopped.

        Args:
            new: the tokens of each row.
            dropped: `[row]` how many positions to take out of the caches; None leaves the caches as they are.
        """
        going = []
        for index, (row, tokens) in enumerate(zip(self.active, new, strict=True)):
            for count, token in enumerate(tokens, start=1):
                self.new[row].append(token)
                if bool(self.criteria(self.sequence(row), None)[0]):
                    tokens = tokens[:count]
                    break
            else:
                going.append(index)
            if self.streamer is not None:
                self.streamer.put(torch.tensor(tokens))
        self.active = [self.active[index] for index in going]
        if not going:
            return
        counts = torch.tensor([len(new[index]) for index in going], device=self.tokens.device)
        if len(going) < len(new):
            keep = torch.tensor(going, device=self.tokens.device)
            self.cache.reorder_cache(keep)
            self.tokens, self.real = self.tokens[keep], self.real[keep]
            if self.lag is not None:
                self.lag.select(keep)
            dropped = None if dropped is None else dropped[keep]
        most = int(counts.max())
        added = torch.tensor([[*new[i], *[0] * (most - len(new[i]))] for i in going], device=self.tokens.device)
        self.real = self.real + counts
        length = self.tokens.shape[1] + most
        # Rows that each have an end of their own are as wide as the longest; it may have left.
        if dropped is not None and self.may_part():
            length = int(self.real.max())
        uniform = bool(counts.eq(most).all()) and length == self.tokens.shape[1] + most
        self.tokens = caches.moved(torch.cat([self.tokens, added], 1), most - counts, length, axis=1)
        if dropped is None:
            return
        if not uniform:
            caches.align(self.cache, dropped, length - 1)
        elif self.cache.is_croppable:
            self.cache.crop(-int(dropped[0]))

    def sequences(self, pad: int) -> Tensor:
        """Return `[batch, position]` prompts and new tokens, padded with `pad` on the right."""
        width = max(map(len, self.new))
        rows = [[*tokens, *[pad] * (width - len(tokens))] for tokens in self.new]
        return torch.cat([self.prompts, torch.tensor(rows, dtype=self.prompts.dtype, device=self.prompts.device)], 1)


@runtime_checkable
class PlacedProcessor(Protocol):
    """A logits processor that looks at no text: only at the row's place in the batch and at the new token's number."""

    def placed(self, scores: Tensor, rows: Sequence[int], numbers: Tensor) -> Tensor:
        """Return `[row, vocabulary]` scores after processing.

        Args:
            rows: the places of these rows in the batch. numbers: `[row]` which new token of its row is chosen.
        """


class Chooser:
    """Chooses tokens from logits, greedily or by sampling, and accepts or rejects drafted ones."""

    def __init__(self, rows: Rows, processors: Any, *, sample: bool) -> None:
        self.rows, self.processors, self.sample = rows, processors, sample
        self.takes_the_most_likely = not sample and not processors

    def scores(self, logits: Tensor, draft: Tensor | None = None, *, last_only: bool = False) -> Tensor:
        """Return `[row, position, vocabulary]` fp32 scores: the logits after the logits processors.

        Args:
            draft: `[row, position]` the drafted tokens; the first i of them precede position i of the logits.
            last_only: the logits are those of one position, which follows the whole draft.
        """
        scores = logits.float()
        if not self.processors:
            return scores
        scores = scores.clone()  # the logits may still be needed
        if all(isinstance(processor, PlacedProcessor) for processor in self.processors):
            return self._placed(scores, draft.shape[1] if draft is not None and last_only else 0)
        known = [[]] * len(scores) if draft is None else draft.tolist()
        for position in range(scores.shape[1]):
            texts = [
                self.rows.sequence(row, *(known[index] if last_only else known[index][:position]))
                for index, row in enumerate(self.rows.active)
            ]
            scores[:, position] = self._processed(texts, scores[:, position])
        return scores

    def _placed(self, scores: Tensor, offset: int) -> Tensor:
        """Return scores after processors that need no text; the first are those of new token `offset` of each row."""
        done = torch.tensor([len(self.rows.new[row]) for row in self.rows.active], device=scores.device)
        for position in range(scores.shape[1]):
            for processor in self.processors:
                scores[:, position] = processor.placed(scores[:, position], self.rows.active, done + offset + position)
        return scores

    def _processed(self, texts: list[Tensor], scores: Tensor) -> Tensor:
        """Return `[row, vocabulary]` scores after the processors, which see each row at its place in the batch."""
        places, result = torch.tensor(self.rows.active, device=scores.device), scores.clone()
        batch = len(self.rows.prompts)
        # Some processors keep something for each row of the batch, so they are always given all rows: those of one
        # length with their own text, the others with a copy of one of these.
        for length in {text.shape[1] for text in texts}:
            chosen = [index for index, text in enumerate(texts) if text.shape[1] == length]
            ids = texts[chosen[0]].expand(batch, -1).clone()
            ids[places[chosen]] = torch.cat([texts[index] for index in chosen])
            full = scores.new_zeros(batch, scores.shape[1])
            full[places[chosen]] = scores[chosen]
            result[chosen] = self.processors(ids, full)[places[chosen]]
        return result

    def choose(self, scores: Tensor) -> Tensor:
        """Return `[row, 1]` tokens from `[row, 1, vocabulary]` scores."""
        return scores[:, 0].softmax(-1).multinomial(1) if self.sample else scores.argmax(-1)

    def accept(self, draft: Tensor, draft_scores: list[Tensor], target_scores: Tensor) -> tuple[Tensor, Tensor]:
        """Return how many drafted tokens of each row are accepted, and what replaces the next one, both `[row]`.

        Args:
            draft: `[row, position]`; draft_scores: pass 0's scores, one `[row, 1, vocabulary]` per position.
            target_scores: `[row, position, vocabulary]` the last pass's scores.
        """
        width = draft.shape[1]
        if not self.sample:
            best = target_scores.argmax(-1)
            accept_length = best.eq(draft).long().cumprod(1).sum(1)
            return accept_length, best.gather(1, accept_length.clamp_max(width - 1)[:, None])[:, 0]
        target_probs, draft_probs = target_scores.softmax(-1), torch.cat(draft_scores, 1).softmax(-1)
        ratio = target_probs.gather(2, draft[..., None])[..., 0] / draft_probs.gather(2, draft[..., None])[..., 0]
        accept_length = (torch.rand_like(ratio) < ratio).long().cumprod(1).sum(1)
        rows, place = torch.arange(len(draft), device=draft.device), accept_length.clamp_max(width - 1)
        rest = (target_probs[rows, place] - draft_probs[rows, place]).clamp_min(0)
        # Nothing is left where the two distributions are equal; there nothing is rejected, except by rounding.
        rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, target_probs[rows, place])
        return accept_length, rest.multinomial(1)[:, 0]
