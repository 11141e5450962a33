"""Statistics of one stage's results, and the correction for several tests. Plain Python, no torch.

Units are documents for perplexity and token accuracy (tokens of one document are not independent) and problems for
accuracies. Intervals are two-sided at `confidence`. `paired` compares two stages, `seeds` several trainings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from rrcli.evaluation import distributions

CONFIDENCE = 0.95
# Below this many units there is no interval over documents and no test. With five units the sign-flip test cannot reach
# p <= 0.05: its smallest p-value is 2 / 2^5 = 0.0625.
LEAST_UNITS = 6


@dataclass(frozen=True)
class Estimate:
    """A value over `n` units with its interval `[low, high]`; both bounds are None if too few units were measured."""

    value: float
    low: float | None
    high: float | None
    n: int = 0


def ratio(totals: Sequence[float], sizes: Sequence[float], confidence: float = CONFIDENCE) -> Estimate:
    """Estimate Σtotals / Σsizes over independent units, for example nats per token over documents.

    The interval is that of t with the bias-reduced standard error CR2 and its degrees of freedom (`ratio_error`). The
    interval is unknown below `LEAST_UNITS` units.

    Raises:
        ValueError: no units, a size that is not positive, or a total that is not finite.
    """
    value, error, df = ratio_error(totals, sizes)
    if len(totals) < LEAST_UNITS:
        return Estimate(value, None, None, len(totals))
    reach = distributions.t_quantile(confidence, df) * error
    return Estimate(value, value - reach, value + reach, len(totals))


def ratio_error(totals: Sequence[float], sizes: Sequence[float]) -> tuple[float, float, float]:
    """Return Σtotals / Σsizes, its standard error (infinite for one unit), and the degrees of freedom of that error.

    The ratio θ is the least-squares slope of total on size with weights 1/size, in which a unit has the leverage h_i =
    size_i / Σsizes. Its residuals e_i = total_i - θ·size_i are too small by the leverage, which CR2 corrects:
    error² = Σ e_i² / (1 - h_i) / (Σsizes)² (Bell & McCaffrey 2002). The degrees of freedom are Satterthwaite's for a
    model in which the total varies in proportion to the size, as where each document has a level of its own: few where
    a few long documents dominate.

    Raises:
        ValueError: no units, a size that is not positive, or a total that is not finite.
    """
    check_units(totals, sizes)
    size = math.fsum(sizes)
    value = math.fsum(totals) / size
    if len(totals) == 1:
        return value, math.inf, 1.0
    leverages = [s / size for s in sizes]
    squares = [(t - value * s) ** 2 / (1 - h) for t, s, h in zip(totals, sizes, leverages, strict=True)]
    return value, math.sqrt(math.fsum(squares)) / size, _degrees(leverages)


def _degrees(leverages: Sequence[float]) -> float:
    """Return Satterthwaite's degrees of freedom 2·E[error²]² / Var[error²] of CR2, for Var(total_i) ∝ size_i².

    The covariance of residuals i and j is then h_i·h_j·(δ_ij + H - h_i - h_j) with H = Σh². With weights w_i =
    1 / (1 - h_i) the result is (Σ w_i·Cov_ii)² / Σ_ij w_i·w_j·Cov_ij², whose double sum is expanded into power sums.
    """
    square = math.fsum(h * h for h in leverages)
    masses = [h * h / (1 - h) for h in leverages]
    a0, a1, a2 = (math.fsum(a * h**k for a, h in zip(masses, leverages, strict=True)) for k in range(3))
    mean = math.fsum(a * (1 - 2 * h + square) for a, h in zip(masses, leverages, strict=True))
    own = math.fsum(a * a * (1 + 2 * (square - 2 * h)) for a, h in zip(masses, leverages, strict=True))
    spread = square**2 * a0**2 + 2 * a2 * a0 + 2 * a1**2 - 4 * square * a1 * a0 + own
    return max(1.0, mean**2 / spread)


def check_units(totals: Sequence[float], sizes: Sequence[float]) -> None:
    """Check that units can be measured by a ratio.

    Raises:
        ValueError: no units, a size that is not positive, or a total that is not finite.
    """
    if len(totals) != len(sizes):
        raise ValueError(f"{len(totals)} totals and {len(sizes)} sizes")
    if not len(totals) or not all(0 < size < math.inf for size in sizes):
        raise ValueError("a ratio needs at least one unit, and every unit a positive size")
    if not all(map(math.isfinite, totals)):
        raise ValueError("a total is not finite")


def wilson(successes: int, n: int, confidence: float = CONFIDENCE) -> Estimate:
    """Estimate a share with Wilson's score interval (Wilson 1927), which stays inside [0, 1].

    Raises:
        ValueError: n is zero, or there are more successes than trials.
    """
    if not 0 <= successes <= n or n == 0:
        raise ValueError(
            f"{successes} successes in {n} trials: a share needs at least one trial, and no more successes"
        )
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    reach = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Estimate(p, max(0.0, centre - reach), min(1.0, centre + reach), n)


def pass_at_k(answers: int, right: int, k: int) -> float:
    """Return the unbiased estimate of the probability that at least one of k sampled answers is right.

    1 - C(n - c, k) / C(n, k) for c right ones among n answers (Chen et al. 2021). For k = 1 it is their share.

    Raises:
        ValueError: fewer than k answers, or more right ones than answers.
    """
    if not 0 <= right <= answers or not 1 <= k <= answers:
        raise ValueError(f"pass@{k} of {right} right answers among {answers}")
    return 1.0 - math.comb(answers - right, k) / math.comb(answers, k)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for testing all of them (Holm 1979); reject where the adjusted value is <= alpha."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted = [0.0] * len(p_values)
    running = 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted


def holm_levels(p_values: Sequence[float], alpha: float) -> list[float]:
    """Return the level at which Holm's procedure tests each p-value: alpha / (m - rank) in the order of p-values.

    The procedure stops at the first p-value above its level; all later ones count as tested at that level. So a p-value
    is at most its level exactly if its adjusted value is at most alpha, and an interval at that level says the same.
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    levels = [0.0] * len(p_values)
    level = alpha / max(1, len(p_values))
    stopped = False
    for rank, index in enumerate(order):
        level = level if stopped else alpha / (len(p_values) - rank)
        stopped = stopped or p_values[index] > level
        levels[index] = level
    return levels
