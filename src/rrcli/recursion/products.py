"""Matrix products on a CPU by oneDNN, where torch would use MKL.

In fp32 torch multiplies with MKL, which leaves much of a core unused on processors that are not Intel's: on an
AMD EPYC with AVX-512, products of 512 rows with a small model's weights run at 142 to 198 GFLOPS with MKL and at 186 to
217 with oneDNN, which torch ships too; with 16 rows the layers of SmolLM2-135M take 78 ms with MKL and 51 with oneDNN
(with one row, 40 and 38). Of the two products of a backward pass the gradient of the rows gains about 7 %, that of the
weights nothing: it stays with torch. The results agree up to rounding.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rrcli.recursion.parts import kind_of
from rrcli.upstream import onednn_product, patched

# The product of a single row is limited by reading the weights, and every library is equally fast.
FEWEST_ROWS = 2
# With fewer weights, choosing how to compute a product takes longer than the product.
FEWEST_WEIGHTS = 100_000
# How often `bfloat16_gain` times each product.
TRIALS = 5


@contextmanager
def through_onednn(model: nn.Module) -> Iterator[None]:
    """While it is entered, the plain linear layers of `model` and of its recursion call `linear`.

    Layers of another class, and layers whose forward is replaced already, stay as they are.
    """
    parts = [part for part in (model, getattr(model, "recursion", None)) if part is not None]
    layers = [layer for part in parts for layer in part.modules() if _gains(layer)] if usable() else []
    with ExitStack() as patches:
        for layer in layers:
            patches.enter_context(patched(layer, forward=functools.partial(_forward, layer)))
        yield


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `rows @ weight.T + bias`, `[..., out]` from `[..., in]` and `[out, in]`: by oneDNN where possible."""
    plain = type(rows) is Tensor and type(weight) in (Tensor, nn.Parameter)
    here = rows.device.type == weight.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    same = rows.dtype == weight.dtype == torch.float32 and (bias is None or bias.dtype == torch.float32)
    many = rows.numel() >= FEWEST_ROWS * weight.shape[1] and weight.numel() >= FEWEST_WEIGHTS
    if plain and here and same and many and usable() and weight.is_contiguous():
        if torch.is_grad_enabled():
            return _Linear.apply(rows, weight, bias)  # type: ignore[no-untyped-call]
        return _by_onednn(rows, weight, bias)
    return F.linear(rows, weight, bias)


class _Linear(torch.autograd.Function):
    """`rows @ weight.T + bias` and its gradients."""

    @staticmethod
    def forward(context: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        context.save_for_backward(rows, weight)
        return _by_onednn(rows, weight, bias)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = context.saved_tensors
        wanted, of_weight, of_bias = context.needs_input_grad
        gradient = gradient.contiguous()
        flat = gradient.view(-1, gradient.shape[-1])
        return (
            _by_onednn(gradient, weight.t(), None) if wanted else None,
            flat.t() @ rows.reshape(-1, rows.shape[-1]) if of_weight else None,
            flat.sum(0) if of_bias else None,
        )


def bfloat16_gain() -> float:
    """Return how many times as fast as in fp32 this processor multiplies in bfloat16.

    Measured, in some milliseconds: of a product of a small model's size the best of a few times, in turns.
    """
    rows, weight = torch.ones(256, 576), torch.ones(1536, 576)
    pairs = {dtype: (rows.to(dtype), weight.to(dtype)) for dtype in (torch.float32, torch.bfloat16)}
    times: dict[torch.dtype, list[float]] = {dtype: [] for dtype in pairs}
    with torch.no_grad():
        for _ in range(1 + TRIALS):
            for dtype, pair in pairs.items():
                began = time.perf_counter()
                linear(*pair)
                times[dtype].append(time.perf_counter() - began)
    single, half = (min(found[1:]) for found in times.values())
    return single / half


def usable() -> bool:
    """Tell whether this torch, on this processor, has oneDNN's product."""
    return onednn_product() is not None


def _by_onednn(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product = onednn_product()
    assert product is not None
    return product(rows, weight, bias)


def _forward(layer: Any, rows: Tensor) -> Tensor:
    return linear(rows, layer.weight, layer.bias)


def _gains(layer: Any) -> bool:
    return kind_of(layer) is nn.Linear and "forward" not in vars(layer) and layer.weight.numel() >= FEWEST_WEIGHTS
