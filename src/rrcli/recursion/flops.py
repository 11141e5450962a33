"""Counts the FLOPs of what runs, forward and backward, on any device and on shapes alone.

A FLOP is half a multiply-add of a matrix product, a convolution, an attention or a triangular solve; additions and
multiplications element by element are not counted, which is the custom of the field. What is counted is what ran: a
forward that is recomputed counts again, a weight that is frozen has no gradient to compute, of a mixture only the
experts count that tokens were routed to, and attention counts all pairs of positions, also those that the causal mask
hides.

torch's `FlopCounterMode` has formulas for a part of torch's operators and takes the others for free, among them the
experts of a mixture (`_grouped_mm`) and the attention that runs on a CPU; and it counts the gradient of a grouped
convolution as if all channels were connected. Here are the missing formulas. What has none is not free, either: it is
named, in three ways.

- An operator of torch whose name says that it multiplies matrices, and that has no formula.
- An operator of another package: nothing is known about it.
- A kernel that torch does not see (Triton's, or an extension's): a tensor that nobody filled is read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from rrcli.errors import RRError
from rrcli.upstream import DispatchMode, operator_arguments, torch_flop_formulas

# A kernel that torch does not see has no name that could be known here.
UNSEEN = "a kernel that torch does not see"
# The words by which an operator of torch is known to multiply matrices; and words of those that are not meant.
MATRIX_WORDS = re.compile(
    r"(^|_)(\w*mm|\w*matmul\w*|mv|addmv|addr|ger|v?dot|bilinear|trilinear|[cp]dist|fft|lstm|gru|rnn|qr|svd)(_|$)"
    r"|conv(olution|\d|_|$)|attention|(^|_)linear(_|$)|linalg|solve|cholesky|(?<!slice_)inverse|einsum|tensordot"
)
NOT_MATRIX_WORDS = re.compile(
    r"norm|upsample|convert|(^|_)(pre)?pack|resolve|diagonal|linalg_cross|linear1d|plan_cache"
)
# Packages whose operators move or make numbers, or tell something about tensors.
FREE_PACKAGES = re.compile(
    r"prims?|profiler|_?c10d\w*|_dtensor|fsdp|rngprims|symm_mem|debug\w*|inductor\w*|streams?|export"
)
FREE_WORDS = re.compile(r"quantize|quant$|pack|permute|transpose|barrier")
# The classes of tensors whose operators are counted as they are.
PLAIN = {"Tensor", "Parameter"}
EMPTY = re.compile(r"(new_)?empty(_like|_strided|_permuted|_quantized)?")


class FlopCounter(DispatchMode):
    """Counts the FLOPs of everything that runs while it is entered.

    Attributes:
        total: the FLOPs so far.
        uncounted: the names of what ran and could not be counted; while it is not empty, `total` is too small.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0
        self.uncounted: set[str] = set()
        self._formulas = torch_flop_formulas()
        # Storages that were made and not filled yet. A weak reference keeps their address from being used again.
        self._unfilled: set[StorageWeakRef] = set()

    def notice(self) -> str:
        """Say what the total leaves out; an empty text if it leaves nothing out."""
        names = ", ".join(sorted(self.uncounted))
        return f"the FLOPs leave out what rr cannot count: {names}" if names else ""

    def checked(self) -> int:
        """Return the total.

        Raises:
            RRError: it leaves something out.
        """
        if self.uncounted:
            raise RRError(self.notice(), "Choose other kernels (attn_implementation), or do without this number.")
        return self.total

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and count it."""
        kwargs = kwargs or {}
        classes = {kind.__name__ for kind in types} - PLAIN
        if "FakeTensor" in classes:  # shapes alone, by which a DTensor finds out what it will be
            return func(*args, **kwargs)
        if classes:  # DTensor, quantised tensors and others: what they do with the tensors they hold is counted
            return NotImplemented
        name, _, _ = func.name().partition(".")
        if "::" not in name:
            return self._run_higher_order(func, args, kwargs)
        known = OWN_FORMULAS.get(name.removesuffix("_")), self._formulas.get(name.removesuffix("_"))
        if not any(known):
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        self._look_at_storages(func, name, args, kwargs)
        result = func(*args, **kwargs)
        if known[0]:
            self.total += int(known[0](args, kwargs, result))
        elif known[1]:
            self.total += int(known[1](*args, **kwargs, out_val=result))
        elif may_be_heavy(name):
            self.uncounted.add(name)
        if EMPTY.fullmatch(name.partition("::")[2]) and isinstance(result, Tensor) and result.numel():
            self._remember_unfilled(result)
        return result

    def _run_higher_order(self, func: Any, args: Any, kwargs: Any) -> Any:
        result = func(*args, **kwargs)
        formula = self._formulas.get(func.name())
        if formula is None:
            self.uncounted.add(func.name())
        else:
            self.total += int(formula(*args, **kwargs, out_val=result))
        return result

    def _remember_unfilled(self, tensor: Tensor) -> None:
        self._unfilled = {storage for storage in self._unfilled if not storage.expired()}
        self._unfilled.add(StorageWeakRef(tensor.untyped_storage()))

    def _look_at_storages(self, func: Any, name: str, args: Any, kwargs: Any) -> None:
        """Note what an operator fills, and what it reads that nobody has filled."""
        if not self._unfilled or func.is_view:
            return
        package, _, operator = name.partition("::")
        if operator.endswith("_like") or operator.startswith("new_"):  # they look at its shape
            return
        names, written = operator_arguments(func)
        for argument, value in [*zip(names, args, strict=False), *kwargs.items()]:
            fills = argument in written or FREE_PACKAGES.fullmatch(package)
            for tensor in _tensors(value):
                storage = StorageWeakRef(tensor.untyped_storage())
                if storage in self._unfilled:
                    self._unfilled.remove(storage)
                    self.uncounted |= set() if fills else {UNSEEN}


@contextmanager
def counted_flops() -> Iterator[FlopCounter]:
    """Count the FLOPs of what runs inside, forward and backward.

    Not compiled: the compiler gives up, for good, on what it first sees under a counter.
    """
    with torch.compiler.set_stance("force_eager"), FlopCounter() as counter:
        yield counter


def may_be_heavy(name: str) -> bool:
    """Tell whether an operator without a formula, such as 'aten::cdist', may take FLOPs that are worth counting."""
    package, _, operator = name.partition("::")
    if FREE_PACKAGES.fullmatch(package):
        return False
    if package == "aten":
        return bool(MATRIX_WORDS.search(operator)) and not NOT_MATRIX_WORDS.search(operator)
    return not FREE_WORDS.search(operator)


# -- formulas: arguments, keyword arguments and result of an operator -> its FLOPs -------------------------------------

Formula = Callable[[Any, Any, Any], int]


def _times(rows: int, inner: int, columns: int) -> int:
    return 2 * rows * inner * columns


def _product(left: int, right: int) -> Formula:
    """Return the formula of a matrix product, `[..., m, k] @ [..., k, n]`, whose factors are these arguments."""

    def formula(args: Any, _: Any, __: Any) -> int:
        a, b = args[left], args[right]
        columns = b.shape[-1] if b.dim() > 1 else 1
        return 2 * a.numel() * columns

    return formula


def _linear(rows: int, weight: int) -> Formula:
    """Return the formula of `[..., in] @ [out, in].T`."""
    return lambda args, _, __: 2 * args[rows].numel() * args[weight].shape[0]


def _to_output(args: Any, _: Any, result: Tensor) -> int:
    """Return the FLOPs of a product whose second factor is packed: every output is a sum over the inputs."""
    return 2 * result.numel() * args[0].shape[-1]


def _grouped(offsets: int) -> Formula:
    """Return the formula of products of many matrices, one group of rows (or columns) after the other."""

    def formula(args: Any, kwargs: Any, _: Any) -> int:
        a, b = args[0], args[1]
        ends = args[offsets] if len(args) > offsets else kwargs.get("offs")
        if a.dim() == b.dim() == 3:
            return 2 * a.numel() * b.shape[-1]
        if a.dim() == 2 and b.dim() == 3:  # rows are shared out among the matrices
            return _times(_last(ends, a.shape[0]), a.shape[1], b.shape[2])
        if a.dim() == 3:  # columns are
            return _times(a.shape[1], a.shape[2], _last(ends, b.shape[1]))
        return _times(a.shape[0], _last(ends, a.shape[1]), b.shape[1])  # what is summed over is

    return formula


def _last(ends: Tensor | None, size: int) -> int:
    """Return where the last group ends; what is after it is not computed. On shapes alone it is not known."""
    return size if ends is None or ends.device.type == "meta" else int(ends[-1])


def _attention(factor_scores: int, factor_values: int, first: int) -> Formula:
    """Return the formula of attention: so many products with queries and keys, and so many with values.

    Args:
        first: the argument that holds the queries `[batch, head, position, width]`; keys and values follow it.
    """

    def formula(args: Any, _: Any, __: Any) -> int:
        queries, keys, values = (args[first + index].shape for index in range(3))
        pairs = math.prod(queries[:-1]) * keys[-2]
        return 2 * pairs * (factor_scores * queries[-1] + factor_values * values[-1])

    return formula


# Backward: the scores are computed again, and give the gradients of queries and keys; those of values and of scores.
_FORWARD, _BACKWARD = (1, 1), (3, 2)


def _convolution(args: Any, _: Any, result: Tensor) -> int:
    """Return the FLOPs of a convolution: each output is a sum over its group's channels and the kernel."""
    transposed = len(args) > 6 and bool(args[6])
    return 2 * (args[0] if transposed else result).numel() * math.prod(args[1].shape[1:])


