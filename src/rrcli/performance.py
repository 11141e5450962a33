"""Speed, memory and FLOPs of a model on real text. Shown beside the metrics, never tested."""

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

from rrcli.batching import context_length
from rrcli.costs import countable
from rrcli.heap import return_freed_memory
from rrcli.reporting import Reporter

PREFILL_TOKENS = 128
DECODE_TOKENS = 32
REPEATS = 5


def measure_performance(
    model: Any, tokenizer: Any, documents: Sequence[str], reporter: Reporter
) -> dict[str, dict[str, Any]]:
    """Time prefill and decoding of real text, one row, after a warm-up; count memory and FLOPs.

    Returns:
        Medians with the range of `REPEATS` runs: `prefill_tokens_per_sec`, `decode_tokens_per_sec`,
        `time_per_output_token` (ms), `memory_mb` (peak: CUDA's counter on a GPU, the process's resident set on a CPU),
        `flops_per_token` (MFLOP, counted by torch over the prefill).
    """
    from torch.utils.flop_counter import FlopCounterMode

    tokens: list[int] = []
    for text in documents:
        tokens += tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(tokens) >= PREFILL_TOKENS:
            break
    room = context_length(model) - DECODE_TOKENS
    ids = torch.tensor([tokens[: min(PREFILL_TOKENS, room)]], device=model.device)
    mask = torch.ones_like(ids)
    cuda = model.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        reset_peak_resident()

    def run(new_tokens: int) -> float:
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=0,
        )
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    prefill, decode = [], []
    with reporter.progress("performance", REPEATS + 1, "runs") as progress:
        for repeat in range(REPEATS + 1):
            short, long = run(1), run(1 + DECODE_TOKENS)
            if repeat:
                prefill.append(short)
                decode.append(max(long - short, 1e-9) / DECODE_TOKENS)
            progress.advance()
    with countable(model), FlopCounterMode(display=False) as counter:
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    memory = torch.cuda.max_memory_allocated() / 2**20 if cuda else peak_resident_mb()
    return {
        "prefill_tokens_per_sec": _median([ids.shape[1] / seconds for seconds in prefill]),
        "decode_tokens_per_sec": _median([1 / seconds for seconds in decode]),
        "time_per_output_token": _median([1000 * seconds for seconds in decode]),
        "memory_mb": {"value": memory},
        "flops_per_token": {"value": counter.get_total_flops() / ids.shape[1] / 1e6},
    }


def reset_peak_resident() -> None:
    """Forget the peak so far, so that a stage is not charged for what ran before it in this process (Linux only)."""
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
