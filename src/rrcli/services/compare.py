"""`rr compare`: reads the results of stages and compares them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rrcli.comparison.compare import compare_stages
from rrcli.comparison.gates import read_gate
from rrcli.comparison.preservation import Preservation, check_preserved
from rrcli.comparison.report import check_report_path
from rrcli.comparison.results import Comparison, Results, generations_of, read_results, speakers
from rrcli.errors import RRError, UsageError, suggest
from rrcli.experiment.workspace import SURGERY_STAGE, Workspace
from rrcli.settings import STAGES, CompareSettings


def compare(settings: CompareSettings, names: Sequence[str], directory: Path) -> Comparison:
    """Compare stages with the first one named; with no name, every stage that was measured.

    Args:
        names: stage names, or paths of results files.

    Raises:
        UsageError: an unknown stage, one that is named twice, or a gate that cannot be read.
        RRError: a stage without results, results that cannot be read, or that hold no generations to show.
    """
    workspace = Workspace(directory, settings)
    if settings.report:
        check_report_path(settings.report)
    stages = {name: _read(workspace, name) for name in _named(names, workspace)}
    comparison = compare_stages(
        stages,
        [read_gate(text, stages) for text in settings.gate],
        alpha=settings.alpha,
        significant=settings.gate_significant,
        preserved=_preserved(stages, workspace),
    )
    if settings.generations:
        comparison.generations = generations_of(comparison.results)
        if not comparison.generations:
            raise RRError("the results hold no generations", "'rr eval' without --skip-generation makes them.")
    return comparison


def _named(names: Sequence[str], workspace: Workspace) -> list[str]:
    """Return the given names, or every stage that was measured if no name was given."""
    names = list(names) or [stage for stage in STAGES if workspace.results_file(stage).exists()]
    if not names:
        raise RRError(
            f"{workspace.directory / workspace.settings.output_dir} holds no results", "'rr run' measures every stage."
        )
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UsageError(f"'{twice}' is named twice", "Name each stage or results file once.")
    return names


def _preserved(stages: Mapping[str, Results], workspace: Workspace) -> Preservation | None:
    """Check that surgery preserved the baseline, if both stages are compared or a recursive stage is.

    A recursive stage rests on the surgery of this folder even if that stage is not compared. Then only a surgery that
    changed the model is reported.
    """
    compared = {stage: stages[label] for stage, label in speakers(stages).items()}
    if {"baseline", SURGERY_STAGE} <= compared.keys():
        return check_preserved(compared[SURGERY_STAGE], compared["baseline"])
    files = [workspace.results_file(stage) for stage in (SURGERY_STAGE, "baseline")]
    if "finetuned_recursive" not in compared or not all(file.is_file() for file in files):
        return None
    found = check_preserved(*(compared.get(stage) or _read(workspace, stage) for stage in (SURGERY_STAGE, "baseline")))
    return found if found.broken else None


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
    return read_results(file, maker)
