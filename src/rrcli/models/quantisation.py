"""Quantised bases: by bitsandbytes while they are read, or as a checkpoint brings them; both through transformers.

A quantised base is frozen: phases a and b train on it. Experts that are one parameter for all of a layer, embedding and
head stay as they are. Some kernels compute forward alone, and gradients would silently stop at them; so a training asks
first (`check_gradients`). Loads transformers only where a model is quantised.
"""

from __future__ import annotations

import importlib.util
import re
from typing import Any

from rrcli.errors import RRError, UsageError
from rrcli.files import read_json, safetensors_header
from rrcli.models.source import ModelSource
from rrcli.models.weights import weight_files

NONE, FOUR, EIGHT = "none", "4bit", "8bit"
# Bytes of a quantised weight: 4 bits and a scale in fp32 for 64 of them; 8 bits and a scale for each row.
SIZES = {FOUR: 0.5 + 4 / 64, EIGHT: 1.01}
# How far two computations of one sum may be apart where rows are rounded to 8 bits, relative to its terms.
TOLERANCE = 0.05


def stored_format(source: ModelSource) -> str:
    """Return the format in which a checkpoint is quantised, as its config.json names it ("gptq"); '' if it is not."""
    if source.is_gguf or not (source.path / "config.json").is_file():
        return ""
    found = read_json(source.path / "config.json", "a model", dict[str, Any]).get("quantization_config")
    return str(found.get("quant_method", "quantised")) if isinstance(found, dict) else ""


def quantised_bytes(source: ModelSource, kind: str, itemsize: int) -> int:
    """Return what the weights take in memory once they are quantised, in bytes, from the headers of their files.

    Args:
        itemsize: bytes of each weight that is not.
    """
    total = 0.0
    for file in weight_files(source.path):
        for name, entry in safetensors_header(file).items():
            count = 1
            for size in entry["shape"]:
                count *= size
            matrix = len(entry["shape"]) == 2 and re.search(r"\.\d+\.", name) and ".experts." not in name
            total += count * (SIZES[kind] if matrix else itemsize)
    return round(total)


def configuration(kind: str, dtype: Any) -> Any:
    """Return transformers' configuration of bitsandbytes: 4 bits (NF4), or 8 bits (LLM.int8).

    Args:
        dtype: the dtype of torch that products are computed in; "auto" means bfloat16.

    Raises:
        UsageError: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError("--quantize needs bitsandbytes", "pip install 'rrcli[quantize]'")
    import torch
    from transformers import BitsAndBytesConfig

    if kind == EIGHT:
        return BitsAndBytesConfig(load_in_8bit=True)
    computing = torch.bfloat16 if dtype == "auto" else dtype
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=computing)


def is_quantised(model: Any) -> bool:
    """Tell whether a model was read through a quantiser of transformers that left its weights quantised."""
    return bool(getattr(model, "is_quantized", False)) and _layers(model) != []


def check_gradients(model: Any) -> None:
    """Check on one quantised layer that gradients go through it.

    A layer without its bias is linear, so the sum of its outputs is that of each input times its gradient.

    Raises:
        RRError: they do not.
    """
    import torch

    layer = _layers(model)[0]
    before = layer.training
    rows = torch.linspace(-1, 1, 2 * layer.in_features, device=model.device, dtype=model.dtype)
    rows = rows.view(2, layer.in_features).requires_grad_(True)
    with torch.enable_grad():
        output = layer(rows)
        if output.requires_grad:
            (output if layer.bias is None else output - layer.bias).sum().backward()
    layer.train(before)
    output = output.detach()
    found = None if rows.grad is None else float((rows.grad * rows.detach()).sum())
    bias = 0.0 if layer.bias is None else float(layer.bias.detach().sum()) * len(rows)
    expected, scale = float(output.sum()) - bias, float(output.abs().sum())
    if found is None or not abs(found - expected) <= TOLERANCE * scale:
        raise RRError(
            f"no gradients go through the kernels of this quantised model ({type(layer).__name__} on {model.device})",
            "Take another device, or train on the model without --quantize.",
        )


def _layers(model: Any) -> list[Any]:
    """Return the quantised layers: with inputs, but no linear layers of torch, or with a weight that is no floats."""
    import torch

    def plain(layer: Any) -> bool:
        weight = layer.weight if type(layer) is torch.nn.Linear else None
        return weight is not None and type(weight.data) is torch.Tensor and weight.dtype.itemsize > 1

    return [
        module
        for module in model.modules()
        if hasattr(module, "in_features") and not hasattr(module, "base_layer") and not plain(module)
    ]
