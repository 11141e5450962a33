"""Tiny random models of many families: their configurations as data.

Every model has 4 layers, hidden size 32 and a vocabulary of 97. Hybrid families mix their layer types in layers 1 and
2, so that the partial span `(1, 3)` meets both. Sliding windows are shorter than the test sequences.

`CONFIGS` are the families that every property is tested on; `MORE` are those whose properties are tested once, by
`families.examine`; `REFUSED` are built to see that they are refused.
"""

from __future__ import annotations

from typing import Any

VOCABULARY = 97
LAYERS = 4

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
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 64}
_SLIDING = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"] * 2}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"] * 2}
_CONV = {"layer_types": ["conv", "full_attention"] * 2}
# Every name that a family gives to its experts; families take what they know.
_MOE = {
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "decoder_sparse_step": 1,
    "n_group": 1,
    "topk_group": 1,
}
_LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
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
_DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_d_conv": 4,
}
_PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY, "num_kv_shared_layers": 0}
_STATES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": LAYERS, "state_size": 8}


def _each(names: str, config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Give several families, separated by spaces, one configuration."""
    return dict.fromkeys(names.split(), config)


CONFIGS: dict[str, dict[str, Any]] = {
    **_each("ernie4_5 exaone4 glm4 granite hunyuan_v1_dense llama nemotron olmo2 phi phi3", _LLAMA),
    **_each("qwen3 smollm3 stablelm starcoder2", _LLAMA),
    **_each("cohere2 gemma2 gemma3_text", _LLAMA | _SLIDING),
    **_each("mixtral qwen2_moe qwen3_moe", _LLAMA | _MOE),
    "bloom": {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": LAYERS, "n_head": 4},
    "deepseek_v2": _LLAMA | _MOE | _LATENT,
    "deepseek_v3": _LLAMA | _LATENT | {"n_routed_experts": 4, "num_experts_per_tok": 2},
    "falcon": _OLD,
    "falcon_h1": _LLAMA
    | {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8},
    "gemma4_text": _LLAMA | _SLIDING | _PER_LAYER | {"global_head_dim": 8},
    "gpt2": _GPT2,
    "gpt_neox": _OLD | {"intermediate_size": 64},
    "gpt_oss": _LLAMA | _SLIDING | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gptj": _GPT2 | {"rotary_dim": 4},
    "granitemoehybrid": _LLAMA
    | _MOE
    | _MAMBA
    | {"layer_types": ["mamba", "attention"] * 2, "shared_intermediate_size": 16},
    "jamba": _LLAMA
    | _MOE
    | {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
    | {"mamba_d_state": 8, "use_mamba_kernels": False},
    "kimi_linear": _LLAMA
    | _LINEAR
    | _LATENT
    | {"linear_head_dim": 8, "linear_num_heads": 4}
    | {"num_local_experts": 4, "num_experts_per_tok": 2, "q_lora_rank": None},
    "lfm2": _LLAMA | _CONV,
    "llama4_text": _LLAMA
    | {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size_mlp": 64, "attention_chunk_size": 5},
    "mamba2": _STATES | {"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    "mistral": _LLAMA | {"sliding_window": 5},
    "mpt": {"vocab_size": VOCABULARY, "d_model": 32, "n_heads": 4, "n_layers": LAYERS, "max_seq_len": 64}
    | {"expansion_ratio": 2},
    "opt": _OLD | {"word_embed_proj_dim": 32, "ffn_dim": 64, "max_position_embeddings": 64},
    "qwen3_5_text": _LLAMA | _LINEAR | _DELTA,
    "qwen3_next": _LLAMA
    | _LINEAR
    | _DELTA
    | {"num_experts": 4, "num_experts_per_tok": 2}
    | {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
}

MORE: dict[str, dict[str, Any]] = {
    **_each("apertus arcee bitnet cohere cwm diffllama doge gemma glm helium hyperclovax", _LLAMA),
    **_each("internlm3 iquestcoder jais2 ministral ministral3 moshi nanochat olmo", _LLAMA),
    **_each("olmo3 persimmon qwen2 seed_oss vaultgemma granite_swa", _LLAMA),
    **_each("afmoe cohere2_moe dots1 ernie4_5_moe exaone_moe flex_olmo glm4_moe", _LLAMA | _MOE),
    **_each("granitemoe granitemoe_swa granitemoeshared hunyuan_v1_moe hy_v3", _LLAMA | _MOE),
    **_each("inkling_text jetmoe kolibri1 laguna mellum mimo_v2_flash", _LLAMA | _MOE),
    **_each("minimax_m2 olmoe phimoe solar_open", _LLAMA | _MOE),
    **_each("axk1 axk2 deepseek_v32 glm4_moe_lite glm_moe_dsa minicpm3 youtu", _LLAMA | _MOE | _LATENT),
    **_each("falcon_mamba mamba", _STATES),
    **_each("codegen gpt_bigcode", _GPT2 | {"rotary_dim": 4}),
    "bailing_hybrid": _LLAMA | _MOE | _LATENT | _LINEAR,
    "bamba": _LLAMA | _MAMBA | {"attn_layer_indices": [1, 3]},
    "biogpt": _OLD | {"intermediate_size": 64, "max_position_embeddings": 64},
    "ctrl": _GPT2 | {"dff": 64},
    "dbrx": {"vocab_size": VOCABULARY, "d_model": 32, "n_heads": 4, "n_layers": LAYERS, "max_seq_len": 64}
    | {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8}}
    | {"ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2}},
    "gemma4_unified_text": _LLAMA | _SLIDING | {"num_kv_shared_layers": 0, "global_head_dim": 8},
    # Its window is called `window_size`. With a `sliding_window` in its config the cache would drop keys that the
    # family's own mask, cut from a square of all positions, still counts.
    "gpt_neo": {"vocab_size": VOCABULARY, "hidden_size": 32, "num_layers": LAYERS, "num_heads": 4, "window_size": 5}
    | {"max_position_embeddings": 64, "attention_types": [[["global", "local"], 2]]},
    "gpt_neox_japanese": _OLD | {"intermediate_multiple_size": 2},
    "lfm2_moe": _LLAMA | _MOE | _CONV,
    "lfm3": _LLAMA | _CONV,
    "longcat_flash": {k: v for k, v in (_LLAMA | _LATENT).items() if k != "num_hidden_layers"}
    | {"num_layers": LAYERS, "n_routed_experts": 4, "moe_topk": 2, "ffn_hidden_size": 64, "zero_expert_num": 1}
    | {"expert_ffn_hidden_size": 16},
    "minimax": _LLAMA | _LINEAR | {"num_local_experts": 4, "num_experts_per_tok": 2, "block_size": 8},
    "modernbert-decoder": _LLAMA | {"local_attention": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "nemotron_h": _LLAMA
    | _MOE
    | {"layers_block_type": ["mamba", "attention", "mamba", "moe"], "ssm_state_size": 8, "mamba_num_heads": 4}
    | {"mamba_head_dim": 16, "n_groups": 1, "chunk_size": 8},
    "olmo_hybrid": _LLAMA | _LINEAR | _DELTA,
    "qwen3_5_moe_text": _LLAMA | _MOE | _LINEAR | _DELTA,
    "xglm": {"vocab_size": VOCABULARY, "d_model": 32, "num_layers": LAYERS, "attention_heads": 4, "ffn_dim": 64}
    | {"max_position_embeddings": 64},
    "zamba2": _LLAMA
    | _MAMBA
    | {"mamba_ngroups": 1, "n_mamba_heads": 8, "layers_block_type": ["mamba", "hybrid"] * 2, "num_mem_blocks": 1}
    | {"use_mem_rope": True, "adapter_rank": 4},
}

REFUSED: dict[str, dict[str, Any]] = {
    "bart": {"vocab_size": VOCABULARY, "d_model": 32, "decoder_layers": LAYERS, "encoder_layers": LAYERS}
    | {"decoder_attention_heads": 4, "encoder_attention_heads": 4, "decoder_ffn_dim": 64, "encoder_ffn_dim": 64}
    | {"max_position_embeddings": 64},
    "bert": _OLD | {"intermediate_size": 64, "is_decoder": True},
    "cpmant": _OLD | {"dim_head": 8, "dim_ff": 64},
    "deepseek_v4": _LLAMA | _MOE | _LATENT,
    "gemma3n_text": _LLAMA
    | _SLIDING
    | _PER_LAYER
    | {
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0] * 4,
        "altup_num_inputs": 2,
        "intermediate_size": [64] * 4,
    },
    "hrm_text": _LLAMA,
    "inkling2_text": _LLAMA | _MOE,
    "recurrent_gemma": _LLAMA
    | {"lru_width": 32, "attention_window_size": 5, "block_types": ["recurrent", "attention"]},
    "reformer": {"vocab_size": VOCABULARY, "hidden_size": 32, "num_attention_heads": 4, "attention_head_size": 8}
    | {"feed_forward_size": 64, "attn_layers": ["local"] * LAYERS, "axial_pos_embds": False, "is_decoder": True}
    | {"max_position_embeddings": 64},
    "rwkv": _STATES | {"attention_hidden_size": 32, "intermediate_size": 64, "context_length": 64},
    "xlnet": {"vocab_size": VOCABULARY, "d_model": 32, "n_layer": LAYERS, "n_head": 4, "d_inner": 64},
    "xlstm": _STATES | {"num_blocks": LAYERS, "num_heads": 4, "chunk_size": 8},
    "zaya": _LLAMA | _MOE | {"num_experts_per_tok": 1},
}
