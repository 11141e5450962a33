"""Chunked decoding as a decoding method of `generate`: the tokens of all passes, at nearly the price of pass 0 alone.

`drafting` decodes one chunk after the other. Here is what belongs to `generate`: its arguments and what it returns, how
each token came about, and what stands in the way of chunks. A model or a cache that cannot be taken back is decoded
token by token, with every pass.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerateDecoderOnlyOutput

from rrcli import upstream
from rrcli.errors import RRError, UsageError
from rrcli.recursion.abilities import continues_in_blocks
from rrcli.recursion.caches import is_empty
from rrcli.recursion.chunk_metrics import ChunkTotals
from rrcli.recursion.drafting import Chunk, commit, draft_and_refine, first_token
from rrcli.recursion.exits import NEVER, ExitRule
from rrcli.recursion.lag import Lag, can_lag
from rrcli.recursion.products import through_onednn
from rrcli.recursion.rows import Chooser, Rows

log = logging.getLogger(__name__)


@dataclass
class Trace:
    """How one row's new tokens came about; one entry per token.

    Attributes:
        passes: the pass with which it left; 0 is pass 0.
        changed: whether that pass put another token in place of pass 0's.
    """

    passes: list[int] = field(default_factory=list)
    changed: list[bool] = field(default_factory=list)


class ChunkedDecoding:
    """A decoding method for `model.generate(..., custom_generate=ChunkedDecoding())`, for a model with a recursion.

    Decodes greedily or by sampling, takes batches with left padding, and works with every logits processor, stopping
    criterion and streamer of `generate`, at the recursion's current depth. A model or a cache that cannot be taken back
    is decoded token by token, with all passes and one notice in the log: the same tokens, more slowly. With an exit
    rule, whose tokens are others, that is an error.

    Attributes:
        totals: the chunk metrics of everything that was decoded with this object.
        traces: one `Trace` for each row of the last call.

    Args:
        width: tokens drafted at a time; the recursion's `chunk_width` if not given.
        exit: when a token stops being refined; the rule that was chosen for the model if not given, and every pass for
            every token if none was.
        streamer: is given the prompt, and tokens as they are committed. Give it here and not to `generate`, which does
            not hand it on to a custom decoding method.
    """

    def __init__(self, width: int | None = None, exit: ExitRule | None = None, *, streamer: Any = None) -> None:
        if width is not None and width < 1:
            raise UsageError(f"the chunk width is {width}", "It must be at least 1.")
        self.width, self.exit, self.streamer = width, exit, streamer
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
            UsageError: beam search, which chunks cannot do. RRError: an exit rule that cannot be decoded here.
        """
        if generation_config.num_beams > 1:
            raise UsageError("chunked decoding cannot search beams", "Leave num_beams or custom_generate out.")
        cache = upstream.cache_of(model_kwargs)
        if self.streamer is not None:
            self.streamer.put(input_ids.cpu())
        obstacle = _obstacle(model, cache, model_kwargs.get("attention_mask"))
        self.traces = [Trace() for _ in input_ids]
        rule = _rule(model, self.exit)
        if obstacle:
            _refuse_exit(rule, obstacle)
            _warn_once(model, f"decoding token by token: {obstacle}")
            output = upstream.sample_one_by_one(
                model, input_ids, logits_processor=logits_processor, stopping_criteria=stopping_criteria,
                generation_config=generation_config, synced_gpus=synced_gpus,
                streamer=None if self.streamer is None else _TracingStreamer(self, model), **model_kwargs,
            )  # fmt: skip
            self._trace_single_tokens(
                model, output if isinstance(output, Tensor) else output.sequences, input_ids, stopping_criteria
            )
            return output
        mask = model_kwargs.get("attention_mask")
        rows = Rows(model, input_ids, mask, cache=cache, criteria=stopping_criteria, streamer=self.streamer)
        chooser = Chooser(rows, logits_processor, sample=bool(generation_config.do_sample))
        recursion = model.recursion
        recursion.prepare(cache)
        if rule != NEVER and can_lag(recursion, cache):
            rows.lag = Lag(recursion, cache, 0 if is_empty(cache) else int(cache.get_seq_length()))
        else:
            if rule != NEVER:
                _refuse_exit(
                    rule, "" if recursion.can_exit else "layers follow the span, and only the last pass runs them"
                )
                _warn_once(model, "exits save nothing: this cache cannot be taken back, so every pass is run")
            first = first_token(rows, chooser, rule)
            self._trace_chunk(first)
            rows.commit(first.tokens.tolist())
        if cache.is_croppable:
            cache.activate_past_recording()
        width = self.width or recursion.config.chunk_width
        committed = width
        with through_onednn(model):
            while rows.active:
                # Where drafts are rejected early, long ones are useless: at most twice what the last chunk committed.
                room = rows.room(stopping_criteria.max_length, width)
                chunk = draft_and_refine(rows, chooser, min(width, 2 * committed, room), rule=rule)
                committed = int(chunk.commit_length.max())
                self.totals.add(chunk.totals())
                self._trace_chunk(chunk)  # before a streamer gets the tokens: it may look at the traces
                commit(rows, chunk)
        if self.streamer is not None:
            self.streamer.end()
        for trace, new in zip(self.traces, rows.new, strict=True):
            del trace.passes[len(new) :], trace.changed[len(new) :]
        sequences = rows.sequences(upstream.padding_token(generation_config))
        if generation_config.return_dict_in_generate:
            if rows.lag is not None:
                rows.lag.level()
            return GenerateDecoderOnlyOutput(**{"sequences": sequences, upstream.output_cache_field(): cache})
        return sequences

    def _trace_single_tokens(self, model: Any, sequences: Tensor, prompts: Tensor, criteria: Any) -> None:
        """Note traces for a batch that was decoded token by token: all passes for every token, and no draft."""
        depth = _depth(model)
        self.traces = [Trace() for _ in sequences]
        for trace, row in zip(self.traces, sequences, strict=True):
            for end in range(prompts.shape[1] + 1, len(row) + 1):
                trace.passes.append(depth)
                trace.changed.append(False)
                if bool(criteria(row[None, :end], None)[0]):
                    break

    def _trace_chunk(self, chunk: Chunk) -> None:
        """Note how each token of a chunk came about."""
        changed = chunk.draft.ne(chunk.tokens).tolist()
        lengths = chunk.commit_length.tolist()
        for row, differs, passes, length in zip(chunk.rows, changed, chunk.passes.tolist(), lengths, strict=True):
            self.traces[row].passes += passes[:length]
            self.traces[row].changed += differs[:length]


