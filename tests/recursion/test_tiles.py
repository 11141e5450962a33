"""Cross-entropy in tiles is cross-entropy, and its most likely token is argmax's, ties and all."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rrcli.recursion import tiles
from rrcli.recursion.readout import _cross_entropy


def plain(rows, projection):
    return projection(rows)


def made(vocabulary=97, hidden=8, n=23, bias=False, dtype=torch.float32):
    """Return a head, rows and targets of small integers: products are exact, and many logits are equal."""
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(hidden, vocabulary, bias=bias, dtype=dtype)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randint(-1, 2, parameter.shape, generator=generator))
    rows = torch.randint(-1, 2, (n, hidden), generator=generator).to(dtype)
    return head, rows, torch.randint(0, vocabulary, (n,), generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (5, 16), (23, 97), (512, 2048), (7, 96)])
@torch.no_grad()
def test_any_tile_gives_the_loss_and_the_first_of_equals(height, width, bias, dtype, monkeypatch):
    monkeypatch.setattr(tiles, "ROWS", height)
    monkeypatch.setattr(tiles, "COLUMNS", {"cpu": width})
    head, rows, targets = made(bias=bias, dtype=dtype)
    whole = head(rows).float()
    assert (whole == whole.amax(1, keepdim=True)).sum(1).max() > 1, "nothing is tied"
    sizes = []

    def logits_by(part, projection):
        logits = projection(part)
        sizes.append(logits.numel())
        return logits

    losses, top = tiles.token_losses(head, logits_by, rows, targets=targets)
    torch.testing.assert_close(losses, F.cross_entropy(whole, targets, reduction="none"))
    assert losses.dtype == torch.float32
    assert torch.equal(top.prediction, whole.argmax(1))
    best = whole.float().softmax(1).topk(2, dim=1).values
    torch.testing.assert_close(top.probability, best[:, 0])
    torch.testing.assert_close(top.margin, best[:, 0] - best[:, 1], atol=1e-6, rtol=1e-4)
    assert max(sizes) <= height * width


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
@torch.no_grad()
def test_logits_of_any_size_neither_overflow_nor_vanish(scale, monkeypatch):
    monkeypatch.setattr(tiles, "COLUMNS", {"cpu": 16})
    head, rows, targets = made()
    losses, _ = tiles.token_losses(
        head, lambda part, projection: projection(part) * scale - 5 * scale, rows, targets=targets
    )
    expected = F.cross_entropy(head(rows).double() * scale, targets, reduction="none")
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5 * scale)


@torch.no_grad()
def test_a_large_vocabulary_costs_no_digits():
    """In tiles and in whole rows; plain log_softmax in fp32 is off by 1e-5 here, on a CPU."""
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(16, 49_152, bias=False)
    head.weight.normal_(generator=generator)
    rows, targets = torch.randn(64, 16, generator=generator), torch.randint(0, 49_152, (64,), generator=generator)
    expected = F.cross_entropy(head(rows).double(), targets, reduction="none")
    for losses in (tiles.token_losses(head, plain, rows, targets=targets)[0], _cross_entropy(head(rows), targets)):
        # The mean, as what rounds both ways does no harm.
        assert abs(float((losses.double() - expected).mean())) < 1e-6


@torch.no_grad()
def test_tokens_that_a_model_rules_out_have_no_share(monkeypatch):
    monkeypatch.setattr(tiles, "COLUMNS", {"cpu": 16})
    head, rows, _ = made(bias=True)
    head.bias[:32] = -torch.inf  # two whole tiles, the first ones
    targets = torch.arange(32, 32 + len(rows))
    losses, top = tiles.token_losses(head, plain, rows, targets=targets)
    torch.testing.assert_close(losses, F.cross_entropy(head(rows), targets, reduction="none"))
    assert torch.equal(top.prediction, head(rows).argmax(1))


@torch.no_grad()
def test_a_broken_logit_breaks_the_loss(monkeypatch):
    monkeypatch.setattr(tiles, "COLUMNS", {"cpu": 16})
    head, rows, targets = made()
    head.weight[40] = torch.nan
    losses, _ = tiles.token_losses(head, plain, rows, targets=targets)
    assert losses.isnan().all()


def test_only_a_plain_projection_with_weights_is_tiled():
    class Own(nn.Linear):
        pass

    assert tiles.can_be_tiled(nn.Linear(4, 8))
    assert not tiles.can_be_tiled(Own(4, 8))
    assert not tiles.can_be_tiled(nn.Linear(4, 8, device="meta"))
    assert not tiles.can_be_tiled(nn.utils.parametrizations.weight_norm(nn.Linear(4, 8)))
