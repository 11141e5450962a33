"""Draft, refine, commit: the tokens of running every pass for every token, at nearly the price of pass 0 alone.

    draft    pass 0 alone proposes up to `width` tokens, one by one; it ends early where the boundary head expects
             that the token will not survive
    refine   one forward of all passes over the whole draft, in parallel
    commit   the longest prefix of the draft that the last pass agrees with, plus its correction behind it; every cache
             is taken back to there

Greedy decoding commits what argmax decoding of the last pass would. Sampling accepts a drafted token x with
probability min(1, p(x)/q(x)) and draws a rejected one from max(0, p - q), normalised, where q is pass 0 and p the last
pass, both after the logits processors: every token is distributed as p (Leviathan et al. 2023, algorithm 1).

Adaptive refining ends at the first pass with which the boundary head is content at every position of the chunk; even
pass 0 may do. Deeper passes then have no cache for these tokens. Before a later chunk runs such a pass, the pending
tokens go through it together with the chunk, in one forward, so that what a pass computes never depends on where chunks
stopped.

Taking back: attention and convolution states are cropped. Recurrent states cannot be, so a snapshot from before the
draft is restored and the committed tokens run again; there the rows of a batch advance together, by what the slowest
of them commits, whereas otherwise every row goes its own way.
"""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.generation import EosTokenCriteria, GenerateDecoderOnlyOutput, MaxLengthCriteria

from rrcli.errors import UsageError
from rrcli.recursion import caches
from rrcli.recursion.chunks import COMMIT_THRESHOLD, ChunkTotals
from rrcli.recursion.proof import LOW_PRECISION, TOLERANCE

log = logging.getLogger(__name__)


@dataclass
class Trace:
    """How one row's new tokens came about; one entry per token.

    Attributes:
        passes: passes after pass 0 that were run before it was committed.
        changed: whether the last pass put another token in place of pass 0's.
    """

    passes: list[int] = field(default_factory=list)
    changed: list[bool] = field(default_factory=list)


