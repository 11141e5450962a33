"""Computes the difference of two stages over the records that both have, and corrects for testing many differences."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from rrcli.comparison.records import PARTS
from rrcli.comparison.results import Cell, Claim, MetricRow, Pair, Results
from rrcli.evaluation import stats
from rrcli.evaluation.metrics import Metric


class Cells:
    """The cells of a comparison, each made once: a stage's value of a metric, and its difference to another stage."""

    def __init__(self, stages: Mapping[str, Results]) -> None:
        """Take label -> results of the stages."""
        self.stages = stages
        self._made: dict[tuple[str, str, str], Cell] = {}

    def of(self, metric: Metric, stage: str, reference: str) -> Cell:
        """Return a stage's cell of a metric, with its difference to the reference stage."""
        key = metric.name, stage, reference
        if key not in self._made:
            self._made[key] = _cell(metric, self.stages[stage], self.stages[reference])
        return self._made[key]


def pair(metric: Metric, result: Results, reference: Results) -> Pair:
    """Estimate a metric's difference, `result` minus `reference`, over the records that both have.

    There is no estimate if they have no record in common, if a record with the same key has different content, or, for
    metrics per token, if the tokenizers differ.
    """
    part = PARTS[metric.part]
    mine, theirs = (metric.records(r["records"]) for r in (result, reference))
    keys = [key for key in theirs if key in mine]
    fields = [field for field in part.identity if field != "tokens" or metric.per_token]
    conflicts = sum(any(mine[key].get(f) != theirs[key].get(f) for f in fields) for key in keys)
    shared = Pair(common=len(keys), of=len(theirs), others=len(mine), conflicts=conflicts)
    if not keys or conflicts or (metric.per_token and result["model"]["tokenizer"] != reference["model"]["tokenizer"]):
        return shared
    a, b = [mine[key] for key in keys], [theirs[key] for key in keys]
    x, y = ([metric.score(record) for record in records] for records in (a, b))
    if metric.test == "ratio":
        sizes = [record[metric.size] for record in b]
        return replace(shared, estimate=stats.paired_ratio_difference(x, y, sizes), same=x == y)
    same = [part.outcome(record)[-1] for record in a] == [part.outcome(record)[-1] for record in b]
    if metric.test == "bootstrap" or any(score not in (0, 1) for score in (*x, *y)):
        return replace(shared, estimate=stats.paired_bootstrap(x, y), same=same)
    estimate = stats.mcnemar([bool(score) for score in x], [bool(score) for score in y])
    discordant = sum(p != q for p, q in zip(x, y, strict=True)) / len(keys)
    return replace(shared, estimate=estimate, same=same, discordant=discordant)


def correct(rows: list[MetricRow], claims: list[Claim], alpha: float) -> None:
    """Correct all p-values together (Holm), and set the verdict of what is then not significant to "within noise".

    A difference whose interval contains zero is within noise too. The tests are those of the table, and those of the
    claims whose cells are not in the table. Cells of the table whose records are identical are left out, because there
    is nothing to test.
    """
    table = [cell for row in rows for cell in row.cells]
    tested = [cell for cell in table if cell.p_value is not None and cell.verdict != "same"]
    tested += [claim.cell for claim in claims if not any(claim.cell is cell for cell in table)]
    for cell, p_adjusted in zip(tested, stats.holm([cell.p_value or 0.0 for cell in tested]), strict=True):
        cell.p_adjusted = p_adjusted
        if not backed(p_adjusted, cell.difference_low, cell.difference_high, alpha):
            cell.verdict = "within noise"


def backed(p_value: float, low: float | None, high: float | None, alpha: float) -> bool:
    """Return whether both the test and the interval show a difference."""
    return p_value <= alpha and low is not None and high is not None and not low <= 0 <= high


def _cell(metric: Metric, result: Results, reference: Results) -> Cell:
    entry, other = (r["metrics"].get(metric.name) for r in (result, reference))
    if entry is None:
        return Cell()
    cell = Cell(entry["value"], entry.get("low"), entry.get("high"), n=entry.get("n", 0))
    if result is reference or other is None or cell.value is None:
        return cell
    if metric.test:
        found = pair(metric, result, reference)
        if found.of or found.others:  # lm-eval's metrics of a whole group have no records
            _differ(cell, metric, found)
    elif metric.relative:
        cell.difference = 100 * (cell.value / other["value"] - 1) if other["value"] else None
    return cell


def _differ(cell: Cell, metric: Metric, found: Pair) -> None:
    cell.pair, estimate = found, found.estimate
    if estimate is None:
        cell.verdict = "not comparable"
        return
    cell.n, cell.p_value = estimate.n, estimate.p_value
    cell.difference, cell.difference_low, cell.difference_high = (
        metric.shown_difference(x) if math.isfinite(x) else None for x in (estimate.value, estimate.low, estimate.high)
    )
    cell.verdict = "same" if found.same else _direction(metric, estimate.value)


def _direction(metric: Metric, difference: float) -> str:
    if difference == 0:
        return "within noise"
    if not metric.better:
        return "differs"
    return "better" if (difference < 0) == (metric.better == "lower") else "worse"
