"""`rr status`: how far the experiment is. Reads small files only: no torch, no weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rrcli.errors import RRError
from rrcli.experiment.identity import recorded_exit
from rrcli.experiment.planning import DONE, IMPOSSIBLE, Load, Step, plan, status_of
from rrcli.experiment.replicates import RECURSIVE_STAGE, TRAINED, Replicate
from rrcli.experiment.workspace import SURGERY_STAGE, Workspace
from rrcli.files import METRICS_FILE, checkpoints, read_json, step_of
from rrcli.recursion.exits import ExitRule
from rrcli.schemas import CheckpointMetrics, Results
from rrcli.settings import STAGES, CommonSettings

SHOWN = ("perplexity", "token_accuracy", "reasoning_accuracy")
NOT_MADE = Step("", None, "")


@dataclass(frozen=True)
class StageStatus:
    """A stage as made with one seed, or another training run, in the workspace.

    Attributes:
        name: that of its files. stage, seed: None for a run that is of no stage.
        model, results: done, missing, stale, unfinished or impossible; empty where the stage has none.
        detail: why a status is not `done`, in a few words.
        checkpoint: the last complete one. step, steps: its step, and the last step of the training. bytes: the size of
            all checkpoints of the run.
        exit: by which rule tokens of the checkpoint leave, or why every pass is run; None where nothing was chosen.
        metrics: those of the evaluation, or the last ones measured in training (`during_training`).
    """

    name: str
    model: str
    results: str
    detail: str = ""
    stage: str | None = None
    seed: int | None = None
    checkpoint: str | None = None
    step: int | None = None
    steps: int | None = None
    bytes: int = 0
    checkpoints: list[int] = field(default_factory=list)
    exit: str | None = None
    metrics: dict[str, float | None] = field(default_factory=dict)
    during_training: bool = False


@dataclass(frozen=True)
class Status:
    """The workspace, the seeds of the experiment, and the command that comes next."""

    directory: Path
    seeds: list[int]
    stages: list[StageStatus]
    next: str

    def lines(self) -> list[Line]:
        """Return what a table shows: a line for each stage with all its seeds, and for each other run."""
        grouped: dict[str, list[StageStatus]] = {}
        for stage in self.stages:
            grouped.setdefault(stage.stage or f"run {stage.name}", []).append(stage)
        return [Line(members[0].name, members) for members in grouped.values()]


@dataclass(frozen=True)
class Line:
    """A stage with all its seeds, or another run.

    Attributes:
        members: its replicates; a single one where it is not repeated.
    """

    name: str
    members: list[StageStatus]

    def state(self, part: str) -> tuple[str, str]:
        """Return what is said of `part`, model or results, and the state that is it coloured by: that of the worst."""
        states = [getattr(member, part) for member in self.members]
        worst = next((state for state in states if state != DONE), DONE)
        done = states.count(DONE)
        return (worst if done in (0, len(states)) else f"{done}/{len(states)} {DONE}"), worst

    @property
    def step(self) -> str:
        """The step of the training, as 'step/steps' where it is not at its end; of several, the smallest to largest."""
        known = [(member.step, member.steps or member.step) for member in self.members if member.step is not None]
        if not known:
            return "-"
        (low, low_of), (high, _) = min(known), max(known)
        if low != low_of:
            return f"{low}/{low_of}"
        return str(low) if low == high else f"{low}-{high}"

    def metric(self, name: str) -> tuple[float | None, bool]:
        """Return a metric's mean over the replicates that were evaluated, and False; else from training, and True."""
        for during in (False, True):
            found = [member.metrics.get(name) for member in self.members if member.during_training == during]
            values = [value for value in found if value is not None]
            if values:
                return sum(values) / len(values), during
        return None, False

    def details(self) -> list[str]:
        """Return why it is not done, and its exits, in a sentence for each; of several seeds, which of them."""
        reasons: dict[str, list[int | None]] = {}
        exits: dict[str, list[int | None]] = {}
        for member in self.members:
            state = next((state for state in (member.model, member.results) if state not in ("", DONE)), "")
            why = member.detail if len(self.members) == 1 else f"{state}: {member.detail}".rstrip(": ")
            if why and (state or member.detail):
                reasons.setdefault(why, []).append(member.seed)
            if member.exit:
                exits.setdefault(f"exit {member.exit}", []).append(member.seed)
        said = [*reasons.items(), *exits.items()]
        if len(self.members) == 1:
            return [why for why, _ in said]
        return [f"seed{'s' * (len(s) > 1)} {', '.join(map(str, s))} {why}" for why, s in said]


