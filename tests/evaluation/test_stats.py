"""Statistics against scipy, against their definitions, and against what they promise under simulation."""

from __future__ import annotations

import itertools
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


# -- the same problems answered twice ----------------------------------------------------------------------------------


def pairs_of(both: int, only_a: int, only_b: int, neither: int) -> tuple[list[bool], list[bool]]:
    cells = [(True, True)] * both + [(True, False)] * only_a + [(False, True)] * only_b + [(False, False)] * neither
    return [a for a, _ in cells], [b for _, b in cells]


@pytest.mark.parametrize(
    ("both", "only_a", "only_b", "neither"),
    [(10, 0, 5, 10), (0, 1, 0, 0), (5, 7, 7, 5), (100, 30, 12, 58), (3, 1, 9, 3), (0, 900, 800, 0), (2, 1500, 1400, 9)],
)
def test_mcnemar_is_the_binomial_test_of_the_discordant_pairs(
    both: int, only_a: int, only_b: int, neither: int
) -> None:
    found = stats.mcnemar(*pairs_of(both, only_a, only_b, neither))
    expected = scipy.stats.binomtest(only_a, only_a + only_b, 0.5).pvalue
    assert found.p_value == pytest.approx(expected, rel=1e-9)
    n = both + only_a + only_b + neither
    assert found.value == pytest.approx((only_a - only_b) / n)
    assert found.n == n
    assert found.low <= found.value <= found.high


def test_mcnemar_interval_is_agresti_min() -> None:
    both, only_a, only_b, neither = 40, 13, 4, 23
    found = stats.mcnemar(*pairs_of(both, only_a, only_b, neither))
    cells = np.array([both, only_a, only_b, neither]) + 0.5
    p = cells / cells.sum()
    centre = p[1] - p[2]
    error = math.sqrt((p[1] + p[2] - centre**2) / cells.sum())
    z = scipy.stats.norm.ppf(0.975)
    assert (found.low, found.high) == pytest.approx((centre - z * error, centre + z * error))


def test_mcnemar_swaps_sign_with_its_arguments() -> None:
    a, b = pairs_of(5, 8, 3, 4)
    there, back = stats.mcnemar(a, b), stats.mcnemar(b, a)
    assert there.value == -back.value
    assert there.p_value == back.p_value
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low))


@pytest.mark.parametrize("answers", [[True] * 9, [False] * 9, [True]])
def test_mcnemar_without_discordant_pairs_shows_nothing(answers: list[bool]) -> None:
    found = stats.mcnemar(answers, answers)
    assert found.value == 0
    assert found.p_value == 1
    assert found.low < 0 < found.high


def test_mcnemar_refuses_nothing_and_unequal_lengths() -> None:
    with pytest.raises(ValueError, match="at least one problem"):
        stats.mcnemar([], [])
    with pytest.raises(ValueError, match="shorter"):
        stats.mcnemar([True, False], [True])


@pytest.mark.parametrize("n", [1, 2, 3])
def test_mcnemar_interval_stays_a_difference_of_shares(n: int) -> None:
    found = stats.mcnemar([True] * n, [False] * n)
    assert found.high <= 1


def test_pairing_sees_what_two_intervals_cannot() -> None:
    """40 of 200 against 52 of 200: the two Wilson intervals overlap, but only one side ever gains."""
    a, b = pairs_of(40, 12, 0, 148)
    after, before = stats.wilson(sum(a), len(a)), stats.wilson(sum(b), len(b))
    assert after.low < before.high
    unpaired = scipy.stats.fisher_exact([[sum(a), len(a) - sum(a)], [sum(b), len(b) - sum(b)]]).pvalue
    assert unpaired > 0.1
    paired = stats.mcnemar(a, b)
    assert paired.p_value is not None
    assert paired.p_value < 0.001
    assert paired.low > 0


# -- ratios over documents ---------------------------------------------------------------------------------------------


def corpus(rng: np.random.Generator, documents: int, spread: float = 0.4) -> tuple[np.ndarray, np.ndarray]:
    """Return nats and tokens of documents whose own level varies: tokens of one document are not independent."""
    sizes = rng.integers(20, 200, documents).astype(float)
    return sizes * (2.0 + spread * rng.standard_normal(documents)), sizes


def standard_error(estimate: stats.Estimate) -> float:
    return (estimate.high - estimate.low) / 2 / stats.normal_quantile()


def jackknife(totals: np.ndarray, sizes: np.ndarray) -> float:
    left_out = (totals.sum() - totals) / (sizes.sum() - sizes)
    n = len(totals)
    return math.sqrt((n - 1) / n * ((left_out - left_out.mean()) ** 2).sum())


