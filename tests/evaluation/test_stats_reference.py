"""Statistics against the implementations of statsmodels and scipy, to rounding."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import statsmodels.api as sm
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import normal_sample_size_one_tail
from statsmodels.stats.proportion import proportion_confint
from test_stats import corpus, pairs_of, standard_error

from rrcli.evaluation import stats


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
    values, owners = token_values(np.random.default_rng(documents), documents)
    found = stats.ratio(np.bincount(owners, values), np.bincount(owners))
    mean, error = clustered(values, np.ones((len(values), 1)), owners)
    assert found.value == pytest.approx(mean, rel=1e-12)
    assert standard_error(found) == pytest.approx(error, rel=1e-9)


def test_a_ratio_is_the_weighted_mean_with_robust_error() -> None:
    totals, sizes = corpus(np.random.default_rng(0), 150)
    fit = sm.WLS(totals / sizes, np.ones(150), weights=sizes).fit(cov_type="HC1")
    found = stats.ratio(totals, sizes)
    assert (found.value, standard_error(found)) == pytest.approx((fit.params[0], fit.bse[0]), rel=1e-9)
    low, high = fit.conf_int()[0]
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-9)


@pytest.mark.parametrize("documents", [2, 30, 200])
def test_a_paired_difference_is_the_cluster_robust_effect_of_the_model(documents: int) -> None:
    """Every token twice, once under each model, regressed on which of the two it was."""
    rng = np.random.default_rng(documents)
    before, owners = token_values(rng, documents)
    after = before + 0.05 + (0.1 * rng.standard_normal(documents))[owners] + 0.2 * rng.standard_normal(len(owners))
    found = stats.paired_ratio_difference(*(np.bincount(owners, v) for v in (after, before)), np.bincount(owners))
    n = len(owners)
    model = np.column_stack([np.ones(2 * n), np.repeat([0.0, 1.0], n)])
    effect, error = clustered(np.concatenate([before, after]), model, np.concatenate([owners, owners]))
    assert found.value == pytest.approx(effect, rel=1e-9)
    # statsmodels multiplies by (N - 1) / (N - K) for the regression's degrees of freedom.
    assert standard_error(found) == pytest.approx(error / math.sqrt((2 * n - 1) / (2 * n - 2)), rel=1e-9)
    differences, _ = clustered(after - before, np.ones((n, 1)), owners)
    assert found.value == pytest.approx(differences, rel=1e-9)


@pytest.mark.parametrize("cells", [(10, 3, 9, 20), (0, 0, 5, 0), (50, 31, 12, 7), (4, 6, 6, 4), (1, 80, 120, 3)])
def test_mcnemar_is_exact(cells: tuple[int, int, int, int]) -> None:
    both, only_a, only_b, neither = cells
    expected = mcnemar([[both, only_a], [only_b, neither]], exact=True).pvalue
    assert stats.mcnemar(*pairs_of(*cells)).p_value == pytest.approx(min(1.0, expected), rel=1e-9)


@pytest.mark.parametrize(("hits", "n"), [(0, 5), (5, 5), (13, 40), (441, 750), (1, 9999)])
def test_wilson_is_the_score_interval(hits: int, n: int) -> None:
    found = stats.wilson(hits, n)
    assert (found.low, found.high) == pytest.approx(proportion_confint(hits, n, method="wilson"), abs=1e-12)


@pytest.mark.parametrize("count", [1, 2, 7, 40])
def test_holm_is_the_step_down_adjustment(count: int) -> None:
    p_values = (np.random.default_rng(count).random(count) ** 3).tolist()
    assert stats.holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1].tolist(), abs=1e-12)


@pytest.mark.parametrize("units", [2, 4, 9])
def test_few_units_have_the_exact_p_value_of_the_sign_flips(units: int) -> None:
    rng = np.random.default_rng(units)
    a, b = rng.standard_normal((2, units))
    expected = scipy.stats.permutation_test(
        (a, b), lambda x, y: np.mean(x - y), permutation_type="samples", n_resamples=np.inf
    ).pvalue
    assert stats.paired_bootstrap(a.tolist(), b.tolist()).p_value == pytest.approx(expected, abs=1e-12)


def test_the_bootstrap_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """With 60 units the percentile bootstrap covers 94 %; 800 trials know that to 0.8 % (one standard error)."""
    rng = np.random.default_rng(12)
    covered = []
    for seed in range(800):
        base = rng.standard_normal(60)
        found = stats.paired_bootstrap(base + 0.2 + 0.5 * rng.standard_normal(60), base, draws=500, seed=seed)
        covered.append(found.low <= 0.2 <= found.high)
    assert np.mean(covered) == pytest.approx(0.94, abs=0.024)


@pytest.mark.parametrize(("alpha", "power"), [(0.05, 0.8), (0.01, 0.9)])
def test_units_needed_is_the_sample_size_of_the_z_test(alpha: float, power: float) -> None:
    reach = 0.03 * stats.normal_quantile()
    found = stats.units_needed(stats.Estimate(0.02, 0.02 - reach, 0.02 + reach, 0.5, 100), alpha, power)
    deviation = 0.03 * math.sqrt(100)
    assert found == math.ceil(normal_sample_size_one_tail(0.02, power, alpha / 2, std_null=deviation))


@pytest.mark.parametrize(("value", "low", "high"), [(0.0, -1.0, 1.0), (1.0, -math.inf, math.inf), (1.0, 1.0, 1.0)])
def test_units_needed_at_its_edges(value: float, low: float, high: float) -> None:
    assert stats.units_needed(stats.Estimate(value, low, high, 1.0, 5)) is None
