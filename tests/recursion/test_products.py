"""Matrix products through oneDNN are torch's up to rounding, and only where they can be."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from families import Letters, build, wake
from rrcli.evaluation.decoding import decode
from rrcli.recursion import products
from rrcli.recursion.chunked_decoding import ChunkedDecoding
from rrcli.recursion.config import RecursionConfig
from rrcli.recursion.engine import attach
from rrcli.recursion.flops import FlopCounter
from rrcli.recursion.products import linear, through_onednn, usable
from rrcli.recursion.readout import Readout
from rrcli.reporting import Silent
from rrcli.services import train as train_service
from rrcli.services.surgery import surgery
from rrcli.services.train import _slow_format, train
from rrcli.settings import SurgerySettings, TrainSettings, with_changes

needs_onednn = pytest.mark.skipif(not usable(), reason="this torch or this processor has no oneDNN")


@pytest.fixture
def taken(monkeypatch):
    """Record the shapes of the products that oneDNN is given, of however few weights."""
    shapes, real = [], products._by_onednn

    def by_onednn(rows, weight, bias):
        shapes.append((tuple(rows.shape), tuple(weight.shape)))
        return real(rows, weight, bias)

    monkeypatch.setattr(products, "_by_onednn", by_onednn)
    monkeypatch.setattr(products, "FEWEST_WEIGHTS", 1)
    return shapes


@needs_onednn
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(16, 48), (2, 40, 48), (3, 1, 64, 48)])
@torch.no_grad()
def test_products_agree_with_double_precision(shape, bias, taken):
    torch.manual_seed(0)
    layer, rows = nn.Linear(48, 80, bias=bias), torch.randn(shape)
    with through_onednn(layer):
        found = layer(rows)
    assert taken == [(shape, (80, 48))]
    torch.testing.assert_close(found.double(), layer.double()(rows.double()), rtol=1e-5, atol=1e-5)


@needs_onednn
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_and_their_flops_are_those_of_torch(bias, frozen, taken):
    torch.manual_seed(0)
    layer, rows = nn.Linear(48, 80, bias=bias).double(), torch.randn(2, 16, 48, dtype=torch.float64)
    layer.requires_grad_(not frozen)
    counted, gradients = [], []
    for dtype in (torch.float64, torch.float32):
        layer, rows = layer.to(dtype), rows.detach().to(dtype).requires_grad_()
        layer.zero_grad()
        with through_onednn(layer), FlopCounter() as counter:
            (layer(rows) ** 2).sum().backward()
        gradients.append([rows.grad, *(p.grad for p in layer.parameters() if not frozen)])
        counted.append(counter.checked())
    assert len(taken) == 2  # the product, and the gradient of the rows
    assert counted[0] == counted[1] == 2 * 32 * 48 * 80 * (2 if frozen else 3)
    for found, expected in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=1e-4)


def test_what_it_cannot_do_stays_with_torch(taken, monkeypatch):
    layer, rows = nn.Linear(48, 80), torch.randn(32, 48)
    with torch.no_grad(), through_onednn(layer):
        layer(rows[:1])  # one row
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(rows).dtype == torch.bfloat16
    with torch.no_grad():
        linear(rows, torch.randn(48, 80).T)  # not contiguous
        for dtype in (torch.bfloat16, torch.float64):
            other = nn.Linear(48, 80, dtype=dtype)
            with through_onednn(other):
                other(rows.to(dtype))
        layer(rows)  # left
        monkeypatch.setattr(products, "FEWEST_WEIGHTS", 48 * 80 + 1)
        with through_onednn(layer):
            layer(rows)  # small
    assert taken == []


@needs_onednn
@torch.no_grad()
def test_a_forward_that_somebody_replaced_is_kept(taken):
    """As accelerate does for weights that lie elsewhere; and where it is entered twice, the first one ends it."""
    mine, plain, rows = nn.Linear(48, 80), nn.Linear(48, 80), torch.randn(32, 48)
    mine.forward = lambda rows: rows[:, :1]
    both = nn.ModuleList([mine, plain])
    with through_onednn(both), through_onednn(both):
        assert mine(rows).shape == (32, 1)
        plain(rows)
    assert len(taken) == 1
    assert "forward" in vars(mine)
    assert "forward" not in vars(plain)


@needs_onednn
@pytest.mark.parametrize("what", ["scoring", "refining", "decoding"])
@torch.no_grad()
def test_batches_use_it_and_a_plain_forward_does_not(what, taken):
    model = build("llama")
    ids = torch.arange(3, 35)[None]
    model(ids)
    assert taken == []
    if what == "scoring":
        mask = torch.ones_like(ids)
        Readout(model).score(ids, mask, mask.bool(), targets=ids[0])
    elif what == "refining":
        wake(attach(model, RecursionConfig(max_steps=1))).depth = 1
        model.generate(ids, max_new_tokens=12, do_sample=False, custom_generate=ChunkedDecoding())
    else:
        list(decode(model, Letters(), [[3, 4, 5], [6, 7, 8]], depth=0, new_tokens=4, batch_tokens=100))
    assert len(taken) > model.config.num_hidden_layers


@needs_onednn
def test_training_uses_it_and_counts_the_same_flops(taken, tmp_path, monkeypatch):
    settings = TrainSettings(steps=2, batch_size=2, eval_interval=0, device="cpu", dtype="float32")
    surgery(SurgerySettings(), tmp_path, Silent())
    by_onednn = train(settings, "recursive", tmp_path, Silent())
    assert taken
    before = len(taken)
    monkeypatch.setattr(products, "FEWEST_WEIGHTS", 10**9)
    by_torch = train(with_changes(settings, run_name="torch"), "recursive", tmp_path, Silent())
    assert len(taken) == before
    assert by_onednn.flops == by_torch.flops > 0
    names = load_file(by_torch.checkpoint / "recursion.safetensors")
    for name, tensor in load_file(by_onednn.checkpoint / "recursion.safetensors").items():
        torch.testing.assert_close(tensor, names[name], rtol=1e-3, atol=1e-4)


def test_a_gain_in_speed_is_a_ratio_of_times():
    assert 0 < products.bfloat16_gain() < 100


@pytest.mark.parametrize(
    ("gain", "dtype", "said"), [(3.0, "auto", True), (1.1, "auto", False), (3.0, "float32", False)]
)
def test_training_says_where_bfloat16_would_be_faster(gain, dtype, said, monkeypatch):
    model = build("llama")
    monkeypatch.setattr(products, "bfloat16_gain", lambda: gain)
    assert _slow_format(model, TrainSettings(dtype=dtype)) == ""  # so small a model
    monkeypatch.setattr(train_service, "WORTH_A_CHOICE", 1)
    assert ("--dtype bfloat16" in _slow_format(model, TrainSettings(dtype=dtype))) == said
