"""Student's t and the binomial distribution: tail probabilities and quantiles. Plain Python.

The tails are the regularised incomplete beta function, computed by its continued fraction (Abramowitz & Stegun 26.5.8,
26.5.24, 26.7.1); scipy has them, but commands that only read results should not need it.
"""

from __future__ import annotations

import functools
import math
from statistics import NormalDist

# The continued fraction ends where a factor differs from 1 by no more than this.
PRECISION = 1e-15
MOST_TERMS = 10_000
# Above this many degrees of freedom the normal distribution is the same to six digits.
NORMAL_FROM = 1e6


def t_tail(t: float, df: float) -> float:
    """Return P(|T| >= |t|) for Student's t with `df` degrees of freedom; infinite `df` is the normal distribution."""
    t = abs(t)
    if math.isinf(t):
        return 0.0
    if df > NORMAL_FROM:
        return math.erfc(t / math.sqrt(2))
    return incomplete_beta(df / 2, 0.5, df / (df + t * t), t * t / (df + t * t))


@functools.lru_cache(maxsize=4096)
def t_quantile(confidence: float, df: float) -> float:
    """Return t with P(|T| <= t) = confidence."""
    tail = 1 - confidence
    if not 0 < tail < 1:
        return 0.0 if tail >= 1 else math.inf
    start = -NormalDist().inv_cdf(tail / 2)
    if df > NORMAL_FROM:
        return start
    # Newton's method on log P against log t, which is close to a line where t is large.
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    low, high, t = 0.0, math.inf, max(start, 1e-8)
    for _ in range(200):
        p = t_tail(t, df)
        if abs(p / tail - 1) < 1e-12:
            break
        low, high = (t, high) if p > tail else (low, t)
        density = 2 * scale * (1 + t * t / df) ** (-(df + 1) / 2)
        step = t * math.exp(min(20.0, math.log(p / tail) * p / (density * t))) if p > 0 and density > 0 else math.inf
        t = step if low < step < high else (2 * low if math.isinf(high) else (low + high) / 2)
        if high - low < 1e-13 * low:
            break
    return t


def binomial_tail(least: int, n: int, p: float) -> float:
    """Return P(X >= least) for n trials with probability p."""
    if least <= 0 or least > n:
        return float(least <= 0)
    return incomplete_beta(float(least), float(n - least + 1), p, 1 - p)


def incomplete_beta(a: float, b: float, x: float, y: float) -> float:
    """Return I_x(a, b), where y = 1 - x is given too, because a small one would be lost in rounding."""
    if x <= 0 or y <= 0:
        return 0.0 if x <= 0 else 1.0
    front = math.exp(
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log(y)
    )  # x^a · y^b / B(a, b)
    if x < (a + 1) / (a + b + 2):
        return front * _fraction(a, b, x) / a
    return 1 - front * _fraction(b, a, y) / b


def _fraction(a: float, b: float, x: float) -> float:
    """Return the continued fraction of the incomplete beta function by Lentz's method."""
    tiny = 1e-300
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1) or tiny)
    value = d
    for m in range(1, MOST_TERMS):
        for numerator in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / (1 + numerator * d or tiny)
            c = 1 + numerator / c or tiny
            value *= c * d
        if abs(c * d - 1) < PRECISION:
            break
    return value