def test_ratio_standard_error_agrees_with_jackknife_and_bootstrap() -> None:
    rng = np.random.default_rng(1)
    totals, sizes = corpus(rng, 400)
    found = stats.ratio(totals.tolist(), sizes.tolist())
    assert found.value == pytest.approx(totals.sum() / sizes.sum())
    assert standard_error(found) == pytest.approx(jackknife(totals, sizes), rel=0.01)
    chosen = rng.integers(0, 400, (2000, 400))
    spread = (totals[chosen].sum(1) / sizes[chosen].sum(1)).std(ddof=1)
    assert standard_error(found) == pytest.approx(spread, rel=0.06)


def test_ratio_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    covered = [(e := stats.ratio(*corpus(rng, 80))).low <= 2.0 <= e.high for _ in range(2500)]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.02)


def test_tokens_as_units_would_be_far_too_sure() -> None:
    """The reason for clustering: counting each token as independent gives a fraction of the true error."""
    rng = np.random.default_rng(3)
    totals, sizes = corpus(rng, 200)
    per_token = math.sqrt(1.0 / sizes.sum())  # one nat of spread per token
    assert standard_error(stats.ratio(totals.tolist(), sizes.tolist())) > 2 * per_token


def test_paired_difference_agrees_with_jackknife_and_z_test() -> None:
    rng = np.random.default_rng(4)
    reference, sizes = corpus(rng, 300)
    totals = reference + sizes * (0.01 + 0.1 * rng.standard_normal(300))
    found = stats.paired_ratio_difference(totals.tolist(), reference.tolist(), sizes.tolist())
    assert found.value == pytest.approx((totals.sum() - reference.sum()) / sizes.sum())
    assert standard_error(found) == pytest.approx(jackknife(totals - reference, sizes), rel=0.01)
    z = abs(found.value) / standard_error(found)
    assert found.p_value == pytest.approx(2 * scipy.stats.norm.sf(z), rel=1e-9)


def test_paired_difference_covers_and_errs_as_often_as_it_says() -> None:
    rng = np.random.default_rng(5)
    covered, rejected = [], []
    for _ in range(2500):
        reference, sizes = corpus(rng, 80)
        shift = sizes * 0.1 * rng.standard_normal(80)
        moved = stats.paired_ratio_difference(reference + shift + 0.05 * sizes, reference, sizes)
        covered.append(moved.low <= 0.05 <= moved.high)
        still = stats.paired_ratio_difference(reference + shift, reference, sizes)
        rejected.append((still.p_value or 0.0) <= 0.05)
    assert np.mean(covered) == pytest.approx(0.95, abs=0.02)
    assert np.mean(rejected) == pytest.approx(0.05, abs=0.02)


def test_paired_difference_sees_what_two_intervals_cannot() -> None:
    rng = np.random.default_rng(6)
    reference, sizes = corpus(rng, 100)
    totals = reference - sizes * (0.02 + 0.02 * rng.standard_normal(100))
    after, before = stats.ratio(totals, sizes), stats.ratio(reference, sizes)
    assert after.high > before.low
    found = stats.paired_ratio_difference(totals, reference, sizes)
    assert found.high < 0
    assert (found.p_value or 0.0) < 1e-6


def test_one_document_has_a_value_and_no_certainty() -> None:
    assert stats.ratio([6.0], [3.0]) == stats.Estimate(2.0, -math.inf, math.inf, None, 1)
    assert stats.paired_ratio_difference([6.0], [3.0], [3.0]) == stats.Estimate(1.0, -math.inf, math.inf, 1.0, 1)


def test_identical_measurements_do_not_differ() -> None:
    assert stats.paired_ratio_difference([1.0, 2.0], [1.0, 2.0], [3.0, 4.0]) == stats.Estimate(0.0, 0.0, 0.0, 1.0, 2)
    assert stats.ratio([0.0, 0.0], [3.0, 4.0]) == stats.Estimate(0.0, 0.0, 0.0, None, 2)


@pytest.mark.parametrize(("totals", "sizes"), [([], []), ([1.0], [0.0]), ([0.0, 0.0], [0.0, 0.0])])
def test_ratio_needs_something_to_divide_by(totals: list[float], sizes: list[float]) -> None:
    with pytest.raises(ValueError, match="positive size"):
        stats.ratio(totals, sizes)
    with pytest.raises(ValueError, match="positive size"):
        stats.paired_ratio_difference(totals, totals, sizes)


# -- bootstrap ---------------------------------------------------------------------------------------------------------


