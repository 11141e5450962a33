"""Attention by products is that of torch, with its gradients, and is taken only where it is faster."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from families import build
from rrcli.recursion import attention as module
from rrcli.recursion.attention import attention, attention_by_products
from rrcli.recursion.flops import FlopCounter
from rrcli.reporting import Silent
from rrcli.services.train import train
from rrcli.settings import TrainSettings

BATCH, HEADS, LENGTH, WIDTH = 2, 6, 12, 16


@pytest.fixture
def taken(monkeypatch):
    """Record the shapes of the queries that are computed by products."""
    shapes, real = [], module._bias

    def bias(query, *args):
        shapes.append(tuple(query.shape))
        return real(query, *args)

    monkeypatch.setattr(module, "_bias", bias)
    return shapes


def inputs(groups: int, dtype: torch.dtype = torch.bfloat16, length: int = LENGTH) -> list[torch.Tensor]:
    torch.manual_seed(0)
    heads = (HEADS, groups, groups)
    return [torch.randn(BATCH, n, length, WIDTH).to(dtype).requires_grad_() for n in heads]


def masks() -> dict[str, dict]:
    allowed = torch.ones(BATCH, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    allowed[0, :, 4:, :3] = False
    added = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    of_heads = added.expand(BATCH, HEADS, LENGTH, LENGTH) + torch.linspace(0, 1, HEADS).view(1, HEADS, 1, 1)
    return {
        "none": {},
        "causal": {"is_causal": True},
        "booleans": {"attn_mask": allowed},
        "numbers": {"attn_mask": added},
        "numbers for each head": {"attn_mask": of_heads},
        "two dimensions": {"attn_mask": added[1, 0], "scale": 0.3},
    }


@pytest.mark.parametrize("groups", [HEADS, 2])
@pytest.mark.parametrize("mask", masks())
def test_it_and_its_gradients_agree_with_double_precision(mask, groups, taken):
    options = masks()[mask] | {"enable_gqa": groups < HEADS}
    ours = inputs(groups)
    exact = [tensor.detach().double().requires_grad_() for tensor in ours]
    if options.get("attn_mask") is not None and options["attn_mask"].is_floating_point():
        expected = F.scaled_dot_product_attention(*exact, **options | {"attn_mask": options["attn_mask"].double()})
    else:
        expected = F.scaled_dot_product_attention(*exact, **options)
    found = attention(*ours, **options)
    assert taken
    assert found.dtype == torch.bfloat16
    away = torch.randn(found.shape)
    found.backward(away.bfloat16())
    expected.backward(away.bfloat16().double())
    torch.testing.assert_close(found.double(), expected, rtol=0.02, atol=0.02)
    for one, other in zip(ours, exact, strict=True):
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=0.05, atol=0.05)


def test_what_it_keeps_for_the_backward_pass_does_not_grow_with_the_square_of_the_length():
    query, key, value = inputs(HEADS, length=64)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda x: x):
        attention(query, key, value)
    assert kept
    assert all(shape[-2:] != (64, 64) for shape in kept)


def test_what_it_is_not_faster_for_stays_with_torch(taken):
    attention(*inputs(HEADS, torch.float32))
    attention(*inputs(HEADS), dropout_p=0.1)
    attention(*inputs(HEADS, length=module.MOST_POSITIONS + 1))
    with torch.no_grad():
        attention(*inputs(HEADS))
    assert taken == []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attention(*inputs(HEADS, torch.float32)).dtype == torch.bfloat16
    assert len(taken) == 1


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3"])
def test_a_model_trains_by_it_as_by_torch(family, taken):
    model, ids = build(family), torch.arange(3, 35).view(2, 16)
    losses, gradients, flops = [], [], []
    for ours in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16), FlopCounter() as counter:
            context = attention_by_products() if ours else torch.enable_grad()
            with context:
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
                loss.backward()
        losses.append(float(loss.detach()))
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        flops.append(counter.checked())
    assert len(taken) == model.config.num_hidden_layers
    assert F.scaled_dot_product_attention is module._torch_attention
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert F.cosine_similarity(gradients[0], gradients[1], dim=0) > 0.99
    assert flops[1] == flops[0]


def test_training_in_bfloat16_uses_it(taken, tmp_path):
    settings = TrainSettings(steps=1, batch_size=2, eval_interval=0, device="cpu")
    train(settings, "vanilla", tmp_path, Silent())
    assert taken == []
    train(TrainSettings(**vars(settings) | {"dtype": "bfloat16", "run_name": "half"}), "vanilla", tmp_path, Silent())
    assert taken
