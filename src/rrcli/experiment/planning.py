"""Plan an experiment: every step of `rr run` with its status, read from the files on disk. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rrcli.configuration import SETTINGS_FILE
from rrcli.data.sources import refuse_stdin
from rrcli.experiment.identity import (
    data_identity,
    eval_inputs,
    model_fingerprint,
    recorded_inputs,
    rewritten,
    surgery_inputs,
    train_inputs,
)
from rrcli.experiment.workspace import SURGERY_STAGE, Workspace
from rrcli.files import checkpoints, step_of
from rrcli.models.source import base_of
from rrcli.settings import CommonSettings, EvalSettings, S, SurgerySettings, TrainSettings

DONE = "done"


class Load(Protocol):
    """Makes the settings of a class from `rr.toml`, the environment and the command line."""

    def __call__(self, cls: type[S]) -> S: ...


@dataclass(frozen=True)
class Step:
    """One command of the experiment.

    Attributes:
        kind: setup, eval, surgery or train. target: the stage, or the training mode.
        status: done, missing, stale (made from other inputs) or unfinished; detail: why, in a few words.
    """

    kind: str
    target: str
    status: str
    detail: str = ""

    @property
    def command(self) -> str:
        """The command that a user would type for it."""
        flag = {"eval": " --stage ", "train": " --mode "}.get(self.kind)
        return f"rr {self.kind}{flag}{self.target}" if flag else f"rr {self.kind}"


ORDER = (
    ("setup", ""),
    ("eval", "baseline"),
    ("surgery", ""),
    ("eval", "after_surgery"),
    ("train", "vanilla"),
    ("eval", "finetuned_vanilla"),
    ("train", "recursive"),
    ("eval", "finetuned_recursive"),
)
# What each step is made from: if one of these has to be done, the step has to be done after it.
NEEDS = {
    ("eval", "baseline"): (("setup", ""),),
    ("surgery", ""): (("setup", ""),),
    ("eval", "after_surgery"): (("surgery", ""),),
    ("train", "vanilla"): (("setup", ""),),
    ("eval", "finetuned_vanilla"): (("train", "vanilla"),),
    ("train", "recursive"): (("surgery", ""),),
    ("eval", "finetuned_recursive"): (("train", "recursive"),),
}


def plan(directory: Path, load: Load, *, new_options: bool = False) -> list[Step]:
    """Look at the workspace and return every step with its status; changes nothing and loads no torch.

    Args:
        load: makes the settings of a class, as the command line would.
        new_options: options were given on the command line, which `rr setup` has to write into `rr.toml` first.
    """
    refuse_stdin(load(CommonSettings).data, "run")
    steps: dict[tuple[str, str], Step] = {}
    needs = NEEDS
    if load(TrainSettings).phase == "b":  # vanilla adapts the layers of surgery's span
        needs = NEEDS | {("train", "vanilla"): (("surgery", ""),)}
    for kind, target in ORDER:
        waiting = [steps[need] for need in needs.get((kind, target), ()) if steps[need].status != DONE]
        # Without rr.toml the settings are the defaults and the command line: the other steps can be judged too.
        waiting = [step for step in waiting if step.kind != "setup"]
        if waiting:
            there = _exists(kind, target, directory, load)
            steps[kind, target] = Step(kind, target, "stale" if there else "missing", f"after {waiting[0].command}")
        else:
            steps[kind, target] = status_of(kind, target, directory, load)
        if kind == "setup" and new_options and steps[kind, target].status == DONE:
            steps[kind, target] = Step(kind, target, "stale", "new options")
    return list(steps.values())


def status_of(kind: str, target: str, directory: Path, load: Load) -> Step:
    """Return one step with its status; what it is made from must exist."""
    if kind == "setup":
        there = (directory / SETTINGS_FILE).is_file()
        return Step(kind, target, DONE if there else "missing", "" if there else f"no {SETTINGS_FILE} yet")
    workspace = Workspace(directory, load(CommonSettings))
    if kind == "eval":
        settings = load(EvalSettings)
        source = workspace.stage_model(target)
        identity = data_identity(settings, directory)
        expected = eval_inputs(settings, target, model_fingerprint(source, directory), identity)
        made_from = (source.path, base_of(source, directory).path)
        return _status(kind, target, workspace.results_file(target), expected, *made_from)
    if kind == "surgery":
        shape = load(SurgerySettings)
        base = workspace.base()
        expected = surgery_inputs(shape, base.fingerprint())
        return _status(kind, target, workspace.surgery_folder, expected, base.path)
    training = load(TrainSettings)
    start = workspace.base() if target == "vanilla" else workspace.stage_model(SURGERY_STAGE)
    identity = data_identity(training, directory)
    span = workspace.vanilla_span(training) if target == "vanilla" else None
    expected = train_inputs(training, target, model_fingerprint(start, directory), identity, span)
    found = checkpoints(workspace.run_folder(f"finetuned_{target}"))
    step = _status(kind, target, found[-1], expected, start.path) if found else Step(kind, target, "missing")
    if step.status == DONE and step_of(found[-1]) < training.steps:
        return Step(kind, target, "unfinished", f"continues from step {step_of(found[-1])} of {training.steps}")
    return step


def _status(kind: str, target: str, result: Path, expected: str, *models: Path) -> Step:
    """Compare what a result was made from with what it would be made from now, `models` and all else."""
    recorded = recorded_inputs(result)
    if recorded is None:
        return Step(kind, target, "missing")
    if recorded != expected:
        return Step(kind, target, "stale", "its inputs changed")
    if again := rewritten(result, *models):
        return Step(kind, target, "stale", f"{Path(again).name} was written again")
    return Step(kind, target, DONE)


def _exists(kind: str, target: str, directory: Path, load: Load) -> bool:
    workspace = Workspace(directory, load(CommonSettings))
    if kind == "eval":
        return workspace.results_file(target).is_file()
    return bool(checkpoints(workspace.run_folder(f"finetuned_{target}")))
