"""`rr compare`: put stages side by side, with paired statistics, and say in words what is shown and what is noise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rrcli.comparison import gates, pairing, sentences
from rrcli.comparison.preservation import Preservation, hold
from rrcli.comparison.report import check_report_path
from rrcli.comparison.results import Cell, Comparison, Generation, MetricRow, Results, generations_of
from rrcli.errors import RRError, UsageError, suggest
from rrcli.evaluation.metrics import Metric
from rrcli.experiment.workspace import SURGERY_STAGE, Workspace
from rrcli.files import read_json
from rrcli.settings import STAGES, CompareSettings

TRAINING_ROWS = (
    ("tokens", "Training tokens", "k", 1e3),
    ("seconds", "Training time", "s", 1.0),
    ("flops", "Training FLOPs", "T", 1e12),
)


def compare(settings: CompareSettings, names: Sequence[str], directory: Path) -> Comparison:
    """Compare stages with the first one named; with no name, every stage that was measured.

    Args:
        names: stage names, or paths of results files.

    Raises:
        UsageError: an unknown stage, one that is named twice, or a gate that cannot be read.
        RRError: a stage without results, or results that cannot be read.
    """
    workspace = Workspace(directory, settings)
    if settings.report:
        check_report_path(settings.report)
    names = list(names) or [stage for stage in STAGES if workspace.results_file(stage).exists()]
    if not names:
        raise RRError(f"{directory / settings.output_dir} holds no results", "'rr run' measures every stage.")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UsageError(f"'{twice}' is named twice", "Name each stage or results file once.")
    results = [_read(workspace, name) for name in names]
    labelled = dict(zip(names, results, strict=True))
    read = [gates.read_gate(text, labelled) for text in settings.gate]
    rows, warnings = _rows(names, results)
    stages = {r["stage"]: r for r in reversed(results)}  # of two files of one stage, the first speaks for it
    preserved = _preserved(stages, workspace)
    broken = preserved is not None and preserved.broken
    told = sentences.claims(stages, sound=not broken)
    told = [claim for claim in told if any(row.name == claim.name for row in rows)]
    pairing.correct(rows, told, results, settings.alpha)
    if broken:
        _withdraw(rows, results)
    return Comparison(
        names,
        rows + _training_rows(results),
        told,
        sentences.sentences(stages, told, settings.alpha, preserved),
        warnings,
        _generations(results) if settings.generations else [],
        [gates.check(gate, labelled, settings.alpha, significant=settings.gate_significant) for gate in read],
        settings.alpha,
        results,
        preserved.sentence() if preserved is not None and preserved.broken else "",
    )


def _preserved(stages: dict[str, Results], workspace: Workspace) -> Preservation | None:
    """Hold the stage after surgery against the baseline: the two that are compared, or those that recursion rests on.

    Recursive stages rest on the surgery of this folder, even where it is not among what is compared; that it held is
    then not worth a word.
    """
    if {"baseline", SURGERY_STAGE} <= stages.keys():
        return hold(stages[SURGERY_STAGE], stages["baseline"])
    files = [workspace.results_file(stage) for stage in (SURGERY_STAGE, "baseline")]
    if "finetuned_recursive" not in stages or not all(file.is_file() for file in files):
        return None
    found = hold(*(stages.get(stage) or _read(workspace, stage) for stage in (SURGERY_STAGE, "baseline")))
    return found if found.broken else None


def _withdraw(rows: list[MetricRow], results: list[Results]) -> None:
    """Take back what the table says about recursion."""
    for row in rows:
        for cell, result in zip(row.cells, results, strict=True):
            if result["stage"] == "finetuned_recursive" and cell.verdict in ("better", "worse", "differs"):
                cell.verdict = "no claim"


def _read(workspace: Workspace, name: str) -> Results:
    if name in STAGES:
        file, maker = workspace.results_file(name), f"rr eval --stage {name}"
        if not file.exists():
            raise RRError(f"stage '{name}' was not measured: {file} is not there", f"'{maker}' measures it.")
    elif "/" in name or name.endswith(".json"):
        file, maker = workspace.directory / name, "rr eval"
        if not file.exists():
            raise UsageError(f"the results file {file} does not exist", "'rr eval' writes one into eval_results/.")
    else:
        raise UsageError(f"unknown stage '{name}'", suggest(name, STAGES))
    results = read_json(file, maker)
    missing = [key for key in ("stage", "metrics", "records", "model", "data", "provenance") if key not in results]
    if missing:
        raise RRError(f"{file} is no evaluation: it has no '{missing[0]}'", f"Make it anew with '{maker}'.")
    return results


def _rows(labels: list[str], results: list[Results]) -> tuple[list[MetricRow], list[str]]:
    """Return the tested and the cost rows, and what is to be said about how the stages were measured and paired."""
    rows, pairs = [], {}
    for name, metric in pairing.tested_metrics(results).items():
        row, pairs[name] = pairing.cells(name, metric, results)
        if any(cell.value is not None for cell in row):
            rows.append(MetricRow(name, metric, row, _depths(name, results)))
    warnings = sentences.samples(labels, results)
    for number, (label, result) in enumerate(zip(labels, results, strict=True)):
        if number:
            warnings += sentences.differences(label, labels[0], result, results[0])
            paired = {name: pair for name, column in pairs.items() if (pair := column[number]) is not None}
            same_tokenizer = result["model"]["tokenizer"] == results[0]["model"]["tokenizer"]
            warnings += sentences.overlaps(label, labels[0], paired, same_tokenizer)
    return rows, warnings


def _depths(name: str, results: list[Results]) -> list[list[float | None]]:
    """Return a metric's value at every depth of each stage, if any stage was measured at more than one."""
    values = [[entry["value"] for entry in r.get("by_depth", {}).get(name, ())] for r in results]
    return values if max(map(len, values)) > 1 else []


def _training_rows(results: list[Results]) -> list[MetricRow]:
    rows = []
    for key, label, unit, scale in TRAINING_ROWS:
        cells = [Cell(value=r["training"][key] / scale if r.get("training") else None) for r in results]
        if any(cell.value is not None for cell in cells):
            rows.append(MetricRow(f"training_{key}", Metric(label, unit, "", "cost"), cells))
    return rows


def _generations(results: list[Results]) -> list[Generation]:
    """Return what the stages wrote.

    Raises:
        RRError: no stage has generations.
    """
    found = generations_of(results)
    if not found:
        raise RRError("the results hold no generations", "'rr eval' without --skip-generation makes them.")
    return found
