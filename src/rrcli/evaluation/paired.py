"""Evidence about the difference of two stages that were measured on the same units: tests and intervals that agree.

`PairedTotals` is for documents (and for scores that are not right or wrong), `PairedAnswers` for problems. Each gives
the p-value of any hypothetical difference, so that tests with a margin (not worse by more than ..., equivalent) use
the same code as "no difference", and an interval at any level that holds exactly the differences that are not rejected.
numpy is imported only where it is needed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal, Protocol

from rrcli.evaluation import distributions
from rrcli.evaluation.stats import LEAST_UNITS, check_units, ratio_error

# Up to this many units, the sign-flip test looks at every flip of signs; a flip and its opposite count once.
ENUMERATED_UNITS = 14
# Random flips for more units: as many as this many numbers allow, within these limits.
FLIPPED_NUMBERS, LEAST_FLIPS, MOST_FLIPS = 40_000_000, 2_000, 10_000
# Numbers that are held at a time: all flips of thousands of units would take gigabytes.
BLOCK_NUMBERS = 2**21
# Numbers of discordant problems at which a power is computed.
POINTS = 100


# The probability with which an experiment that is planned should show a difference that is there.
POWER = 0.8


@dataclass(frozen=True)
class Needed:
    """How many units, or seeds, a difference would need."""

    count: int
    what: Literal["units", "seeds"] = "units"


class Evidence(Protocol):
    """What measurements say about a difference.

    Attributes:
        value: the estimated difference. n: how many units (documents, problems) it rests on.
    """

    @property
    def value(self) -> float: ...
    @property
    def n(self) -> int: ...

    def p_value(self, null: float = 0.0) -> float | None:
        """Return the two-sided p-value of the hypothesis "the difference is `null`"; None if there is no test."""

    def interval(self, alpha: float) -> tuple[float, float] | None:
        """Return the interval of the differences with a p-value above alpha; None if it is unknown."""

    def detectable(self, alpha: float, power: float = POWER) -> float | None:
        """Return the smallest true difference that a test at alpha shows with this power, with as many units."""

    def needed(self, effect: float, alpha: float) -> Needed | None:
        """Return how many units, or seeds, show a true difference of `effect` with `POWER`; None if unknown."""


class PairedTotals:
    """The difference (Σtotals - Σreference) / Σsizes of the same units measured twice, by sign flips.

    With nats as totals and tokens as sizes this is the difference of ln perplexity; with sizes of 1, that of means.

    *Test*: if the true difference is `null`, the paired differences d_i - null·size_i are as likely with the opposite
    sign. The p-value is the share of the flips of signs whose sum is at least as large as that of the data: all flips
    are enumerated for few units, else they are drawn with a fixed seed and the data counts as one of them (Fisher 1935;
    Phipson & Smyth 2010), so p is never 0. Long documents are not a problem for it, as they are for a normal or t
    approximation. *Interval*: the differences that the test does not reject. Its bounds are quantiles of the ratio over
    random subsets of the units (Hartigan 1969), because the flips of a subset reach the data's sum exactly where `null`
    passes the ratio of the subset or of the rest.

    There is no test and no interval below `LEAST_UNITS` units.

    Raises:
        ValueError: no units, a size that is not positive, or a total that is not finite.
    """

    def __init__(self, totals: Sequence[float], reference: Sequence[float], sizes: Sequence[float]) -> None:
        self._differences = [a - b for a, b in zip(totals, reference, strict=True)]
        self._sizes = list(sizes)
        check_units(self._differences, self._sizes)
        self.n = len(self._sizes)
        self.value = math.fsum(self._differences) / math.fsum(self._sizes)

    @functools.cached_property
    def error(self) -> tuple[float, float]:
        """The standard error of the difference and its degrees of freedom, for planning; see `ratio_error`."""
        _, error, df = ratio_error(self._differences, self._sizes)
        return error, df

    def p_value(self, null: float = 0.0) -> float | None:
        """Return the two-sided p-value of the hypothesis "the difference is `null`"; None below `LEAST_UNITS`."""
        if self.n < LEAST_UNITS:
            return None
        import numpy as np

        totals, sizes = self._subsets
        whole = math.fsum(self._differences) - null * math.fsum(self._sizes)
        rounding = 1e-12 * (math.fsum(map(abs, self._differences)) + abs(null) * math.fsum(self._sizes))
        extreme = np.abs(whole - 2 * (totals - null * sizes)) >= abs(whole) - rounding
        return float((1 + np.count_nonzero(extreme)) / (1 + len(totals)))

    def interval(self, alpha: float) -> tuple[float, float] | None:
        """Return the differences with a p-value above alpha; None if so few units can reject none at this level."""
        if self.n < LEAST_UNITS:
            return None
        low, high = self._bounds
        place = math.floor(alpha * (len(low) + 1) * (1 + 1e-12)) - 1
        return (float(low[place]), float(high[-1 - place])) if 0 <= place < len(low) else None

    def detectable(self, alpha: float, power: float = POWER) -> float | None:
        """Return the smallest true difference that a test at alpha shows with this power, with as many units."""
        error, df = self.error
        reach = _t_reach(alpha, df, power) * error
        return reach if self.n >= LEAST_UNITS and 0 < reach < math.inf else None

    def needed(self, effect: float, alpha: float) -> Needed | None:
        """Return how many units like these show a true difference of `effect` with `POWER`; None if unknown.

        The standard error falls with sqrt(units), and its degrees of freedom rise with them.
        """
        error, df = self.error
        if effect == 0 or not 0 < error < math.inf:
            return None
        units = float(self.n)
        for _ in range(50):  # the count decides the degrees of freedom, which decide the count
            units = self.n * (_t_reach(alpha, max(1.0, df * units / self.n), POWER) * error / effect) ** 2
        return Needed(max(LEAST_UNITS, math.ceil(units)))

    @functools.cached_property
    def _subsets(self) -> tuple[Any, Any]:
        """The total and the size of the flipped subset of each flip; the flip of no unit is left out."""
        import numpy as np

        columns = np.array([self._differences, self._sizes], dtype=np.float64).T
        sums = np.concatenate([block @ columns for block in _flipped(self.n)])
        return sums[:, 0], sums[:, 1]

    @functools.cached_property
    def _bounds(self) -> tuple[Any, Any]:
        """The sorted lower, and upper, of the ratios over each flipped subset and over the rest."""
        import numpy as np

        totals, sizes = self._subsets
        rest = math.fsum(self._sizes) - sizes
        whole = (sizes == 0) | (rest <= 1e-12 * sizes)  # flipping all units or none is reached by every difference
        with np.errstate(divide="ignore", invalid="ignore"):
            inner, outer = totals / sizes, (math.fsum(self._differences) - totals) / rest
        low = np.where(whole, -np.inf, np.minimum(inner, outer))
        high = np.where(whole, np.inf, np.maximum(inner, outer))
        return np.sort(low), np.sort(high)


def _flipped(units: int) -> Iterator[Any]:
    """Yield blocks `[flip, unit]` of zeros and ones: which units each flip takes with the opposite sign."""
    import numpy as np

    if units <= ENUMERATED_UNITS:
        numbers = np.arange(1, 2 ** (units - 1))
        yield ((numbers[:, None] >> np.arange(units)) & 1).astype(np.float64)
        return
    random = np.random.default_rng(0)
    left = min(MOST_FLIPS, max(LEAST_FLIPS, FLIPPED_NUMBERS // units))
    while left:
        rows = min(left, max(1, BLOCK_NUMBERS // units))
        bits = np.unpackbits(np.frombuffer(random.bytes(-(-rows * units // 8)), dtype=np.uint8), count=rows * units)
        yield bits.reshape(rows, units).astype(np.float64)
        left -= rows


@dataclass(frozen=True)
class PairedAnswers:
    """The difference of two shares of right answers to the same problems, from the discordant ones.

    *Test* of no difference: McNemar's, exact (the two-sided binomial test of the discordant problems at 1/2). *Test* of
    another difference, and *interval*: Tango's score test (1998), whose variance is that of the hypothetical
    difference; an interval takes 0 in where the exact test does not reject it, so that the two never contradict each
    other.

    Attributes:
        only_a, only_b: problems that only the stage, only the reference, answered right. n: all problems.
    """

    only_a: int
    only_b: int
    n: int

    def __post_init__(self) -> None:
        """Check the counts.

        Raises:
            ValueError: there is no problem, or there are more discordant problems than problems.
        """
        if self.n < 1 or min(self.only_a, self.only_b) < 0 or self.only_a + self.only_b > self.n:
            raise ValueError(f"{self.only_a} + {self.only_b} discordant problems of {self.n}")

    @classmethod
    def of(cls, a: Sequence[bool], b: Sequence[bool]) -> PairedAnswers:
        """Count the answers of a stage, and of the reference, to the same problems."""
        only_a = sum(x and not y for x, y in zip(a, b, strict=True))
        only_b = sum(y and not x for x, y in zip(a, b, strict=True))
        return cls(only_a, only_b, len(a))

    @property
    def value(self) -> float:
        """The difference of the shares."""
        return (self.only_a - self.only_b) / self.n

    @property
    def discordant(self) -> float:
        """The share of problems that exactly one of the two stages answered right."""
        return (self.only_a + self.only_b) / self.n

    def p_value(self, null: float = 0.0) -> float | None:
        """Return the two-sided p-value of the hypothesis "the difference is `null`"; None below `LEAST_UNITS`."""
        if self.n < LEAST_UNITS:
            return None
        return self._score(null) if null else _sign_test(self.only_a, self.only_b)

    def interval(self, alpha: float) -> tuple[float, float] | None:
        """Return the interval of differences that are not rejected at alpha; None below `LEAST_UNITS`."""
        if self.n < LEAST_UNITS:
            return None
        low, high = (self._bound(alpha, end) for end in (-1.0, 1.0))
        return (min(low, 0.0), max(high, 0.0)) if _sign_test(self.only_a, self.only_b) > alpha else (low, high)

    def detectable(self, alpha: float, power: float = POWER) -> float | None:
        """Return the smallest true difference that a test at alpha shows with this power, with as many problems.

        The share of discordant problems is taken to be that of these answers.
        """
        if self.n < LEAST_UNITS:
            return None
        low, high = 0.0, 1.0
        if mcnemar_power(self.n, high, self.discordant, alpha) < power:
            return None
        while high - low > 1e-3 * high:
            middle = (low + high) / 2
            enough = mcnemar_power(self.n, middle, self.discordant, alpha) >= power
            low, high = (low, middle) if enough else (middle, high)
        return high

    def needed(self, effect: float, alpha: float) -> Needed | None:
        """Return how many problems show a true difference of `effect` with `POWER`; None for no difference."""
        count = problems_needed(effect, self.discordant, alpha)
        return None if count is None else Needed(max(LEAST_UNITS, count))

    def _score(self, null: float) -> float:
        """Return Tango's p-value; the shares of discordant problems are estimated under the hypothesis."""
        if abs(null) >= 1:
            return float(self.value == null)
        a, b, n = self.only_a, self.only_b, self.n
        linear = (2 * n - a + b) * null - a - b
        share_b = (math.sqrt(linear**2 + 8 * n * b * null * (1 - null)) - linear) / (4 * n)
        variance = n * (2 * share_b + null * (1 - null))
        excess = a - b - n * null
        if variance <= 0:
            return float(excess == 0)
        return math.erfc(abs(excess) / math.sqrt(2 * variance))

    def _bound(self, alpha: float, end: float) -> float:
        inside, outside = self.value, end
        if self._score(outside) > alpha:
            return outside
        for _ in range(60):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if self._score(middle) > alpha else (inside, middle)
        return inside


