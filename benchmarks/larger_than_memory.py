"""What `rr eval` of a model takes that is several times larger than the memory it may use: time, memory, batches.

A llama of random weights is written, and its perplexity is measured on some texts twice: with all of it in memory, and
with `--max-memory cpu=...`, in a process each. Memory is what the process itself holds (RssAnon of /proc, every 20 ms),
less what it held before the model was read; pages of weight files, which the system may drop, do not count. Every layer
on disk is read once for each batch.

    python benchmarks/larger_than_memory.py --gib 1 --cap 256MiB --documents 8

Linux alone.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

GIB = 2**30


def write_model(folder: Path, gib: float) -> None:
    """Write a llama of so many GiB in fp32: layers of 64 MiB, and the tokenizer of the embedded model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from rrcli.demo.defaults import MODEL_DIR

    width = 1024
    of_layer = 4 * (4 * width * width + 3 * width * 4 * width)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=width, intermediate_size=4 * width, num_attention_heads=8,
        num_hidden_layers=max(2, round(gib * GIB / of_layer)), max_position_embeddings=1024,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="256MB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(MODEL_DIR) / name, folder)


def held() -> int:
    """Return the bytes that this process holds and no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon")


def measure(folder: Path, cap: str, documents: int, batch_tokens: int, answers: Any) -> None:
    """Evaluate in this process, and send what it took."""
    import transformers.models.llama.modeling_llama  # noqa: F401

    import rrcli.evaluation.evaluate  # noqa: F401
    from rrcli.reporting import Silent
    from rrcli.services.eval import evaluate
    from rrcli.settings import EvalSettings

    os.chdir(folder)
    settings = EvalSettings(
        model="model", device="cpu", max_samples=documents, max_memory=f"cpu={cap}" if cap else "",
        skip_reasoning=True, skip_generation=True, skip_performance=True, tensorboard=False,
        batch_tokens=batch_tokens, output_dir=f"results-{cap}",
    )  # fmt: skip
    before, began = held(), time.perf_counter()
    peak, over = [before], threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            peak.append(held())

    watcher = threading.Thread(target=watch)
    watcher.start()
    results = evaluate(settings, "baseline", folder, Silent()).results
    over.set()
    watcher.join()
    answers.put({
        "perplexity": results["metrics"]["perplexity"]["value"],
        "tokens": sum(record["tokens"] for record in results["records"]["documents"]),
        "seconds": time.perf_counter() - began,
        "peak_mib": (max(peak) - before) / 2**20,
        "batches": (folder / settings.output_dir / "baseline_samples.jsonl").read_text().count('"documents"'),
    })  # fmt: skip


def main() -> None:
    """Write the model, measure both ways, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--cap", default="256MiB")
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--only-capped", action="store_true")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".larger-") as name:
        folder = Path(name)
        writer = context.Process(target=write_model, args=(folder / "model", options.gib))
        writer.start()
        writer.join()
        size = sum(file.stat().st_size for file in (folder / "model").glob("*.safetensors")) / GIB
        print(f"model: {size:.2f} GiB, cap {options.cap}, batches of {options.batch_tokens} tokens")
        for cap in (options.cap,) if options.only_capped else ("", options.cap):
            answers = context.SimpleQueue()
            process = context.Process(
                target=measure, args=(folder, cap, options.documents, options.batch_tokens, answers)
            )
            process.start()
            print(json.dumps({"cap": cap or "none", **answers.get()}), flush=True)
            process.join()


if __name__ == "__main__":
    main()
