"""Statistics of one stage, and corrections: against scipy, their definitions, and their promise under simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from rrcli.evaluation import stats

# -- shares ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hits", "n"), [(0, 1), (1, 1), (0, 20), (20, 20), (3, 17), (499, 1000), (1, 100_000)])
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.999])
def test_wilson_agrees_with_scipy(hits: int, n: int, confidence: float) -> None:
    expected = scipy.stats.binomtest(hits, n).proportion_ci(confidence, method="wilson")
    found = stats.wilson(hits, n, confidence)
    assert found.value == hits / n
    assert found.low == pytest.approx(expected.low, abs=1e-12)
    assert found.high == pytest.approx(expected.high, abs=1e-12)
    assert found.n == n


@given(st.integers(1, 500), st.data())
def test_wilson_stays_in_bounds_and_holds_its_value(n: int, data: st.DataObject) -> None:
    found = stats.wilson(data.draw(st.integers(0, n)), n)
    assert 0 <= found.low <= found.value + 1e-12
    assert found.value - 1e-12 <= found.high <= 1


def test_wilson_needs_a_trial() -> None:
    with pytest.raises(ValueError, match="at least one trial"):
        stats.wilson(0, 0)


# -- ratios over documents ---------------------------------------------------------------------------------------------


def corpus(rng: np.random.Generator, documents: int, spread: float = 0.4) -> tuple[np.ndarray, np.ndarray]:
    """Return nats and tokens of documents whose own level varies: tokens of one document are not independent.

    The logarithm of the length has a standard deviation of 1, as in real text: a few documents hold most tokens.
    """
    sizes = np.ceil(np.exp(4 + rng.standard_normal(documents)))
    return sizes * (2.0 + spread * rng.standard_normal(documents)), sizes


def jackknife(totals: np.ndarray, sizes: np.ndarray) -> float:
    left_out = (totals.sum() - totals) / (sizes.sum() - sizes)
    n = len(totals)
    return math.sqrt((n - 1) / n * ((left_out - left_out.mean()) ** 2).sum())


def test_ratio_standard_error_agrees_with_jackknife_and_bootstrap() -> None:
    rng = np.random.default_rng(1)
    totals, sizes = corpus(rng, 400)
    value, error, _ = stats.ratio_error(totals.tolist(), sizes.tolist())
    assert value == pytest.approx(totals.sum() / sizes.sum())
    assert error == pytest.approx(jackknife(totals, sizes), rel=0.03)
    chosen = rng.integers(0, 400, (2000, 400))
    spread = (totals[chosen].sum(1) / sizes[chosen].sum(1)).std(ddof=1)
    assert error == pytest.approx(spread, rel=0.08)


@pytest.mark.parametrize("documents", [6, 10, 40])
def test_ratio_interval_covers_the_truth_at_least_as_often_as_it_says(documents: int) -> None:
    """The normal interval covered 77, 83 and 91 %."""
    rng = np.random.default_rng(documents)
    covered = []
    for _ in range(1500):
        found = stats.ratio(*corpus(rng, documents))
        assert found.low is not None
        assert found.high is not None
        covered.append(found.low <= 2.0 <= found.high)
    assert 0.94 <= np.mean(covered) <= 0.995


def test_degrees_of_freedom_are_bell_and_mccaffreys() -> None:
    """Against the definition: moments of the quadratic form d'Ad with d of variance size²."""
    sizes = np.exp(np.random.default_rng(3).standard_normal(9))
    leverages = sizes / sizes.sum()
    residuals = np.eye(9) - np.outer(sizes, np.ones(9)) / sizes.sum()
    form = sizes[:, None] * (residuals.T @ np.diag(1 / (1 - leverages)) @ residuals) * sizes
    _, _, df = stats.ratio_error(sizes * 2.0, sizes)
    assert df == pytest.approx(np.trace(form) ** 2 / (form * form).sum())
    assert stats.ratio_error(list(range(1, 21)), [1.0] * 20)[2] == pytest.approx(19)


