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
from rrcli.files import read_json
from rrcli.models.source import ModelSource

NONE, FOUR, EIGHT = "none", "4bit", "8bit"
# How far two computations of one sum may be apart where rows are rounded to 8 bits, relative to its terms.
TOLERANCE = 0.05


def stored_format(source: ModelSource) -> str:
    """Return the format in which a checkpoint is quantised, as its config.json names it ("gptq"); '' if it is not."""
    if source.is_gguf or not (source.path / "config.json").is_file():
        return ""
    found = read_json(source.path / "config.json", "a model", dict[str, Any]).get("quantization_config")
    return str(found.get("quant_method", "quantised")) if isinstance(found, dict) else ""


def refuse(source: ModelSource, quantize: str, *, trains: bool, cut: bool) -> None:
    """Refuse what cannot be done with a quantised base, before anything is read; others are let through.

    Args:
        quantize: in how many bits it is to be held. trains: whether its weights are to be trained. cut: whether they
            are to be cut among processes.

    Raises:
        UsageError: one of these, or it is to be quantised once more.
    """
    stored = stored_format(source)
    if quantize == NONE and not stored:
        return
    if quantize != NONE and (stored or source.is_gguf):
        raise UsageError(
            f"{source.path} is quantised already ({stored or 'gguf'}), --quantize {quantize} cannot be added",
            "Leave --quantize out.",
        )
    what = f"{source.path} is quantised ({stored})" if stored else f"--quantize {quantize} holds few bits"
    if trains:
        raise UsageError(f"{what}: such weights cannot be trained", "Take --phase b or --phase a.")
    if cut:
        raise UsageError(f"{what}: such weights cannot be cut among processes", "Take --num-processes.")


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
    return bool(getattr(model, "is_quantized", False)) and bool(_layers(model))


def check_gradients(model: Any) -> None:
    """Check on the quantised layers of each kind that gradients go through them.

    A layer without its bias is linear, so the sum of its outputs is that of each input times its gradient.

    Raises:
        RRError: they do not.
    """
    kinds: dict[Any, Any] = {}
    for name, layer in _layers(model).items():
        of_its_own = type(layer), type(layer.weight.data), layer.weight.dtype, "forward" in vars(layer)
        kinds.setdefault((re.sub(r"\d+", "", name), *of_its_own), layer)
    for layer in kinds.values():
        if not _passes_gradients(layer, model):
            raise RRError(
                f"no gradients go through the kernels of this quantised model ({type(layer).__name__} on "
                f"{model.device})",
                "Take another device, or train on the model as it was before it was quantised.",
            )


def _passes_gradients(layer: Any, model: Any) -> bool:
    import torch

    before = layer.training
    rows = torch.linspace(-1, 1, 2 * layer.in_features, device=model.device, dtype=model.dtype)
    rows = rows.view(2, layer.in_features).requires_grad_(True)
    with torch.enable_grad():
        output = layer(rows)
        if output.requires_grad:
            (output if layer.bias is None else output - layer.bias).sum().backward()
    layer.train(before)
    output = output.detach()
    if rows.grad is None:
        return False
    bias = 0.0 if layer.bias is None else float(layer.bias.detach().sum()) * len(rows)
    found, scale = float((rows.grad * rows.detach()).sum()), float(output.abs().sum())
    return abs(found - (float(output.sum()) - bias)) <= TOLERANCE * scale


def _layers(model: Any) -> dict[str, Any]:
    """Return the quantised layers by name: with inputs, and not just torch's own linear layer with a weight of floats.

    That may also be one that has a forward of its own, in which compressed-tensors rounds what goes in.
    """
    import torch

    def plain(layer: Any) -> bool:
        weight = layer.weight if type(layer) is torch.nn.Linear and "forward" not in vars(layer) else None
        return weight is not None and type(weight.data) is torch.Tensor and weight.dtype.itemsize > 1

    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "in_features") and not hasattr(module, "base_layer") and not plain(module)
    }
