"""Attention in bfloat16 on a CPU by matrix products, where torch would use its flash kernel.

The backward pass of torch's kernel hardly uses a processor's bfloat16 instructions in short rows. On an AMD EPYC with
AVX512-BF16, forward and backward of 16 rows of 36 positions with 9 heads of width 64 take 18 ms with it and 3 ms here,
once for each layer and pass; of 4 rows of 256 positions 26 and 17 ms. Like a flash kernel it keeps no `[position,
position]` tensor for the backward pass, but computes it again: there is one at a time (Dao et al. 2022, FlashAttention,
algorithm 4). The scores are rounded to bfloat16 before the softmax, as in the eager attention of transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rrcli.upstream import patched

# With longer rows torch's kernel is as fast.
MOST_POSITIONS = 256

_torch_attention = F.scaled_dot_product_attention


@contextmanager
def attention_by_products() -> Iterator[None]:
    """While it is entered, `torch.nn.functional.scaled_dot_product_attention` is `attention`."""
    with patched(F, scaled_dot_product_attention=attention):
        yield


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return what `scaled_dot_product_attention` returns: by products in training in bfloat16 on a CPU, else by torch.

    Args:
        query: `[batch, heads, position, width]`; key, value: the same, with as many heads or (`enable_gqa`) fewer.
        attn_mask: True or 0 where a position may attend, False or a large negative number where not; it broadcasts.
    """
    if not _usable(query, key, attn_mask, dropout_p):
        options = {"scale": scale, "enable_gqa": enable_gqa}
        return _torch_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)
    query, key, value = (tensor.to(torch.bfloat16) for tensor in (query, key, value))
    bias = _bias(query, key, attn_mask, is_causal)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    result: Tensor = _Attention.apply(query, key, value, bias, scale)
    return result


class _Attention(torch.autograd.Function):
    """softmax(query · keyᵀ · scale + bias) · value, and its gradients; heads that share a key are rows of one product.

    Shapes: query `[batch, heads, L, width]`, key and value `[batch, groups, S, width]`; bias broadcasts to
    `[batch, groups, heads / groups, L, S]`.
    """

    @staticmethod
    def forward(context: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            result = (_probabilities(query * scale, key, bias) @ value).view(*query.shape[:3], value.shape[-1])
        context.save_for_backward(query, key, value, bias)
        context.scale = scale
        return result

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, bias = context.saved_tensors
        with torch.autocast("cpu", enabled=False):
            scaled, rows = query * context.scale, _rows(gradient.to(query.dtype), key)
            probabilities = _probabilities(scaled, key, bias)
            of_value = probabilities.transpose(-1, -2) @ rows
            of_scores = rows @ value.transpose(-1, -2)
            of_scores = torch.ops.aten._softmax_backward_data(of_scores, probabilities, -1, query.dtype)
            of_query = (of_scores @ key).view(query.shape) * context.scale
            of_key = of_scores.transpose(-1, -2) @ _rows(scaled, key)
        return of_query, of_key, of_value, None, None


def _probabilities(query: Tensor, key: Tensor, bias: Tensor | None) -> Tensor:
    """Return `[batch, groups, heads / groups * L, S]` attention probabilities; the softmax itself is in fp32."""
    scores = _rows(query, key) @ key.transpose(-1, -2)
    if bias is not None:
        scores.view(*key.shape[:2], -1, query.shape[2], key.shape[2]).add_(bias)
    return scores.softmax(-1)


def _rows(tensor: Tensor, key: Tensor) -> Tensor:
    """Return `[batch, heads, L, n]` as `[batch, groups, heads / groups * L, n]`."""
    return tensor.reshape(tensor.shape[0], key.shape[1], -1, tensor.shape[-1])


def _bias(query: Tensor, key: Tensor, mask: Tensor | None, causal: bool) -> Tensor | None:
    """Return what is added to the scores, in the format of the query, with a dimension for the heads of a group."""
    if causal:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=query.dtype).masked_fill_(~mask, torch.finfo(query.dtype).min)
    mask = mask.to(query.dtype).clamp(min=torch.finfo(query.dtype).min)[(None,) * (4 - mask.ndim)]
    if mask.shape[1] == 1:
        return mask[:, :, None]
    return mask.reshape(mask.shape[0], key.shape[1], -1, *mask.shape[2:])


def _usable(query: Tensor, key: Tensor, mask: Tensor | None, dropout: float) -> bool:
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    plain = all(type(tensor) is Tensor and tensor.device.type == "cpu" for tensor in (query, key))
    short = query.ndim == 4 and max(query.shape[2], key.shape[2]) <= MOST_POSITIONS
    fixed = dropout == 0.0 and (mask is None or not mask.requires_grad)
    return torch.is_grad_enabled() and dtype == torch.bfloat16 and plain and short and fixed
