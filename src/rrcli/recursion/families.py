"""Where each family of models keeps its decoder layers: data, not code.

A layout names the list of decoder layers and what follows it inside the backbone (the "tail": final norm, output
projection). Families that are not listed are looked for by structure and have to prove themselves in a self-check.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from rrcli.errors import RRError


@dataclass(frozen=True)
class Layout:
    """Dotted paths inside a causal language model: the layer list, and the modules between it and the head."""

    layers: str
    tail: tuple[str, ...]

    @property
    def backbone(self) -> str:
        """The module that owns the layer list; its forward runs every layer and the tail."""
        return self.layers.rpartition(".")[0]


LLAMA = Layout("model.layers", ("model.norm",))
GPT2 = Layout("transformer.h", ("transformer.ln_f",))

LAYOUTS: dict[str, Layout] = {
    **dict.fromkeys(
        (
            *("llama", "mistral", "mixtral", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen2_moe", "qwen3"),
            *(
                "qwen3_moe",
                "qwen3_next",
                "phi3",
                "olmo",
                "olmo2",
                "olmoe",
                "cohere",
                "cohere2",
                "granite",
                "granitemoe",
            ),
            *(
                "smollm3",
                "starcoder2",
                "stablelm",
                "deepseek_v2",
                "deepseek_v3",
                "gpt_oss",
                "kimi_linear",
                "glm",
                "glm4",
            ),
        ),
        LLAMA,
    ),
    **dict.fromkeys(("gpt2", "gptj", "codegen", "bloom", "falcon", "gpt_bigcode"), GPT2),
    "phi": Layout("model.layers", ("model.final_layernorm",)),
    "lfm2": Layout("model.layers", ("model.embedding_norm",)),
    "falcon_h1": Layout("model.layers", ("model.final_layernorm",)),
    "gpt_neox": Layout("gpt_neox.layers", ("gpt_neox.final_layer_norm",)),
    "opt": Layout("model.decoder.layers", ("model.decoder.final_layer_norm", "model.decoder.project_out")),
    "mamba": Layout("backbone.layers", ("backbone.norm_f",)),
    "mamba2": Layout("backbone.layers", ("backbone.norm_f",)),
}


def find_layout(model: nn.Module) -> tuple[Layout, bool]:
    """Return the model's layout and whether it comes from the table (otherwise it needs a self-check).

    Raises:
        RRError: the layers cannot be found; the message names what was seen.
    """
    config = model.config.get_text_config()  # type: ignore[union-attr,operator]
    family = config.model_type
    known = LAYOUTS.get(family)
    if known and _has(model, known.layers):
        return known, True
    count = config.num_hidden_layers
    lists = {name: len(m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and "." in name}
    candidates = [name for name, length in lists.items() if length == count]
    if len(candidates) != 1:
        seen = ", ".join(f"{name} ({length})" for name, length in lists.items()) or "none"
        raise RRError(
            f"cannot find the {count} decoder layers of a '{family}' model; module lists seen: {seen}",
            "Recursion needs one list of decoder layers that run one after the other.",
        )
    layers = candidates[0]
    backbone = model.get_submodule(layers.rpartition(".")[0])
    names = [name for name, _ in backbone.named_children()]
    behind = names[names.index(layers.rpartition(".")[2]) + 1 :]
    tail = tuple(f"{layers.rpartition('.')[0]}.{name}" for name in behind if "norm" in name or name.startswith("ln"))
    return Layout(layers, tail), False


def home_of(module: nn.Module) -> torch.device:
    """Return the device that `module` computes on, also where accelerate keeps its weights elsewhere until then."""
    weight = next(module.parameters())
    if weight.device.type != "meta":
        return weight.device
    hooks = [getattr(part, "_hf_hook", None) for part in module.modules()]
    homes = [home for hook in hooks if (home := getattr(hook, "execution_device", None)) is not None]
    return torch.device(homes[0]) if homes else weight.device


def _has(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True
