"""Evidence about the difference of two stages over several trainings: seeds and units are both random.

A single training says nothing about how much another seed would change the result. So the units (documents, problems)
of several seeds must not be pooled: what one seed did to all its units does not average out over units.

- *Crossed*: all seeds measured the same units, as the documents of the held-out text. Variance components of the
  two-way layout; what is left, seeds times units, is counted in both margins and taken off once.
- *Nested*: each seed has units of its own, as the problems of a test set that is drawn for it. The seeds' differences
  are the observations of a t-test, which is exact however much seeds and units vary.
- *Mixed*: some units are those of all seeds, others each seed's own, as problems of a file beside those of a
  generator. All of them are in the seeds' differences, whose variance holds what seeds and their own units
  contribute; what the common units contribute is that of the crossed layout, times the square of their share of the
  units. With a share of 1 this is the crossed, with 0 the nested design.

If crossed or mixed, the interval squares and adds the reach of each component, with its own t quantile: reach² =
t²_a·V_a + t²_b·V_b - z²·V_e (the modified large-sample method: Graybill & Wang 1980; Burdick & Graybill 1992).
Satterthwaite's single t quantile was tried: with two or three seeds a small V_a by chance also gives many degrees of
freedom, and "no difference" is rejected in up to 13 % of experiments; see benchmarks/simulated_statistics.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, variance

from rrcli.evaluation import distributions
from rrcli.evaluation.paired import POWER, Needed, PairedAnswers
from rrcli.evaluation.stats import LEAST_UNITS, ratio_error

# What a unit has: the stage's total, the reference's, and the size (1 for a problem).
Unit = tuple[float, float, float]
# No p-value is said to be smaller, because no distribution is known that far out.
LEAST_P = 1e-12


@dataclass(frozen=True)
class AcrossSeeds:
    """The mean difference over seeds, with what seeds and units contribute to its error.

    Attributes:
        value: the mean of the seeds' differences. by_seed: these.
        n: the number of distinct units. common: how many of them all seeds have.
        seed_variance: V_a, the variance of the mean that seeds show, with `seeds - 1` degrees of freedom.
        unit_variance, unit_df: V_b, the variance that units show.
        shared_variance: V_e, what is in both of them (0 if nested).
    """

    value: float
    by_seed: tuple[float, ...]
    n: int
    common: int
    seed_variance: float
    unit_variance: float
    unit_df: float
    shared_variance: float = 0.0

    @property
    def crossed(self) -> bool:
        """Whether seeds share units, which then contribute to the error of all of them at once."""
        return self.common > 0

    @property
    def df(self) -> float:
        """Satterthwaite's degrees of freedom of the error, to be shown beside it; tests use each component's own."""
        if not self.crossed:
            return len(self.by_seed) - 1.0
        parts = [(self.seed_variance, len(self.by_seed) - 1.0), (self.unit_variance, self.unit_df)]
        spread = math.fsum(v * v / df for v, df in parts)
        return math.fsum(v for v, _ in parts) ** 2 / spread if spread else math.inf

    def p_value(self, null: float = 0.0) -> float | None:
        """Return the two-sided p-value of the hypothesis "the difference is `null`"; None below `LEAST_UNITS` units."""
        if self.n < LEAST_UNITS:
            return None
        distance = abs(self.value - null)
        if distance == 0:
            return 1.0
        low, high = LEAST_P, 1.0
        if self._reach(low) < distance:
            return low
        for _ in range(40):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if self._reach(middle) >= distance else (low, middle)
        return high

    def interval(self, alpha: float) -> tuple[float, float] | None:
        """Return the interval of the differences with a p-value above alpha; None if it is unknown."""
        reach = self._reach(alpha)
        return (self.value - reach, self.value + reach) if self.n >= LEAST_UNITS and reach < math.inf else None

    def detectable(self, alpha: float, power: float = POWER) -> float | None:
        """Return the smallest true difference that a test at alpha shows with this power, with as many seeds."""
        parts = (self.seed_variance, self.unit_variance)
        variance_of_mean = max(*parts, sum(parts) - self.shared_variance) if self.crossed else self.nested_variance
        found = self._reach(alpha) + distributions.t_quantile(2 * power - 1, self.df) * math.sqrt(variance_of_mean)
        return found if self.n >= LEAST_UNITS and 0 < found < math.inf else None

    def needed(self, effect: float, alpha: float) -> Needed | None:
        """Return how many seeds show a true difference of `effect` with `POWER`.

        None if there is no such number: the units that all seeds share may leave more error than the effect allows.
        """
        seeds = len(self.by_seed)
        shared = max(0.0, self.unit_variance - self.shared_variance) if self.crossed else 0.0
        each = (self.seed_variance if self.crossed else self.nested_variance) * seeds
        if effect == 0 or not 0 < each < math.inf:
            return None
        for count in range(2, 1001):
            reach = distributions.t_quantile(1 - alpha, count - 1.0) + distributions.t_quantile(
                2 * POWER - 1, count - 1.0
            )
            if reach * math.sqrt(each / count + shared) <= abs(effect):
                return Needed(count, "seeds")
        return None

    @property
    def nested_variance(self) -> float:
        """V_a, or V_b where all seeds have the same difference by chance, as shares of few problems can have."""
        return self.seed_variance if self.seed_variance > 1e-9 * self.unit_variance else self.unit_variance

    def _reach(self, alpha: float) -> float:
        """Return how far the interval at alpha goes from the value to either side."""
        if alpha >= 1:
            return 0.0
        by_seed = distributions.t_quantile(1 - alpha, len(self.by_seed) - 1.0) ** 2
        if not self.crossed:
            return math.sqrt(by_seed * self.nested_variance)
        by_seeds = by_seed * self.seed_variance
        by_units = distributions.t_quantile(1 - alpha, self.unit_df) ** 2 * self.unit_variance
        twice = NormalDist().inv_cdf(1 - alpha / 2) ** 2 * self.shared_variance
        return math.sqrt(max(by_seeds, by_units, by_seeds + by_units - twice))


def across_seeds(seeds: Sequence[Mapping[str, Unit]], *, answers: bool = False) -> AcrossSeeds:
    """Estimate the mean difference of a stage and its reference over seeds.

    Each seed's difference is (Σtotals - Σreference) / Σsizes over all of its units, and all seeds weigh the same. Units
    that some seeds share, but not all, count as units of their own.

    Args:
        seeds: for each seed, key -> unit. answers: whether totals are 0 or 1: a problem is answered wrong or right.

    Raises:
        ValueError: fewer than two seeds, or a seed without units.
    """
    if len(seeds) < 2 or not all(seeds):
        raise ValueError("a comparison over seeds needs at least two seeds, each with units")
    common = [key for key in seeds[0] if all(key in seed for seed in seeds)]
    if all(len(seed) == len(common) for seed in seeds):
        return _crossed(seeds, common)
    if len(common) < 2:  # how much units vary, a single one cannot say
        return _nested(seeds, answers=answers)
    return _mixed(seeds, common, answers=answers)


def _nested(seeds: Sequence[Mapping[str, Unit]], *, answers: bool) -> AcrossSeeds:
    found = [_within(list(seed.values()), answers=answers) for seed in seeds]
    values = tuple(value for value, *_ in found)
    k = len(seeds)
    within = math.fsum(error**2 for _, error, _ in found) / k**2
    return AcrossSeeds(
        fmean(values), values, sum(map(len, seeds)), 0, variance(values) / k, within, sum(df for *_, df in found)
    )  # fmt: skip


def _mixed(seeds: Sequence[Mapping[str, Unit]], common: Sequence[str], *, answers: bool) -> AcrossSeeds:
    nested, crossed = _nested(seeds, answers=answers), _crossed(seeds, common)
    share = fmean(
        math.fsum(seed[key][2] for key in common) / math.fsum(size for *_, size in seed.values()) for seed in seeds
    )
    return AcrossSeeds(
        nested.value, nested.by_seed, len(set().union(*seeds)), len(common), nested.nested_variance,
        share**2 * crossed.unit_variance, crossed.unit_df, share**2 * crossed.shared_variance,
    )  # fmt: skip


def _within(units: Sequence[Unit], *, answers: bool) -> tuple[float, float, float]:
    """Return a seed's difference, its standard error over units, and the degrees of freedom of that error."""
    if not answers:
        return ratio_error([x - y for x, y, _ in units], [size for *_, size in units])
    pairs = PairedAnswers.of([x > 0 for x, *_ in units], [y > 0 for _, y, _ in units])
    # Half a problem more in each of the four cells (Agresti & Min 2005): the error is never 0.
    a, b, n = pairs.only_a + 0.5, pairs.only_b + 0.5, pairs.n + 2
    return pairs.value, math.sqrt(a + b - (a - b) ** 2 / n) / n, max(1.0, pairs.n - 1.0)


def _crossed(seeds: Sequence[Mapping[str, Unit]], keys: Sequence[str]) -> AcrossSeeds:
    k = len(seeds)
    sizes = [seeds[0][key][2] for key in keys]
    size = math.fsum(sizes)
    by_seed = [[seed[key][0] - seed[key][1] for key in keys] for seed in seeds]
    values = tuple(math.fsum(differences) / size for differences in by_seed)
    means = [fmean(unit) for unit in zip(*by_seed, strict=True)]
    value, error, df = ratio_error(means, sizes)
    left = math.fsum(
        (d - mean - (of_seed - value) * s) ** 2 / (1 - s / size)
        for differences, of_seed in zip(by_seed, values, strict=True)
        for d, mean, s in zip(differences, means, sizes, strict=True)
        if s < size
    )
    shared = left / size**2 / (k * (k - 1))
    return AcrossSeeds(value, values, len(keys), len(keys), variance(values) / k, error**2, df, shared)
