"""Matrix products through oneDNN are torch's up to rounding, and only where they can be."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rrcli
from rrcli.recursion import products
from rrcli.recursion.products import OneDNN
from rrcli.recursion.readout import Readout


@pytest.fixture
def taken(monkeypatch):
    """Record the shapes of the products that oneDNN is given."""
    shapes = []
    real = products.linear

    def linear(rows, weight, bias=None):
        shapes.append((tuple(rows.shape), tuple(weight.shape)))
        return real(rows, weight, bias)

    monkeypatch.setattr(products, "linear", linear)
    return shapes


@pytest.mark.skipif(not OneDNN().usable, reason="this torch or this processor has no oneDNN")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(16, 48), (2, 40, 48), (3, 1, 64, 48)])
@torch.no_grad()
def test_products_agree_with_double_precision(shape, bias, taken):
    torch.manual_seed(0)
    layer, rows = nn.Linear(48, 80, bias=bias), torch.randn(shape)
    with OneDNN():
        found = layer(rows)
    assert taken == [(shape, (80, 48))]
    torch.testing.assert_close(found.double(), layer.double()(rows.double()), rtol=1e-5, atol=1e-5)


def test_what_it_cannot_do_stays_with_torch(taken):
    layer, rows = nn.Linear(48, 80), torch.randn(32, 48)
    with OneDNN():
        layer(rows).sum().backward()  # gradients
        assert layer.weight.grad is not None
        with torch.no_grad():
            layer(rows[:1])  # one row
            F.linear(rows, torch.randn(48, 80).T)  # not contiguous
            nn.Linear(48, 80, dtype=torch.bfloat16)(rows.bfloat16())
            nn.Linear(48, 80, dtype=torch.float64)(rows.double())
    with torch.no_grad():
        layer(rows)  # left
    assert taken == []


@pytest.mark.skipif(not OneDNN().usable, reason="this torch or this processor has no oneDNN")
@pytest.mark.parametrize("what", ["scoring", "refining"])
@torch.no_grad()
def test_scoring_and_refining_use_it_and_a_plain_forward_does_not(what, taken):
    model, _ = rrcli.load("default", dtype="float32", device="cpu")
    ids = torch.arange(3, 35)[None]
    model(ids)
    assert taken == []
    if what == "scoring":
        mask = torch.ones_like(ids)
        Readout(model).score(ids, mask, mask.bool(), ids[0])
    else:
        recursion = rrcli.attach(model, rrcli.RecursionConfig(max_steps=1))
        recursion.depth = 1
        model.generation_config.eos_token_id = None  # or there may be nothing to refine
        model.generate(ids, max_new_tokens=12, do_sample=False, custom_generate=rrcli.ChunkedDecoding())
    assert len(taken) > model.config.num_hidden_layers
