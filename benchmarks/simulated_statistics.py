"""How often do the tests of `rr compare` reject a difference that is not there, and their intervals hold the truth?

    python benchmarks/simulated_statistics.py    # minutes on one core; prints the tables of docs/statistics.md

Four questions, each with the method of `rr compare` beside the one that it replaced:

1. *Documents*, whose lengths are log-normal with a standard deviation of the logarithm of 1: the sign-flip test and its
   interval, and the interval of a single stage, against the normal approximation.
2. *Seeds with a test set each* (nested): answers to problems of which 15 % are won and 15 % are lost on average. The
   t-test over seeds against pooling all problems (McNemar's test, as with one seed).
3. *Seeds that share their documents* (crossed): the same lengths as in 1. Each component with its own t quantile,
   against pooling, and against Satterthwaite's single t quantile.
4. *Power* where the sentences of `rr compare` say 80 %.

In 1 to 3 there is no difference on average, so that rejecting is an error. Tables of seeds have two halves: seeds
differ (by 0.1 nats, or by 10 points of accuracy, in standard deviation), or do not differ at all.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator

import numpy as np

from rrcli.evaluation import distributions
from rrcli.evaluation.paired import PairedAnswers, PairedTotals, problems_needed
from rrcli.evaluation.seeds import Unit, across_seeds
from rrcli.evaluation.stats import LEAST_UNITS, ratio, ratio_error

Z = distributions.t_quantile(0.95, math.inf)
DOCUMENTS = (5, 6, 10, 20, 50, 200)
SEEDS, UNITS = (1, 2, 3, 5, 10), (20, 100, 500, 1000)
# The standard deviation of the differences of seeds.
CASES = {"seeds differ": 0.1, "seeds alike": 0.0}
# Of the problems, the share that is won and the share that is lost.
DISCORDANT = 0.15


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


def nested_table(trials: int) -> Iterator[str]:
    """Yield the table of seeds that have problems of their own."""
    yield "| seeds | problems each | " + " | ".join(f"{case}: pooled | rr | interval" for case in CASES) + " |"
    yield "|---|---" + "|---" * 3 * len(CASES) + "|"
    for seeds in SEEDS:
        for problems in UNITS:
            cells = [" | ".join(nested_errors(seeds, problems, spread, trials)) for spread in CASES.values()]
            yield f"| {seeds} | {problems} | {' | '.join(cells)} |"


def nested_errors(seeds: int, problems: int, spread: float, trials: int) -> tuple[str, str, str]:
    """Return how often pooling and the t-test over seeds reject, and how often the latter's interval holds 0."""
    rng = np.random.default_rng((seeds, problems))
    shift = np.clip(spread * rng.standard_normal((trials, seeds)), -2 * DISCORDANT, 2 * DISCORDANT) / 2
    chances = np.stack([DISCORDANT + shift, DISCORDANT - shift, np.full_like(shift, 1 - 2 * DISCORDANT)], axis=-1)
    counts = rng.multinomial(problems, chances)
    pooled = [PairedAnswers(int(a), int(b), seeds * problems) for a, b, _ in counts.sum(1)]
    rejected = [(evidence.p_value() or 0.0) <= 0.05 for evidence in pooled]
    if seeds == 1:  # the units alone, said to hold for these checkpoints
        held = [low <= 0 <= high for low, high in (evidence.interval(0.05) or (0.0, 0.0) for evidence in pooled)]
        return percent(rejected), "-", percent(held)
    won, lost = counts[..., 0], counts[..., 1]
    values = (won - lost) / problems
    n, more, less = problems + 2, won + 0.5, lost + 0.5
    within = ((more + less - (more - less) ** 2 / n) / n**2).sum(1) / seeds**2
    between = values.var(1, ddof=1) / seeds
    variance = np.where(between > 1e-9 * within, between, within)
    reach = distributions.t_quantile(0.95, seeds - 1.0) * np.sqrt(variance)
    first = [[(1.0, 0.0)] * a + [(0.0, 1.0)] * b + [(1.0, 1.0)] * c for a, b, c in counts[0].tolist()]
    check(
        [{f"{s} {i}": (x, y, 1.0) for i, (x, y) in enumerate(f)} for s, f in enumerate(first)], reach[0], answers=True
    )
    wrong = np.abs(values.mean(1)) > reach
    return percent(rejected), percent(wrong), percent(np.invert(wrong))


