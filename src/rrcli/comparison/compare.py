"""Builds a comparison of stages: the table, the sentences, the warnings and the gates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rrcli.comparison import gates, sentences
from rrcli.comparison.pairing import Cells, correct
from rrcli.comparison.preservation import Preservation
from rrcli.comparison.results import Cell, Comparison, MetricRow, Results
from rrcli.evaluation.metrics import Metric, metrics_of

TRAINING_ROWS = (
    ("tokens", "Training tokens", "k", 1e3),
    ("seconds", "Training time", "s", 1.0),
    ("flops", "Training FLOPs", "T", 1e12),
)


def compare_stages(
    stages: Mapping[str, Results],
    wanted: Sequence[gates.Gate] = (),
    *,
    alpha: float,
    significant: bool = False,
    preserved: Preservation | None = None,
) -> Comparison:
    """Compare stages with the first of them.

    Args:
        stages: label -> content of the results file.
        wanted: gates to check. significant: whether a gate also needs a significant difference (`gates.check`).
        alpha: the significance level for all tests of the table together.
        preserved: whether surgery preserved the baseline, if that is known; if it did not, nothing is claimed about
            recursion.

    Raises:
        UsageError: `significant` was asked for a gate that has no test.
    """
    broken = preserved is not None and preserved.broken
    cells = Cells(stages)
    rows = _rows(cells)
    claims = sentences.claims(cells, [row.metric for row in rows], sound=not broken)
    correct(rows, claims, alpha)
    if broken:
        _withdraw(rows, stages)
    return Comparison(
        list(stages),
        rows + _training_rows(stages),
        claims,
        sentences.sentences(stages, claims, alpha, preserved=preserved),
        sentences.warnings(stages, rows),
        gates=[gates.check(gate, cells, alpha, significant=significant) for gate in wanted],
        alpha=alpha,
        results=list(stages.values()),
        broken_surgery=preserved.sentence() if preserved is not None and broken else "",
    )


def _rows(cells: Cells) -> list[MetricRow]:
    """Return a row for each metric of which at least one stage has a value."""
    first, results = next(iter(cells.stages)), list(cells.stages.values())
    rows = []
    for metric in metrics_of(*(result["metrics"] for result in results)):
        found = [cells.of(metric, stage, first) for stage in cells.stages] if metric.compared else []
        if any(cell.value is not None for cell in found):
            rows.append(MetricRow(metric, found, _depths(metric, results)))
    return rows


def _depths(metric: Metric, results: Sequence[Results]) -> list[list[float | None]]:
    """Return a metric's values at every depth of each stage, or nothing if no stage was measured at more than one."""
    values = [[entry["value"] for entry in r.get("by_depth", {}).get(metric.name, ())] for r in results]
    return values if max(map(len, values)) > 1 else []


def _training_rows(stages: Mapping[str, Results]) -> list[MetricRow]:
    """Return the costs of the trainings, if there were any."""
    rows = []
    for key, label, unit, scale in TRAINING_ROWS:
        trained = [result.get("training") for result in stages.values()]
        cells = [Cell(value=training[key] / scale if training else None) for training in trained]
        if any(cell.value is not None for cell in cells):
            rows.append(MetricRow(Metric(f"training_{key}", label, unit, relative=True), cells))
    return rows


def _withdraw(rows: Sequence[MetricRow], stages: Mapping[str, Results]) -> None:
    """Remove the verdicts about recursion from the table."""
    for row in rows:
        for cell, result in zip(row.cells, stages.values(), strict=True):
            if result["stage"] == "finetuned_recursive" and cell.verdict in ("better", "worse", "differs"):
                cell.verdict = "no claim"
