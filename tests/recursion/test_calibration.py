"""The reliability of the boundary head, against a loop, against itself in parts, and where the answer is known."""

from __future__ import annotations

import inspect
import math

import pytest
import torch

from rrcli.recursion.calibration import BINS, errors, joined, reliability, table
from rrcli.recursion.config import LossWeights
from rrcli.settings import TrainSettings


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
            rows[min(BINS - 1, math.floor(p * BINS))].append(
                (p, gain <= LossWeights.margin, min(1.0, abs(gain - LossWeights.margin)))
            )
    bins = reliability(commit, losses)
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
    parts = [reliability(commit[:, part], losses[:, part]) for part in (slice(0, 150), slice(150, None))]
    whole = reliability(commit, losses)
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
    assert errors(reliability(commit, losses))["commit_ece"] < 0.02
    sure = torch.where(gains, 0.0, 1.0)
    assert errors(reliability(sure, losses))["commit_ece"] == 1
    assert [row["high"] for row in table(reliability(sure, losses))] == [0.1, 1.0]


def test_the_margin_is_the_one_of_training():
    default = inspect.signature(reliability).parameters["margin"].default
    assert TrainSettings().commit_margin == LossWeights().margin == default
