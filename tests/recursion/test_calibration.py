"""The reliability of the boundary head, against a loop, against itself in parts, and where the answer is known."""

from __future__ import annotations

import math

import pytest
import torch

from families import build, tokens, wake
from rrcli import RecursionConfig, attach
from rrcli.evaluation.perplexity import _chunks
from rrcli.recursion.calibration import BINS, errors, joined, reliability, table
from rrcli.recursion.readout import Readout

MARGIN = 0.02


def random(seed=0, depth=2, n=400):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(depth, n, generator=generator), torch.rand(depth + 1, n, generator=generator) * 3


def test_bins_and_errors_are_those_of_a_loop():
    commit, losses = random()
    rows = [[] for _ in range(BINS)]
    for k in range(2):
        for t in range(400):
            gain = float(losses[k, t].double() - losses[k + 1, t].double())
            p = float(commit[k, t])
            rows[min(BINS - 1, math.floor(p * BINS))].append((p, gain <= MARGIN, min(1.0, abs(gain - MARGIN))))
    bins = reliability(commit, losses, MARGIN)
    for row, found in zip(rows, table(bins), strict=True):
        assert found["n"] == len(row)
        assert found["predicted"] == pytest.approx(sum(p for p, _, _ in row) / len(row))
        assert found["observed"] == pytest.approx(sum(label for _, label, _ in row) / len(row))
    plain = sum(abs(sum(p - label for p, label, _ in row)) for row in rows) / 800
    weight = sum(w for row in rows for _, _, w in row)
    weighted = sum(abs(sum(w * (p - label) for p, label, w in row)) for row in rows) / weight
    assert errors(bins) == {"commit_ece": pytest.approx(plain), "commit_ece_weighted": pytest.approx(weighted)}


def test_parts_add_up_to_the_whole():
    commit, losses = random(1)
    parts = [reliability(commit[:, part], losses[:, part], MARGIN) for part in (slice(0, 150), slice(150, None))]
    whole = reliability(commit, losses, MARGIN)
    for found, expected in zip(joined(joined([], parts[0]), parts[1]), whole, strict=True):
        assert found == pytest.approx(expected)
    assert joined([], []) == []
    assert errors([]) == {}


def test_a_head_that_is_right_has_no_error_and_one_that_is_sure_and_wrong_has_the_largest():
    n = 20_000
    commit = torch.rand(1, n, generator=torch.Generator().manual_seed(2))
    gains = torch.rand(1, n, generator=torch.Generator().manual_seed(3)) < commit
    # The next pass gains nothing exactly as often as the head says.
    losses = torch.cat([torch.ones(1, n), torch.where(gains, 1.0, 0.0)])
    assert errors(reliability(commit, losses, MARGIN))["commit_ece"] < 0.02
    sure = torch.where(gains, 0.0, 1.0)
    assert errors(reliability(sure, losses, MARGIN))["commit_ece"] == 1
    assert [row["high"] for row in table(reliability(sure, losses, MARGIN))] == [0.1, 1.0]


@pytest.mark.parametrize("margin", [0.0, 0.02, 0.4])
def test_a_perfect_head_has_no_error_at_the_margin_that_it_was_trained_with(margin):
    """Its label is whether the next pass gains more than the margin; a small one is not right for all heads."""
    losses = torch.rand(3, 5000, generator=torch.Generator().manual_seed(4))
    perfect = ((losses[:-1] - losses[1:]).double() <= margin).float()
    assert errors(reliability(perfect, losses, margin))["commit_ece"] == 0
    assert errors(reliability(perfect, losses, margin + 0.3))["commit_ece"] > 0.1


@torch.no_grad()
@pytest.mark.parametrize("margin", [0.3, None])
def test_an_evaluation_uses_the_margin_of_the_checkpoint(margin):
    model = build("llama")
    recursion = wake(attach(model, RecursionConfig(max_steps=2, commit_margin=margin)))
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    scores = Readout(model).score(ids, mask, mask.bool(), targets=ids.roll(-1, 1).flatten())
    commit = torch.stack(
        [recursion.head(*seen).sigmoid() for seen in zip(scores.states[:2], scores.tops[:2], strict=True)]
    )
    totals = _chunks(Readout(model), scores, ids.roll(-1, 1).flatten(), [12, 12])
    assert totals.reliability == ([] if margin is None else reliability(commit, scores.losses, margin))
    assert ("commit_ece" in totals.metrics()) == (margin is not None)
