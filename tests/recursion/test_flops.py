"""Counted FLOPs against closed formulas: of single operators, of models forward and backward, and what is unknown."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rrcli
from families import FAMILIES, build, tokens, wake
from rrcli import upstream
from rrcli.errors import RRError
from rrcli.recursion.flops import UNSEEN, counted_flops, may_be_heavy
from rrcli.recursion.lora import add_lora

BATCH, LENGTH = 2, 12
POSITIONS = BATCH * LENGTH
# Products of attention: scores and values forward; five backward, as fused kernels compute the scores again.
FORWARD, BACKWARD = 2, 5


def counted(run: Any) -> int:
    with counted_flops() as counter:
        run()
    return counter.checked()


def train(model: Any, **options: Any) -> None:
    """Run forward and backward."""
    ids = tokens(BATCH, LENGTH)
    model.train()
    model(input_ids=ids, labels=ids, use_cache=False, **options).loss.backward()


def weights(module: Any, active: float = 1) -> float:
    """Return how many weights multiply one position; of experts, whose weights have three axes, a share is active."""
    kept = {
        name: p for name, p in module.named_parameters() if p.dim() > 1 and "bias" not in name and "conv" not in name
    }
    return sum(p.numel() * (active if p.dim() == 3 else 1) for p in kept.values())


def of_cell(recursion: Any) -> int:
    return recursion.cell.w_in.weight.numel() + recursion.cell.w_out.weight.numel()


def pairs(model: Any, layers: int = 4) -> int:
    """Return the multiply-adds of one product of attention, over all pairs of positions, in so many layers."""
    return layers * BATCH * LENGTH * LENGTH * model.config.num_attention_heads * model.config.head_dim


@pytest.mark.parametrize(
    ("family", "active", "attention"),
    [
        ("llama", 1, FORWARD + BACKWARD),  # with fewer heads of keys than of queries
        ("mixtral", 0.5, FORWARD + BACKWARD),
        ("qwen3_moe", 0.5, FORWARD + BACKWARD),
        ("gpt_oss", 0.5, 3 * FORWARD),  # its attention is made of plain products: the scores are kept
    ],
)
def test_training_a_model(family: str, active: float, attention: int) -> None:
    """Each weight multiplies forward, for the gradient of its input and for its own; so do two factors of attention."""
    model = build(family)
    products = weights(model.model.layers, active) + weights(model.lm_head)
    assert counted(lambda: train(model)) == 2 * (3 * POSITIONS * products + attention * pairs(model))


@pytest.mark.filterwarnings("ignore:_compile flag:DeprecationWarning")  # of transformers, about flex attention
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
@torch.no_grad()
def test_a_forward_costs_the_same_by_every_kernel(implementation: str) -> None:
    model = build("llama", attn_implementation=implementation)
    expected = 2 * (POSITIONS * (weights(model.model.layers) + weights(model.lm_head)) + FORWARD * pairs(model))
    if implementation == "flex_attention" and implementation not in upstream.torch_flop_formulas():
        with pytest.raises(RRError, match="what rr cannot count: flex_attention"):
            counted(lambda: model(input_ids=tokens(BATCH, LENGTH)))
        return
    assert counted(lambda: model(input_ids=tokens(BATCH, LENGTH))) == expected


@torch.no_grad()
def test_linear_attention_and_its_convolution() -> None:
    model = build("qwen3_next")
    config = model.config
    chunk, keys, values = (
        64,
        config.linear_key_head_dim,
        config.linear_value_head_dim,
    )  # positions are padded to a chunk
    heads, kernel = config.linear_num_value_heads, config.linear_conv_kernel_dim
    of_chunk = 2 * chunk**2 * keys + chunk**2 * (keys + values) / 2 + 3 * chunk * keys * values + chunk**2 * values
    channels = 2 * config.linear_num_key_heads * keys + heads * values
    convolution = BATCH * (LENGTH + kernel - 1) * channels * kernel
    products = POSITIONS * (weights(model.model.layers, 0.5) + weights(model.lm_head))
    expected = 2 * (products + FORWARD * pairs(model, 2) + 2 * (BATCH * heads * of_chunk + convolution))
    assert counted(lambda: model(input_ids=tokens(BATCH, LENGTH), use_cache=False)) == expected


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("span", [None, (1, 3)], ids=str)
def test_a_pass_costs_its_layers_and_its_cell(span: tuple[int, int] | None, depth: int, checkpointed: bool) -> None:
    model = build("llama")
    recursion = wake(rrcli.attach(model, rrcli.RecursionConfig(max_steps=2, span=span)))
    recursion.depth = depth
    if checkpointed:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    layers = 4 + depth * (4 if span is None else 2)
    of_layers = layers * weights(model.model.layers) / 4
    others = weights(model.lm_head) + depth * of_cell(recursion)
    products = (3 + checkpointed) * of_layers + 3 * others
    if checkpointed:  # a layer is recomputed up to its last product, whose result is not needed
        products -= layers * weights(model.model.layers[0].mlp.down_proj)
    attention = FORWARD * (1 + checkpointed) + BACKWARD
    expected = 2 * (POSITIONS * products + attention * pairs(model, layers))
    assert counted(lambda: train(model)) == expected


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("depth", [1, 2])
def test_frozen_weights_have_no_gradient_to_compute(depth: int, lora: bool) -> None:
    """Phases a and b: pass 0 runs forward alone; in later passes the base hands gradients on and has none itself."""
    model = build("llama")
    recursion = wake(rrcli.attach(model, rrcli.RecursionConfig(max_steps=2)))
    recursion.depth = depth
    model.requires_grad_(False)
    recursion.requires_grad_(True)
    base, adapters = weights(model.model.layers), 0.0
    if lora:
        add_lora(model, rank=2, alpha=4, seed=0)
        adapters = sum(p.numel() for p in model.lora.parameters())
    products = base + depth * (2 * base + 3 * adapters + 3 * of_cell(recursion)) + 2 * weights(model.lm_head)
    attention = FORWARD + depth * (FORWARD + BACKWARD)
    assert counted(lambda: train(model)) == 2 * (POSITIONS * products + attention * pairs(model))


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("transposed", [False, True])
def test_convolutions_are_counted_within_their_groups(groups: int, transposed: bool) -> None:
    layer = (nn.ConvTranspose1d if transposed else nn.Conv1d)(6, 12, 4, groups=groups)
    rows = torch.randn(BATCH, 6, LENGTH, requires_grad=True)
    positions = LENGTH if transposed else LENGTH - 3
    once = 2 * BATCH * positions * 6 * 12 * 4 / groups
    assert counted(lambda: layer(rows)) == once
    assert counted(lambda: layer(rows).sum().backward()) == 3 * once
    assert counted(lambda: layer(rows.detach()).sum().backward()) == 2 * once


def grouped(kind: str) -> Any:
    """Return a product of two groups: of 3 and 4 rows (or columns, or summed positions), with one row left over."""
    ends = torch.tensor([3, 7], dtype=torch.int32)
    left, right = {
        "rows": (torch.randn(8, 16), torch.randn(2, 16, 32)),
        "columns": (torch.randn(2, 16, 32), torch.randn(32, 8)),
        "summed": (torch.randn(16, 8), torch.randn(8, 32)),
    }[kind]
    return torch.ops.aten._grouped_mm(left, right, ends)


A, B, V = torch.randn(3, 4), torch.randn(4, 5), torch.randn(4)
OPERATORS = {
    "linear": (lambda: F.linear(A, B.T), 2 * 3 * 4 * 5),
    "einsum": (lambda: torch.einsum("ij,jk->ik", A, B), 2 * 3 * 4 * 5),
    "in place": (lambda: torch.zeros(3, 5).addmm_(A, B), 2 * 3 * 4 * 5),
    "into": (lambda: torch.mm(A, B, out=torch.zeros(3, 5)), 2 * 3 * 4 * 5),
    "vector": (lambda: A @ V, 2 * 3 * 4),
    "scalar": (lambda: V @ V, 2 * 4),
    "triangle": (lambda: torch.linalg.solve_triangular(torch.eye(4), B, upper=False), 4 * 4 * 5),
    "rows of experts": (lambda: grouped("rows"), 2 * 7 * 16 * 32),
    "columns of experts": (lambda: grouped("columns"), 2 * 16 * 32 * 7),
    "weights of experts": (lambda: grouped("summed"), 2 * 16 * 7 * 32),
    "experts elsewhere": (
        lambda: torch.ops.transformers.grouped_mm_fallback(A, torch.stack([B, B]), torch.tensor([1, 3])),
        2 * 3 * 4 * 5,
    ),
    "elementwise": (lambda: (A * A).sum().exp().sqrt(), 0),
}  # fmt: skip


@pytest.mark.parametrize("operator", OPERATORS)
@torch.no_grad()
def test_operators(operator: str) -> None:
    run, expected = OPERATORS[operator]
    assert counted(run) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_runs_what_is_not_counted(family: str) -> None:
    assert counted(lambda: train(build(family))) > 6 * POSITIONS * 97 * 32


def test_what_has_no_formula_is_named() -> None:
    """An operator of torch, one of another package, and a kernel that writes where torch does not see it."""

    def twice(rows: torch.Tensor) -> torch.Tensor:
        return rows + rows

    library = torch.library.Library("foreign", "DEF")
    library.define("product(Tensor rows) -> Tensor")
    library.impl("product", twice, "CompositeExplicitAutograd")

    def unseen() -> torch.Tensor:
        rows = torch.empty(3, 4)
        rows.numpy()[:] = 1
        return rows.view(4, 3) + 1

    found = {}
    for name, run in {
        "aten::_cdist_forward": lambda: torch.cdist(A, A),
        "foreign::product": lambda: torch.ops.foreign.product(A),
        UNSEEN: unseen,
    }.items():
        with torch.no_grad(), counted_flops() as counter:
            run()
        found[name] = counter.uncounted
        with pytest.raises(RRError, match=f"cannot count: {name}"):
            counter.checked()
    assert found == {name: {name} for name in found}


@torch.no_grad()
def test_an_empty_tensor_that_torch_fills_is_no_kernel() -> None:
    def fill() -> None:
        for make in (torch.empty, torch.zeros(1).new_empty, lambda *shape: torch.empty_like(torch.zeros(shape))):
            one, other = make(3, 4), make(3, 4)
            one.copy_(A)
            torch.add(A, 1, out=other)
            one[0].add_(other.view(4, 3)[0, 0])

    assert counted(fill) == 0


def test_which_operators_may_be_heavy() -> None:
    heavy = (
        "_foreach_mm _sparse_mm _convolution_double_backward conv_tbc lstm _fft_r2c _flash_attention_new cholesky_solve"
    )
    light = (
        "add_ rms_norm linalg_vector_norm embedding resolve_conj cummax hamming_window upsample_linear1d slice_inverse"
    )
    assert [name for name in heavy.split() if not may_be_heavy(f"aten::{name}")] == []
    assert [name for name in light.split() if may_be_heavy(f"aten::{name}")] == []
    assert may_be_heavy("flash_attn::forward")
    assert may_be_heavy("bitsandbytes::gemv_4bit")
    assert not any(map(may_be_heavy, ["c10d::allreduce_", "_c10d_functional::wait_tensor", "prim::device"]))
    assert not may_be_heavy("bitsandbytes::dequantize_4bit")


def test_without_torchs_own_formulas_products_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    upstream.torch_flop_formulas.cache_clear()
    monkeypatch.delattr(torch.utils.flop_counter, "flop_registry")
    try:
        with torch.no_grad(), counted_flops() as counter:
            torch.mm(A, B)
        assert counter.uncounted == {"aten::mm"}
    finally:
        upstream.torch_flop_formulas.cache_clear()
