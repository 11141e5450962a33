"""Speed, memory and FLOPs of a model on real text. They are shown with the metrics; no statistical test uses them."""

from __future__ import annotations

import contextlib
import re
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rrcli.allocator import return_freed_memory
from rrcli.data.tokens import encode_prompt
from rrcli.errors import RRError
from rrcli.evaluation.decoding import GREEDY, room_for
from rrcli.evaluation.generation_settings import without_own_settings
from rrcli.models.costs import held_bytes
from rrcli.recursion.chunk_metrics import ChunkTotals
from rrcli.recursion.chunked_decoding import ChunkedDecoding
from rrcli.recursion.engine import at_depth
from rrcli.recursion.facts import context_length, refuse_unknown_tokens, vocabulary
from rrcli.recursion.flops import counted_flops
from rrcli.recursion.probing import in_pieces
from rrcli.recursion.readout import Readout
from rrcli.reporting import Reporter
from rrcli.upstream import cache_of, takes_cache

PREFILL_TOKENS = 128
DECODE_TOKENS = 32
REPEATS = 5
# How many texts the chunk metrics of decoding are measured on, and how many tokens of each are the prompt.
SAMPLES, SAMPLE_TOKENS = 4, 64
# How a recursion decodes where it does not decode in chunks: the ends of the metrics' names.
SEQUENTIAL, PASS_0 = "/sequential", "/pass_0"


def measure_performance(
    model: Any, tokenizer: Any, documents: Sequence[str], *, depth: int, reporter: Reporter
) -> dict[str, dict[str, Any]]:
    """Time prefill and decoding of real text, one row, after a warm-up; count memory and FLOPs.

    A recursion decodes in chunks. In the same rounds it also decodes token by token, for comparison: with all passes,
    and with pass 0 alone, which is the stock model.

    Args:
        depth: how many passes follow pass 0; a model without a recursion has pass 0 alone.

    Returns:
        Medians with the range of `REPEATS` runs: `prefill_tokens_per_sec`, `decode_tokens_per_sec`,
        `time_per_output_token` (ms; with a recursion also `.../sequential` and `.../pass_0`), `memory_mb` (peak: CUDA's
        counter on a GPU, the process's resident set on a CPU), `cache_bytes_per_token` (what the caches of all passes
        grow by), `flops_per_token` (MFLOP, counted by torch over the prefill); and with a recursion `decode/<metric>`,
        the chunk metrics of `SAMPLES` texts as they are decoded.
    """
    decoded = room_for(model, DECODE_TOKENS)
    texts = _prompts(model, tokenizer, documents, decoded)
    ids = texts[0]
    cuda = model.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        reset_peak_resident()

    def run(way: str, new_tokens: int) -> float:
        decoding = ChunkedDecoding() if depth and not way else None
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        _generate(model, ids, new_tokens, decoding=decoding, depth=0 if way == PASS_0 else depth)
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    prefill: list[float] = []
    decode: dict[str, list[float]] = {way: [] for way in (("", SEQUENTIAL, PASS_0) if depth else ("",))}
    with reporter.progress("performance", REPEATS + 1, "runs") as progress:
        for repeat in range(REPEATS + 1):
            for way, found in decode.items():
                short, long = run(way, 1), run(way, 1 + decoded)
                if repeat:
                    found.append(max(long - short, 1e-9) / decoded)
                    prefill += [] if way else [short]
            progress.advance()
    memory = torch.cuda.max_memory_allocated() / 2**20 if cuda else peak_resident_mb()
    with at_depth(model, depth), counted_flops() as counter:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    times = {f"time_per_output_token{way}": _median([1000 * s for s in found]) for way, found in decode.items()}
    return {
        "prefill_tokens_per_sec": _median([ids.shape[1] / seconds for seconds in prefill]),
        "decode_tokens_per_sec": _median([1 / seconds for seconds in decode[""]]),
        **times,
        "memory_mb": {"value": memory},
        **({"cache_bytes_per_token": {"value": cache_growth(model, ids, depth)}} if takes_cache(model) else {}),
        "flops_per_token": {"value": counter.checked() / ids.shape[1] / 1e6},
        **(
            {f"decode/{k}": {"value": v} for k, v in _chunk_metrics(model, texts, depth, new_tokens=decoded).items()}
            if depth
            else {}
        ),
    }


