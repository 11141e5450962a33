"""How often do the tests of `rr compare` reject a difference that is not there, and their intervals hold the truth?

    python benchmarks/simulated_statistics.py    # on one core; prints the tables of docs/statistics.md

Three questions, each with the method of `rr compare` beside the one that it replaced:

1. *Documents*, whose lengths are log-normal with a standard deviation of the logarithm of 1: the sign-flip test and its
   interval, and the interval of a single stage, against the normal approximation.
2. *Seeds with a test set each* (nested) and *seeds that share their documents* (crossed), against pooling all units as
   if they were independent, and against Satterthwaite's single t quantile.
3. *Power* where the sentences of `rr compare` say 80 %.

Every table is drawn from the hypothesis of no difference, so that rejecting is an error. One of seeds has two columns:
if seeds differ as units do, and if seeds do not differ at all.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator

import numpy as np

from rrcli.evaluation import distributions
from rrcli.evaluation.paired import PairedAnswers, PairedTotals, problems_needed
from rrcli.evaluation.seeds import across_seeds
from rrcli.evaluation.stats import LEAST_UNITS, ratio

Z = distributions.t_quantile(0.95, math.inf)
DOCUMENTS = (5, 6, 10, 20, 50, 200)
SEEDS, UNITS = (1, 2, 3, 5, 10), (20, 100, 500, 1000)
# Standard deviations of the differences: of seeds, of units in all seeds, of the rest.
CASES = {"seeds differ": (0.1, 0.2, 0.4), "seeds alike": (0.0, 0.2, 0.4)}


def documents(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return paired differences of documents without a difference on average, and their sizes."""
    sizes = np.ceil(np.exp(4 + rng.standard_normal(n)))
    return sizes * rng.standard_normal(n), sizes


def normal_error(totals: np.ndarray, sizes: np.ndarray) -> float:
    """Return the linearised standard error that a normal approximation used."""
    residuals = totals - totals.sum() / sizes.sum() * sizes
    return float(math.sqrt(len(sizes) / (len(sizes) - 1) * (residuals**2).sum()) / sizes.sum())


def document_table(trials: int) -> Iterator[str]:
    yield "| documents | normal test | its interval | sign flips | their interval | interval of one stage |"
    yield "|---|---|---|---|---|---|"
    for n in DOCUMENTS:
        rng = np.random.default_rng(n)
        old, flips, holds, own = [], [], [], []
        for _ in range(trials):
            totals, sizes = documents(rng, n)
            old.append(abs(totals.sum() / sizes.sum()) > Z * normal_error(totals, sizes))
            if n >= LEAST_UNITS:
                evidence, stage = PairedTotals(totals, 0 * sizes, sizes), ratio(totals, sizes)
                flips.append((evidence.p_value() or 0.0) <= 0.05)
                low, high = evidence.interval(0.05) or (0.0, 0.0)
                holds.append(low <= 0 <= high)
                own.append((stage.low or 0.0) <= 0 <= (stage.high or 0.0))
        new = " | ".join(percent(values) for values in (flips, holds, own))
        yield f"| {n} | {percent(old)} | {percent(np.invert(old))} | {new} |"


def seed_table(kind: str, trials: int) -> Iterator[str]:
    """Yield a table for seeds that are 'nested' (own problems) or 'crossed' (the same documents)."""
    cases = " | ".join(f"{case}: pooled | Satterthwaite | rr | interval holds" for case in CASES)
    yield f"| seeds | units | {cases} |"
    yield "|---|---" + "|---" * 4 * len(CASES) + "|"
    for seeds in SEEDS:
        for units in UNITS:
            cells = [" | ".join(seed_errors(kind, seeds, units, parts, trials)) for parts in CASES.values()]
            yield f"| {seeds} | {units} | {' | '.join(cells)} |"


