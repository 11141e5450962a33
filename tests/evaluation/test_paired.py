"""Tests and intervals of paired differences: they agree with each other, with scipy, and with what they promise."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from test_stats import corpus

from rrcli.evaluation import paired, stats
from rrcli.evaluation.paired import PairedAnswers, PairedTotals


def p_of(evidence: paired.Evidence, null: float = 0.0) -> float:
    p_value = evidence.p_value(null)
    assert p_value is not None
    return p_value


def interval_of(evidence: paired.Evidence, alpha: float = 0.05) -> tuple[float, float]:
    found = evidence.interval(alpha)
    assert found is not None
    return found


# -- documents ---------------------------------------------------------------------------------------------------------


def test_two_documents_that_differ_alike_are_no_evidence() -> None:
    """A normal test gave p = 0.0 here."""
    found = PairedTotals([101, 101.01], [100, 100], [100, 100])
    assert found.value == pytest.approx(0.01005)
    assert (found.p_value(), found.interval(0.05)) == (None, None)


@pytest.mark.parametrize("n", [6, 9, 12])
def test_few_documents_have_the_exact_p_value_of_the_sign_flips(n: int) -> None:
    rng = np.random.default_rng(n)
    totals, sizes = corpus(rng, n)
    reference = totals - sizes * (0.1 + 0.3 * rng.standard_normal(n))
    expected = scipy.stats.permutation_test(
        (totals, reference), lambda x, y: np.sum(x - y), permutation_type="samples", n_resamples=np.inf
    ).pvalue
    assert p_of(PairedTotals(totals, reference, sizes)) == pytest.approx(expected, abs=1e-12)


def test_many_documents_have_it_by_drawing() -> None:
    rng = np.random.default_rng(8)
    totals, sizes = corpus(rng, 60)
    reference = totals - sizes * (0.1 + 0.4 * rng.standard_normal(60))
    expected = scipy.stats.permutation_test(
        (totals, reference), lambda x, y: np.sum(x - y), permutation_type="samples", n_resamples=9999, rng=rng
    ).pvalue
    found = PairedTotals(totals, reference, sizes)
    assert p_of(found) == pytest.approx(expected, abs=4 * math.sqrt(2 * expected / 1e4))
    assert p_of(found) == p_of(PairedTotals(totals, reference, sizes)), "drawn with a fixed seed"
    assert 0 < p_of(PairedTotals(sizes * 3, sizes, sizes)) <= 1e-4, "never 0"


def test_drawing_in_blocks_is_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(9)
    totals, sizes = corpus(rng, 30)
    whole = p_of(PairedTotals(totals, sizes * 1.9, sizes))
    monkeypatch.setattr(paired, "BLOCK_NUMBERS", 1000)
    assert p_of(PairedTotals(totals, sizes * 1.9, sizes)) == pytest.approx(whole, abs=0.03)


@pytest.mark.parametrize("n", [6, 8, 14, 40])
@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.3])
def test_the_interval_holds_what_the_test_does_not_reject(n: int, alpha: float) -> None:
    rng = np.random.default_rng(n)
    totals, sizes = corpus(rng, n)
    found = PairedTotals(totals, 1.9 * sizes, sizes)
    low, high = interval_of(found, alpha)
    step = 1e-9 * (high - low)
    assert p_of(found, low - step) <= alpha < p_of(found, low + step)
    assert p_of(found, high + step) <= alpha < p_of(found, high - step)


def test_six_documents_reject_at_five_percent_and_at_no_stricter_level() -> None:
    totals, sizes = corpus(np.random.default_rng(1), 6)
    found = PairedTotals(totals, sizes * 0.1, sizes)
    assert p_of(found) == 2 / 2**6
    assert interval_of(found)[0] > 0
    assert found.interval(0.025) is None


@pytest.mark.parametrize(("documents", "trials"), [(6, 2000), (10, 2000), (20, 1000), (50, 500)])
def test_documents_of_unequal_length_are_covered_and_rejected_as_often_as_promised(documents: int, trials: int) -> None:
    """The normal test rejects 17 % of the time with 10 documents, and 9 % with 50."""
    rng = np.random.default_rng(documents)
    rejected, covered = [], []
    for _ in range(trials):
        reference, sizes = corpus(rng, documents)
        found = PairedTotals(reference + sizes * (0.05 + 0.1 * rng.standard_normal(documents)), reference, sizes)
        rejected.append(p_of(found, 0.05) <= 0.05)
        low, high = interval_of(found)
        covered.append(low <= 0.05 <= high)
    # Six documents have p-values that are multiples of 1/32, and 1/32 is the largest below 5 %.
    level = 1 / 32 if documents == 6 else 0.05
    assert np.mean(rejected) == pytest.approx(level, abs=3.3 * math.sqrt(level / trials))
    assert np.mean(covered) == pytest.approx(1 - np.mean(rejected), abs=1e-9)


def test_identical_documents_do_not_differ_and_are_equivalent() -> None:
    found = PairedTotals([1.0] * 9, [1.0] * 9, [2.0] * 9)
    assert (found.value, p_of(found), interval_of(found)) == (0.0, 1.0, (0.0, 0.0))
    assert p_of(found, 0.01) == 2 / 2**9


@pytest.mark.parametrize("count", [10, 50])
def test_the_smallest_difference_that_is_stated_is_shown_with_about_the_stated_power(count: int) -> None:
    """Over corpora whose spread is known from a corpus of the same kind alone, as the sentence of `rr compare` says."""
    rng = np.random.default_rng(count)

    def measured(difference: float) -> PairedTotals:
        _, sizes = corpus(rng, count)
        return PairedTotals(sizes * (difference + 0.3 * rng.standard_normal(count)), sizes * 0, sizes)

    shown = [p_of(measured(measured(0.0).detectable(0.025) or 0.0)) <= 0.025 for _ in range(300)]
    assert 0.75 <= np.mean(shown) <= 0.95


def test_documents_needed_follow_from_error_and_effect() -> None:
    sizes = np.ones(50)
    found = PairedTotals(0.1 + scipy.stats.zscore(np.arange(50.0)), sizes * 0, sizes)
    needed = found.needed(0.1, 0.05)
    assert needed is not None
    assert needed.what == "units"
    # n = (z_a + z_b)²·s²/δ² = 785 for a normal test; t needs a few more.
    assert 790 <= needed.count <= 810
    assert (found.needed(0.1, 0.01) or needed).count > needed.count
    assert found.needed(0.0, 0.05) is None


def test_a_power_of_80_percent_is_what_the_stated_number_of_documents_has() -> None:
    """As the sentence of `rr compare` uses it: the effect that was measured, at the corrected level."""
    rng = np.random.default_rng(5)
    pilot = PairedTotals(0.08 + scipy.stats.zscore(rng.standard_normal(60)) * 0.4, np.zeros(60), np.ones(60))
    needed = pilot.needed(pilot.value, 0.025)
    assert needed is not None
    count = needed.count
    shown = [
        p_of(PairedTotals(0.08 + 0.4 * rng.standard_normal(count), np.zeros(count), np.ones(count))) <= 0.025
        for _ in range(300)
    ]
    assert np.mean(shown) == pytest.approx(0.8, abs=0.08)


# -- problems ----------------------------------------------------------------------------------------------------------

COUNTS = [(10, 5, 100), (0, 1, 30), (7, 7, 24), (30, 12, 200), (1, 9, 16), (900, 800, 1700), (1500, 1400, 2911)]


@pytest.mark.parametrize(("only_a", "only_b", "n"), COUNTS)
def test_mcnemar_is_the_binomial_test_of_the_discordant_pairs(only_a: int, only_b: int, n: int) -> None:
    found = PairedAnswers(only_a, only_b, n)
    assert p_of(found) == pytest.approx(scipy.stats.binomtest(only_a, only_a + only_b, 0.5).pvalue, rel=1e-9)
    assert found.value == pytest.approx((only_a - only_b) / n)
    low, high = interval_of(found)
    assert low <= found.value <= high
    back = PairedAnswers(only_b, only_a, n)
    assert (p_of(back), *interval_of(back)) == pytest.approx((p_of(found), -high, -low))


@pytest.mark.parametrize(("only_a", "only_b", "n", "null"), [(12, 3, 100, 0.02), (12, 3, 100, -0.05), (5, 0, 10, -0.2)])
def test_another_difference_is_tested_by_the_score_with_its_own_estimates(
    only_a: int, only_b: int, n: int, null: float
) -> None:
    """Tango's statistic, whose share of discordant problems is the likeliest one under the hypothesis."""

    def unlikeliness(share_b: float) -> float:
        shares = (share_b + null, share_b, 1 - 2 * share_b - null)
        counts = (only_a, only_b, n - only_a - only_b)
        return -sum(k * math.log(max(share, 1e-300)) for k, share in zip(counts, shares, strict=True) if k)

    bounds = (max(0.0, -null), (1 - null) / 2)
    share = scipy.optimize.minimize_scalar(unlikeliness, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x
    z = (only_a - only_b - n * null) / math.sqrt(n * (2 * share + null - null**2))
    assert p_of(PairedAnswers(only_a, only_b, n), null) == pytest.approx(2 * scipy.stats.norm.sf(abs(z)), rel=1e-4)


@given(st.integers(6, 80), st.data(), st.sampled_from([0.2, 0.05, 0.01]))
def test_the_interval_and_the_exact_test_never_contradict_each_other(n: int, data: st.DataObject, alpha: float) -> None:
    only_a = data.draw(st.integers(0, n))
    found = PairedAnswers(only_a, data.draw(st.integers(0, n - only_a)), n)
    low, high = interval_of(found, alpha)
    assert -1 <= low <= found.value <= high <= 1
    assert (low <= 0 <= high) or p_of(found) <= alpha
    assert not (low < 0 < high) or p_of(found) > alpha or p_of(found, 1e-12) > alpha


@pytest.mark.parametrize(
    ("n", "gain", "loss"), [(20, 0.3, 0.1), (100, 0.1, 0.05), (500, 0.06, 0.005), (1500, 0.057, 0.001), (200, 0.5, 0.2)]
)
def test_intervals_of_problems_cover(n: int, gain: float, loss: float) -> None:
    counts = np.random.default_rng(n).multinomial(n, [gain, loss, 1 - gain - loss], size=3000)
    pairs = {(int(a), int(b)) for a, b, _ in counts}
    holds = {pair: interval_of(PairedAnswers(*pair, n)) for pair in pairs}
    covered = [holds[int(a), int(b)][0] <= gain - loss <= holds[int(a), int(b)][1] for a, b, _ in counts]
    assert 0.935 <= np.mean(covered) <= 0.985


@pytest.mark.parametrize(("a", "b", "n"), [(0, 0, 0), (-1, 0, 5), (3, 3, 5)])
def test_impossible_counts_are_refused(a: int, b: int, n: int) -> None:
    with pytest.raises(ValueError, match="discordant problems"):
        PairedAnswers(a, b, n)
    with pytest.raises(ValueError, match="shorter"):
        PairedAnswers.of([True, False], [True])


def test_below_six_problems_there_is_no_test() -> None:
    found = PairedAnswers.of([True] * 5, [False] * 5)
    assert (found.value, found.p_value(), found.interval(0.05), found.detectable(0.05)) == (1.0, None, None, None)


def test_pairing_sees_what_two_intervals_cannot() -> None:
    """40 of 200 against 52 of 200: the two Wilson intervals overlap, but only one side ever gains."""
    after, before = stats.wilson(52, 200), stats.wilson(40, 200)
    assert (after.low or 0) < (before.high or 0)
    assert scipy.stats.fisher_exact([[52, 148], [40, 160]]).pvalue > 0.1
    found = PairedAnswers(12, 0, 200)
    assert p_of(found) < 0.001
    assert interval_of(found)[0] > 0


@pytest.mark.parametrize(("gain", "loss"), [(0.09, 0.04), (0.2, 0.1), (0.05, 0.0), (0.04, 0.03)])
@pytest.mark.parametrize("alpha", [0.05, 0.01])
def test_as_many_problems_as_are_called_for_have_about_the_power_that_is_stated(
    gain: float, loss: float, alpha: float
) -> None:
    n = paired.problems_needed(gain - loss, gain + loss, alpha)
    assert n is not None
    counts = np.random.default_rng(13).multinomial(n, [gain, loss, 1 - gain - loss], size=3000)
    p_values = {(int(a), int(b)): p_of(PairedAnswers(int(a), int(b), n)) for a, b, _ in counts}
    assert np.mean([p_values[int(a), int(b)] <= alpha for a, b, _ in counts]) == pytest.approx(0.8, abs=0.025)
    assert paired.mcnemar_power(n // 4, gain - loss, gain + loss, alpha) < 0.45


def test_problems_needed_at_its_edges() -> None:
    assert paired.problems_needed(0.0, 0.3, 0.05) is None
    assert paired.problems_needed(-0.1, 0.3, 0.05) == paired.problems_needed(0.1, 0.3, 0.05)
    assert paired.problems_needed(0.1, 0.0, 0.05) == paired.problems_needed(0.1, 0.1, 0.05)
    sizes = [paired.problems_needed(difference, 0.3, 0.05) or 0 for difference in (0.02, 0.05, 0.1, 0.3)]
    assert all(more > less for more, less in itertools.pairwise(sizes))


def test_the_smallest_detectable_difference_needs_as_many_problems_as_there_are() -> None:
    found = PairedAnswers(20, 10, 400)
    smallest = found.detectable(0.05)
    assert smallest is not None
    assert paired.mcnemar_power(400, smallest, found.discordant, 0.05) == pytest.approx(0.8, abs=0.01)
    assert paired.problems_needed(smallest, found.discordant, 0.05) == pytest.approx(400, abs=12)
