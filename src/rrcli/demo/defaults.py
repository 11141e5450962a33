"""The embedded default model: a small Llama that `rr` uses when no other model is named.

`model/` holds its weights and tokenizer, `text.jsonl` the stories it was trained on, and `pretrain` is the script that
made both. Loads neither torch nor transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

MODEL_DIR = Path(__file__).parent / "model"
TEXT_FILE = Path(__file__).parent / "text.jsonl"

# What pretraining teaches: one and two steps of each rule, which one layer can do in one pass.
PRETRAIN_TASKS = (
    "row_steps:min_steps=1,max_steps=1",
    "row_steps:min_steps=2,max_steps=2",
    "row_shift:min_steps=1,max_steps=2",
)

# Evaluation and fine-tuning: what the model knows, twice as many steps, and the control, new too, whose steps add up.
TASKS = (
    "row_steps:min_steps=1,max_steps=2",
    "row_steps:min_steps=3,max_steps=4",
    "row_add:min_steps=3,max_steps=4",
)

# Values in place of the defaults that `rr setup` writes into rr.toml for the embedded model.
SETTINGS: dict[str, dict[str, Any]] = {
    "surgery": {"max_steps": 1},
    "train": {
        "steps": 800,
        "batch_size": 32,
        "lr": 2e-3,
        "sidecar_lr": 2e-3,
        "max_length": 128,
        "packing": True,
        "task_share": 0.8,
        "supervised_share": 1.0,
        "eval_interval": 400,
        "eval_samples": 16,
    },
    "eval": {"problems": 250, "max_new_tokens": 24},
}


def claims(*, equal_flops: bool) -> tuple[str, ...]:
    """Return the primary claims of the embedded experiment.

    Args:
        equal_flops: whether it has the stage of vanilla training at equal FLOPs.
    """
    said = ["reasoning_accuracy: finetuned_recursive > finetuned_vanilla"]
    if equal_flops:
        said.append("reasoning_accuracy: finetuned_recursive > vanilla_equal_flops")
    return (*said, "perplexity: finetuned_recursive < finetuned_vanilla + 2 %")
