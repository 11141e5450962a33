"""Statistics against the implementations of statsmodels and scipy, to rounding."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import statsmodels.api as sm
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower
from statsmodels.stats.proportion import proportion_confint
from test_stats import corpus

from rrcli.evaluation import stats
from rrcli.evaluation.paired import PairedAnswers, PairedTotals


def clustered(values: np.ndarray, predictors: np.ndarray, documents: np.ndarray) -> tuple[float, float]:
    """Return the last coefficient of a regression of tokens, and its standard error clustered by document."""
    fit = sm.OLS(values, predictors).fit(cov_type="cluster", cov_kwds={"groups": documents})
    return float(fit.params[-1]), float(fit.bse[-1])


def token_values(rng: np.random.Generator, documents: int) -> tuple[np.ndarray, np.ndarray]:
    """Return nats of single tokens, alike within a document, and the number of each token's document."""
    sizes = rng.integers(5, 60, documents)
    owners = np.repeat(np.arange(documents), sizes)
    return (2 + 0.5 * rng.standard_normal(documents))[owners] + rng.standard_normal(len(owners)), owners


@pytest.mark.parametrize("documents", [2, 3, 40, 300])
def test_a_ratio_is_the_cluster_robust_mean_of_its_tokens(documents: int) -> None:
    """CR2 is above statsmodels' CR1 where documents are few, and the same where they are many."""
    values, owners = token_values(np.random.default_rng(documents), documents)
    found, error, _ = stats.ratio_error(np.bincount(owners, values), np.bincount(owners))
    mean, cr1 = clustered(values, np.ones((len(values), 1)), owners)
    assert found == pytest.approx(mean, rel=1e-12)
    assert error == pytest.approx(cr1, rel=0.35 if documents < 6 else 0.02)


def test_a_ratio_is_the_weighted_mean_with_robust_error() -> None:
    """HC2 is CR2 where each cluster is one observation."""
    totals, sizes = corpus(np.random.default_rng(0), 150)
    fit = sm.WLS(totals / sizes, np.ones(150), weights=sizes).fit(cov_type="HC2")
    value, error, _ = stats.ratio_error(totals, sizes)
    assert (value, error) == pytest.approx((fit.params[0], fit.bse[0]), rel=1e-9)


@pytest.mark.parametrize("cells", [(10, 3, 9, 20), (0, 0, 5, 0), (50, 31, 12, 7), (4, 6, 6, 4), (1, 80, 120, 3)])
def test_mcnemar_is_exact(cells: tuple[int, int, int, int]) -> None:
    both, only_a, only_b, neither = cells
    expected = mcnemar([[both, only_a], [only_b, neither]], exact=True).pvalue
    found = PairedAnswers(only_a, only_b, max(6, sum(cells)))
    assert found.p_value() == pytest.approx(min(1.0, expected), rel=1e-9)


@pytest.mark.parametrize(("hits", "n"), [(0, 5), (5, 5), (13, 40), (441, 750), (1, 9999)])
def test_wilson_is_the_score_interval(hits: int, n: int) -> None:
    found = stats.wilson(hits, n)
    assert (found.low, found.high) == pytest.approx(proportion_confint(hits, n, method="wilson"), abs=1e-12)


@pytest.mark.parametrize("count", [1, 2, 7, 40])
def test_holm_is_the_step_down_adjustment(count: int) -> None:
    p_values = (np.random.default_rng(count).random(count) ** 3).tolist()
    assert stats.holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1].tolist(), abs=1e-12)


@pytest.mark.parametrize(("alpha", "power"), [(0.05, 0.8), (0.01, 0.9)])
def test_the_smallest_detectable_mean_is_that_of_the_t_test(alpha: float, power: float) -> None:
    values = scipy.stats.zscore(np.random.default_rng(1).standard_normal(40), ddof=1)
    found = PairedTotals(values, np.zeros(40), np.ones(40)).detectable(alpha, power)
    assert found == pytest.approx(TTestPower().solve_power(nobs=40, alpha=alpha, power=power), rel=0.01)


@pytest.mark.parametrize("effect", [0.2, 0.5])
def test_documents_needed_are_those_of_the_t_test(effect: float) -> None:
    values = scipy.stats.zscore(np.random.default_rng(1).standard_normal(40), ddof=1)
    found = PairedTotals(values, np.zeros(40), np.ones(40)).needed(effect, 0.05)
    assert found is not None
    assert found.count == pytest.approx(TTestPower().solve_power(effect_size=effect, alpha=0.05, power=0.8), abs=2)