class _TracingStreamer:
    """A streamer that notes the trace of each token of a single row, and then hands it on."""

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


def _rule(model: Any, asked: ExitRule | None) -> ExitRule:
    """Return the rule to decode by; at depth 0 no rule has anything to decide."""
    recursion = getattr(model, "recursion", None)
    if recursion is None or recursion.depth == 0:
        return NEVER
    found: ExitRule = asked or recursion.exit or NEVER
    # Running to the full depth for every token is what the rule says then, and chunks do that in fewer forwards.
    return NEVER if found.kind == "depth" and found.threshold >= recursion.depth else found


def _refuse_exit(rule: ExitRule, obstacle: str) -> None:
    """Refuse to decode by an exit rule where only the tokens of every pass can be found.

    Raises:
        RRError: there is an obstacle, and a rule.
    """
    if rule != NEVER and obstacle:
        raise RRError(f"texts cannot be decoded with the exit {rule}: {obstacle}", "--exit none runs every pass.")


def _warn_once(model: Any, obstacle: str) -> None:
    """Log something about a model, once for each reason."""
    said = model.__dict__.setdefault("rr_obstacles", set())
    if obstacle not in said:
        said.add(obstacle)
        log.warning("%s", obstacle)


def _obstacle(model: Any, cache: Any, mask: Tensor | None) -> str:
    """Say why a model has to be decoded token by token; an empty text if it does not have to."""
    recursion = getattr(model, "recursion", None)
    if recursion is None or recursion.depth == 0:
        return "no pass follows pass 0"
    if cache is None:
        return "`generate` hands no cache over"
    if not upstream.can_be_taken_back(cache):
        return f"a cache of class {type(cache).__name__} cannot be taken back"
    if mask is not None and bool((mask.long().diff(dim=1) < 0).any()):
        return "the prompts are not padded on the left"
    if not continues_in_blocks(recursion):
        return f"'{model.config.model_type}' models cannot take several tokens at once after a cache"
    return ""
