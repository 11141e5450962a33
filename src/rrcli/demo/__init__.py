"""The embedded default model: a small Llama that `rr` uses when no other model is named.

`model/` holds its weights and tokenizer, `text.jsonl` the stories it was trained on, and `pretrain` is the script that
made both. This file loads neither torch nor transformers.
"""

from __future__ import annotations

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
TEXT_FILE = Path(__file__).parent / "text.jsonl"

# Pretraining saw the easy end of each task: few terms, few animals.
PRETRAIN_TASKS = (
    "chain_sum:min_terms=2,max_terms=4,max_digits=1",
    "leg_counting:min_animals=1,max_animals=2,max_instances=5",
    "rotate_matrix:min_n=2,max_n=3,min_rotations=0,max_rotations=3",
)

# Evaluation and fine-tuning reach the harder end. The first two take more steps as they grow, so a fixed number of
# layers runs out; the last one only copies digits to other places, and serves as the control.
TASKS = (
    "chain_sum:min_terms=3,max_terms=6,max_digits=1",
    "leg_counting:min_animals=2,max_animals=3,max_instances=5",
    "rotate_matrix:min_n=2,max_n=3,min_rotations=0,max_rotations=3",
)

# What `rr setup` writes into rr.toml for the embedded model, beside the defaults.
SETTINGS = {
    "train": {"steps": 250, "batch_size": 32, "lr": 5e-4, "sidecar_lr": 2e-3, "max_length": 160},
    "eval": {"max_new_tokens": 16},
}
