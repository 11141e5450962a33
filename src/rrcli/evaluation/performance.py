"""Speed, cache and FLOPs of a model on real text, in each of the ways in which it can decode.

What is counted is what is timed: the same texts, decoded in the same way, with the tokens that are drafted and
rejected, the passes that refine, and those that are caught up later. Prefill is what `generate` does up to the first
new token, decoding what it does for the others. Nothing of it is used in a statistical test.

Here is what happens in one process; `interleaved` measures several models in turns, and their memory.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from rrcli.data.tokens import encode_prompt
from rrcli.errors import RRError
from rrcli.evaluation.decoding import GREEDY, room_for
from rrcli.evaluation.generation_settings import without_own_settings
from rrcli.models.costs import held_bytes
from rrcli.recursion.chunk_metrics import ChunkTotals
from rrcli.recursion.chunked_decoding import ChunkedDecoding
from rrcli.recursion.engine import at_depth
from rrcli.recursion.exits import NEVER
from rrcli.recursion.facts import context_length, refuse_unknown_tokens, vocabulary
from rrcli.recursion.families import input_device
from rrcli.recursion.flops import counted_flops
from rrcli.recursion.probing import in_pieces
from rrcli.recursion.readout import Readout
from rrcli.reporting import Reporter
from rrcli.upstream import cache_of, takes_cache

# How many texts are continued, the longest prompt, and how many tokens are written after each.
TEXTS, PROMPT_TOKENS, DECODE_TOKENS = 4, 128, 32
# How often everything is timed, after a warm-up.
ROUNDS = 3
# The metric of the FLOPs of prefill or decoding.
FLOPS = "{}_flops_per_token"
# What a way without chunks is called at the end of a metric's name.
SEQUENTIAL, PASS_0 = "/sequential", "/pass_0"


@dataclass(frozen=True)
class Way:
    """A way to decode.

    Attributes:
        depth: how many passes follow pass 0. in_chunks: whether they refine chunks, or are run for every token.
        exits: whether tokens leave by the model's exit rule, or are refined by every pass.
    """

    depth: int
    in_chunks: bool
    exits: bool = False


@dataclass(frozen=True)
class Times:
    """Seconds for each prompt token, and for each new token after the first."""

    prefill: float
    decode: float


@dataclass
class Counts:
    """What one way takes and does, which is the same in every round.

    Attributes:
        prefill, decode: FLOPs for each prompt token, and for each new token after the first; None if some of what ran
            cannot be counted.
        chunks: the metrics of the chunks that were decoded.
    """

    prefill: float | None
    decode: float | None
    chunks: dict[str, float] = field(default_factory=dict)


@dataclass
class Performance:
    """What was measured of one model.

    Attributes:
        method: the way that is measured. For comparison, every depth is measured without exits, and its own depth
            without chunks.
        rounds: the times of every way, once for each round. counts: of every way.
        memory_mb: the peak of a process that loads the model and decodes the texts, without what it held before. None
            where the process was not made for it.
        cache_bytes: what the caches of all passes grow by with each token; None if the family shows no cache.
        notices: what the numbers leave out.
    """

    method: Way
    rounds: list[dict[Way, Times]] = field(default_factory=list)
    counts: dict[Way, Counts] = field(default_factory=dict)
    memory_mb: float | None = None
    cache_bytes: float | None = None
    notices: list[str] = field(default_factory=list)

    def metrics(self) -> dict[str, dict[str, Any]]:
        """Return the metrics by name: times as medians with the range of the rounds.

        `prefill_tokens_per_sec`, `decode_tokens_per_sec`, `time_per_output_token` (ms), `prefill_flops_per_token` and
        `decode_flops_per_token` (MFLOP), the latter three also with `/sequential` (all passes for every token) and
        `/pass_0` (the stock model) where there is a recursion; `memory_mb`, `cache_bytes_per_token`; and the metrics of
        the decoded chunks as `decode/...`.
        """
        method = self.method
        ways = {"": method}
        if method.depth:
            ways |= {SEQUENTIAL: Way(method.depth, in_chunks=False), PASS_0: Way(0, in_chunks=False)}
        found = {
            "prefill_tokens_per_sec": _median([1 / times[method].prefill for times in self.rounds]),
            "decode_tokens_per_sec": _median([1 / times[method].decode for times in self.rounds]),
        }
        for end, way in ways.items():
            found[f"time_per_output_token{end}"] = _median([1000 * times[way].decode for times in self.rounds])
        if self.memory_mb is not None:
            found["memory_mb"] = {"value": self.memory_mb}
        if self.cache_bytes is not None:
            found["cache_bytes_per_token"] = {"value": self.cache_bytes}
        for end, way in ways.items():
            for name, flops in (("prefill", self.counts[way].prefill), ("decode", self.counts[way].decode)):
                if flops is not None:
                    found[FLOPS.format(name) + end] = {"value": flops / 1e6}
        return found | {f"decode/{name}": {"value": value} for name, value in self.counts[method].chunks.items()}

    def by_depth(self) -> dict[str, list[dict[str, Any]]]:
        """Return what every depth costs without exits, pass 0 first; nothing for a model without a recursion."""
        if not self.method.depth:
            return {}
        ways = _fixed(self.method.depth)
        found = {"time_per_output_token": [_median([1000 * t[way].decode for t in self.rounds]) for way in ways]}
        for name in ("prefill", "decode"):
            flops = [getattr(self.counts[way], name) for way in ways]
            if None not in flops:
                found[FLOPS.format(name)] = [{"value": value / 1e6} for value in flops]
        return found


class Workload:
    """A model and the texts that it continues, one row at a time.

    Args:
        depth: how many passes follow pass 0; a model without a recursion has pass 0 alone.

    Raises:
        RRError: the tokenizer makes no token of any document, or one that the model does not know.
    """

    def __init__(self, model: Any, tokenizer: Any, documents: Sequence[str], depth: int) -> None:
        self.model, self.depth = model, depth
        self.new_tokens = room_for(model, DECODE_TOKENS)
        self.prompts = _prompts(model, tokenizer, documents, self.new_tokens)
        exits = depth > 0 and (model.recursion.exit or NEVER) != NEVER
        self.method = Way(depth, in_chunks=depth > 0, exits=exits)
        ways = [self.method, *_fixed(depth), Way(depth, in_chunks=False)]
        self.ways = list(dict.fromkeys(ways))

    def warm_up(self) -> None:
        """Run the method that is measured, once on every text."""
        for ids in self.prompts:
            self._generate(ids, self.method, 1 + self.new_tokens)

    def round(self) -> dict[Way, Times]:
        """Time every way once on every text."""
        self._generate(self.prompts[0], self.method, 2)  # wake what slept while others had their turn
        return {way: self._time(way) for way in self.ways}

    def _time(self, way: Way) -> Times:
        short = long = 0.0
        for ids in self.prompts:
            short += self._seconds(ids, way, 1)
            long += self._seconds(ids, way, 1 + self.new_tokens)
        tokens = sum(ids.shape[1] for ids in self.prompts)
        return Times(short / tokens, max(long - short, 1e-9) / (self.new_tokens * len(self.prompts)))

    def _seconds(self, ids: torch.Tensor, way: Way, new_tokens: int) -> float:
        cuda = input_device(self.model).type == "cuda"
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        self._generate(ids, way, new_tokens)
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def count(self) -> tuple[dict[Way, Counts], list[str]]:
        """Return what every way takes and does, and sentences about what could not be counted."""
        found, notices = {}, list[str]()
        for way in self.ways:
            decoding = _decoding(way)
            self._generate(self.prompts[0], way, 2)  # what is found out about a model once is not counted
            with counted_flops() as short:
                for ids in self.prompts:
                    self._generate(ids, way, 1)
            with counted_flops() as long:
                texts = [self._generate(ids, way, 1 + self.new_tokens, decoding) for ids in self.prompts]
            tokens, new = sum(ids.shape[1] for ids in self.prompts), self.new_tokens * len(self.prompts)
            found[way] = Counts(short.total / tokens, (long.total - short.total) / new)
            if notice := long.notice():
                notices.append(notice)
                found[way].prefill = found[way].decode = None
            if decoding is not None and way == self.method:
                found[way].chunks = decoding.totals.metrics() | self._stability(texts)
        return found, list(dict.fromkeys(notices))

    def _stability(self, texts: Sequence[torch.Tensor]) -> dict[str, float]:
        """Compare what the passes predict for the tokens that were written."""
        readout, stable = Readout(self.model), ChunkTotals()
        for ids, text in zip(self.prompts, texts, strict=True):
            inputs, scored = text[:, :-1], torch.zeros_like(text[:, :-1], dtype=torch.bool)
            scored[:, ids.shape[1] - 1 :] = True
            targets, mask = text[:, 1:][scored], torch.ones_like(inputs)
            predictions = readout.score(inputs, mask, scored, targets=targets, depth=self.depth).predictions
            same = predictions[1:].eq(predictions[:-1]).sum(1).tolist()
            stable.add(ChunkTotals(chunks=1, positions=predictions.shape[1], stable=same))
        return {name: value for name, value in stable.metrics().items() if name.startswith("stability@")}

    def cache_growth(self) -> int | None:
        """Return how many bytes the caches of all passes grow by with a token; None if the family shows no cache."""
        return cache_growth(self.model, self.prompts[0], self.depth) if takes_cache(self.model) else None

    def _generate(
        self, ids: torch.Tensor, way: Way, new_tokens: int, decoding: ChunkedDecoding | None = None
    ) -> torch.Tensor:
        """Return `[1, position]` prompt and exactly so many new tokens."""
        decoding = decoding or _decoding(way)
        with at_depth(self.model, way.depth), without_own_settings(self.model):
            generated: torch.Tensor = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                eos_token_id=None,
                pad_token_id=0,
                custom_generate=decoding,
                **GREEDY,
            )
        return generated


def _fixed(depth: int) -> list[Way]:
    """Return the way of every depth without exits."""
    return [Way(passes, in_chunks=passes > 0) for passes in range(depth + 1)]


def _decoding(way: Way) -> ChunkedDecoding | None:
    """Return the decoding method of a way; None for that of `generate` itself."""
    return ChunkedDecoding(exit=None if way.exits else NEVER) if way.in_chunks else None


def measure_performance(
    model: Any, tokenizer: Any, documents: Sequence[str], *, depth: int, reporter: Reporter
) -> dict[str, dict[str, Any]]:
    """Measure a model that is in this process already; see `Performance.metrics`. Its memory is not measured.

    Args:
        depth: how many passes follow pass 0; a model without a recursion has pass 0 alone.
    """
    workload = Workload(model, tokenizer, documents, depth)
    found = Performance(workload.method)
    workload.warm_up()
    with reporter.progress("performance", ROUNDS, "rounds") as progress:
        for _ in range(ROUNDS):
            found.rounds.append(workload.round())
            progress.advance()
    found.counts, found.notices = workload.count()
    found.cache_bytes = workload.cache_growth()
    for notice in found.notices:
        reporter.warn(notice)
    return found.metrics()


def cache_growth(model: Any, ids: torch.Tensor, depth: int) -> int:
    """Return how many bytes the caches of all passes grow by when one more token follows `[1, position]` ids.

    Raises:
        RRError: the model returns no cache.
    """
    held = []
    ids = torch.cat([ids, ids[:, -1:]], 1)  # so that there are two
    with at_depth(model, depth):
        for output in in_pieces(model, ids, [ids.shape[1] - 1, 1]):
            cache = cache_of(output)
            if cache is None:
                kind = model.config.model_type
                raise RRError(f"this '{kind}' model returns no cache, so decoding cannot be measured")
            held.append(held_bytes(cache, set()))
    return held[1] - held[0]


def _prompts(model: Any, tokenizer: Any, documents: Sequence[str], new_tokens: int) -> list[torch.Tensor]:
    """Return `[1, position]` ids: each begins with a document, and goes on with others until it is long enough."""
    room = min(PROMPT_TOKENS, max(1, context_length(model) - new_tokens))
    rows: list[list[int]] = []
    for text in documents:
        tokens = encode_prompt(tokenizer, text)
        refuse_unknown_tokens(vocabulary(model), tokenizer, tokens, f"the document {text[:40]!r}")
        if not tokens:
            continue
        if rows and len(rows[-1]) < room:
            rows[-1] += tokens
        elif len(rows) < TEXTS:
            rows.append(tokens)
        else:
            break
    if not rows:
        raise RRError("the tokenizer makes no token of any document", "Does it belong to this model and this text?")
    return [torch.tensor([row[:room]], device=input_device(model)) for row in rows]


def _median(values: list[float]) -> dict[str, Any]:
    return {"value": statistics.median(values), "low": min(values), "high": max(values), "n": len(values)}
