"""The skeleton of a quantised model: what its matrices take in memory, and what each is unpacked into to be used.

A quantised matrix is multiplied as floats that are made of it for that moment, in the forward pass and once more in the
backward pass: one matrix at a time (bitsandbytes' `MatMul4Bit`, and `MatMul8bitFp` on a CPU; a kernel that multiplies
what is packed, as of 8 bits on a GPU, needs less). Two formats are floats as soon as they are read, and stay so:
compressed-tensors, which nothing multiplies as it is stored, and fp8 where the device has no products of it.
"""

from __future__ import annotations

import re
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from rrcli.files import safetensors_header
from rrcli.models.inspection import BITS
from rrcli.models.quantisation import EIGHT, FOUR, NONE, stored_format
from rrcli.models.source import ModelSource
from rrcli.models.weights import weight_files

# Weights of 4 bits that share a scale, in bitsandbytes; the scale, and that of each row of 8 bits, is one of fp32.
BLOCK, SCALE = 64, 4
# What bitsandbytes keeps of a matrix of 4 bits beside it: the 16 values that its codes stand for, in fp32.
CODES = 16 * 4


def hold(model: Any, source: ModelSource, quantize: str = NONE, *, fp8: bool = False) -> Any:
    """Replace the matrices of a skeleton that will be quantised by ones of `FewBits`, and return it.

    Args:
        source: the model, which may be quantised as it is stored. quantize: in how many bits it is to be held.
        fp8: whether the device has products of fp8.
    """
    found = _stored(model, source) if stored_format(source) else {}
    if is_unpacked(source, fp8=fp8):
        return model
    if quantize != NONE:
        from rrcli.upstream import quantised_matrices

        found = {name: _bytes(model.get_submodule(name).weight, quantize) for name in quantised_matrices(model)}
    keeps = quantize == EIGHT or stored_format(source) == "bitsandbytes"
    for name, size in found.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, FewBits(model.get_submodule(name), size, keeps_rows=keeps))
    return model


def is_unpacked(source: ModelSource, *, fp8: bool) -> bool:
    """Tell whether a checkpoint's own format is left when it is read: its weights are then floats in memory.

    Args:
        fp8: whether the device has products of fp8.
    """
    name = stored_format(source)
    return name == "compressed-tensors" or (name == "fp8" and not fp8)


def sizes(model: Any) -> dict[int, int]:
    """Return what the parameters and buffers of a model take in memory, in bytes, by their `id`."""
    found = {id(t): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())}
    return found | {id(m.weight): m.size for m in model.modules() if isinstance(m, FewBits)}


class FewBits(nn.Linear):
    """A matrix that is held in few bits, on shapes: `[..., in] -> [..., out]`.

    Args:
        linear: the layer in whose place it stands. size: bytes that it takes, with its scales.
        keeps_rows: whether it keeps its input for the backward pass, as bitsandbytes does with 8 bits.
    """

    def __init__(self, linear: Any, size: int, *, keeps_rows: bool) -> None:
        nn.Module.__init__(self)  # it has its weights already
        turned = not isinstance(linear, nn.Linear)  # GPT-2's are [in, out]
        self.weight = nn.Parameter(linear.weight.t(), linear.weight.requires_grad) if turned else linear.weight
        self.bias = linear.bias
        self.out_features, self.in_features = self.weight.shape
        self.size, self.keeps_rows = size, keeps_rows

    def forward(self, input: Tensor) -> Tensor:
        """Return the product with the matrix, which is unpacked for it."""
        found: Tensor = _Unpacked.apply(input, self.weight, self.bias, self.keeps_rows)  # type: ignore[no-untyped-call]
        return found


class _Unpacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, keeps_rows: bool) -> Tensor:
        ctx.weight, ctx.rows = weight, rows if keeps_rows else None
        return nn.functional.linear(rows, torch.zeros_like(weight), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0] @ torch.zeros_like(ctx.weight), None, None, None


def _bytes(weight: Tensor, quantize: str) -> int:
    """Return what a matrix takes once bitsandbytes has quantised it."""
    if quantize == FOUR:
        return weight.numel() // 2 + SCALE * -(-weight.numel() // BLOCK) + CODES
    return weight.numel() + SCALE * weight.shape[0]


def _stored(model: Any, source: ModelSource) -> dict[str, int]:
    """Return the matrices of a skeleton whose weights are packed in the files, with the bytes that they take there.

    The names of all that belongs to a matrix begin with its own: `q_proj.qweight`, `q_proj.weight.absmax`.
    """
    entries = {name: entry for file in weight_files(source.path) for name, entry in safetensors_header(file).items()}
    parts: dict[str, list[dict[str, Any]]] = {}
    matrices = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name, entry in entries.items():
        owner = name.rpartition(".")[0]
        while owner and owner not in matrices:
            owner = owner.rpartition(".")[0]
        if owner:
            parts.setdefault(owner, []).append(entry)
    found = {}
    for owner, own in parts.items():
        if any(not re.match(r"(BF|F)\d", entry["dtype"]) or BITS[entry["dtype"]] <= 8 for entry in own):
            found[owner] = sum(prod(entry["shape"]) * BITS[entry["dtype"]] // 8 for entry in own)
    return found