def test_bootstrap_agrees_with_scipy() -> None:
    rng = np.random.default_rng(7)
    a, b = rng.gamma(2.0, size=60), rng.gamma(1.7, size=60)
    found = stats.paired_bootstrap(a.tolist(), b.tolist(), draws=20_000)
    expected = scipy.stats.bootstrap(
        (a - b,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(8)
    ).confidence_interval
    width = expected.high - expected.low
    assert found.value == pytest.approx(float((a - b).mean()))
    assert found.low == pytest.approx(expected.low, abs=0.03 * width)
    assert found.high == pytest.approx(expected.high, abs=0.03 * width)
    assert found.n == 60


def test_bootstrap_is_seeded() -> None:
    rng = np.random.default_rng(9)
    a, b = rng.random(20).tolist(), rng.random(20).tolist()
    assert stats.paired_bootstrap(a, b) == stats.paired_bootstrap(a, b)
    assert stats.paired_bootstrap(a, b, seed=1) != stats.paired_bootstrap(a, b, seed=2)


def test_bootstrap_in_blocks_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(9)
    a, b = rng.random(30).tolist(), rng.random(30).tolist()
    whole = stats.paired_bootstrap(a, b, draws=1001)
    monkeypatch.setattr(stats, "BLOCK_NUMBERS", 100)
    assert stats.paired_bootstrap(a, b, draws=1001) == whole


def test_bootstrap_p_value_falls_with_the_effect_and_never_reaches_zero() -> None:
    rng = np.random.default_rng(10)
    b = rng.standard_normal(50)
    noise = 0.3 * rng.standard_normal(50)
    noise -= noise.mean()
    none, some, large = (stats.paired_bootstrap(b + noise + shift, b, draws=1000) for shift in (0.0, 0.08, 5.0))
    p_none, p_some, p_large = (e.p_value or 0.0 for e in (none, some, large))
    assert p_none > 0.5 > p_some > p_large
    assert 0 < p_large <= 1 / 1000 + 1e-12


def test_bootstrap_of_equal_or_single_scores_shows_nothing() -> None:
    assert stats.paired_bootstrap([1.0, 2.0], [1.0, 2.0]) == stats.Estimate(0.0, 0.0, 0.0, 1.0, 2)
    assert stats.paired_bootstrap([2.0], [1.0]) == stats.Estimate(1.0, -math.inf, math.inf, 1.0, 1)


def test_bootstrap_errs_no_more_often_than_alpha_with_as_few_prompts_as_are_built_in() -> None:
    """With 4 units no test can reach p < 2/16; the built-in prompts are 4."""
    rng = np.random.default_rng(11)
    p_values = [stats.paired_bootstrap(*rng.standard_normal((2, 4)), draws=400).p_value or 0.0 for _ in range(500)]
    assert np.mean(np.array(p_values) <= 0.05) <= 0.08


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


# -- planning ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gain", "loss"), [(0.09, 0.04), (0.2, 0.1), (0.05, 0.0)])
def test_problems_needed_gives_about_the_power_it_promises(gain: float, loss: float) -> None:
    n = stats.problems_needed(gain - loss, gain + loss)
    assert n is not None
    rng = np.random.default_rng(13)

    def power(problems: int) -> float:
        counts = rng.multinomial(problems, [gain, loss, 1 - gain - loss], size=1500)
        p_value = {
            (int(a), int(b)): stats.mcnemar(*pairs_of(0, int(a), int(b), problems - int(a) - int(b))).p_value
            for a, b in {(row[0], row[1]) for row in counts}
        }
        return float(np.mean([(p_value[int(a), int(b)] or 0.0) <= 0.05 for a, b, _ in counts]))

    # The exact test is a little more careful than the normal approximation that plans it.
    assert 0.68 <= power(n) <= 0.86
    assert power(n // 4) < 0.45


def test_problems_needed_is_connors_formula() -> None:
    z_alpha, z_power = scipy.stats.norm.ppf([0.975, 0.8])
    for gain, discordant in ((0.1, 0.3), (0.3, 0.35), (0.02, 0.05)):
        root = z_alpha * math.sqrt(discordant) + z_power * math.sqrt(discordant - gain**2)
        assert stats.problems_needed(gain, discordant) == math.ceil(root**2 / gain**2)
    assert stats.problems_needed(0.1, 0.3) == 234


def test_problems_needed_at_its_edges() -> None:
    assert stats.problems_needed(0.0, 0.3) is None
    assert stats.problems_needed(-0.1, 0.3) == stats.problems_needed(0.1, 0.3)
    assert stats.problems_needed(0.1, 0.0) == stats.problems_needed(0.1, 0.1)
    sizes = [stats.problems_needed(difference, 0.3) or 0 for difference in (0.02, 0.05, 0.1, 0.3)]
    assert all(more > less for more, less in itertools.pairwise(sizes))
    assert (stats.problems_needed(0.1, 0.3, alpha=0.01) or 0) > (stats.problems_needed(0.1, 0.3) or 0)


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.99])
def test_normal_quantile(confidence: float) -> None:
    assert stats.normal_quantile(confidence) == pytest.approx(scipy.stats.norm.ppf(0.5 + confidence / 2))