@functools.lru_cache(maxsize=1024)
def _sign_test(a: int, b: int) -> float:
    """Return the two-sided binomial p-value of `a` against `b` at 1/2."""
    tail = term = 1
    for k in range(min(a, b)):
        term = term * (a + b - k) // (k + 1)
        tail += term
    return min(1.0, float(2 * tail / 2 ** (a + b)))


@functools.lru_cache(maxsize=65536)
def _least_wins(discordant: int, alpha: float) -> int:
    """Return how many of the discordant problems must favour one side to be significant; more than all if none is."""
    guess = discordant / 2 + NormalDist().inv_cdf(1 - alpha / 2) * math.sqrt(discordant) / 2
    least = min(discordant + 1, max(0, math.floor(guess)))
    while least > 0 and 2 * distributions.binomial_tail(least - 1, discordant, 0.5) <= alpha:
        least -= 1
    while least <= discordant and 2 * distributions.binomial_tail(least, discordant, 0.5) > alpha:
        least += 1
    return least


def mcnemar_power(n: int, difference: float, discordant_share: float, alpha: float) -> float:
    """Return the probability that the exact test at alpha shows a true difference in its direction, with n problems.

    The number of discordant problems is binomial, and given it the number that favours the better side is too; of the
    first, values within four standard deviations are looked at, at most `POINTS` of them.
    """
    delta = abs(difference)
    share = min(1.0, max(discordant_share, delta))
    wins = (1 + delta / share) / 2
    middle, spread = n * share, math.sqrt(n * share * (1 - share))
    first, last = max(0, math.floor(middle - 4 * spread)), min(n, math.ceil(middle + 4 * spread))
    step = max(1, -(-(last - first) // POINTS))
    weights, power = 0.0, 0.0
    for discordant in range(first, last + 1, step):
        weight = (
            math.exp(-((discordant - middle) ** 2) / (2 * spread**2))
            if spread and step > 1
            else _chance(discordant, n, share)
        )
        weights += weight
        power += weight * distributions.binomial_tail(_least_wins(discordant, alpha), discordant, wins)
    return power / weights


def _chance(k: int, n: int, p: float) -> float:
    """Return the binomial probability of k."""
    if p >= 1:
        return float(k == n)
    log = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) + k * math.log(p) + (n - k) * math.log1p(-p)
    return math.exp(log)


def problems_needed(difference: float, discordant_share: float, alpha: float, power: float = POWER) -> int | None:
    """Return about how many paired problems show `difference` of two accuracies, or None if it is zero.

    The number at which `mcnemar_power` reaches `power`, searched around Connor's approximation (1987): n =
    (z_a·sqrt(d) + z_b·sqrt(d - δ²))² / δ² with the share d of discordant pairs.

    Args:
        alpha: two-sided level of the test. power: the probability of showing the difference if it is true.
    """
    if difference == 0:
        return None
    delta = abs(difference)
    share = max(discordant_share, delta)
    z_alpha, z_beta = NormalDist().inv_cdf(1 - alpha / 2), NormalDist().inv_cdf(power)
    about = ((z_alpha * math.sqrt(share) + z_beta * math.sqrt(max(share - delta**2, 0.0))) / delta) ** 2
    low, high = 0, math.ceil(1.1 * about) + 10
    while mcnemar_power(high, delta, share, alpha) < power:
        low, high = high, 2 * high
    while high - low > max(1, high // 500):
        middle = (low + high) // 2
        low, high = (low, middle) if mcnemar_power(middle, delta, share, alpha) >= power else (middle, high)
    return high


def _t_reach(alpha: float, df: float, power: float) -> float:
    """Return how many standard errors a difference needs, to be shown by a t-test at alpha with this power."""
    return distributions.t_quantile(1 - alpha, df) + distributions.t_quantile(2 * power - 1, df)