def _prompts(model: Any, tokenizer: Any, documents: Sequence[str], new_tokens: int) -> list[torch.Tensor]:
    """Return `[1, position]` ids: first one long text, then the beginnings of some documents.

    Raises:
        RRError: the tokenizer makes no token of any document, or one that the model does not know.
    """
    room = max(1, context_length(model) - new_tokens)
    long: list[int] = []
    short = []
    for text in documents:
        tokens = encode_prompt(tokenizer, text)
        refuse_unknown_tokens(vocabulary(model), tokenizer, tokens, f"the document {text[:40]!r}")
        long += tokens
        if tokens:
            short.append(tokens[: min(SAMPLE_TOKENS, room)])
        if len(long) >= PREFILL_TOKENS and len(short) >= SAMPLES:
            break
    if not long:
        raise RRError("the tokenizer makes no token of any document", "Does it belong to this model and this text?")
    return [torch.tensor([row], device=model.device) for row in (long[: min(PREFILL_TOKENS, room)], *short[:SAMPLES])]


def _generate(model: Any, ids: torch.Tensor, new_tokens: int, *, decoding: Any, depth: int) -> torch.Tensor:
    """Return `[1, position]` prompt and exactly so many new tokens."""
    with at_depth(model, depth), without_own_settings(model):
        generated: torch.Tensor = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            eos_token_id=None,
            pad_token_id=0,
            custom_generate=decoding,
            **GREEDY,
        )
    return generated


def _chunk_metrics(model: Any, texts: Sequence[torch.Tensor], depth: int, *, new_tokens: int) -> dict[str, float]:
    """Decode texts in chunks, and compare what the passes predict for the text that was written."""
    decoding, readout = ChunkedDecoding(), Readout(model)
    stable = ChunkTotals()
    for ids in texts:
        text = _generate(model, ids, new_tokens, decoding=decoding, depth=depth)
        inputs, scored = text[:, :-1], torch.zeros_like(text[:, :-1], dtype=torch.bool)
        scored[:, ids.shape[1] - 1 :] = True
        targets = text[:, 1:][scored]
        predictions = readout.score(inputs, torch.ones_like(inputs), scored, targets=targets, depth=depth).predictions
        same = predictions[1:].eq(predictions[:-1]).sum(1).tolist()
        stable.add(ChunkTotals(chunks=1, positions=predictions.shape[1], stable=same))
    # Both are means over the same tokens, one over chunks and one over positions.
    stability = {name: value for name, value in stable.metrics().items() if name.startswith("stability@")}
    return decoding.totals.metrics() | stability


def cache_growth(model: Any, ids: torch.Tensor, depth: int) -> int:
    """Return how many bytes the caches of all passes grow by when the last of `[1, position]` ids is read.

    Raises:
        RRError: the model returns no cache.
    """
    held = []
    with at_depth(model, depth):
        for output in in_pieces(model, ids, [ids.shape[1] - 1, 1]):
            cache = cache_of(output)
            if cache is None:
                kind = model.config.model_type
                raise RRError(f"this '{kind}' model returns no cache, so decoding cannot be measured")
            held.append(held_bytes(cache, set()))
    return held[1] - held[0]


def reset_peak_resident() -> None:
    """Reset the peak, so that a stage is not charged for what ran before it in this process (Linux only)."""
    return_freed_memory()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_resident_mb() -> float:
    """Return the peak resident set size in MB: since the last reset on Linux, of the whole process elsewhere."""
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text()
        return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def _median(values: list[float]) -> dict[str, Any]:
    return {"value": statistics.median(values), "low": min(values), "high": max(values), "n": len(values)}
