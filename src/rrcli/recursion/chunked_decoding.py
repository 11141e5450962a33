"""Draft, refine, commit: the tokens of running every pass for every token, at nearly the price of pass 0 alone.

    draft    pass 0 alone proposes up to `width` tokens, one by one; it ends early where the boundary head expects
             that the token will not survive
    refine   one forward of the other passes over the whole draft, in parallel; what pass 0 gave is kept from drafting
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

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerateDecoderOnlyOutput

from rrcli import upstream
from rrcli.errors import UsageError
from rrcli.recursion import caches
from rrcli.recursion.chunk_metrics import COMMIT_THRESHOLD, ChunkTotals
from rrcli.recursion.engine import Record
from rrcli.recursion.probing import in_pieces
from rrcli.recursion.products import through_onednn
from rrcli.recursion.proof import LOW_PRECISION, TOLERANCE
from rrcli.recursion.rows import Chooser, Rows

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
    token, with all passes and one notice in the log: the same tokens, later.

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
        cache = upstream.cache_of(model_kwargs)
        if self.streamer is not None:
            self.streamer.put(input_ids.cpu())
        obstacle = _obstacle(model, cache, model_kwargs.get("attention_mask"))
        self.traces = [Trace() for _ in input_ids]
        if obstacle:
            _say_once(model, obstacle)
            output = upstream.sample_one_by_one(
                model, input_ids, logits_processor=logits_processor, stopping_criteria=stopping_criteria,
                generation_config=generation_config, synced_gpus=synced_gpus,
                streamer=None if self.streamer is None else _Noting(self, model), **model_kwargs,
            )  # fmt: skip
            self._trace(model, output if isinstance(output, Tensor) else output.sequences, input_ids, stopping_criteria)
            return output
        rows = Rows(model, input_ids, model_kwargs.get("attention_mask"), cache, stopping_criteria, self.streamer)
        chooser = Chooser(rows, logits_processor, sample=bool(generation_config.do_sample))
        first = chooser.choose(chooser.scores(rows.prefill()[:, -1:]))
        self._note(rows, first, first, model.recursion.depth, torch.ones_like(first[:, 0]))
        rows.commit(first.tolist())
        if cache.is_croppable:
            cache.activate_past_recording()
        rows.pending = [0] * model.recursion.depth if self.adaptive and _can_lag(model.recursion, cache) else None
        width = self.width or model.recursion.config.chunk_width
        committed = width
        with through_onednn(model):
            while rows.active:
                # Where drafts fail early, a long one is for nothing: at most twice what the last chunk committed.
                room = rows.room(stopping_criteria.max_length, width)
                committed = self._chunk(rows, chooser, min(width, 2 * committed, room))
        if self.streamer is not None:
            self.streamer.end()
        for trace, new in zip(self.traces, rows.new, strict=True):
            del trace.passes[len(new) :], trace.changed[len(new) :]
        sequences = rows.sequences(upstream.padding_token(generation_config))
        if generation_config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(**{"sequences": sequences, upstream.output_cache_field(): cache})
        return sequences

    def _trace(self, model: Any, sequences: Tensor, prompts: Tensor, criteria: Any) -> None:
        """Note what token by token gives: every token from all passes, none of them drafted."""
        depth = _depth(model)
        self.traces = [Trace() for _ in sequences]
        for trace, row in zip(self.traces, sequences, strict=True):
            for end in range(prompts.shape[1] + 1, len(row) + 1):
                trace.passes.append(depth)
                trace.changed.append(False)
                if bool(criteria(row[None, :end], None)[0]):
                    break

    def _chunk(self, rows: Rows, chooser: Chooser, width: int) -> int:
        """Draft, refine and commit once for every row that goes on; return the most tokens that a row committed."""
        cache, recurs = rows.cache, not rows.cache.is_croppable
        before = caches.Snapshot(cache) if recurs else None
        draft, drawn_from, content, record = self._draft(rows, chooser, width)
        chunk = torch.cat([rows.tokens[:, -1:], draft[:, :-1]], 1)
        passes = rows.model.recursion.depth
        drafted = caches.Snapshot(cache, draft=True)
        if before is not None:
            before.restore(cache, draft=True)
            logits = self._refine(rows, chunk, record, drafted)
        elif rows.pending is None:
            caches.forget(cache, [draft.shape[1]])
            logits = self._refine(rows, chunk, record, drafted)
        elif content:
            logits, passes = None, 0
        else:
            logits, passes = self._refine_until_content(rows, chunk)
        accepted, last = torch.full_like(draft[:, 0], draft.shape[1]), draft[:, -1]
        if logits is not None:
            accepted, last = chooser.accept(draft, drawn_from, chooser.scores(logits, draft))
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
        return int(counts.max())

    def _draft(self, rows: Rows, chooser: Chooser, width: int) -> tuple[Tensor, list[Tensor], bool, Record]:
        """Draft with pass 0.

        Returns:
            `[row, position]` drafted tokens; when sampling, the `[row, 1, vocabulary]` scores of each; whether the
            boundary head was content with all of them; and what pass 0 left behind.
        """
        recursion = rows.model.recursion
        draft, drawn_from = rows.tokens[:, :0], []
        ended = torch.zeros(len(rows.active), dtype=torch.bool, device=draft.device)
        doubted = ended
        with recursion.drafting() as record:
            while draft.shape[1] < width and not bool(ended.all()):
                token = torch.cat([rows.tokens[:, -1:], draft], 1)[:, -1:]
                logits = rows.forward(token, behind=draft.shape[1])
                scores = chooser.scores(logits, draft, last_only=True)
                if chooser.sample:
                    drawn_from.append(scores)
                draft = torch.cat([draft, chooser.choose(scores)], 1)
                if self.boundary is not None:
                    doubted = doubted | ~self._content(recursion, record.states[-1][:, -1]).to(doubted.device)
                ended = ended | rows.ended(draft) | doubted
        return draft, drawn_from, not bool(doubted.any()), record

    def _refine(self, rows: Rows, chunk: Tensor, record: Record, drafted: caches.Snapshot) -> Tensor:
        """Run the passes behind pass 0 over a chunk; pass 0's cache comes without it and gets it back.

        Args:
            chunk: `[row, position]` ids; record, drafted: what drafting them gave, and pass 0's cache behind them.

        Returns:
            `[row, position, vocabulary]` logits of the last pass.
        """
        recursion = rows.model.recursion
        if not record.entries:
            return rows.forward(chunk)
        known = torch.cat(record.entries, 1), torch.cat(record.states, 1)
        with recursion.refining(known):
            logits = rows.forward(chunk)
        drafted.restore(rows.cache, layers=recursion.end)
        return logits

    def _refine_until_content(self, rows: Rows, chunk: Tensor) -> tuple[Tensor, int]:
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
            with recursion.refining_until(content, depth=deepest) as record:
                logits = rows.forward(ids, behind=-lag)
            ran = len(record.states) - 1
            rows.pending = [0 if k < ran else behind for k, behind in enumerate(rows.pending)]
            if ran == len(rows.pending) or content(record.states[-1]):
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

    def _note(self, rows: Rows, draft: Tensor, committed: Tensor, passes: int, counts: Tensor) -> None:
        changed = draft.ne(committed).tolist()
        for row, differs, count in zip(rows.active, changed, counts.tolist(), strict=True):
            self.traces[row].passes += [passes] * count
            self.traces[row].changed += differs[:count]


class _Noting:
    """A streamer that notes how each token of a single row came about before it hands it on."""

    def __init__(self, decoding: ChunkedDecoding, model: Any) -> None:
        self.decoding, self.depth = decoding, _depth(model)

    def put(self, value: Tensor) -> None:
        trace = self.decoding.traces[0]
        trace.passes += [self.depth] * value.numel()
        trace.changed += [False] * value.numel()
        self.decoding.streamer.put(value)

    def end(self) -> None:
        self.decoding.streamer.end()


def _depth(model: Any) -> int:
    recursion = getattr(model, "recursion", None)
    return 0 if recursion is None else int(recursion.depth)


def _say_once(model: Any, obstacle: str) -> None:
    """Log why a model is decoded token by token, once for each reason."""
    said = model.__dict__.setdefault("rr_obstacles", set())
    if obstacle not in said:
        said.add(obstacle)
        log.warning("decoding token by token: %s", obstacle)


def _obstacle(model: Any, cache: Any, mask: Tensor | None) -> str:
    """Say why a model is decoded token by token, or nothing."""
    recursion = getattr(model, "recursion", None)
    if recursion is None or recursion.depth == 0:
        return "no pass follows pass 0"
    if not upstream.can_be_taken_back(cache):
        return f"a cache of class {type(cache).__name__} cannot be taken back"
    if mask is not None and bool((mask.long().diff(dim=1) < 0).any()):
        return "the prompts are not padded on the left"
    if not continues_in_blocks(recursion):
        return f"'{model.config.model_type}' models cannot take several tokens at once behind a cache"
    return ""


def _can_lag(recursion: Any, cache: Any) -> bool:
    """Tell whether passes can be taken back any way and caught up: not where windows or states forget."""
    return recursion.end == len(recursion.layers) and all(map(upstream.remembers_all, cache.layers))


def continues_in_blocks(recursion: Any) -> bool:
    """Tell, by trying pass 0 once for each model, whether tokens behind a cache give together what they give alone."""
    model = recursion.model
    if "rr_continues_in_blocks" not in model.__dict__:
        with recursion.at_depth(0):
            model.__dict__["rr_continues_in_blocks"] = _block_is_its_tokens(model)
    return model.__dict__["rr_continues_in_blocks"]


def _block_is_its_tokens(model: Any) -> bool:
    if not upstream.takes_cache(model):
        return False
    ids = torch.arange(7, device=model.device)[None] * 37 % model.get_input_embeddings().num_embeddings
    found = []
    for pieces in ([3], [1] * 3):
        cache = upstream.DynamicCache(config=model.config.get_text_config(decoder=True))
        _, *outputs = in_pieces(model, ids, [4, *pieces], cache=cache, told=("position_ids",))
        found.append(torch.cat([output.logits for output in outputs], 1).float())
    together, alone = found
    limit = TOLERANCE.get(model.dtype, LOW_PRECISION)
    return bool((together - alone).abs().max() <= limit * alone.abs().max())
