"""Two stages measured on the same records: which of them can be paired, and by how much they differ."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from rrcli.comparison.results import Cell, Claim, MetricRow, Results
from rrcli.evaluation import stats
from rrcli.evaluation.metrics import Metric

# What a record of each part must agree on, beside its key, to be the same record.
IDENTITY = {
    "documents": ("bytes", "tokens"),
    "problems": ("question", "answer"),
    "generations": ("prompt",),
    "harness": ("target",),
}


@dataclass(frozen=True)
class Pair:
    """The difference of one metric between two stages.

    Attributes:
        estimate: on the scale of the test (nats, shares, scores); None where the two cannot be paired.
        same: whether every common record is identical. discordant: the share of problems that one of them solves.
        common, of, others: records in both stages, in the reference, and in the other stage.
        conflicts: common records that are not the same ones (`IDENTITY`).
    """

    estimate: stats.Estimate | None = None
    same: bool = False
    discordant: float = 0.0
    common: int = 0
    of: int = 0
    others: int = 0
    conflicts: int = 0


def pair(metric: Metric, result: Results, reference: Results) -> Pair:
    """Estimate a metric's difference, `result` minus `reference`, over the records that both hold.

    Nothing is paired if the two share no record, if a common record is not the same one in both, or, for metrics per
    token, if the tokenizers differ.
    """
    mine, theirs = (metric.records(r["records"]) for r in (result, reference))
    keys = [key for key in theirs if key in mine]
    fields = [field for field in IDENTITY[metric.part] if field != "tokens" or metric.per_token]
    conflicts = sum(any(mine[key].get(f) != theirs[key].get(f) for f in fields) for key in keys)
    shared = Pair(common=len(keys), of=len(theirs), others=len(mine), conflicts=conflicts)
    if not keys or conflicts or (metric.per_token and result["model"]["tokenizer"] != reference["model"]["tokenizer"]):
        return shared
    a, b = [mine[key] for key in keys], [theirs[key] for key in keys]
    x, y = ([metric.score(record) for record in records] for records in (a, b))
    if metric.test == "ratio":
        sizes = [record[metric.size] for record in b]
        return replace(shared, estimate=stats.paired_ratio_difference(x, y, sizes), same=x == y)
    said = {"problems": lambda row: row["outputs"][-1], "generations": lambda row: row["text"]}.get(metric.part)
    same = [said(row) for row in a] == [said(row) for row in b] if said else x == y
    binary = metric.test != "bootstrap" and all(score in (0, 1) for score in (*x, *y))
    if not binary:
        return replace(shared, estimate=stats.paired_bootstrap(x, y), same=same)
    estimate = stats.mcnemar([bool(score) for score in x], [bool(score) for score in y])
    discordant = sum(p != q for p, q in zip(x, y, strict=True)) / len(keys)
    return replace(shared, estimate=estimate, same=same, discordant=discordant)


def cells(metric: Metric, results: list[Results]) -> tuple[list[Cell], list[Pair | None]]:
    """Return each stage's cell of a metric, and how the stage was paired with the first one (None where it was not)."""
    first, row, pairs = results[0]["metrics"].get(metric.name), [], []
    for number, result in enumerate(results):
        entry = result["metrics"].get(metric.name)
        cell = Cell() if entry is None else _cell(entry)
        paired = None
        if number and first is not None and cell.value is not None:
            if metric.test:
                paired = pair(metric, result, results[0])
                if paired.of or paired.others:
                    _differ(cell, metric, paired)
                else:  # a metric without records, as lm-eval's of a whole group
                    paired = None
            elif metric.relative:
                cell.difference = 100 * (cell.value / first["value"] - 1) if first["value"] else None
        row.append(cell)
        pairs.append(paired)
    return row, pairs


def direction(metric: Metric, difference: float) -> str:
    """Return better, worse, or (where neither is) differs; '' of no difference is within noise."""
    if not metric.better or difference == 0:
        return "differs" if difference else "within noise"
    return "better" if (difference < 0) == (metric.better == "lower") else "worse"


def correct(rows: list[MetricRow], claims: list[Claim], results: list[Results], alpha: float) -> None:
    """Adjust all p-values together (Holm), and call noise what does not survive or whose interval holds zero.

    A claim against the first stage is a cell of the table and shares its value; other claims join the family. Records
    that are identical leave nothing to test, so they do not make it harder for the others.
    """
    tested = [cell for row in rows for cell in row.cells if cell.p_value is not None and cell.verdict != "same"]
    others = [claim for claim in claims if claim.reference is not results[0]]
    p_values = [cell.p_value or 0.0 for cell in tested] + [claim.estimate.p_value or 0.0 for claim in others]
    adjusted = stats.holm(p_values)
    for cell, p_value in zip(tested, adjusted, strict=False):
        cell.p_adjusted = p_value
        if not backed(p_value, cell.difference_low, cell.difference_high, alpha):
            cell.verdict = "within noise"
    for claim, p_value in zip(others, adjusted[len(tested) :], strict=True):
        claim.p_adjusted = p_value
    for claim in claims:
        if claim.reference is results[0]:
            row = next(row for row in rows if row.metric == claim.metric)
            column = next(i for i, result in enumerate(results) if result is claim.result)
            adjusted_here = row.cells[column].p_adjusted
            claim.p_adjusted = 1.0 if adjusted_here is None else adjusted_here


def backed(p_value: float, low: float | None, high: float | None, alpha: float) -> bool:
    """Tell whether both the corrected test and the interval say that there is a difference."""
    return p_value <= alpha and low is not None and high is not None and not low <= 0 <= high


def _cell(entry: Mapping[str, Any]) -> Cell:
    return Cell(entry["value"], entry.get("low"), entry.get("high"), n=entry.get("n", 0))


def _differ(cell: Cell, metric: Metric, paired: Pair) -> None:
    if paired.estimate is None:
        cell.verdict = "not comparable"
        return
    estimate = paired.estimate
    cell.n, cell.p_value = estimate.n, estimate.p_value
    cell.difference, cell.difference_low, cell.difference_high = (
        metric.difference(x) if math.isfinite(x) else None for x in (estimate.value, estimate.low, estimate.high)
    )
    cell.verdict = "same" if paired.same else direction(metric, estimate.value)
