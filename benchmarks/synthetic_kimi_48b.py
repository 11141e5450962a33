"""Claim: `rr surgery --no-verify` takes seconds and megabytes on a checkpoint of 92 GiB, as on a small one.

    python benchmarks/synthetic_kimi_48b.py [--folder DIR] [--layers 27 4] [--repeats 3] [--check]

Writes checkpoints of the shape of Kimi-Linear-48B-A3B (published sizes; 27 layers, 49 billion parameters): names,
shapes, index and safetensors headers are as stock `from_pretrained` expects them, the weights are holes in sparse
files, so that 92 GiB take a few megabytes of disk. Surgery runs on each in processes of its own; wall time, CPU
time and peak memory are printed. `--check` lets stock `from_pretrained` read every checkpoint onto the meta device
first and fails if it misses or does not expect a tensor (a minute for the large one: it reads all the holes).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHARDS = 20
# Layers that attend fully, counted from 1 as the published configuration does; the others are linear (KDA).
FULL_ATTENTION = (4, 8, 12, 16, 20, 24, 27)
CONFIG: dict[str, Any] = {
    "architectures": ["KimiLinearForCausalLM"],
    "model_type": "kimi_linear",
    "dtype": "bfloat16",
    "vocab_size": 163840,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "moe_intermediate_size": 1024,
    "num_hidden_layers": 27,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "first_k_dense_replace": 1,
    "num_experts": 256,
    "num_experts_per_token": 8,
    "num_shared_experts": 1,
    "num_expert_group": 1,
    "topk_group": 1,
    "moe_renormalize": True,
    "routed_scaling_factor": 2.446,
    "hidden_act": "silu",
    "model_max_length": 1048576,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "bos_token_id": 163584,
    "eos_token_id": 163586,
    "pad_token_id": 163839,
}

# What has numbers for `kimi_from_disk.py`. As attention and experts add nothing, what the model says can be computed
# without its layers; and yet tokens are spread over all experts.
VALUED = re.compile(r"norm\.weight$|embed_tokens|lm_head|moe\.gate\.weight$")

Shapes = dict[str, tuple[int, ...]]


def configuration(layers: int, **changes: Any) -> dict[str, Any]:
    """Return the configuration with that many layers; `changes` shrink it for tests."""
    full = [layer for layer in FULL_ATTENTION if layer <= layers]
    linear = {
        "full_attn_layers": full,
        "kda_layers": [layer for layer in range(1, layers + 1) if layer not in full],
        "head_dim": changes.pop("linear_head_dim", 128),
        "num_heads": changes.pop("linear_num_heads", 32),
        "short_conv_kernel_size": 4,
    }
    return CONFIG | changes | {"num_hidden_layers": layers, "linear_attn_config": linear}


def tensors(config: dict[str, Any]) -> Shapes:
    """Return the tensors of such a checkpoint as they lie on disk: experts one by one, convolutions apart."""
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    found: Shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for index in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{index}."
        found |= {f"{prefix}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
        linear = index + 1 in config["linear_attn_config"]["kda_layers"]
        attention = _linear_attention(config) if linear else _latent_attention(config)
        found |= {f"{prefix}self_attn.{name}": shape for name, shape in attention.items()}
        if index < config["first_k_dense_replace"]:
            found |= _mlp(f"{prefix}mlp.", ("gate_proj", "up_proj", "down_proj"), hidden, config["intermediate_size"])
            continue
        moe, inner, experts = f"{prefix}block_sparse_moe.", config["moe_intermediate_size"], config["num_experts"]
        found |= {f"{moe}gate.weight": (experts, hidden), f"{moe}gate.e_score_correction_bias": (experts,)}
        found |= _mlp(f"{moe}shared_experts.", ("gate_proj", "up_proj", "down_proj"), hidden, inner)
        for expert in range(experts):
            found |= _mlp(f"{moe}experts.{expert}.", ("w1", "w3", "w2"), hidden, inner)
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def _linear_attention(config: dict[str, Any]) -> Shapes:
    hidden, shape = config["hidden_size"], config["linear_attn_config"]
    head, heads = shape["head_dim"], shape["num_heads"]
    width = head * heads
    found: Shapes = {f"{name}_proj.weight": (width, hidden) for name in "qkv"}
    found |= {f"{name}_conv1d.weight": (width, 1, shape["short_conv_kernel_size"]) for name in "qkv"}
    found |= {f"{name}_a_proj.weight": (head, hidden) for name in "fg"}
    found |= {f"{name}_b_proj.weight": (width, head) for name in "fg"}
    found |= {"A_log": (1, 1, heads, 1), "dt_bias": (width,), "b_proj.weight": (heads, hidden)}
    return found | {"o_norm.weight": (head,), "o_proj.weight": (hidden, width)}


def _latent_attention(config: dict[str, Any]) -> Shapes:
    hidden, heads, rank = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    plain, rotary, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    return {
        "q_proj.weight": (heads * (plain + rotary), hidden),
        "kv_a_proj_with_mqa.weight": (rank + rotary, hidden),
        "kv_a_layernorm.weight": (rank,),
        "kv_b_proj.weight": (heads * (plain + value), rank),
        "o_proj.weight": (hidden, heads * value),
    }


def _mlp(prefix: str, names: tuple[str, str, str], hidden: int, inner: int) -> Shapes:
    gate, up, down = (f"{prefix}{name}.weight" for name in names)
    return {gate: (inner, hidden), up: (inner, hidden), down: (hidden, inner)}


def write_checkpoint(folder: Path, config: dict[str, Any], shards: int = SHARDS, *, values: bool = False) -> int:
    """Write the folder with weights that are holes, and a tiny tokenizer; return the bytes of its tensors.

    Args:
        values: give numbers to embedding, head, norms and routers.
    """
    from rrcli.demo import defaults

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((defaults.MODEL_DIR / name).read_bytes())
    shapes = tensors(config)
    sizes = {name: 2 * math.prod(shape) for name, shape in shapes.items()}
    total, before = sum(sizes.values()), 0
    groups: list[dict[str, int]] = [{} for _ in range(shards)]
    for name, size in sizes.items():
        groups[min(before * shards // total, shards - 1)][name] = size
        before += size
    groups = [group for group in groups if group]
    weight_map = {}
    for number, group in enumerate(groups, start=1):
        file = folder / f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        weight_map |= dict.fromkeys(group, file.name)
        header, offset = {}, 0
        for name, size in group.items():
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [offset, offset + size]}
            offset += size
        text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
        text += b" " * (-len(text) % 8)
        with file.open("wb") as sparse:
            sparse.write(struct.pack("<Q", len(text)) + text)
            sparse.truncate(8 + len(text) + offset)
            for name in filter(VALUED.search, group if values else ()):
                sparse.seek(8 + len(text) + header[name]["data_offsets"][0])
                sparse.write(some_numbers(name, shapes[name]))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def some_numbers(name: str, shape: tuple[int, ...]) -> bytes:
    """Return ones for a norm, else small random numbers that its name decides, in bfloat16."""
    import torch

    if len(shape) == 1:
        found = torch.ones(shape, dtype=torch.bfloat16)
    else:
        found = torch.empty(shape, dtype=torch.bfloat16)
        found.normal_(0, 0.02, generator=torch.Generator().manual_seed(len(name)))
    return found.view(torch.int16).numpy().tobytes()


def check(folder: Path) -> None:
    """Let stock transformers load the checkpoint without keeping any data, and compare its tensors with the model's."""
    from transformers import AutoModelForCausalLM

    _, found = AutoModelForCausalLM.from_pretrained(folder, device_map="meta", output_loading_info=True)
    wrong = {key: sorted(names)[:3] for key, names in found.items() if names}
    if wrong:
        raise SystemExit(f"{folder} is not what transformers expects: {wrong}")