class ChunkedDecoding:
    """A decoding method for `model.generate(..., custom_generate=ChunkedDecoding())`, for a model with a recursion.

    Greedy and sampling; batches with left padding; every logits processor, stopping criterion and streamer of
    `generate`. Works at the recursion's current depth. A model or a cache that cannot be taken back is decoded token by
    token, with a notice in the log.

    Attributes:
        totals: the chunk metrics of everything that was decoded with this object.
        traces: one `Trace` for each row of the last call.

    Args:
        width: tokens drafted at a time; the recursion's `chunk_width` if not given.
        boundary: end a draft where the boundary head's probability of committing is below this; None = never. A batch
            drafts on until every row has come to such a place.
        adaptive: end refining where that probability is at least `boundary` (0.5 if not given) at every position. Needs
            full attention and a span that ends with the last layer; other models refine at the full depth.
        streamer: gets prompt and tokens as they are committed. To be given here: `generate` does not hand its own on.
    """

    def __init__(
        self, width: int | None = None, boundary: float | None = None, *, adaptive: bool = False, streamer: Any = None
    ) -> None:
        if width is not None and width < 1:
            raise UsageError(f"the chunk width is {width}", "It must be at least 1.")
        self.width, self.adaptive, self.streamer = width, adaptive, streamer
        self.boundary = COMMIT_THRESHOLD if boundary is None and adaptive else boundary
        self.totals = ChunkTotals()
        self.traces: list[Trace] = []

    @torch.no_grad()
    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        **model_kwargs: Any,
    ) -> Any:
        """Return `[batch, position]` prompts and new tokens, padded on the right, in the form `generate` was asked for.

        Raises:
            UsageError: beam search, which chunks cannot do.
        """
        if generation_config.num_beams > 1:
            raise UsageError("chunked decoding cannot search beams", "Leave num_beams or custom_generate out.")
        cache = model_kwargs.get(caches.argument_of(model))
        if self.streamer is not None:
            self.streamer.put(input_ids.cpu())
        obstacle = _obstacle(model, cache, model_kwargs.get("attention_mask"))
        self.traces = [Trace() for _ in input_ids]
        if obstacle:
            log.warning("decoding token by token: %s", obstacle)
            return model._sample(
                input_ids, logits_processor, stopping_criteria, generation_config,
                synced_gpus=synced_gpus, streamer=self.streamer, **model_kwargs,
            )  # fmt: skip
        rows = _Rows(model, input_ids, model_kwargs.get("attention_mask"), cache, stopping_criteria, self.streamer)
        chooser = _Chooser(rows, logits_processor, sample=bool(generation_config.do_sample))
        first = chooser.choose(chooser.scores(rows.prefill()[:, -1:]))
        self._note(rows, first, first, model.recursion.depth, torch.ones_like(first[:, 0]))
        rows.commit(first.tolist())
        if cache.is_croppable:
            cache.activate_past_recording()
        rows.pending = [0] * model.recursion.depth if self.adaptive and _can_lag(model.recursion, cache) else None
        width = self.width or model.recursion.config.chunk_width
        while rows.active:
            self._chunk(rows, chooser, min(width, rows.room(stopping_criteria.max_length, width)))
        if self.streamer is not None:
            self.streamer.end()
        for trace, new in zip(self.traces, rows.new, strict=True):
            del trace.passes[len(new) :], trace.changed[len(new) :]
        sequences = rows.sequences(generation_config._pad_token_tensor)
        if generation_config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=sequences, past_key_values=cache)
        return sequences

    def _chunk(self, rows: _Rows, chooser: _Chooser, width: int) -> None:
        """Draft, refine and commit once for every row that goes on."""
        cache, recurs = rows.cache, not rows.cache.is_croppable
        before = caches.Snapshot(cache) if recurs else None
        draft, drawn_from, content = self._draft(rows, chooser, width)
        chunk = torch.cat([rows.tokens[:, -1:], draft[:, :-1]], 1)
        if before is not None:
            before.restore(cache, draft=True)
            logits, passes = rows.forward(chunk), rows.model.recursion.depth
        elif rows.pending is None:
            caches.forget(cache, [draft.shape[1]])
            logits, passes = rows.forward(chunk), rows.model.recursion.depth
        elif content:
            logits, passes = None, 0
        else:
            logits, passes = self._refine_until_content(rows, chunk)
        accepted, last = torch.full_like(draft[:, 0], draft.shape[1]), draft[:, -1]
        if logits is not None:
            accepted, last = chooser.judge(draft, drawn_from, chooser.scores(logits, draft))
        counts = (accepted + 1).clamp_max(draft.shape[1])
        if recurs or rows.pending is not None or not caches.is_alignable(cache):
            counts = counts.min().expand_as(counts)
        committed = draft.clone()
        corrected = accepted < counts
        committed[corrected, accepted[corrected]] = last[corrected]
        self._count(draft, accepted, counts, passes)
        self._note(rows, draft, committed, passes, counts)
        new = [row[:count] for row, count in zip(committed.tolist(), counts.tolist(), strict=True)]
        dropped: Tensor | None = draft.shape[1] - counts
        if before is not None and int(dropped[0]):
            before.restore(cache)
            rows.forward(chunk[:, : int(counts[0])])
            dropped = torch.zeros_like(dropped)
        if rows.pending is not None:
            caches.forget(cache, [int(dropped[0])] * (passes + 1))
            rows.pending = [0 if k < passes else lag + int(counts[0]) for k, lag in enumerate(rows.pending)]
            dropped = None
        rows.commit(new, dropped)

    def _draft(self, rows: _Rows, chooser: _Chooser, width: int) -> tuple[Tensor, list[Tensor], bool]:
        """Draft with pass 0.

        Returns:
            `[row, position]` drafted tokens; when sampling, the `[row, 1, vocabulary]` scores of each; and whether the
            boundary head was content with all of them.
        """
        recursion = rows.model.recursion
        draft, drawn_from = rows.tokens[:, :0], []
        ended = torch.zeros(len(rows.active), dtype=torch.bool, device=draft.device)
        doubted = ended
        while draft.shape[1] < width and not bool(ended.all()):
            token = torch.cat([rows.tokens[:, -1:], draft], 1)[:, -1:]
            with recursion.recording(draft=True) as states:
                logits = rows.forward(token, behind=draft.shape[1])
            scores = chooser.scores(logits, draft, last_only=True)
            if chooser.sample:
                drawn_from.append(scores)
            draft = torch.cat([draft, chooser.choose(scores)], 1)
            if self.boundary is not None:
                doubted = doubted | ~self._content(recursion, states[-1][:, -1]).to(doubted.device)
            ended = ended | rows.ended(draft) | doubted
        return draft, drawn_from, not bool(doubted.any())

    def _refine_until_content(self, rows: _Rows, chunk: Tensor) -> tuple[Tensor, int]:
        """Run passes over a chunk until the boundary head is content with all of it.

        Returns:
            `[row, position, vocabulary]` logits of the last pass that was run, and which it was.
        """
        recursion, width, ran = rows.model.recursion, chunk.shape[1], 0

        def content(state: Tensor) -> bool:
            return bool(self._content(recursion, state[:, -width:]).all())

        while True:
            # Passes that are equally far behind go in one forward; those before them are run again from there.
            lag = rows.pending[ran]
            deepest = next((k for k in range(ran, len(rows.pending)) if rows.pending[k] != lag), len(rows.pending))
            caches.forget(rows.cache, [lag + width] * (ran + 1))
            ids = torch.cat([rows.tokens[:, rows.tokens.shape[1] - 1 - lag : -1], chunk], 1)
            with recursion.recording(depth=deepest, enough=content) as states:
                logits = rows.forward(ids, behind=-lag)
            ran = len(states) - 1
            rows.pending = [0 if k < ran else behind for k, behind in enumerate(rows.pending)]
            if ran == len(rows.pending) or content(states[-1]):
                return logits[:, -width:], ran

    def _content(self, recursion: Any, states: Tensor) -> Tensor:
        return recursion.head(states).sigmoid() >= self.boundary

    def _count(self, draft: Tensor, accepted: Tensor, counts: Tensor, passes: int) -> None:
        self.totals.add(
            ChunkTotals(
                chunks=len(draft),
                positions=draft.numel(),
                refine_steps=passes * len(draft),
                whole=int(accepted.eq(draft.shape[1]).sum()),
                committed=int(counts.sum()),
            )
        )

    def _note(self, rows: _Rows, draft: Tensor, committed: Tensor, passes: int, counts: Tensor) -> None:
        changed = draft.ne(committed).tolist()
        for row, differs, count in zip(rows.active, changed, counts.tolist(), strict=True):
            self.traces[row].passes += [passes] * count
            self.traces[row].changed += differs[:count]


