"""A model without its weights: every tensor has a shape and a dtype, and no storage (torch's meta device).

Layout, parameter counts and costs per token can be read from it; its memory does not grow with the model.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

from rrcli.errors import RRError, first_line
from rrcli.models.config import load_config
from rrcli.models.source import ModelSource
from rrcli.settings import CommonSettings

# Format on disk -> dtype to compute in, where a configuration names none; float32 for all others. Formats of one byte
# are for storage only.
STORED_DTYPES = {
    **dict.fromkeys(("BF16", "F8_E4M3", "F8_E5M2", "I8", "U8"), torch.bfloat16),
    "F16": torch.float16,
}


def skeleton(settings: CommonSettings, source: ModelSource, stored: str) -> Any:
    """Build the skeleton of a base model, in evaluation mode.

    Args:
        stored: the number format that most weights have on disk ("BF16"), for models whose configuration names none.

    Raises:
        RRError: the configuration cannot be read, or is not of a causal language model.
    """
    config = load_config(source, trust_remote_code=settings.trust_remote_code)
    dtype = getattr(config, "dtype", None) or STORED_DTYPES.get(stored, torch.float32)
    if settings.dtype != "auto":
        dtype = getattr(torch, settings.dtype)
    try:
        with torch.device("meta"), no_init_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=settings.trust_remote_code)
            model.tie_weights()
    except Exception as error:
        raise RRError(
            f"cannot build a '{config.model_type}' model from the configuration of {source.path}: {first_line(error)}",
            "It must be a causal language model that transformers knows, or come with --trust-remote-code.",
        ) from error
    return model.eval()
