"""Runs a model on shapes alone, and keeps account of FLOPs and of the bytes that would be held at every moment.

On torch's meta device the same operators run, forward and backward, with shapes and without storage. Every tensor that
an operator makes is entered with its size and struck out when nothing refers to it any more, as the allocator of a real
device would do; the greatest sum is the peak. So what a family does needs no formula here: caches, experts, recurrent
states and what the backward pass keeps are found by running its own code.

Three things differ on the meta device, and are done here as a real device does them:

- attention runs in a fused kernel, which keeps no matrix of scores; on a CPU only where queries and values have one
  width, as torch does
- under autocast, products are computed in bfloat16, and keep copies of their factors in it
- a question about values ("is any position masked?") has no answer, and is taken to be a yes

Not seen are what a kernel takes while it runs, and what an allocator rounds up.
"""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rrcli.recursion.flops import FlopCounter
from rrcli.upstream import fused_attention, on_shapes, storage_address

# What a tensor is held for. A gradient is that of a parameter.
ACTIVATIONS, LOGITS, GRADIENTS = "activations", "logits", "gradients"


class Ledger(FlopCounter):
    """Counts FLOPs, and the bytes of all tensors that are made while it is entered, by what they are held for.

    Attributes:
        held: the bytes that are held now, by kind. peak: the same at the moment of the greatest sum.

    Args:
        known: tensors that are there before, and are not counted: weights and inputs.
        vocabulary: a tensor whose last axis is this long holds logits.
    """

    def __init__(self, known: Iterable[Tensor], vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.held: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._most = self._sum = 0
        # Address of a storage -> what it is held for, its bytes, and the reference that strikes it out.
        self._entries: dict[int, tuple[str, int, Any]] = {}
        self._known = {storage_address(tensor) for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, count it, and enter what it made."""
        if func.name() == "aten::_local_scalar_dense" and args[0].is_meta and args[0].dtype == torch.bool:
            return True
        result = super().__torch_dispatch__(func, types, args, kwargs)
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self._enter(tensor)
        return result

    def mark_gradient(self, parameter: Tensor) -> None:
        """Enter the gradient of a parameter as such."""
        if parameter.grad is not None:
            place = storage_address(parameter.grad)
            if place in self._entries:
                kind, size, reference = self._entries[place]
                self.held[kind] -= size
                self.held[GRADIENTS] += size
                self._entries[place] = GRADIENTS, size, reference

    def _enter(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        place = storage_address(tensor)
        if place in self._entries or place in self._known:
            return
        kind = LOGITS if tensor.dim() > 1 and tensor.shape[-1] == self.vocabulary else ACTIVATIONS
        size = storage.nbytes()
        self._entries[place] = kind, size, weakref.ref(storage, lambda _: self._strike_out(place))
        self.held[kind] += size
        self._sum += size
        if self._sum > self._most:
            self._most, self.peak = self._sum, self.held.copy()

    def _strike_out(self, place: int) -> None:
        kind, size, _ = self._entries.pop(place)
        self.held[kind] -= size
        self._sum -= size


@contextmanager
def accounted(
    model: Any, inputs: Iterable[Tensor], *, vocabulary: int, device: str, autocast: bool = False
) -> Iterator[Ledger]:
    """Keep account of what runs inside, of a skeleton on the meta device with its recursion.

    Args:
        inputs: tensors that are given to it. device: the type of device whose kernels are meant ("cpu", "cuda").
        autocast: whether products are computed in bfloat16.
    """
    parts = [part for part in (model, getattr(model, "recursion", None)) if part is not None]
    known = [tensor for part in parts for tensor in (*part.parameters(), *part.buffers())]
    ledger = Ledger([*known, *inputs], vocabulary)
    with ExitStack() as stack:
        for parameter in known:
            if parameter.requires_grad and parameter.is_leaf:
                stack.callback(parameter.register_post_accumulate_grad_hook(ledger.mark_gradient).remove)
        stack.enter_context(on_shapes(model))
        stack.enter_context(_replaced(_kernels(device, autocast=autocast)))
        stack.enter_context(ledger)
        yield ledger


# Where torch keeps what autocast computes in the lower format on every device.
PRODUCTS: dict[Any, tuple[str, ...]] = {
    F: ("linear", "bilinear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "scaled_dot_product_attention"),
    torch: ("conv1d", "conv2d", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum"),
    Tensor: ("matmul", "__matmul__", "mm", "bmm", "addmm", "baddbmm"),
}


def _kernels(device: str, *, autocast: bool) -> dict[tuple[Any, str], Callable[..., Any]]:
    """Return the functions that the meta device needs in place of torch's own, by owner and name.

    Not by a mode for functions, since torch leaves such a mode while it runs the backward pass, in which checkpointed
    layers run again.
    """
    found: dict[tuple[Any, str], Callable[..., Any]] = {
        (F, "scaled_dot_product_attention"): functools.partial(_attention, F.scaled_dot_product_attention, device)
    }
    for owner, names in PRODUCTS.items() if autocast else ():
        for name in names:
            function = found.get((owner, name), getattr(owner, name))
            found[owner, name] = _in_bfloat16(function)
    return found


def _in_bfloat16(function: Callable[..., Any]) -> Callable[..., Any]:
    def lowered(*args: Any, **kwargs: Any) -> Any:
        return function(*_lower(args), **{name: _lower(value) for name, value in kwargs.items()})

    return lowered


@contextmanager
def _replaced(functions: Mapping[tuple[Any, str], Callable[..., Any]]) -> Iterator[None]:
    with ExitStack() as stack:
        for (owner, name), function in functions.items():
            if name in vars(owner):
                stack.callback(setattr, owner, name, vars(owner)[name])
            else:  # it is inherited
                stack.callback(delattr, owner, name)
            setattr(owner, name, function)
        yield


def _attention(
    own: Callable[..., Tensor],
    device: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return attention's output, `[batch, head, position, width]`, by a fused kernel where the device has one.

    Args:
        own: torch's function, which on the meta device keeps the scores.
    """
    same_width = query.shape[-1] == key.shape[-1] == value.shape[-1]
    same_heads = query.shape[:-2] == key.shape[:-2] == value.shape[:-2] or enable_gqa
    if not query.is_meta or query.dim() != 4 or (device == "cpu" and (dropout_p or not same_width or not same_heads)):
        return own(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    mask = attn_mask
    if mask is not None and mask.dtype == torch.bool:  # kernels add a mask to the scores
        mask = torch.zeros_like(mask, dtype=query.dtype)
    width = value.shape[-1]
    if not same_width:  # values are padded to the queries' width, or a kernel takes both as they are
        value = F.pad(value, (0, query.shape[-1] - width))
    output = fused_attention(query, key, value, mask, dropout=dropout_p, causal=is_causal, scale=scale)
    if output is None:
        return own(query, key, value, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)[..., :width]
    return output[..., :width]


def _lower(value: Any) -> Any:
    """Return tensors in fp32 in bfloat16, also those in tuples and lists; all else as it is."""
    if isinstance(value, Tensor):
        return value.to(torch.bfloat16) if value.dtype == torch.float32 else value
    if isinstance(value, (tuple, list)):
        return type(value)(_lower(part) for part in value)
    return value
