"""Builds a comparison of stages: the table, the sentences, the warnings and the gates."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from rrcli.comparison import gates, sentences
from rrcli.comparison.claims import Declaration
from rrcli.comparison.comparison import Comparison
from rrcli.comparison.judging import judge, mark, withdraw
from rrcli.comparison.pairing import Cells
from rrcli.comparison.preservation import Preservation
from rrcli.comparison.results import Cell, MetricRow, Stage, Stages
from rrcli.evaluation.metrics import Metric, metrics_of

TRAINING_ROWS = (
    ("tokens", "Training tokens", "k", 1e3),
    ("seconds", "Training time", "s", 1.0),
    ("flops", "Training FLOPs", "T", 1e12),
)


def compare_stages(
    stages: Stages,
    declared: Declaration,
    wanted: Sequence[gates.Gate] = (),
    *,
    significant: bool = False,
    preserved: Preservation | None = None,
    others: Stages | None = None,
    late: Collection[str] = (),
) -> Comparison:
    """Compare stages with the first of them.

    Args:
        stages: label -> stage.
        declared: the primary claims, which are judged wherever both their stages were measured.
        wanted: gates to check. significant: whether a gate also needs a difference that is shown (`gates.check`).
        preserved: whether surgery preserved the baseline, if that is known; if it did not, nothing is claimed about
            recursion.
        others: further stages of the experiment that primary claims may be about, which get no column.
        late: primary claims that were declared after their numbers were known: they are corrected, and exploratory.

    Raises:
        UsageError: `significant` was asked for a gate that has no test.
    """
    broken = preserved is not None and preserved.broken
    cells = Cells({**(others or {}), **stages})
    first = next(iter(stages))
    rows = _rows(cells, stages, first)
    asked = [gates.claim_of(gate, significant=significant) for gate in wanted]
    judged, extra = judge(cells, declared, sound=not broken, more=[claim for claim in asked if claim is not None])
    judged = [replace(judgement, late=judgement.claim.text in late) for judgement in judged]
    for judgement in judged:
        if not judgement.late:
            mark(judgement.cell, judgement)
    if broken:
        for row in rows:
            for cell, stage in zip(row.cells, stages.values(), strict=True):
                if stage.name == "finetuned_recursive":
                    withdraw(cell)
    tested = iter(extra)
    return Comparison(
        list(stages.values()),
        rows + _training_rows(stages),
        judged,
        sentences.sentences(cells, judged, [row.metric for row in rows], alpha=declared.alpha, preserved=preserved),
        sentences.warnings(stages, rows),
        gates=[
            gates.check(gate, cells, next(tested) if claim is not None else None)
            for gate, claim in zip(wanted, asked, strict=True)
        ],
        alpha=declared.alpha,
        broken_surgery=preserved.sentence() if preserved is not None and broken else "",
    )


def _rows(cells: Cells, stages: Stages, first: str) -> list[MetricRow]:
    """Return a row for each metric of which at least one stage has a value."""
    runs = [run for stage in stages.values() for run in stage.runs]
    rows = []
    for metric in metrics_of(*(run["metrics"] for run in runs)):
        found = [cells.of(metric, stage, first) for stage in stages] if metric.compared else []
        if any(cell.value is not None for cell in found):
            rows.append(MetricRow(metric, found, _depths(metric, list(stages.values()))))
    _join_tests(rows)
    return rows


def _join_tests(rows: Sequence[MetricRow]) -> None:
    """Leave one of two metrics with the same test: bits per byte are the nats of perplexity, and so is its p-value."""
    by_name = {row.metric.name: row for row in rows}
    for row in rows:
        twin = by_name.get(row.metric.same_test)
        for cell, other in zip(row.cells, twin.cells if twin else (), strict=False):
            if other.p_value is not None:
                cell.p_value, cell.role = None, ""


def _depths(metric: Metric, stages: Sequence[Stage]) -> list[list[float | None]]:
    """Return a metric's values at every depth of each stage, or nothing if no stage was measured at more than one."""
    found = []
    for stage in stages:
        by_run = [[entry["value"] for entry in run.get("by_depth", {}).get(metric.name, ())] for run in stage.runs]
        depths = min(map(len, by_run))
        found.append([metric.middle([run[depth] for run in by_run]) for depth in range(depths)])
    return found if max(map(len, found)) > 1 else []


def _training_rows(stages: Stages) -> list[MetricRow]:
    """Return the costs of the trainings, if there were any."""
    rows = []
    for key, label, unit, scale in TRAINING_ROWS:
        metric = Metric(f"training_{key}", label, unit, relative=True)
        trained = [[(run.get("training") or {}).get(key) for run in stage.runs] for stage in stages.values()]
        values = [metric.middle(each) for each in trained]
        if any(value is not None for value in values):
            rows.append(MetricRow(metric, [Cell(None if value is None else value / scale) for value in values]))
    return rows
