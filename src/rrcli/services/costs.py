"""`rr costs`: measure speed, memory and FLOPs of several stages in turns, a process for each."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rrcli.data.corpus import refuse_stdin
from rrcli.errors import UsageError
from rrcli.evaluation.held_out import held_out_data
from rrcli.experiment.identity import costs_inputs, model_fingerprint
from rrcli.experiment.provenance import provenance
from rrcli.experiment.template_date import fix_date, with_template_date
from rrcli.experiment.workspace import Workspace, check_stage
from rrcli.files import SCHEMA, back_up, finite, write_json
from rrcli.locks import holding, lock, reading
from rrcli.other_trackers import check_trackers, start_trackers
from rrcli.reporting import Reporter
from rrcli.settings import CostsSettings, EvalSettings
from rrcli.tracker import COSTS, SUMMARY, MetricsTracker

if TYPE_CHECKING:
    from rrcli.evaluation.interleaved import Measured


@dataclass(frozen=True)
class CostsResult:
    """What was published, and where."""

    costs: dict[str, Any]
    file: Path


@holding
def costs(
    held: ExitStack,
    settings: CostsSettings,
    evaluation: EvalSettings,
    names: Sequence[str],
    directory: Path,
    reporter: Reporter,
) -> CostsResult:
    """Measure the costs of stages in turns, and publish them as `costs.json`, which `rr compare` reads.

    Args:
        evaluation: how `rr eval` measures the stages: device, dtype, depth.
        names: the stages; with none, every stage that has a model. Of a stage with several seeds, that of the settings.

    Raises:
        UsageError: an unknown stage, one that is named twice, or text from standard input.
        RRError: a stage has no model, or cannot be measured.
    """
    refuse_stdin(evaluation, "costs")
    check_trackers(settings.tracker)
    if evaluation.parallel:
        raise UsageError(
            f"costs are measured in one process for each stage, --parallel is {evaluation.parallel}",
            "Leave it out: what does not fit on the device is laid over others and the disk (--device-map).",
        )
    workspace = Workspace(directory, evaluation)
    stages = _named(names, workspace)
    file = workspace.costs_file
    held.enter_context(lock(file, "the measurement of costs"))
    data = held_out_data(evaluation, directory, 1, reasoning=False)
    load = _load()
    if load is not None and load > (os.cpu_count() or 1) / 2:
        reporter.warn(
            f"this machine is busy (load {load:.1f} on {os.cpu_count()} cores): its times say little about the models"
        )
    from rrcli.evaluation.interleaved import Subject, measure_in_turns

    subjects, fingerprints = [], {}
    for stage in stages:
        source = held.enter_context(reading(lambda stage=stage: workspace.stage_model(stage)))  # type: ignore[misc]
        fingerprints[stage] = model_fingerprint(source, directory)
        dated = with_template_date(evaluation, source, directory)
        prepare = partial(fix_date, day=dated.template_date)
        subjects.append(Subject(stage, source, dated, directory, data, prepare))
    found = measure_in_turns(subjects, reporter, rounds=settings.rounds)
    for notice in dict.fromkeys(f"{name}: {text}" for name, one in found.items() for text in one.performance.notices):
        reporter.warn(notice)
    first = next(iter(found.values())).loaded
    published = {
        "schema": SCHEMA,
        "kind": "costs",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "inputs": costs_inputs(evaluation, fingerprints),
        "rounds": settings.rounds,
        "data": evaluation.data,
        "provenance": provenance(evaluation, directory, first.device, first.dtype)
        | {"threads": first.threads, "cores": os.cpu_count(), "load": load},
        "stages": {
            subject.name: {
                "model": {"source": subject.source.recorded(directory), "fingerprint": subject.source.fingerprint()},
                "seed": workspace.replicate(subject.name).seed,
                "depth": found[subject.name].loaded.method.depth,
                "exit": found[subject.name].loaded.exit,
                "device": found[subject.name].loaded.device,
                "dtype": found[subject.name].loaded.dtype,
                "metrics": found[subject.name].performance.metrics(),
                "by_depth": found[subject.name].performance.by_depth(),
            }
            for subject in subjects
        },
    }
    back_up(file)
    write_json(file, finite(published))
    if evaluation.tensorboard:
        _log(found, workspace, settings.tracker, reporter=reporter)
    return CostsResult(published, file)


def _named(names: Sequence[str], workspace: Workspace) -> list[str]:
    """Return the given stages, or all that have a model."""
    if not names:
        return workspace.made_stages()
    twice = next((name for name in names if list(names).count(name) > 1), None)
    if twice:
        raise UsageError(f"'{twice}' is named twice", "Name each stage once.")
    return [check_stage(name) for name in names]


def _load() -> float | None:
    """Return how many processes have been running, on average over the last minute; None where it is not known."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None


def _log(found: dict[str, Measured], workspace: Workspace, trackers: Sequence[str], *, reporter: Reporter) -> None:
    """Log the costs of each stage into its run, and those that all stages share into the common tags."""
    for stage, one in found.items():
        logs = workspace.log_folder(workspace.replicate(stage).name)
        others = start_trackers(
            trackers,
            project=workspace.directory.resolve().name,
            run=f"{logs.name} costs",
            folder=logs,
            hold=True,
            warn=reporter.warn,
        )
        with MetricsTracker(logs, part=COSTS, others=others, warn=reporter.warn) as tracker:
            for name, entry in one.performance.metrics().items():
                tracker.log_scalar(f"costs/{stage}/{name}", entry["value"], 0)
                if name in SUMMARY:
                    tracker.log_scalar(f"final/{name}", entry["value"], 0)
