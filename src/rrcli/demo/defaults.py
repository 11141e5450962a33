"""The embedded default model: a small Llama that `rr` uses when no other model is named.

`model/` holds its weights and tokenizer, `text.jsonl` the stories it was trained on, and `pretrain` is the script that
made both. Loads neither torch nor transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

MODEL_DIR = Path(__file__).parent / "model"
TEXT_FILE = Path(__file__).parent / "text.jsonl"

# Pretraining used easy problems of each task: few steps.
PRETRAIN_TASKS = (
    "row_steps:min_steps=1,max_steps=1",
    "row_steps:min_steps=2,max_steps=2",
    "rotate_matrix:min_n=2,max_n=2,min_rotations=0,max_rotations=3",
)

# Evaluation and fine-tuning also use harder problems. Each further step of a row needs one more step of computation;
# the last task only copies digits to other places, and is the control.
TASKS = (
    "row_steps:min_steps=2,max_steps=3",
    "row_steps:min_steps=4,max_steps=4",
    "rotate_matrix:min_n=2,max_n=2,min_rotations=0,max_rotations=3",
)

# Values in place of the defaults that `rr setup` writes into rr.toml for the embedded model.
SETTINGS: dict[str, dict[str, Any]] = {
    "train": {
        "steps": 600,
        "batch_size": 128,
        "lr": 2e-3,
        "sidecar_lr": 2e-3,
        "max_length": 64,
        "task_share": 0.8,
        "masked_weight": 0.3,
        "supervised_share": 1.0,
        "eval_interval": 200,
        "eval_samples": 16,
    },
    "eval": {"problems": 250, "max_new_tokens": 16},
}