def status(directory: Path, load: Load) -> Status:
    """Look at every stage, with every seed, and every other training run of the workspace; changes nothing.

    Args:
        load: makes the settings of a class, as the command line would.

    Raises:
        RRError: the settings name a model, data or tasks that do not exist.
    """
    workspace = Workspace(directory, load(CommonSettings))
    steps = plan(directory, load)
    by_task = {(step.kind, step.replicate): step for step in steps}
    runs = sorted(path.name for path in (directory / workspace.settings.checkpoint_dir).glob("*") if checkpoints(path))
    stages = []
    for one in (one for stage in STAGES for one in workspace.replicates(stage)):
        if ("eval", one) not in by_task:  # the control, where it is not part of the experiment
            if one.name not in runs and not workspace.results_file(one.name).is_file():
                continue
            by_task |= {(kind, one): _looked_up(kind, one, directory, load) for kind in ("train", "eval")}
        stages.append(_stage(workspace, one, by_task))
    others = [_other(workspace, run) for run in runs if run not in [stage.name for stage in stages]]
    following = next((step.command for step in steps if step.status not in (DONE, IMPOSSIBLE)), "rr compare")
    return Status(directory, list(workspace.settings.all_seeds), stages + others, following)


def _looked_up(kind: str, one: Replicate, directory: Path, load: Load) -> Step:
    """Return a step that is not planned with its status; stale where what it is made from is not there any more."""
    try:
        return status_of(kind, one, directory, load)
    except RRError as error:
        return Step(kind, one, "stale", error.message)


def _stage(workspace: Workspace, one: Replicate, steps: Mapping[tuple[str, Replicate | None], Step]) -> StageStatus:
    name = one.name
    made = steps.get(("train" if one.stage in TRAINED else "surgery", one), NOT_MADE)
    measured = steps["eval", one]
    detail = (made if made.status not in ("", DONE) else measured).detail
    metrics, during = _results(workspace, name), False
    found: dict[str, Any] = {}
    if one.stage in TRAINED:
        found = _checkpoints(workspace.run_folder(name))
        found |= {"exit": _exit(workspace, one)} if found and one.stage == RECURSIVE_STAGE else {}
        if not metrics and (latest := found.pop("latest", {})):
            metrics, during = latest, True
    elif one.stage == SURGERY_STAGE and workspace.surgery_folder.is_dir():
        folder = workspace.surgery_folder
        found = {"checkpoint": str(folder), "bytes": _size(folder)}
    found.pop("latest", None)
    return StageStatus(
        name,
        made.status,
        measured.status,
        detail,
        stage=one.stage,
        seed=one.seed,
        metrics=metrics,
        during_training=during,
        **found,
    )


def _other(workspace: Workspace, run: str) -> StageStatus:
    found = _checkpoints(workspace.run_folder(run))
    metrics = found.pop("latest", {})
    unfinished = found.get("steps") is not None and found["step"] < found["steps"]
    state = "unfinished" if unfinished else DONE
    return StageStatus(run, state, "", metrics=metrics, during_training=bool(metrics), **found)


def _checkpoints(folder: Path) -> dict[str, Any]:
    """Return what a run's checkpoints say about themselves; `latest` are metrics measured in training."""
    found = checkpoints(folder)
    if not found:
        return {}
    last = found[-1]
    about = _read(last / METRICS_FILE, CheckpointMetrics)
    scalars = about.get("scalars", {})
    tags = {name: scalars.get(f"evaluation/during_training/{name}", {}).get("value") for name in SHOWN}
    return {
        "checkpoint": str(last),
        "step": step_of(last),
        "steps": about.get("steps"),
        "bytes": _size(folder),
        "checkpoints": [step_of(path) for path in found],
        "latest": {name: value for name, value in tags.items() if value is not None},
    }


def _exit(workspace: Workspace, one: Replicate) -> str | None:
    """Return the exit that was chosen for the checkpoint that a stage uses, as a text; None where none was chosen."""
    try:
        source = workspace.at(one).stage_model(one.stage)
        choice = recorded_exit(source.path)
    except RRError:  # the plan says what has to be made again
        return None
    rule = (source.manifest or {}).get("exit")
    if rule is not None:
        return str(ExitRule.from_dict(rule))
    return None if choice is None else f"none: {choice['why']}"


def _results(workspace: Workspace, stage: str) -> dict[str, float | None]:
    metrics = _read(workspace.results_file(stage), Results).get("metrics", {})
    return {name: metrics[name].get("value") for name in SHOWN if name in metrics}


def _read(path: Path, kind: Any) -> Any:
    """Return the content of a file, or nothing if it is missing or broken: the plan says what has to be made again."""
    try:
        return read_json(path, "rr run", kind)
    except RRError:
        return {}


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