def _convolution_backward(args: Any, _: Any, __: Any) -> int:
    """Return the FLOPs of the gradients that are asked for, of input and kernel: each as many as forward."""
    output, rows, weight, transposed, wanted = args[0], args[1], args[2], args[7], args[10]
    forward = 2 * (rows if transposed else output).numel() * math.prod(weight.shape[1:])
    return forward * (int(wanted[0]) + int(wanted[1]))


def _solve_triangular(args: Any, kwargs: Any, _: Any) -> int:
    """Return the FLOPs of solving with a triangle: half of those of the product with the whole matrix."""
    matrix, other = args[0], args[1]
    return matrix.shape[-1] * other.numel()


# `name` -> formula, for what torch has no formula for, or a wrong one. Names with a trailing _ have the same.
OWN_FORMULAS: dict[str, Formula] = {
    "aten::convolution": _convolution,
    "aten::_convolution": _convolution,
    "aten::convolution_overrideable": _convolution,
    "aten::convolution_backward": _convolution_backward,
    "aten::convolution_backward_overrideable": _convolution_backward,
    "aten::addbmm": _product(1, 2),
    "aten::_addmm_activation": _product(1, 2),
    "aten::addmv": _product(1, 2),
    "aten::addr": lambda args, _, __: 2 * args[1].numel() * args[2].numel(),
    "aten::mv": _product(0, 1),
    "aten::dot": _product(0, 1),
    "aten::vdot": _product(0, 1),
    "aten::_int_mm": _product(0, 1),
    "aten::_scaled_mm_v2": _product(0, 1),
    "aten::_weight_int8pack_mm": _linear(0, 1),
    "aten::_weight_int4pack_mm": _to_output,
    "aten::_weight_int4pack_mm_for_cpu": _to_output,
    "aten::_dyn_quant_matmul_4bit": _to_output,
    "aten::linalg_solve_triangular": _solve_triangular,
    "aten::_grouped_mm": _grouped(2),
    "aten::_scaled_grouped_mm": _grouped(4),
    "aten::_scaled_grouped_mm_v2": _grouped(8),
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention(*_FORWARD, 0),
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _attention(*_BACKWARD, 1),
    "aten::_scaled_dot_product_fused_attention_overrideable": _attention(*_FORWARD, 0),
    "aten::_scaled_dot_product_fused_attention_overrideable_backward": _attention(*_BACKWARD, 1),
    "aten::_scaled_dot_product_attention_math_for_mps": _attention(*_FORWARD, 0),
    "mkldnn::_linear_pointwise": _linear(0, 1),
    "bitsandbytes::gemm_4bit": _to_output,
    "bitsandbytes::gemv_4bit": _to_output,
    "bitsandbytes::int8_linear_matmul": _to_output,
    "bitsandbytes::int8_scaled_mm": _to_output,
    "bitsandbytes::int8_mixed_scaled_mm": _linear(1, 2),
    "transformers::grouped_mm_fallback": _grouped(2),
    "transformers::grouped_mm_fallback_backward": lambda args, _, __: 2 * _grouped(2)(args, {}, None),
}


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)
