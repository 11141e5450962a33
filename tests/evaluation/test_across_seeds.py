"""Seeds and units as two random factors: against scipy, statsmodels, analysis of variance, and simulation."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import statsmodels.formula.api as smf
from test_stats import corpus

from rrcli.evaluation import stats
from rrcli.evaluation.seeds import AcrossSeeds, Unit, across_seeds


def crossed(table: np.ndarray, sizes: np.ndarray | None = None) -> list[dict[str, Unit]]:
    """Return the units of `[seed, unit]` differences."""
    sizes = np.ones(table.shape[1]) if sizes is None else sizes
    pairs = [zip(row, sizes, strict=True) for row in table]
    return [{str(i): (float(d), 0.0, float(s)) for i, (d, s) in enumerate(pair)} for pair in pairs]


def nested(table: np.ndarray) -> list[dict[str, Unit]]:
    """Return the units of `[seed, unit]` differences, where each seed has units of its own."""
    return [{f"{seed}/{key}": unit for key, unit in units.items()} for seed, units in enumerate(crossed(table))]


def draw(rng: np.random.Generator, seeds: int, units: int, of_seed: float, of_unit: float, rest: float) -> np.ndarray:
    parts = (rng.standard_normal((seeds, 1)) * of_seed, rng.standard_normal((1, units)) * of_unit)
    return sum(parts) + rng.standard_normal((seeds, units)) * rest


# -- nested: each seed has its own problems ----------------------------------------------------------------------------


def test_three_seeds_are_three_observations() -> None:
    """Gains of 8.3, 32.3 and 21.1 points: pooled as 3000 problems they gave p < 1e-22."""
    rng = np.random.default_rng(0)
    seeds = []
    for seed, (gained, lost) in enumerate(((88, 5), (323, 0), (213, 2))):
        answers = [(1.0, 0.0)] * gained + [(0.0, 1.0)] * lost + [(1.0, 1.0)] * (1000 - gained - lost)
        rng.shuffle(answers)
        seeds.append({f"{seed}/{i}": (x, y, 1.0) for i, (x, y) in enumerate(answers)})
    found = across_seeds(seeds, answers=True)
    expected = scipy.stats.ttest_1samp([0.083, 0.323, 0.211], 0)
    assert not found.crossed
    assert found.by_seed == pytest.approx((0.083, 0.323, 0.211))
    assert found.value == pytest.approx(0.2057, abs=1e-4)
    assert found.p_value() == pytest.approx(expected.pvalue, rel=1e-6) == pytest.approx(0.0756, abs=0.03)
    interval = expected.confidence_interval(0.95)
    assert found.interval(0.05) == pytest.approx((interval.low, interval.high))
    assert (found.df, found.n) == (2, 3000)


def test_nested_seeds_agree_with_a_mixed_model() -> None:
    """REML of value ~ 1 + (1 | seed): with as many units in each seed, the same mean and standard error."""
    table = draw(np.random.default_rng(1), 6, 40, 0.5, 0.0, 1.0) + 0.3
    found = across_seeds(nested(table))
    frame = pd.DataFrame({"d": table.ravel(), "seed": np.repeat(np.arange(6), 40)})
    fit = smf.mixedlm("d ~ 1", frame, groups=frame["seed"]).fit(reml=True)
    assert found.value == pytest.approx(fit.params["Intercept"], rel=1e-6)
    assert math.sqrt(found.seed_variance) == pytest.approx(fit.bse["Intercept"], rel=1e-3)


def test_seeds_with_the_same_difference_by_chance_have_the_error_of_their_units() -> None:
    """Shares of few problems can be equal; a t-test would find them infinitely sure."""
    table = np.tile(np.repeat([1.0, -1.0, 0.0, 0.0], 5), (3, 1)) + 0.1
    found = across_seeds(nested(table))
    assert found.seed_variance == pytest.approx(0)
    error = scipy.stats.sem(table[0]) / math.sqrt(3)
    assert found.p_value() == pytest.approx(2 * scipy.stats.t.sf(0.1 / error, 2))
    same = across_seeds([{f"{s}/{i}": (1.0, 0.0, 1.0) for i in range(50)} for s in range(3)], answers=True)
    assert 0 < (same.p_value() or 0) < 1e-3, "every problem gained, in every seed: never 0"


# -- crossed: all seeds have the same documents ------------------------------------------------------------------------


def test_components_are_those_of_the_analysis_of_variance() -> None:
    table = draw(np.random.default_rng(2), 4, 30, 0.4, 0.6, 0.5)
    found = across_seeds(crossed(table))
    rows, columns, mean = table.mean(1), table.mean(0), table.mean()
    of_seed = 30 * ((rows - mean) ** 2).sum() / 3
    of_unit = 4 * ((columns - mean) ** 2).sum() / 29
    rest = ((table - rows[:, None] - columns + mean) ** 2).sum() / (3 * 29)
    assert found.crossed
    assert found.value == pytest.approx(mean)
    assert (found.seed_variance, found.unit_variance, found.shared_variance) == pytest.approx(
        (of_seed / 120, of_unit / 120, rest / 120)
    )
    assert found.unit_df == pytest.approx(29)
    total = of_seed / 120 + of_unit / 120
    assert found.df == pytest.approx(total**2 / ((of_seed / 120) ** 2 / 3 + (of_unit / 120) ** 2 / 29))


def test_components_agree_with_a_mixed_model() -> None:
    """REML with two crossed random effects has the same variances where the design is balanced."""
    table = draw(np.random.default_rng(3), 5, 25, 0.6, 0.8, 0.5)
    found = across_seeds(crossed(table))
    frame = pd.DataFrame({"d": table.ravel(), "seed": np.repeat(np.arange(5), 25), "unit": np.tile(np.arange(25), 5)})
    effects = {"seed": "0 + C(seed)", "unit": "0 + C(unit)"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit = smf.mixedlm("d ~ 1", frame, groups=np.ones(len(frame)), vc_formula=effects, re_formula="0").fit(reml=True)
    variance = found.seed_variance + found.unit_variance - found.shared_variance
    assert fit.bse["Intercept"] == pytest.approx(math.sqrt(variance), rel=0.02)


def test_documents_weigh_by_their_size() -> None:
    rng = np.random.default_rng(4)
    totals, sizes = corpus(rng, 20)
    table = totals - 1.9 * sizes + sizes * 0.01 * rng.standard_normal((3, 1))
    found = across_seeds(crossed(table, sizes))
    value, error, df = stats.ratio_error(table.mean(0), sizes)
    assert (found.value, found.unit_variance, found.unit_df) == pytest.approx((value, error**2, df))
    assert found.by_seed == pytest.approx(tuple(table.sum(1) / sizes.sum()))


# -- mixed: some documents are those of all seeds, others each seed's own ---------------------------------------------


def mixed(table: np.ndarray) -> list[dict[str, Unit]]:
    """Return units of which the first third is the same for all seeds."""
    third = table.shape[1] // 3
    return [a | b for a, b in zip(crossed(table[:, :third]), nested(table[:, third:]), strict=True)]


def test_all_units_of_a_mixed_design_count() -> None:
    table = draw(np.random.default_rng(5), 3, 30, 0.1, 0.5, 0.3)
    found, common = across_seeds(mixed(table)), across_seeds(crossed(table[:, :10]))
    assert (found.common, found.n, found.crossed) == (10, 70, True)
    assert found.by_seed == pytest.approx(tuple(table.mean(1)))
    assert found.value == pytest.approx(table.mean())
    assert found.seed_variance == pytest.approx(table.mean(1).var(ddof=1) / 3)
    assert found.unit_variance == pytest.approx(common.unit_variance / 9)
    assert found.shared_variance == pytest.approx(common.shared_variance / 9)


def test_one_unit_in_common_does_not_decide() -> None:
    """A problem that all seeds happen to have: the other problems count as before."""
    table = draw(np.random.default_rng(9), 3, 40, 0.1, 0.0, 0.5) + 0.2
    one = [units | {"same": (0.0, 0.0, 1.0)} for units in nested(table)]
    found, without = across_seeds(one), across_seeds(nested(table))
    assert found.value == pytest.approx(without.value * 40 / 41)
    assert found.p_value() == pytest.approx(without.p_value(), rel=0.1)


# -- promises ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize(
    ("of_seed", "of_unit", "rest"),
    [(0.0, 1.0, 0.5), (0.1, 1.0, 0.5), (0.3, 1.0, 0.5), (1.0, 0.3, 0.5), (0.0, 0.5, 1.0)],
)
def test_no_difference_is_rejected_at_most_as_often_as_promised(
    seeds: int, of_seed: float, of_unit: float, rest: float
) -> None:
    """Satterthwaite's single quantile rejects 12 % with two seeds, and pooling the units up to 86 %."""
    rng = np.random.default_rng(seeds)
    # What is a unit's own belongs to the rest, where only one seed has it.
    alone = math.hypot(of_unit, rest)

    def both() -> list[dict[str, Unit]]:
        effects = rng.standard_normal((seeds, 1)) * of_seed
        common, own = draw(rng, seeds, 10, 0.0, of_unit, rest), draw(rng, seeds, 20, 0.0, 0.0, alone)
        return mixed(np.hstack([common, own]) + effects)

    for make in (
        lambda: crossed(draw(rng, seeds, 30, of_seed, of_unit, rest)),
        lambda: nested(draw(rng, seeds, 30, of_seed, 0.0, alone)),
        both,
    ):
        rejected = [(across_seeds(make()).p_value() or 0.0) <= 0.05 for _ in range(200)]
        assert np.mean(rejected) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 200)


