"""`rr compare`: reads the results of stages and compares them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rrcli.comparison.claims import Declaration, read_declaration
from rrcli.comparison.compare import compare_stages
from rrcli.comparison.comparison import Comparison
from rrcli.comparison.costs import with_costs
from rrcli.comparison.flips import flips_of
from rrcli.comparison.frontier import read_frontier
from rrcli.comparison.gates import read_gate
from rrcli.comparison.preservation import Preservation, check_preserved
from rrcli.comparison.report import check_report_path
from rrcli.comparison.results import Stage, Stages, generations_of, speakers
from rrcli.errors import RRError
from rrcli.experiment.declarations import late, late_claims, recorded
from rrcli.experiment.measured import named_stages, read_stage
from rrcli.experiment.workspace import SURGERY_STAGE, Workspace
from rrcli.settings import STAGES, CompareSettings


def compare(settings: CompareSettings, names: Sequence[str], directory: Path) -> Comparison:
    """Compare stages with the first one named; with no name, every stage that was measured.

    Args:
        names: stage names, or paths of results files.

    Raises:
        UsageError: an unknown stage, one that is named twice, or a gate that cannot be read.
        RRError: a stage without results, results that cannot be read, or that hold no texts to show.
    """
    workspace = Workspace(directory, settings)
    if settings.report:
        check_report_path(settings.report)
    declared = read_declaration(settings)
    measured = {name: read_stage(workspace, name) for name in named_stages(names, workspace)}
    stages, said, warnings = with_costs(measured, workspace.costs_file)
    comparison = compare_stages(
        stages,
        declared,
        [read_gate(text, stages, declared.margins) for text in settings.gate],
        significant=settings.gate_significant,
        preserved=_preserved(stages, workspace),
        others=_others(declared, stages, workspace),
        late=late_claims(workspace, declared.texts) if stages.keys() <= set(STAGES) else (),
    )
    if stages.keys() <= set(STAGES):
        comparison.warnings += late(workspace, declared.texts)
        comparison.recorded = recorded(workspace, declared.texts)
    if settings.report:
        found = {name: read_frontier(workspace.exits_file(name), name) for name in stages if name in STAGES}
        comparison.frontiers = {name: frontier for name, frontier in found.items() if frontier}
    comparison.sentences += said
    comparison.warnings += warnings
    if settings.generations:
        comparison.generations = generations_of(comparison.stages)
        flips = flips_of(comparison.stages)
        comparison.flips = flips if flips.compared else None
        if not comparison.generations and comparison.flips is None:
            raise RRError(
                "the results hold no generations, and no problems of two stages or depths",
                "'rr eval' without --skip-generation and --skip-reasoning makes them.",
            )
    return comparison


def _others(declared: Declaration, stages: Stages, workspace: Workspace) -> dict[str, Stage]:
    """Return the measured stages that primary claims are about and that have no column; none beside files by path."""
    if not stages.keys() <= set(STAGES):
        return {}
    about = {stage for claim in declared.primary for stage in (claim.stage, claim.reference)}
    absent = sorted(about - stages.keys(), key=STAGES.index)
    return {stage: read_stage(workspace, stage) for stage in absent if workspace.measured(stage)}


def _preserved(stages: Stages, workspace: Workspace) -> Preservation | None:
    """Check that surgery preserved the baseline, if both stages are compared or a recursive stage is.

    A recursive stage rests on the surgery of this folder even if that stage is not compared. Then only a surgery that
    changed the model is reported.
    """
    compared = {stage: stages[label] for stage, label in speakers(stages).items()}
    if {"baseline", SURGERY_STAGE} <= compared.keys():
        return check_preserved(compared[SURGERY_STAGE].first, compared["baseline"].first)
    files = [workspace.results_file(stage) for stage in (SURGERY_STAGE, "baseline")]
    if "finetuned_recursive" not in compared or not all(file.is_file() for file in files):
        return None
    found = check_preserved(
        *((compared.get(stage) or read_stage(workspace, stage)).first for stage in (SURGERY_STAGE, "baseline"))
    )
    return found if found.broken else None
