"""Two stages measured on the same records: which of them can be paired, and by how much they differ."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from rrcli.comparison.results import Cell, Claim, MetricRow, Results
from rrcli.evaluation import stats
from rrcli.evaluation.metrics import METRICS, Metric, document_totals, from_ratio, stability_label, task_labels

# What a record of each part must agree on, beside its key, to be the same record.
IDENTITY = {
    "documents": ("bytes", "tokens"),
    "problems": ("question", "answer"),
    "generations": ("prompt",),
    "harness": ("target",),
}
PARTS = {"documents": "documents", "problems": "problems", "prompts": "generations", "harness": "harness"}


@dataclass(frozen=True)
class Pair:
    """The difference of one metric between two stages.

    Attributes:
        estimate: on the scale of the test (nats, shares, scores); None where the two cannot be paired.
        same: whether every common record is identical. discordant: the share of problems that one of them solves.
        common, of, others: records in both stages, in the reference, and in the other stage.
        conflicts: common records that are not the same ones (`IDENTITY`). part: where the records come from.
    """

    estimate: stats.Estimate | None = None
    same: bool = False
    discordant: float = 0.0
    common: int = 0
    of: int = 0
    others: int = 0
    conflicts: int = 0
    part: str = ""


def pair(name: str, metric: Metric, result: Results, reference: Results) -> Pair:
    """Estimate a metric's difference, `result` minus `reference`, over the records that both hold.

    Nothing is paired if the two share no record, if a common record is not the same one in both, or, for metrics per
    token, if the tokenizers differ.
    """
    part = PARTS[metric.kind]
    mine, theirs = (_records(name, part, r) for r in (result, reference))
    keys = [key for key in theirs if key in mine]
    fields = [field for field in IDENTITY[part] if not (name == "bits_per_byte" and field == "tokens")]
    conflicts = sum(any(mine[key].get(f) != theirs[key].get(f) for f in fields) for key in keys)
    shared = Pair(common=len(keys), of=len(theirs), others=len(mine), conflicts=conflicts, part=part)
    per_token = part == "documents" and name != "bits_per_byte"
    if not keys or conflicts or (per_token and result["model"]["tokenizer"] != reference["model"]["tokenizer"]):
        return shared
    a, b = [mine[key] for key in keys], [theirs[key] for key in keys]
    if part == "documents":
        after, before = (list(document_totals({"documents": rows}, name).values()) for rows in (a, b))
        totals, others, sizes = [t for t, _ in after], [t for t, _ in before], [size for _, size in before]
        return replace(shared, estimate=stats.paired_ratio_difference(totals, others, sizes), same=totals == others)
    x, y = ([_score(name, part, row) for row in rows] for rows in (a, b))
    said = {"problems": lambda row: row["outputs"][-1], "generations": lambda row: row["text"]}.get(part)
    same = [said(row) for row in a] == [said(row) for row in b] if said else x == y
    if part == "generations" or any(score not in (0, 1) for score in (*x, *y)):
        return replace(shared, estimate=stats.paired_bootstrap(x, y), same=same)
    estimate = stats.mcnemar([bool(score) for score in x], [bool(score) for score in y])
    discordant = sum(p != q for p, q in zip(x, y, strict=True)) / len(keys)
    return replace(shared, estimate=estimate, same=same, discordant=discordant)


def cells(name: str, metric: Metric, results: list[Results]) -> tuple[list[Cell], list[Pair | None]]:
    """Return each stage's cell of a metric, and how the stage was paired with the first one (None where it was not)."""
    first, row, pairs = results[0]["metrics"].get(name), [], []
    for number, result in enumerate(results):
        entry = result["metrics"].get(name)
        cell = Cell() if entry is None else _cell(entry)
        paired = None
        if number and first is not None and cell.value is not None:
            if metric.kind == "cost":
                cell.difference = 100 * (cell.value / first["value"] - 1) if first["value"] else None
            elif metric.kind in PARTS:
                paired = pair(name, metric, result, results[0])
                if paired.of or paired.others:
                    _differ(cell, name, metric, paired)
                else:  # a metric without records, as lm-eval's of a whole group
                    paired = None
        row.append(cell)
        pairs.append(paired)
    return row, pairs