def test_the_p_value_and_the_interval_agree() -> None:
    for table in (crossed(draw(np.random.default_rng(6), 3, 20, 0.2, 0.5, 0.5) + 0.3), nested(np.eye(3, 20) + 0.2)):
        found = across_seeds(table)
        for alpha in (0.3, 0.05, 0.001):
            low, high = found.interval(alpha) or (0.0, 0.0)
            for bound in (low, high):
                assert found.p_value(bound) == pytest.approx(alpha, rel=1e-4)
    assert found.p_value(found.value) == 1


def test_as_many_seeds_as_are_called_for_have_about_the_power_that_is_stated() -> None:
    rng = np.random.default_rng(7)
    pilot = AcrossSeeds(0.1, (0.0, 0.1, 0.2), 300, 0, 0.01 / 3, 0.0001, 297.0)
    needed = pilot.needed(0.1, 0.05)
    assert needed is not None
    assert needed.what == "seeds"
    gains = 0.1 + 0.1 * rng.standard_normal((4000, needed.count))
    power = np.mean(scipy.stats.ttest_1samp(gains, 0, axis=1).pvalue <= 0.05)
    assert 0.75 <= power <= 0.9
    smallest = pilot.detectable(0.05)
    assert smallest is not None
    gains = smallest + 0.1 * rng.standard_normal((4000, 3))
    assert np.mean(scipy.stats.ttest_1samp(gains, 0, axis=1).pvalue <= 0.05) == pytest.approx(0.8, abs=0.1)


def test_more_seeds_do_not_help_where_the_shared_documents_decide() -> None:
    found = across_seeds(crossed(draw(np.random.default_rng(8), 3, 10, 0.01, 1.0, 0.01)))
    assert found.needed(0.05, 0.05) is None


def test_one_seed_or_an_empty_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least two seeds"):
        across_seeds([{"a": (1.0, 0.0, 1.0)}])
    with pytest.raises(ValueError, match="each with units"):
        across_seeds([{"a": (1.0, 0.0, 1.0)}, {}])


def test_few_units_have_no_test() -> None:
    found = across_seeds(crossed(np.ones((3, 5)) * [[1.0], [2.0], [3.0]]))
    assert (found.p_value(), found.interval(0.05), found.detectable(0.05)) == (None, None, None)
