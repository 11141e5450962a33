"""Matrix products on a CPU through oneDNN, where torch would take MKL.

In fp32 torch multiplies with MKL, which on processors of other makers than its own leaves much of a core unused: on an
AMD EPYC with AVX-512, products of 512 rows with a small model's weights run at 142 to 198 GFLOPS with MKL and at 186 to
217 with oneDNN, which torch ships too; with 16 rows the layers of SmolLM2-135M take 78 ms with MKL and 51 with oneDNN
(with one row, 40 and 38). The results agree up to rounding.

Looking at every call of torch costs a few milliseconds a forward: too much for a forward on one token.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

# One row is bound by reading the weights, and any library is as good.
FEWEST_ROWS = 2


class OneDNN(TorchFunctionMode):
    """While it is entered, `linear` of fp32 tensors on an x86 CPU runs through oneDNN. Without gradients only."""

    def __init__(self) -> None:
        super().__init__()
        found = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        self.usable = found and platform.machine() in ("x86_64", "AMD64")

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a function of torch, `linear` in our way."""
        if function is F.linear and self.usable and not kwargs and self._fits(*args):
            return linear(*args)
        return function(*args, **(kwargs or {}))

    def _fits(self, rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
        plain = all(type(t) in (Tensor, torch.nn.Parameter) for t in (rows, weight))
        return (
            plain
            and not torch.is_grad_enabled()
            and rows.device.type == weight.device.type == "cpu"
            and rows.dtype == weight.dtype == torch.float32
            and (bias is None or bias.dtype == torch.float32)
            and weight.is_contiguous()
            and rows.numel() >= FEWEST_ROWS * weight.shape[1]
        )


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `rows @ weight.T + bias` by oneDNN: `[..., in]` and `[out, in]` give `[..., out]`, all fp32 on a CPU."""
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