def scale_of(name: str, metric: Metric) -> Callable[[float], float]:
    """Return how a difference on the test's scale is shown: percent of perplexity, points, or the metric's own unit."""
    if name == "perplexity":
        return lambda nats: 100 * math.expm1(min(nats, 700))
    if metric.kind == "documents":
        return lambda ratio: from_ratio(name, ratio)
    return lambda share: 100 * share if metric.unit == "%" else share


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
            row = next(row for row in rows if row.name == claim.name)
            column = next(i for i, result in enumerate(results) if result is claim.result)
            adjusted_here = row.cells[column].p_adjusted
            claim.p_adjusted = 1.0 if adjusted_here is None else adjusted_here


def backed(p_value: float, low: float | None, high: float | None, alpha: float) -> bool:
    """Tell whether both the corrected test and the interval say that there is a difference."""
    return p_value <= alpha and low is not None and high is not None and not low <= 0 <= high


def tested_metrics(results: list[Results]) -> dict[str, Metric]:
    """Return the metrics to show, in order: known ones, each reasoning task behind the overall accuracy, harness."""
    names: dict[str, Mapping[str, Any]] = {}
    for result in results:
        names |= {name: entry for name, entry in result["metrics"].items() if name not in names}
    tasks = [name for name in names if name.startswith("reasoning_accuracy/")]
    shown: dict[str, Metric] = {}
    for name, metric in METRICS.items():
        shown[name] = metric
        if name == "reasoning_accuracy":
            if len(tasks) > 1:
                label = "  {}".format
                shown |= {key: Metric(label(key.partition("/")[2]), "%", "higher", "problems") for key in tasks}
            shown |= {key: _harness_metric(key, names[key]) for key in names if key.startswith("harness/")}
        elif name in ("commit_rate", "decode/commit_rate"):
            prefix = name.replace("commit_rate", "stability@")
            depths = [key for key in names if key.startswith(prefix)]
            shown |= {key: Metric(stability_label(key), "", "", "shown") for key in depths}
    return shown


def _records(name: str, part: str, result: Results) -> dict[str, Mapping[str, Any]]:
    rows = result["records"].get(part, ())
    if part == "harness":
        _, task, metric = name.split("/", 2)
        return {r["key"]: r for r in rows if (r["task"], r["metric"]) == (task, metric)}
    task = name.partition("/")[2]
    if part == "problems" and task:
        labels = task_labels(r["task"] for r in rows)
        rows = [r for r in rows if labels[r["task"]] == task]
    # An older record without the field of a newer metric has nothing to pair.
    return {r["key"]: r for r in rows if part != "generations" or r.get(name) is not None}


def _score(name: str, part: str, row: Mapping[str, Any]) -> float:
    if part == "problems":
        return float(row["correct"][-1])
    return float(row["score"] if part == "harness" else row[name])


def _harness_metric(name: str, entry: Mapping[str, Any]) -> Metric:
    """Describe `harness/<task>/<metric>`, in lm-eval's own unit; the entry says which way is better."""
    return Metric(name.removeprefix("harness/").replace("/", " "), "", entry.get("better", ""), "harness")


def _cell(entry: Mapping[str, Any]) -> Cell:
    return Cell(entry["value"], entry.get("low"), entry.get("high"), n=entry.get("n", 0))


def _differ(cell: Cell, name: str, metric: Metric, paired: Pair) -> None:
    if paired.estimate is None:
        cell.verdict = "not comparable"
        return
    scale, estimate = scale_of(name, metric), paired.estimate
    cell.n, cell.p_value = estimate.n, estimate.p_value
    cell.difference, cell.difference_low, cell.difference_high = (
        scale(x) if math.isfinite(x) else None for x in (estimate.value, estimate.low, estimate.high)
    )
    cell.verdict = "same" if paired.same else direction(metric, estimate.value)
