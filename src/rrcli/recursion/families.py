"""Where each family of models keeps its decoder layers: data, not code.

A layout names the list of decoder layers and the modules after it in the backbone (the "tail": final norm, output
projection). The tests show that the families in the table work. For any other family the layers are found by the
model's structure, and it has to prove itself; see `proof`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from rrcli import upstream
from rrcli.errors import RRError
from rrcli.recursion.facts import text_config


@dataclass(frozen=True)
class Layout:
    """Dotted paths inside a causal language model: the layer list, and the modules between it and the head."""

    layers: str
    tail: tuple[str, ...]

    @property
    def backbone(self) -> str:
        """The module that owns the layer list; its forward runs every layer and the tail."""
        return self.layers.rpartition(".")[0]


GPT2 = Layout("transformer.h", ("transformer.ln_f",))

# Model types by layout, each in alphabetical order. The first layout is llama's.
_TABLE: dict[Layout, str] = {
    Layout("model.layers", ("model.norm",)): """
        afmoe apertus arcee axk1 axk2 bailing_hybrid bitnet cohere cohere2 cohere2_moe cwm deepseek_v2 deepseek_v3
        deepseek_v32 diffllama doge dots1 ernie4_5 ernie4_5_moe exaone4 exaone_moe flex_olmo gemma gemma2 gemma3_text
        gemma4_text gemma4_unified_text glm glm4 glm4_moe glm4_moe_lite glm_moe_dsa gpt_oss granite granite_swa
        granitemoe granitemoe_swa granitemoehybrid granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hy_v3
        hyperclovax inkling_text internlm3 iquestcoder jais2 jetmoe kimi_linear kolibri1 laguna llama llama4_text
        longcat_flash mellum mimo_v2_flash minicpm3 minimax minimax_m2 ministral ministral3 mistral mixtral moshi
        nanochat nemotron olmo olmo2 olmo3 olmo_hybrid olmoe phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_5_moe_text
        qwen3_5_text qwen3_moe qwen3_next seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma youtu
    """,
    Layout("model.layers", ("model.final_layernorm",)): "bamba falcon_h1 jamba persimmon phi zamba2",
    Layout("model.layers", ("model.embedding_norm",)): "lfm2 lfm2_moe lfm3",
    Layout("model.layers", ("model.final_norm",)): "modernbert-decoder",
    Layout("model.layers", ("model.layer_norm",)): "xglm",
    Layout("model.layers", ("model.norm_f",)): "nemotron_h",
    Layout("backbone.layers", ("backbone.norm_f",)): "falcon_mamba mamba mamba2",
    Layout("biogpt.layers", ("biogpt.layer_norm",)): "biogpt",
    Layout("gpt_neox.layers", ("gpt_neox.final_layer_norm",)): "gpt_neox",
    Layout("gpt_neox_japanese.layers", ("gpt_neox_japanese.final_layer_norm",)): "gpt_neox_japanese",
    Layout("model.decoder.layers", ("model.decoder.final_layer_norm", "model.decoder.project_out")): "opt",
    GPT2: "bloom codegen falcon gpt2 gpt_bigcode gpt_neo gptj",
    Layout("transformer.h", ("transformer.layernorm",)): "ctrl",
    Layout("transformer.blocks", ("transformer.norm_f",)): "dbrx mpt",
}
LAYOUTS = {family: layout for layout, families in _TABLE.items() for family in families.split()}

_HYPER = "the stream between its layers holds several mixed copies of every position"
_ENCODER = "it is an encoder used as a decoder: its layers lie in a module that is not given the tokens"
_CROSS = "it is the decoder half of an encoder-decoder model"

# Families that are known not to work, and why.
REFUSED: dict[str, str] = {
    "blt": "its layers see patches of bytes, not one position for each token",
    "cpmant": "it puts a prompt of its own before the tokens, and its stock cached decoding fails",
    "deepseek_v4": _HYPER,
    "gemma3n_text": _HYPER,
    "hrm_text": "it already loops over two lists of layers",
    "hy_v4": _HYPER,
    "inkling2_text": "its layers read states that are collected from earlier layers",
    "recurrent_gemma": "its recurrent state lies in its modules, so the passes would share one state",
    "reformer": "its reversible layers pass two streams, not one hidden state",
    "rwkv": "its recurrent state goes from layer to layer as plain tensors, so the passes would share one state",
    "xlnet": "its layers run on [position, batch, hidden] in two streams",
    "xlstm": "its backbone writes the recurrent state, not its layers, so the passes would have none",
    "zaya": "its layers pass router states from one to the next",
    **dict.fromkeys(
        ("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie"), _ENCODER
    ),
    **dict.fromkeys(("megatron-bert", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer"), _ENCODER),
    **dict.fromkeys(("xlm", "xlm-roberta", "xlm-roberta-xl", "xmod"), _ENCODER),
    **dict.fromkeys(("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp"), _CROSS),
    **dict.fromkeys(("pegasus", "plbart", "prophetnet", "trocr", "whisper"), _CROSS),
}


def find_layout(model: nn.Module) -> tuple[Layout, bool]:
    """Return the model's layout and whether it comes from the table (otherwise it needs a proof).

    Raises:
        RRError: the family is known not to work, or the layers cannot be found; the message names what was seen.
    """
    config = text_config(model.config)
    family = config.model_type
    reason = REFUSED.get(family)
    if reason is None and getattr(model.config, "is_encoder_decoder", False):
        reason = "it is an encoder-decoder model"
    shared: int = getattr(config, "num_kv_shared_layers", 0)
    if reason is None and shared:
        reason = f"its last {shared} layers read the keys and values of earlier layers"
    if reason is not None:
        raise RRError(f"'{family}' models cannot be supported: {reason}", "Recursion needs another model.")
    known = LAYOUTS.get(family)
    if known and _has(model, known.layers):
        return known, True
    return _by_structure(model, family, getattr(config, "num_hidden_layers", None)), False


def _by_structure(model: nn.Module, family: str, count: int | None) -> Layout:
    # A list inside a list (the experts of a layer) is never the list of decoder layers.
    lists = {
        name: len(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and "." in name and not any(part.isdigit() for part in name.split("."))
    }
    candidates = [name for name, length in lists.items() if count in (None, length)]
    if len(candidates) != 1:
        seen = ", ".join(f"{name} ({length})" for name, length in lists.items()) or "none"
        raise RRError(
            f"cannot find the {'' if count is None else f'{count} '}decoder layers of a '{family}' model; "
            f"module lists seen: {seen}",
            "Recursion needs one list of decoder layers that run one after the other.",
        )
    parent, _, own = candidates[0].rpartition(".")
    names = [name for name, _ in model.get_submodule(parent).named_children()]
    after = names[names.index(own) + 1 :]
    return Layout(candidates[0], tuple(f"{parent}.{name}" for name in after if "norm" in name or name.startswith("ln")))


def home_of(module: nn.Module) -> torch.device:
    """Return the device that `module` computes on, even if accelerate keeps its weights elsewhere until they are used.

    For a skeleton, whose weights are on no device, that is the CPU, since what is added to it has real weights.
    """
    weight = next(module.parameters())
    if weight.device.type != "meta":
        return weight.device
    home = upstream.computing_device(module)
    return torch.device("cpu" if home is None else home)


def is_spread(model: nn.Module) -> bool:
    """Tell whether a model's layers lie in several places, or on disk, and are brought to where they run each time."""
    places = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
    return len(places) > 1 or "disk" in places


def input_device(model: nn.Module) -> torch.device:
    """Return the device that a model's tokens have to be on: where its embedding computes."""
    embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    return home_of(embedding)


def is_skeleton(model: nn.Module) -> bool:
    """Tell whether a model has no weights at all, rather than some that accelerate keeps elsewhere."""
    return next(model.parameters()).device.type == "meta" and upstream.computing_device(model) is None


def _has(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True