def crossed_table(trials: int) -> Iterator[str]:
    """Yield the table of seeds that share their documents."""
    cases = " | ".join(f"{case}: pooled | Satterthwaite | rr | interval" for case in CASES)
    yield f"| seeds | documents | {cases} |"
    yield "|---|---" + "|---" * 4 * len(CASES) + "|"
    for seeds in SEEDS[1:]:
        for units in UNITS:
            cells = [" | ".join(crossed_errors(seeds, units, spread, trials)) for spread in CASES.values()]
            yield f"| {seeds} | {units} | {' | '.join(cells)} |"


def crossed_errors(seeds: int, units: int, spread: float, trials: int) -> tuple[str, str, str, str]:
    """Return how often pooling, Satterthwaite's quantile and rr reject, and how often rr's interval holds 0."""
    rng = np.random.default_rng((seeds, units))
    pooled, single, wrong = [], [], []
    for _ in range(trials):
        sizes = np.ceil(np.exp(4 + rng.standard_normal(units)))
        share = sizes / sizes.sum()
        table = spread * rng.standard_normal((seeds, 1)) + 0.2 * rng.standard_normal(units)
        table = table + 0.4 * rng.standard_normal((seeds, units))
        by_seed = table @ share
        value, error, df = ratio_error(table.mean(0) * sizes, sizes)
        left = ((table - table.mean(0) - (by_seed - value)[:, None]) * share) ** 2 / (1 - share)
        v_seed, v_unit, both = by_seed.var(ddof=1) / seeds, error**2, left.sum() / (seeds * (seeds - 1))
        t_seed, t_unit = distributions.t_quantile(0.95, seeds - 1.0), distributions.t_quantile(0.95, round(df, 2))
        parts = t_seed**2 * v_seed, t_unit**2 * v_unit
        reach = math.sqrt(max(*parts, sum(parts) - Z**2 * both))
        wrong.append(abs(value) > reach)
        variance = max(v_seed, v_unit, v_seed + v_unit - both)
        spread_of_it = v_seed**2 / (seeds - 1) + v_unit**2 / df + both**2 / ((seeds - 1) * df)
        degrees = max(1.0, round(variance**2 / spread_of_it, 1))
        single.append(abs(value) > distributions.t_quantile(0.95, degrees) * math.sqrt(variance))
        rest = (table - value) * share / seeds
        pooled.append(abs(value) > Z * math.sqrt((rest**2).sum()))
    check([{f"{i}": (d * s, 0.0, s) for i, (d, s) in enumerate(zip(row, sizes, strict=True))} for row in table], reach)
    return percent(pooled), percent(single), percent(wrong), percent(np.invert(wrong))


def check(seeds: list[dict[str, Unit]], reach: float, *, answers: bool = False) -> None:
    """Check on one draw that the formulas here, which are fast, are those of `across_seeds`."""
    low, high = across_seeds(seeds, answers=answers).interval(0.05) or (0.0, 0.0)
    assert math.isclose(high - low, 2 * reach, rel_tol=0.02), (high - low, 2 * reach)


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
        ("Seeds, each with problems of its own", nested_table(trials)),
        ("Seeds that share their documents", crossed_table(trials)),
        ("Power where 80 % is stated", power_table(trials)),
    ):
        print(f"\n{title}\n")
        for line in lines:
            print(line, flush=True)


if __name__ == "__main__":
    main()
