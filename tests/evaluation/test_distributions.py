"""Student's t and the binomial distribution against scipy."""

from __future__ import annotations

import math

import pytest
import scipy.stats

from rrcli.evaluation import distributions

DEGREES = (0.7, 1, 2, 2.5, 5, 30, 1e3, 1e5, 1e9)


@pytest.mark.parametrize("df", DEGREES)
@pytest.mark.parametrize("t", [0.0, 1e-6, 0.1, 1.0, 2.0, -5.0, 50.0, 1e4])
def test_tail(df: float, t: float) -> None:
    assert distributions.t_tail(t, df) == pytest.approx(
        2 * scipy.stats.t.sf(abs(t), df), rel=1e-5 if df > 1e5 else 1e-7, abs=1e-300
    )


@pytest.mark.parametrize("df", DEGREES)
@pytest.mark.parametrize("confidence", [0.1, 0.5, 0.9, 0.95, 0.975, 0.9999, 1 - 1e-9])
def test_quantile(df: float, confidence: float) -> None:
    assert distributions.t_quantile(confidence, df) == pytest.approx(
        scipy.stats.t.isf((1 - confidence) / 2, df), rel=1e-7
    )


def test_edges() -> None:
    assert distributions.t_quantile(0.95, math.inf) == pytest.approx(scipy.stats.norm.ppf(0.975))
    assert (distributions.t_quantile(1.0, 3), distributions.t_quantile(0.0, 3), distributions.t_tail(math.inf, 3)) == (
        math.inf,
        0,
        0,
    )


@pytest.mark.parametrize(
    ("least", "n", "p"), [(0, 5, 0.3), (6, 5, 0.3), (3, 5, 0.3), (520, 1000, 0.5), (90, 100, 0.99)]
)
def test_binomial_tail(least: int, n: int, p: float) -> None:
    assert distributions.binomial_tail(least, n, p) == pytest.approx(scipy.stats.binom.sf(least - 1, n, p), rel=1e-9)
