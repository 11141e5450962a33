"""Tiny random models of many families: their configurations as data, and one function that builds them.

Every family has 4 layers, hidden size 32 and a vocabulary of 97. Hybrid families mix their layer types in layers 1 and
2, so that the partial span `(1, 3)` meets both. Sliding windows are shorter than the test sequences.
"""

from __future__ import annotations

import copy
import functools
import inspect
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 97
LAYERS = 4

_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
_LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
_OLD = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
_SLIDING = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"] * 2}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"] * 2}
_LATENT = {
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 16,
    "num_key_value_heads": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_mtp_layers": 0,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "qwen3": _LLAMA,
    "olmo2": _LLAMA,
    "mistral": _LLAMA | {"sliding_window": 5},
    "gemma2": _LLAMA | _SLIDING,
    "gemma3_text": _LLAMA | _SLIDING,
    "cohere2": _LLAMA | _SLIDING,
    "mixtral": _LLAMA | _MOE,
    "gpt_oss": _LLAMA | _MOE | _SLIDING,
    "deepseek_v3": _LLAMA | _LATENT | {"q_lora_rank": 16, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "kimi_linear": _LLAMA | _MOE | _LATENT | _LINEAR | {"linear_head_dim": 8, "linear_num_heads": 4},
    "qwen3_next": _LLAMA
    | _LINEAR
    | {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "lfm2": _LLAMA | {"layer_types": ["conv", "full_attention"] * 2},
    "falcon_h1": _LLAMA
    | {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8},
    "mamba2": {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": LAYERS,
        "num_heads": 8,
        "head_dim": 8,
        "state_size": 8,
        "n_groups": 1,
        "chunk_size": 8,
    },
    "gpt2": {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 64},
    "gpt_neox": _OLD | {"intermediate_size": 64},
    "bloom": {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": LAYERS, "n_head": 4},
    "falcon": _OLD,
    "opt": _OLD | {"word_embed_proj_dim": 32, "ffn_dim": 64, "max_position_embeddings": 64},
}

FAMILIES = sorted(CONFIGS)
SPANS = [None, (1, 3)]


def build(family: str, **changes: Any) -> Any:
    """Return a random model of `family` in evaluation mode, in fp32; always the same weights.

    Matrices are drawn larger than the families' own initialisation does, so that attention is far from uniform and a
    wrong cache or mask shows in the logits.
    """
    if changes:
        return _build(family, **changes)
    return copy.deepcopy(_built(family))


def _build(family: str, **changes: Any) -> Any:
    config = AutoConfig.for_model(family, **(CONFIGS[family] | {"pad_token_id": 0, "bos_token_id": 1} | changes))
    config.eos_token_id = None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval().float()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() >= 2:
                    parameter.normal_(std=0.1)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


_built = functools.cache(_build)


def tokens(batch: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    """Return random token ids `[batch, length]`, none of them special."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def wake(recursion: Any, std: float = 0.1) -> Any:
    """Give a recursion random weights everywhere, as if it had been trained, and return it."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in recursion.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * std)
    return recursion


def accepts(model: Any, argument: str) -> bool:
    """Tell whether the model's forward takes `argument`."""
    return argument in inspect.signature(model.forward).parameters


def cache_name(model: Any) -> str:
    """Return the name under which the model takes and returns its cache."""
    return "past_key_values" if accepts(model, "past_key_values") else "cache_params"


def arguments(model: Any, mask: torch.Tensor | None, start: int, end: int) -> dict[str, Any]:
    """Return mask and positions of a forward over positions `[start, end)` of a left-padded batch."""
    if mask is None:
        return {}
    values: dict[str, Any] = {"attention_mask": mask[:, :end]}
    if accepts(model, "position_ids"):
        values["position_ids"] = (mask.long().cumsum(1) - 1).clamp_min(0)[:, start:end]
    return values


def uncached(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Return `[batch, position, vocabulary]` logits of one forward without a cache."""
    return model(ids, use_cache=False, **arguments(model, mask, 0, ids.shape[1])).logits


def cached(
    model: Any, ids: torch.Tensor, prefill: int = 7, mask: torch.Tensor | None = None, cache: Any = None
) -> tuple[torch.Tensor, Any]:
    """Return the logits of `prefill` positions at once and the others one by one, and the cache."""
    name = cache_name(model)
    parts = []
    for start, end in [(0, prefill), *((t, t + 1) for t in range(prefill, ids.shape[1]))]:
        known = {} if cache is None else {name: cache}
        output = model(ids[:, start:end], use_cache=True, **known, **arguments(model, mask, start, end))
        cache = getattr(output, name)
        parts.append(output.logits)
    return torch.cat(parts, 1), cache


def generate(model: Any, ids: torch.Tensor, **options: Any) -> Any:
    """Generate 6 tokens, greedily unless told otherwise."""
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), **({"max_new_tokens": 6, "do_sample": False} | options)
    )


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the largest difference relative to the scale of `b`."""
    return float((a - b).abs().max() / b.abs().max())