def operate(folder: Path, workspace: Path) -> tuple[float, float, float]:
    """Run surgery in its own process; return wall seconds, CPU seconds and peak resident megabytes."""
    command = [sys.executable, "-m", "rrcli", "surgery", "--no-verify", "--overwrite", "--model", str(folder)]
    began = time.monotonic()
    process = subprocess.Popen([*command, "--dir", str(workspace)], stdout=subprocess.DEVNULL)
    # The kernel's ru_maxrss of a child begins at what its parent held when it was started; VmHWM begins anew.
    peak, ended = 0.0, 0
    while not ended:
        with contextlib.suppress(OSError, IndexError):
            peak = int(re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())[0]) / 2**10
        ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        time.sleep(0.01)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} exited with {process.returncode}")
    peak = peak or usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return time.monotonic() - began, usage.ru_utime + usage.ru_stime, peak


def main() -> None:
    """Write the checkpoints, run surgery on each, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder if not given")
    parser.add_argument("--layers", type=int, nargs="+", default=[27, 4], help="layers of each checkpoint")
    parser.add_argument("--repeats", type=int, default=3, help="runs on each; the fastest and the largest are shown")
    parser.add_argument("--check", action="store_true", help="let stock transformers read the checkpoints, too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = options.folder or Path(temporary)
        print("layers   weights, GiB   on disk, MiB   wall, s   CPU, s   peak memory, MiB   sidecar, MiB")
        for layers in options.layers:
            folder, workspace = root / f"kimi-{layers}", root / f"work-{layers}"
            size = write_checkpoint(folder, configuration(layers)) / 2**30
            used = sum(512 * file.stat().st_blocks for file in folder.iterdir()) / 2**20
            if options.check:
                check(folder)
            workspace.mkdir()
            runs = [operate(folder, workspace) for _ in range(options.repeats)]
            wall, cpu = (min(run[index] for run in runs) for index in (0, 1))
            sidecar = workspace / "checkpoints" / "after_surgery" / "recursion.safetensors"
            print(
                f"{layers:6}   {size:12.1f}   {used:12.1f}   {wall:7.1f}   {cpu:6.1f}   "
                f"{max(run[2] for run in runs):16.0f}   {sidecar.stat().st_size / 2**20:12.1f}"
            )


if __name__ == "__main__":
    main()
