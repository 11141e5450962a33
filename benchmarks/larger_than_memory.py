"""Claim: `rr eval` measures a model several times larger than the memory it may use, rightly, and reads layers rarely.

    python benchmarks/larger_than_memory.py [--gib 12] [--cap 3GiB] [--width 2048] [--documents 8] [--folder DIR]

Writes a llama of random weights, layer by layer, and evaluates it in two ways, in a process each:

    reference   plain torch, written out below: layer after layer is read from its file, and all texts go through it one
                by one. Nothing of transformers, of accelerate or of `rr` computes here
    capped      `rr eval --stage baseline --max-memory cpu=CAP --batch-tokens ...`

Both must give the same perplexity (to a millionth), and the second may hold at most the cap and one layer; else the
script fails. Memory is what the process itself holds (RssAnon of /proc, every 20 ms), less what it held before. Pages
of weight files, which the system drops when it needs room, do not count. `times_read` says how often the weights on
disk were brought to run (once to check the head, once for each batch); `disk_gib`, what really came from the disk.
Before each way the system is asked to forget the files.

Linux alone.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

GIB = 2**30
HEAD, EPSILON, BASE = 64, 1e-6, 10_000.0


def configuration(gib: float, width: int) -> Any:
    """Return a llama of so many GiB in fp32, with the proportions of Llama-3.2-1B."""
    from transformers import LlamaConfig

    heads = width // HEAD
    of_layer = 4 * (2.5 * width * width + 3 * width * 4 * width)
    return LlamaConfig(
        vocab_size=1024, hidden_size=width, intermediate_size=4 * width, num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4), head_dim=HEAD, num_hidden_layers=max(2, round(gib * GIB / of_layer)),
        max_position_embeddings=1024, rms_norm_eps=EPSILON, tie_word_embeddings=False, dtype="float32",
        rope_parameters={"rope_type": "default", "rope_theta": BASE},
    )  # fmt: skip


def write_model(folder: Path, gib: float, width: int) -> None:
    """Write the model, a file for each layer, and the tokenizer of the embedded model."""
    import torch
    from safetensors.torch import save_file

    from rrcli.demo.defaults import MODEL_DIR

    config = configuration(gib, width)
    config.architectures = ["LlamaForCausalLM"]
    inner, keys = config.intermediate_size, config.num_key_value_heads * HEAD
    shapes = {
        "self_attn.q_proj": (width, width), "self_attn.k_proj": (keys, width), "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, width), "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }  # fmt: skip
    torch.manual_seed(0)
    folder.mkdir()
    files: dict[str, str] = {}
    for index in (*range(config.num_hidden_layers), "ends"):
        if index == "ends":
            tensors = {
                name: torch.randn(1024, width) * 0.02 for name in ("model.embed_tokens.weight", "lm_head.weight")
            }
            tensors["model.norm.weight"] = torch.ones(width)
        else:
            before = f"model.layers.{index}."
            tensors = {f"{before}{name}.weight": torch.randn(shape) * 0.02 for name, shape in shapes.items()}
            norms = ("input_layernorm", "post_attention_layernorm")
            tensors |= {f"{before}{name}.weight": 1 + 0.1 * torch.randn(width) for name in norms}
        name = f"model-{index}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        files |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(MODEL_DIR) / name, folder)


def held() -> int:
    """Return the bytes that this process holds and no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon")


def from_disk() -> int:
    """Return the bytes that the disk has delivered to this process."""
    return int(Path("/proc/self/io").read_text().split("\nread_bytes: ")[1].split()[0])


