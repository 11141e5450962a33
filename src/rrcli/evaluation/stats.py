"""Statistics of evaluation results: intervals, paired tests, corrections. Plain Python, no torch.

Units are documents for perplexity and token accuracy (tokens of one document are not independent) and problems for
accuracies. Intervals are two-sided at `confidence`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

CONFIDENCE = 0.95
# Up to this many units, a permutation test looks at every flip of signs (2^12 of them).
ENUMERATED_UNITS = 12
# Numbers that a bootstrap holds at a time: all draws of thousands of units would take gigabytes.
BLOCK_NUMBERS = 2**22


@dataclass(frozen=True)
class Estimate:
    """A value with its interval `[low, high]` and, for a difference, the p-value of "no difference"."""

    value: float
    low: float
    high: float
    p_value: float | None = None
    n: int = 0


def normal_quantile(confidence: float = CONFIDENCE) -> float:
    """Return z with P(|N(0,1)| <= z) = confidence."""
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def ratio(totals: Sequence[float], sizes: Sequence[float], confidence: float = CONFIDENCE) -> Estimate:
    """Estimate Σtotals / Σsizes over independent units, for example nats per token over documents.

    Clustered (linearised) standard error: sqrt(N/(N-1) · Σ(total_i - θ·size_i)²) / Σsizes
    (Cochran, Sampling Techniques, 3rd ed., section 6.3). The interval is infinite for fewer than two units.

    Raises:
        ValueError: no units, or all of size zero.
    """
    theta, error = _ratio(totals, sizes)
    reach = normal_quantile(confidence) * error
    return Estimate(theta, theta - reach, theta + reach, n=len(totals))


def paired_ratio_difference(
    totals: Sequence[float], reference: Sequence[float], sizes: Sequence[float], confidence: float = CONFIDENCE
) -> Estimate:
    """Estimate (Σtotals - Σreference) / Σsizes for the same units measured twice, with a two-sided z-test.

    With nats as totals and tokens as sizes this is the difference of ln perplexity.
    """
    differences = [a - b for a, b in zip(totals, reference, strict=True)]
    theta, error = _ratio(differences, sizes)
    reach = normal_quantile(confidence) * error
    if error == 0:
        p_value = 1.0 if theta == 0 else 0.0
    else:
        p_value = 1.0 if math.isinf(error) else math.erfc(abs(theta / error) / math.sqrt(2))
    return Estimate(theta, theta - reach, theta + reach, p_value, len(differences))


def _ratio(totals: Sequence[float], sizes: Sequence[float]) -> tuple[float, float]:
    n, size = len(totals), math.fsum(sizes)
    if n == 0 or size <= 0:
        raise ValueError("a ratio needs at least one unit of positive size")
    theta = math.fsum(totals) / size
    if n == 1:
        return theta, math.inf
    squares = math.fsum((t - theta * s) ** 2 for t, s in zip(totals, sizes, strict=True))
    return theta, math.sqrt(n / (n - 1) * squares) / size


def wilson(successes: int, n: int, confidence: float = CONFIDENCE) -> Estimate:
    """Estimate a share with Wilson's score interval (Wilson 1927), which stays inside [0, 1].

    Raises:
        ValueError: n is zero.
    """
    if n == 0:
        raise ValueError("a share needs at least one trial")
    z = normal_quantile(confidence)
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    reach = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Estimate(p, max(0.0, centre - reach), min(1.0, centre + reach), n=n)


def mcnemar(a: Sequence[bool], b: Sequence[bool], confidence: float = CONFIDENCE) -> Estimate:
    """Estimate mean(a) - mean(b) for the same problems answered twice, with the exact McNemar test.

    The p-value is the two-sided binomial test of the discordant pairs at 1/2 (McNemar 1947, exact form); the interval
    is the paired Wald interval with the Agresti-Min adjustment (add 1/2 to each of the four cells; Agresti & Min 2005).
    """
    only_a = sum(x and not y for x, y in zip(a, b, strict=True))
    only_b = sum(y and not x for x, y in zip(a, b, strict=True))
    n, discordant = len(a), only_a + only_b
    if n == 0:
        raise ValueError("a comparison needs at least one problem")
    tail = sum(math.comb(discordant, k) for k in range(min(only_a, only_b) + 1))
    p_value = min(1.0, 2 * tail / 2**discordant)
    value = (only_a - only_b) / n
    plus_a, plus_b, total = only_a + 0.5, only_b + 0.5, n + 2
    centre = (plus_a - plus_b) / total
    reach = normal_quantile(confidence) * math.sqrt(plus_a + plus_b - (plus_a - plus_b) ** 2 / total) / total
    low, high = min(value, centre - reach), max(value, centre + reach)
    return Estimate(value, max(-1.0, low), min(1.0, high), p_value, n)


def paired_bootstrap(
    a: Sequence[float], b: Sequence[float], draws: int = 4000, seed: int = 0, confidence: float = CONFIDENCE
) -> Estimate:
    """Estimate mean(a) - mean(b) for the same units scored twice.

    The interval is the percentile bootstrap's over units (Efron & Tibshirani 1993). The p-value is the sign-flip
    permutation test's, which holds its level for a handful of units, where the bootstrap's would not: all flips are
    enumerated for up to 12 units, else `draws` of them are taken.
    """
    import numpy as np

    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    n = len(difference)
    value = float(difference.mean())
    if n < 2 or not difference.any():
        return Estimate(value, -math.inf if n < 2 else 0.0, math.inf if n < 2 else 0.0, 1.0, n)
    random = np.random.default_rng(seed)
    rows = max(1, BLOCK_NUMBERS // n)
    blocks = [(min(rows, draws - done), n) for done in range(0, draws, rows)]
    means = np.concatenate([difference[random.integers(0, n, size=block)].mean(axis=1) for block in blocks])
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    few = n <= ENUMERATED_UNITS
    if few:
        flipped = (np.array(list(itertools.product((1, -1), repeat=n))) * difference).mean(axis=1)
    else:
        flipped = np.concatenate([(random.choice((1, -1), size=b) * difference).mean(axis=1) for b in blocks])
    extreme = np.abs(flipped) >= abs(value) - 1e-12
    p_value = extreme.mean() if few else (extreme.sum() + 1) / (draws + 1)
    return Estimate(value, float(low), float(high), float(p_value), n)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for testing all of them (Holm 1979); reject where the adjusted value is <= alpha."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted = [0.0] * len(p_values)
    running = 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted


def problems_needed(difference: float, discordant_share: float, alpha: float = 0.05, power: float = 0.8) -> int | None:
    """Return about how many paired problems show `difference` of two accuracies, or None if it is zero.

    Normal approximation of McNemar's test (Connor 1987): n = (z_a·sqrt(d) + z_b·sqrt(d - δ²))² / δ², where d is the
    share of discordant pairs.
    """
    if difference == 0:
        return None
    share = max(discordant_share, abs(difference))
    z_alpha, z_beta = NormalDist().inv_cdf(1 - alpha / 2), NormalDist().inv_cdf(power)
    root = z_alpha * math.sqrt(share) + z_beta * math.sqrt(max(share - difference**2, 0.0))
    return math.ceil((root / difference) ** 2)


def units_needed(estimate: Estimate, alpha: float = 0.05, power: float = 0.8) -> int | None:
    """Return about how many units like those measured would show a difference of this size, or None.

    The standard error falls with sqrt(n), so a z-test needs n · ((z_a + z_b) / z)² units, where z is the value over its
    standard error, read off the 95 % interval. None for a difference of zero or an interval that is unknown.
    """
    error = (estimate.high - estimate.low) / (2 * normal_quantile())
    if estimate.value == 0 or not 0 < error < math.inf:
        return None
    z_alpha, z_beta = NormalDist().inv_cdf(1 - alpha / 2), NormalDist().inv_cdf(power)
    return math.ceil(estimate.n * ((z_alpha + z_beta) * error / estimate.value) ** 2)