def seed_errors(
    kind: str, seeds: int, units: int, parts: tuple[float, float, float], trials: int
) -> tuple[str, str, str, str]:
    """Return the share of wrong rejections by three methods, and how often the last one's interval holds the truth."""
    rng = np.random.default_rng((seeds, units))
    of_seed, of_unit, rest = parts
    crossed = kind == "crossed"
    common = (trials, 1, units) if crossed else (trials, seeds, units)
    table = rng.standard_normal((trials, seeds, 1)) * of_seed + rng.standard_normal(common) * of_unit
    table = table + rng.standard_normal((trials, seeds, units)) * rest
    means = table.mean((1, 2))
    pooled = np.abs(means) > Z * table.reshape(trials, -1).std(1, ddof=1) / math.sqrt(seeds * units)
    if seeds == 1:  # the units alone, said to hold for these checkpoints
        return percent(pooled), "-", "(units alone)", percent(np.invert(pooled))
    by_seed = table.mean(2).var(1, ddof=1) / seeds
    if not crossed:
        reach, single = distributions.t_quantile(0.95, seeds - 1.0) * np.sqrt(by_seed), "-"
    else:
        by_unit = table.mean(1).var(1, ddof=1) / units
        residual = table - table.mean(1, keepdims=True) - table.mean(2, keepdims=True) + means[:, None, None]
        both = (residual**2).sum((1, 2)) / ((seeds - 1) * (units - 1)) / (seeds * units)
        t_seed, t_unit = (distributions.t_quantile(0.95, n - 1.0) for n in (seeds, units))
        parts_of = (t_seed**2 * by_seed, t_unit**2 * by_unit)
        reach = np.sqrt(np.maximum(np.maximum(*parts_of), sum(parts_of) - Z**2 * both))
        variance = np.maximum(np.maximum(by_seed, by_unit), by_seed + by_unit - both)
        df = variance**2 / (by_seed**2 / (seeds - 1) + by_unit**2 / (units - 1) + both**2 / ((seeds - 1) * (units - 1)))
        quantiles = np.array([distributions.t_quantile(0.95, max(1.0, round(float(d), 1))) for d in df])
        single = percent(np.abs(means) > quantiles * np.sqrt(variance))
    check(table[0], crossed=crossed, reach=float(reach[0]))
    wrong = np.abs(means) > reach
    return percent(pooled), single, percent(wrong), percent(np.invert(wrong))


def check(table: np.ndarray, *, crossed: bool, reach: float) -> None:
    """Check that the vectorised formulas are those of `across_seeds`, on one draw."""
    found = across_seeds(
        [{f"{'' if crossed else seed} {i}": (d, 0.0, 1.0) for i, d in enumerate(row)} for seed, row in enumerate(table)]
    )
    low, high = found.interval(0.05) or (0.0, 0.0)
    assert math.isclose(high - low, 2 * reach, rel_tol=1e-6), (high - low, 2 * reach)


def power_table(trials: int) -> Iterator[str]:
    yield "| what is stated | alpha | power |"
    yield "|---|---|---|"
    for n in (10, 50, 200):
        rng = np.random.default_rng(n)
        shown = []
        for _ in range(trials // 4):
            totals, sizes = documents(rng, n)
            smallest = PairedTotals(totals, 0 * sizes, sizes).detectable(0.025) or 0.0
            totals, sizes = documents(rng, n)
            shown.append((PairedTotals(totals + smallest * sizes, 0 * sizes, sizes).p_value() or 0.0) <= 0.025)
        yield f"| smallest difference of {n} documents | 0.025 | {percent(shown)} |"
    for gain, loss in ((0.09, 0.04), (0.05, 0.0), (0.01, 0.002)):
        n = problems_needed(gain - loss, gain + loss, 0.025) or 0
        counts = np.random.default_rng(n).multinomial(n, [gain, loss, 1 - gain - loss], size=4 * trials)
        shown = [(PairedAnswers(int(a), int(b), n).p_value() or 0.0) <= 0.025 for a, b, _ in counts]
        text = f"{n:,} problems for {100 * (gain - loss):.1f} points ({100 * gain:g} % won, {100 * loss:g} % lost)"
        yield f"| {text} | 0.025 | {percent(shown)} |"


def percent(found: object) -> str:
    values = np.asarray(found)
    return f"{100 * float(values.mean()):.1f} %" if values.size else "no test"


def main() -> None:
    parser = argparse.ArgumentParser(description="Type-1 error, coverage and power of the statistics of rr compare.")
    parser.add_argument("--trials", type=int, default=2000, help="experiments for each line")
    trials = parser.parse_args().trials
    print(f"{trials} experiments a line; a share of 5 % is known to +-{100 * 2 * math.sqrt(0.0475 / trials):.1f} %.")
    for title, lines in (
        ("Documents", document_table(trials)),
        ("Seeds, each with problems of its own", seed_table("nested", trials)),
        ("Seeds that share their documents", seed_table("crossed", trials)),
        ("Power where 80 % is stated", power_table(trials)),
    ):
        print(f"\n{title}\n")
        for line in lines:
            print(line, flush=True)


if __name__ == "__main__":
    main()