class _Rows:
    """The rows that are still being decoded: right-aligned, their caches with them.

    The last column of `tokens` is each row's last committed token, which no pass has processed yet.

    Attributes:
        tokens: `[row, position]`; real: `[row]` how many of a row's positions are no padding.
        active: which rows of the batch these are. new: each row of the batch's new tokens.
        pending: when passes may lag, how many committed tokens pass k + 1 has not seen; else None.
    """

    pending: list[int] | None = None

    def __init__(
        self, model: Any, input_ids: Tensor, mask: Tensor | None, cache: Any, criteria: Any, streamer: Any
    ) -> None:
        self.model, self.cache, self.criteria, self.streamer = model, cache, criteria, streamer
        self.prompts, self.tokens = input_ids, input_ids
        self.real = torch.full_like(input_ids[:, 0], input_ids.shape[1]) if mask is None else mask.long().sum(1)
        self.active = list(range(len(input_ids)))
        self.new: list[list[int]] = [[] for _ in input_ids]
        self._accepts = inspect.signature(model.forward).parameters
        self._ends = [c.eos_token_id for c in criteria if isinstance(c, EosTokenCriteria)]
        self._others = [c for c in criteria if not isinstance(c, EosTokenCriteria | MaxLengthCriteria)]

    def prefill(self) -> Tensor:
        """Run the prompt, but for what the cache holds of it; return `[row, position, vocabulary]` logits."""
        ids = self.tokens if caches.is_empty(self.cache) else self.tokens[:, int(self.cache.get_seq_length()) :]
        return self._run(ids, self.tokens.shape[1], {"logits_to_keep": 1} if "logits_to_keep" in self._accepts else {})

    def forward(self, ids: Tensor, behind: int = 0) -> Tensor:
        """Run `ids` `[row, position]`, which begin `behind` tokens after the first unprocessed one; return logits."""
        return self._run(ids, self.tokens.shape[1] - 1 + behind + ids.shape[1], {})

    def _run(self, ids: Tensor, total: int, options: dict[str, Any]) -> Tensor:
        # Columns in front of the first real one are padding, however many tokens were drafted behind.
        padding = self.tokens.shape[1] - self.real
        mask = (torch.arange(total, device=ids.device) >= padding[:, None]).long()
        if "attention_mask" in self._accepts:
            options["attention_mask"] = mask
        if "position_ids" in self._accepts:
            options["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        options |= {caches.argument_of(self.model): self.cache, "use_cache": True}
        return self.model(input_ids=ids, **options).logits

    def room(self, max_length: int | None, width: int) -> int:
        """Return how many more tokens the row that is furthest back may get."""
        if max_length is None:
            return width
        return max(1, max_length - self.prompts.shape[1] - min(len(self.new[row]) for row in self.active))

    def sequence(self, row: int, *more: int) -> Tensor:
        """Return `[1, position]`: a row's prompt, padding included, its new tokens, and `more`."""
        tail = torch.tensor([[*self.new[row], *more]], dtype=self.prompts.dtype, device=self.prompts.device)
        return torch.cat([self.prompts[row : row + 1], tail], 1)

    def ended(self, draft: Tensor) -> Tensor:
        """Tell for each row whether its draft ends the text, so that drafting on is for nothing."""
        ended = torch.zeros(len(draft), dtype=torch.bool, device=draft.device)
        for ends in self._ends:
            ended |= torch.isin(draft[:, -1], ends.to(draft.device))
        for criterion in self._others:
            texts = [self.sequence(row, *draft[i].tolist()) for i, row in enumerate(self.active)]
            ended |= torch.cat([criterion(text, None) for text in texts]).to(ended)
        return ended

    def commit(self, new: list[list[int]], dropped: Tensor | None = None) -> None:
        """Append each row's tokens up to where it stops, take its caches back, and let stopped rows go.

        Args:
            dropped: `[row]` positions that the caches hold too many; None behind a prefill.
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
            dropped = None if dropped is None else dropped[keep]
        most = int(counts.max())
        added = torch.tensor([[*new[i], *[0] * (most - len(new[i]))] for i in going], device=self.tokens.device)
        self.real = self.real + counts
        uniform = bool(counts.eq(most).all())
        # With rows of one length nothing moves; else the longest row decides how wide the block is.
        length = self.tokens.shape[1] + most if uniform else int(self.real.max())
        self.tokens = caches.moved(torch.cat([self.tokens, added], 1), most - counts, length, 1)
        if dropped is None:
            return
        if not uniform:
            caches.align(self.cache, dropped, length - 1)
        elif self.cache.is_croppable:
            self.cache.crop(-int(dropped[0]))

    def sequences(self, pad: Tensor | None) -> Tensor:
        """Return `[batch, position]` prompts and new tokens, padded on the right."""
        width = max(map(len, self.new))
        fill = 0 if pad is None else int(pad)
        rows = [[*tokens, *[fill] * (width - len(tokens))] for tokens in self.new]
        return torch.cat([self.prompts, torch.tensor(rows, dtype=self.prompts.dtype, device=self.prompts.device)], 1)


class _Chooser:
    """Turns logits into tokens, greedily or by sampling, and judges drafts."""

    def __init__(self, rows: _Rows, processors: Any, *, sample: bool) -> None:
        self.rows, self.processors, self.sample = rows, processors, sample

    def scores(self, logits: Tensor, draft: Tensor | None = None, *, last_only: bool = False) -> Tensor:
        """Return `[row, position, vocabulary]` fp32 scores behind the logits processors.

        Args:
            draft: `[row, position]` the drafted tokens, of which the first i stand before position i.
            last_only: the logits are of the one position behind the whole draft.
        """
        scores = logits.float()
        if not self.processors:
            return scores
        known = [[]] * len(scores) if draft is None else draft.tolist()
        for position in range(scores.shape[1]):
            texts = [
                self.rows.sequence(row, *(known[index] if last_only else known[index][:position]))
                for index, row in enumerate(self.rows.active)
            ]
            scores[:, position] = self._processed(texts, scores[:, position])
        return scores

    def _processed(self, texts: list[Tensor], scores: Tensor) -> Tensor:
        """Return `[row, vocabulary]` scores behind the processors, which see every row where the batch had it."""
        places, result = torch.tensor(self.rows.active, device=scores.device), scores.clone()
        batch = len(self.rows.prompts)
        # Some processors know each row of the batch: those of one length go together, the others stand aside.
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

    def judge(self, draft: Tensor, drawn_from: list[Tensor], refined: Tensor) -> tuple[Tensor, Tensor]:
        """Return how many drafted tokens of each row are accepted, and what stands in place of the next, both `[row]`.

        Args:
            draft: `[row, position]`; drawn_from: pass 0's scores, one `[row, 1, vocabulary]` per position.
            refined: `[row, position, vocabulary]` the last pass's scores.
        """
        width = draft.shape[1]
        if not self.sample:
            best = refined.argmax(-1)
            accepted = best.eq(draft).long().cumprod(1).sum(1)
            return accepted, best.gather(1, accepted.clamp_max(width - 1)[:, None])[:, 0]
        target, guess = refined.softmax(-1), torch.cat(drawn_from, 1).softmax(-1)
        ratio = target.gather(2, draft[..., None])[..., 0] / guess.gather(2, draft[..., None])[..., 0]
        accepted = (torch.rand_like(ratio) < ratio).long().cumprod(1).sum(1)
        rows, place = torch.arange(len(draft), device=draft.device), accepted.clamp_max(width - 1)
        rest = (target[rows, place] - guess[rows, place]).clamp_min(0)
        # Nothing is left where the two agree; then nothing was rejected either, but for rounding.
        rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, target[rows, place])
        return accepted, rest.multinomial(1)[:, 0]


def _obstacle(model: Any, cache: Any, mask: Tensor | None) -> str:
    """Say why a model is decoded token by token, or nothing."""
    recursion = getattr(model, "recursion", None)
    if recursion is None or recursion.depth == 0:
        return "no pass follows pass 0"
    if not isinstance(cache, DynamicCache) or cache.offloading:
        return f"a cache of class {type(cache).__name__} cannot be taken back"
    if mask is not None and bool((mask.long().diff(dim=1) < 0).any()):
        return "the prompts are not padded on the left"
    if not continues_in_blocks(recursion):
        return f"'{model.config.model_type}' models cannot take several tokens at once behind a cache"
    return ""


def _can_lag(recursion: Any, cache: Any) -> bool:
    """Tell whether passes can be taken back any way and caught up: not where windows or states forget."""
    return recursion.end == len(recursion.layers) and all(type(layer) is DynamicLayer for layer in cache.layers)


def continues_in_blocks(recursion: Any) -> bool:
    """Tell, by trying once, whether several tokens at once behind a cache give what they give one by one."""
    known = recursion.__dict__.get("_continues_in_blocks")
    if known is not None:
        return known
    model, name = recursion.model, caches.argument_of(recursion.model)
    ids = torch.arange(8, device=model.device)[None] * 37 % model.get_input_embeddings().num_embeddings
    rows = []
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    for pieces in ([4], [1] * 4):
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        model(input_ids=ids[:, :4], use_cache=True, **{name: cache})
        parts, seen = [], 4
        for piece in pieces:
            options = {name: cache, "use_cache": True}
            if takes_positions:
                options["position_ids"] = torch.arange(seen, seen + piece, device=ids.device)[None]
            parts.append(model(input_ids=ids[:, seen : seen + piece], **options).logits)
            seen += piece
        rows.append(torch.cat(parts, 1).float())
    limit = TOLERANCE.get(model.dtype, LOW_PRECISION)
    recursion.__dict__["_continues_in_blocks"] = bool((rows[0] - rows[1]).abs().max() <= limit * rows[1].abs().max())
    return recursion.__dict__["_continues_in_blocks"]