def forget(folder: Path) -> None:
    """Ask the system to drop the pages of the weight files, so that they are read from the disk again."""
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def watched(found: dict[str, float]) -> Iterator[None]:
    """Note time, peak memory and what came from the disk while it is entered."""
    before, read, began = held(), from_disk(), time.perf_counter()
    peak, over = [before], threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            peak.append(held())

    watcher = threading.Thread(target=watch)
    watcher.start()
    computed = time.process_time()
    yield
    over.set()
    watcher.join()
    found["seconds"] = round(time.perf_counter() - began, 1)
    found["cpu_seconds"] = round(time.process_time() - computed, 1)
    found["peak_mib"] = round((max(peak) - before) / 2**20)
    found["disk_gib"] = round((from_disk() - read) / GIB, 2)


def reference(folder: Path, documents: int) -> dict[str, float]:
    """Return the perplexity by plain torch."""
    import torch
    from safetensors.torch import load_file
    from torch.nn import functional as F
    from transformers import AutoConfig, AutoTokenizer

    from rrcli.data.tokens import scored_after, text_ids
    from rrcli.evaluation.held_out import held_out_data
    from rrcli.settings import EvalSettings

    tokenizer, config = AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder)
    data = held_out_data(EvalSettings(), folder, 1, documents, reasoning=False)
    pairs = [scored_after(tokenizer, text_ids(tokenizer, text)) for text in data.texts(tokenizer, EvalSettings())]
    found: dict[str, float] = {}

    def norm(x_PH: Any, weight: Any) -> Any:
        return x_PH * torch.rsqrt(x_PH.pow(2).mean(-1, keepdim=True) + EPSILON) * weight

    def turned(x_NPD: Any) -> Any:
        """Rotary embedding: pairs of features that are half a head apart are turned by an angle for each position."""
        speeds = BASE ** (-torch.arange(0, HEAD, 2).float() / HEAD)
        angles = torch.arange(x_NPD.shape[1])[:, None].float() * speeds
        cos, sin = angles.cos(), angles.sin()
        low, high = x_NPD.chunk(2, -1)
        return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)

    def layer(x_PH: Any, w: Callable[[str], Any]) -> Any:
        normed = norm(x_PH, w("input_layernorm"))
        q, k, v = ((normed @ w(f"self_attn.{n}_proj").T).unflatten(-1, (-1, HEAD)).transpose(0, 1) for n in "qkv")
        k, v = (part.repeat_interleave(q.shape[0] // k.shape[0], 0) for part in (k, v))
        scores = turned(q) @ turned(k).transpose(1, 2) / HEAD**0.5
        future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        mixed = (scores.masked_fill(future, -math.inf).softmax(-1) @ v).transpose(0, 1).flatten(1)
        x_PH = x_PH + mixed @ w("self_attn.o_proj").T
        normed = norm(x_PH, w("post_attention_layernorm"))
        return x_PH + (F.silu(normed @ w("mlp.gate_proj").T) * (normed @ w("mlp.up_proj").T)) @ w("mlp.down_proj").T

    with watched(found), torch.no_grad():
        ends = load_file(folder / "model-ends.safetensors")
        states = [ends["model.embed_tokens.weight"][[*start, *ids][:-1]] for start, ids in pairs]
        for index in range(config.num_hidden_layers):
            tensors = load_file(folder / f"model-{index}.safetensors")
            states = [layer(x, lambda n, t=tensors, i=index: t[f"model.layers.{i}.{n}.weight"]) for x in states]
        nats = 0.0
        for x_PH, (_, ids) in zip(states, pairs, strict=True):
            logits = norm(x_PH, ends["model.norm.weight"]) @ ends["lm_head.weight"].T
            nats += float(F.cross_entropy(logits.double(), torch.tensor(ids), reduction="sum"))
    tokens = sum(len(ids) for _, ids in pairs)
    return {"perplexity": math.exp(nats / tokens), "tokens": tokens, **found}


def capped(folder: Path, cap: str, documents: int, batch_tokens: int) -> dict[str, float]:
    """Return what `rr eval` measures with a cap, and what it takes."""
    import transformers.models.llama.modeling_llama  # noqa: F401

    import rrcli.evaluation.evaluate  # noqa: F401
    from rrcli import upstream
    from rrcli.reporting import Silent
    from rrcli.services.eval import evaluate
    from rrcli.settings import EvalSettings

    brought: dict[int, int] = {}
    sizes: dict[int, int] = {}
    firsts: list[float] = []
    real = upstream._part

    def counted(part: Any, dtype: Any) -> Any:
        tensor = real(part, dtype)
        firsts.append(time.perf_counter())
        sizes[id(part)] = tensor.nbytes
        brought[id(part)] = brought.get(id(part), 0) + tensor.nbytes
        return tensor

    upstream._part = counted
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".larger-") as name:
        settings = EvalSettings(
            model=str(folder.resolve()), device="cpu", max_samples=documents, max_memory=f"cpu={cap}",
            skip_reasoning=True, skip_generation=True, skip_performance=True, tensorboard=False,
            batch_tokens=batch_tokens,
        )  # fmt: skip
        os.chdir(name)
        found: dict[str, float] = {}
        began = time.perf_counter()
        with watched(found):
            results = evaluate(settings, "baseline", Path(name), Silent()).results
        log = Path(name, settings.output_dir, "baseline_samples.jsonl").read_text()
        os.chdir(folder)
    return {
        "perplexity": results["metrics"]["perplexity"]["value"],
        "tokens": sum(record["tokens"] for record in results["records"]["documents"]),
        **found,
        "loading_seconds": round(firsts[0] - began, 1),
        "batches": log.count('"documents"'),
        "offloaded_gib": round(sum(sizes.values()) / GIB, 2),
        "times_read": round(sum(brought.values()) / sum(sizes.values()), 2),
    }


def _answer(measure: Callable[..., dict[str, float]], answers: Any, *given: Any) -> None:
    answers.put(measure(*given))


def main() -> None:
    """Write the model, measure both ways, print what was found, and fail if the claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=12.0, help="size of the model in fp32")
    parser.add_argument("--cap", default="3GiB", help="memory that weights may take")
    parser.add_argument("--width", type=int, default=2048, help="width of its hidden states")
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--folder", type=Path, help="keep the model here, and take what is there")
    parser.add_argument(
        "--right", type=float, help="the perplexity that an earlier reference gave; then none is computed"
    )
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")

    def measured(measure: Callable[..., dict[str, float]], *given: Any) -> dict[str, float]:
        forget(folder)
        answers = context.SimpleQueue()
        process = context.Process(target=_answer, args=(measure, answers, folder, *given))
        process.start()
        found: dict[str, float] = answers.get()
        process.join()
        print(json.dumps({"way": measure.__name__, **found}), flush=True)
        return found

    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".larger-") as name:
        folder = (options.folder or Path(name) / "model").resolve()
        if not (folder / "config.json").is_file():
            writer = context.Process(target=write_model, args=(folder, options.gib, options.width))
            writer.start()
            writer.join()
        files = [file.stat().st_size for file in folder.glob("model-*.safetensors")]
        about = f"{sum(files) / GIB:.2f} GiB, layers of {max(files) / 2**20:.0f} MiB, cap {options.cap}"
        print(f"model: {about}, batches of {options.batch_tokens} tokens", flush=True)
        right = options.right or measured(reference, options.documents)["perplexity"]
        found = measured(capped, options.cap, options.documents, options.batch_tokens)
        from rrcli.models.placement import read_placement
        from rrcli.settings import EvalSettings

        cap = read_placement(EvalSettings(max_memory=f"cpu={options.cap}"), folder).max_memory["cpu"]
        if abs(found["perplexity"] / right - 1) > 1e-6:
            raise SystemExit(f"perplexity {found['perplexity']}, not {right}")
        if found["peak_mib"] * 2**20 > cap + max(files):
            raise SystemExit(f"{found['peak_mib']} MiB were held at most, more than the cap and a layer")


if __name__ == "__main__":
    main()