def test_equal_sizes_give_the_t_interval_of_a_mean() -> None:
    values = np.random.default_rng(4).standard_normal(12)
    found = stats.ratio(values.tolist(), [1.0] * 12)
    expected = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize("n", [1, 2, 5])
def test_too_few_documents_have_a_value_and_no_interval(n: int) -> None:
    found = stats.ratio([6.0] * n, [3.0] * n)
    assert found == stats.Estimate(2.0, None, None, n)


@pytest.mark.parametrize(
    ("totals", "sizes"), [([], []), ([1.0], [0.0]), ([1.0, 1.0], [2.0, -1.0]), ([math.nan], [1.0]), ([1.0], [1.0, 2.0])]
)
def test_what_no_document_can_be_is_an_error(totals: list[float], sizes: list[float]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - each has its own sentence
        stats.ratio(totals, sizes)


# -- many tests --------------------------------------------------------------------------------------------------------


def holm_by_definition(p_values: list[float]) -> list[float]:
    """For each hypothesis: the largest (m - rank)·p over all hypotheses with a p-value that is no larger."""
    ordered = sorted(p_values)
    m = len(p_values)
    return [min(1.0, max((m - j) * q for j, q in enumerate(ordered) if q <= p)) for p in p_values]


def rejected_step_down(p_values: list[float], alpha: float) -> set[int]:
    """Holm's procedure as he wrote it: walk up from the smallest p-value and stop at the first that is too large."""
    rejected: set[int] = set()
    for step, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        if p_values[index] > alpha / (len(p_values) - step):
            break
        rejected.add(index)
    return rejected


shares = st.floats(1e-6, 1.0)


@given(st.lists(shares, max_size=8))
def test_holm_agrees_with_its_definition(p_values: list[float]) -> None:
    assert stats.holm(p_values) == pytest.approx(holm_by_definition(p_values))


@given(st.lists(shares, min_size=1, max_size=8), st.floats(0.01, 0.2))
def test_holm_rejects_what_the_step_down_procedure_rejects(p_values: list[float], alpha: float) -> None:
    adjusted = stats.holm(p_values)
    if any(math.isclose(p, alpha, rel_tol=1e-9) for p in adjusted):
        return
    assert {i for i, p in enumerate(adjusted) if p <= alpha} == rejected_step_down(p_values, alpha)


def test_holm_on_a_worked_example() -> None:
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.2]) == [0.2]
    assert stats.holm([]) == []
    assert stats.holm([0.0, 0.0, 1.0]) == [0.0, 0.0, 1.0]


@given(st.permutations([0.001, 0.01, 0.02, 0.4, 0.9]))
def test_holm_keeps_the_order_it_was_given(order: list[float]) -> None:
    by_value = dict(zip(order, stats.holm(order), strict=True))
    assert by_value == pytest.approx({0.001: 0.005, 0.01: 0.04, 0.02: 0.06, 0.4: 0.8, 0.9: 0.9})


def test_holm_keeps_the_family_wise_error() -> None:
    rng = np.random.default_rng(12)
    wrong = [min(stats.holm(rng.random(6).tolist())) <= 0.05 for _ in range(4000)]
    assert np.mean(wrong) <= 0.06


@given(st.lists(shares, min_size=1, max_size=8), st.floats(0.01, 0.2))
def test_a_p_value_is_below_its_level_exactly_if_its_adjusted_value_is_below_alpha(
    p_values: list[float], alpha: float
) -> None:
    adjusted, levels = stats.holm(p_values), stats.holm_levels(p_values, alpha)
    if any(math.isclose(p, alpha, rel_tol=1e-9) for p in adjusted):
        return
    assert [p <= level for p, level in zip(p_values, levels, strict=True)] == [p <= alpha for p in adjusted]


def test_the_levels_of_a_worked_example() -> None:
    assert stats.holm_levels([0.03, 0.001], 0.05) == [0.05, 0.025]
    assert stats.holm_levels([0.03, 0.2, 0.001], 0.05) == pytest.approx([0.025, 0.025, 0.05 / 3])
