"""Plan an experiment: every step of `rr run` with its status, read from the files on disk. Loads no torch.

Baseline and surgery come once. Then each seed of the experiment has its trainings, each with its evaluation. Between
the recursive training and its evaluation stands the choice of its exit, on the validation side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from rrcli.configuration import SETTINGS_FILE
from rrcli.data.corpus import refuse_stdin
from rrcli.errors import RRError, UsageError
from rrcli.experiment.identity import (
    best_checkpoint,
    costs_inputs,
    data_identity,
    eval_inputs,
    exit_inputs,
    model_fingerprint,
    recorded_exit,
    recorded_inputs,
    recorded_seeds,
    recorded_steps,
    rewritten,
    surgery_inputs,
    train_inputs,
    within_context,
)
from rrcli.experiment.replicates import (
    EQUAL_FLOPS_STAGE,
    RECURSIVE_STAGE,
    TRAINED,
    Replicate,
    evaluated_seeds,
    refuse_one_seed,
    replicates,
)
from rrcli.experiment.revisions import moved
from rrcli.experiment.workspace import SURGERY_STAGE, Workspace, check_passes, maker, used_checkpoint
from rrcli.files import checkpoints, step_of
from rrcli.models.source import base_of
from rrcli.settings import CommonSettings, EvalSettings, S, SurgerySettings, TrainSettings, with_changes

DONE = "done"
CHANGED = "its inputs changed"
IMPOSSIBLE = "impossible"


class Load(Protocol):
    """Makes the settings of a class from `rr.toml`, the environment and the command line."""

    def __call__(self, cls: type[S]) -> S: ...


@dataclass(frozen=True)
class Step:
    """One command of the experiment.

    Attributes:
        kind: setup, eval, surgery, train, exit or costs.
        replicate: what it makes or measures; None for setup and costs.
        status: done, missing, stale (made from other inputs), unfinished, or impossible: the control where FLOPs cannot
            be counted. detail: why, in a few words.
    """

    kind: str
    replicate: Replicate | None
    status: str
    detail: str = ""

    @property
    def command(self) -> str:
        """The command that a user would type for it."""
        one = self.replicate
        if one is None:
            return f"rr {self.kind}"
        if self.kind in ("eval", "exit"):
            return f"rr eval --stage {one.stage}{' --choose-exit' * (self.kind == 'exit')}{one.flag}"
        return maker(one)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        one = self.replicate
        about = {"stage": one.stage if one else None, "seed": one.seed if one else None}
        return {"kind": self.kind, **about, "status": self.status, "detail": self.detail, "command": self.command}


# What is to be done: a kind of step and the replicate that it is for.
Task = tuple[str, Replicate | None]
SETUP: Task = ("setup", None)
COSTS: Task = ("costs", None)


def plan(directory: Path, load: Load, *, new_options: bool = False) -> list[Step]:
    """Look at the workspace and return every step with its status; changes nothing and loads no torch.

    Args:
        load: makes the settings of a class, as the command line would.
        new_options: options were given on the command line, which `rr setup` has to write into `rr.toml` first.

    Raises:
        UsageError: settings that contradict each other.
    """
    settings = load(CommonSettings)
    refuse_stdin(settings, "run")
    refuse_one_seed(settings, "a plan is for all of them")
    steps: dict[Task, Step] = {}
    check_passes(load(TrainSettings), load(SurgerySettings).max_steps)
    on_span = load(TrainSettings).phase == "b"
    tasks = _tasks(settings, load(EvalSettings))
    for kind, one in tasks:
        waiting = [steps[need] for need in _needs(kind, one, tasks, on_span=on_span)]
        # Without rr.toml the settings are the defaults and the command line: the other steps can be judged too.
        waiting = [step for step in waiting if step.kind != "setup" and step.status != DONE]
        if kind == "costs":  # of the stages that there can be
            waiting = [step for step in waiting if step.status != IMPOSSIBLE]
        if waiting:
            there = kind != "setup" and _exists(kind, one, directory, load)
            status = IMPOSSIBLE if waiting[0].status == IMPOSSIBLE else "stale" if there else "missing"
            step = Step(kind, one, status, _after(waiting[0], one))
        else:
            step = status_of(kind, one, directory, load)
        if kind == "setup" and new_options and step.status == DONE:
            step = Step(kind, one, "stale", "new options")
        steps[kind, one] = step
    return list(steps.values())


def refuse_phase_a(settings: TrainSettings) -> None:
    """Refuse to run an experiment in a phase in which its vanilla training could not be.

    Raises:
        UsageError: it is phase a.
    """
    if settings.phase == "a":
        raise UsageError(
            "phase a trains the sidecar alone, so the experiment's vanilla training would have nothing to train",
            "Take --phase b or c. Recursion alone: 'rr surgery', 'rr train --mode recursive --phase a', 'rr eval'.",
        )


def _tasks(settings: CommonSettings, evaluation: EvalSettings) -> list[Task]:
    """Return what an experiment consists of, in the order in which it is done: one seed after the other."""
    (baseline,), (operated,) = (replicates(stage, settings) for stage in ("baseline", SURGERY_STAGE))
    tasks: list[Task] = [SETUP, ("eval", baseline), ("surgery", operated), ("eval", operated)]
    trained = [stage for stage in TRAINED if stage != EQUAL_FLOPS_STAGE or has_equal_flops(settings)]
    for replicas in zip(*(replicates(stage, settings) for stage in trained), strict=True):
        for one in replicas:
            exits = one.stage == RECURSIVE_STAGE and chooses_exit(evaluation)
            tasks += [(kind, one) for kind in ("train", *(["exit"] if exits else []), "eval")]
    # Models in parts are not timed.
    return tasks if evaluation.skip_performance or evaluation.parallel else [*tasks, COSTS]


def chooses_exit(settings: EvalSettings) -> bool:
    """Tell whether an experiment chooses exits: where settings name none, nor a depth, and something is measured."""
    measured = not (settings.skip_perplexity and settings.skip_reasoning)
    return measured and not settings.exit and settings.depth < 0


def has_equal_flops(settings: CommonSettings) -> bool:
    """Tell whether an experiment has the control of vanilla training at equal FLOPs."""
    return settings.equal_flops or len(settings.all_seeds) > 1


def _needs(kind: str, one: Replicate | None, tasks: Sequence[Task], *, on_span: bool) -> list[Task]:
    """Return what a step is made from: if one of these has to be done, the step has to be done after it.

    Args:
        tasks: what the experiment consists of. on_span: vanilla training adapts the layers of the surgery's span.
    """
    if kind == "costs":
        return [(made, one) for made, one in tasks if one is not None and one.first and made != "eval"]
    if one is None:
        return []
    operated = next(one for made, one in tasks if made == "surgery")
    if kind == "exit":
        return [("train", one)]
    if kind == "eval":
        made = next((task for task in (("exit", one), ("train", one), ("surgery", one)) if task in tasks), SETUP)
        return [made]
    if kind == "surgery":
        return [SETUP]
    if one.stage == EQUAL_FLOPS_STAGE:
        return [("train", replace(one, stage=RECURSIVE_STAGE))]
    return [("surgery", operated)] if one.stage == RECURSIVE_STAGE or on_span else [SETUP]


def _after(step: Step, one: Replicate | None) -> str:
    """Say after which step another one, for `one`, has its turn."""
    if step.replicate == one and step.kind in ("train", "exit"):
        return "after its training" if step.kind == "train" else "after the choice of its exit"
    if step.replicate is not None and step.kind in ("train", "exit"):
        return f"after {'the exit of ' * (step.kind == 'exit')}{step.replicate.stage}"
    return f"after {step.kind}"


def status_of(kind: str, one: Replicate | None, directory: Path, load: Load) -> Step:
    """Return one step with its status; what it is made from must exist."""
    step = _status_of(kind, one, directory, load)
    if step.detail == CHANGED and (said := moved(Workspace(directory, load(CommonSettings)))):
        return replace(step, detail=said)
    return step


def _status_of(kind: str, one: Replicate | None, directory: Path, load: Load) -> Step:
    if kind == "costs":
        return _status_of_costs(Workspace(directory, load(EvalSettings)), load(EvalSettings))
    if one is None:
        there = (directory / SETTINGS_FILE).is_file()
        return Step(kind, one, DONE if there else "missing", "" if there else f"no {SETTINGS_FILE} yet")
    workspace = Workspace(directory, load(CommonSettings)).at(one)
    if kind == "eval":
        settings = with_changes(load(EvalSettings), seed=one.seed)
        source = workspace.stage_model(one.stage)
        identity = data_identity(settings, directory)
        used = within_context(settings, source, directory)
        expected = eval_inputs(used, one.stage, model_fingerprint(source, directory), identity)
        made_from = (source.path, base_of(source, directory).path)
        step = _status(kind, one, workspace.results_file(one.name), expected, *made_from)
        lacking = set(evaluated_seeds(one.stage, settings)) - set(recorded_seeds(workspace.results_file(one.name)))
        if step.status == "stale" and one.stage not in TRAINED and lacking:
            return replace(step, detail=f"not measured on the problems of seed {', '.join(map(str, sorted(lacking)))}")
        return step
    if kind == "exit":
        return _status_of_exit(one, workspace, with_changes(load(EvalSettings), seed=one.seed))
    if kind == "surgery":
        shape = load(SurgerySettings)
        base = workspace.base()
        expected = surgery_inputs(shape, base.fingerprint())
        return _status(kind, one, workspace.surgery_folder, expected, base.path)
    training, mode = with_changes(load(TrainSettings), seed=one.seed), TRAINED[one.stage]
    start = workspace.base() if mode == "vanilla" else workspace.stage_model(SURGERY_STAGE)
    training = training if mode == "vanilla" else workspace.as_operated(training)
    try:
        flops = workspace.spent_flops(RECURSIVE_STAGE) if one.stage == EQUAL_FLOPS_STAGE else 0.0
    except RRError as error:
        return Step(kind, one, IMPOSSIBLE, error.message)
    identity = data_identity(training, directory)
    span = workspace.vanilla_span(training) if mode == "vanilla" else None
    cut = within_context(training, start, directory)
    expected = train_inputs(cut, mode, model_fingerprint(start, directory), identity, span=span, matched_flops=flops)
    found = checkpoints(workspace.run_folder(one.name))
    step = _status(kind, one, found[-1], expected, start.path) if found else Step(kind, one, "missing")
    if step.status == DONE and step_of(found[-1]) < (steps := recorded_steps(found[-1])):
        return Step(kind, one, "unfinished", f"continues from step {step_of(found[-1])} of {steps}")
    if step.status == DONE and used_checkpoint(found[-1].parent) != best_checkpoint(found, last=not training.load_best):
        return Step(kind, one, "unfinished", "another checkpoint is to be used")
    return step


def _status_of_exit(one: Replicate, workspace: Workspace, settings: EvalSettings) -> Step:
    """Return the step of choosing an exit. Its result lies in the checkpoint that it is for, and goes with it."""
    source = workspace.stage_model(one.stage)
    choice = recorded_exit(source.path)
    if choice is None:
        return Step("exit", one, "missing")
    if choice["inputs"] != exit_inputs(settings, workspace.directory):
        return Step("exit", one, "stale", CHANGED)
    if choice["chosen"] != (source.manifest or {}).get("exit"):
        return Step("exit", one, "stale", "the checkpoint has another exit")
    return Step("exit", one, DONE, choice["why"] and f"no exit: {choice['why']}")


def _status_of_costs(workspace: Workspace, settings: EvalSettings) -> Step:
    """Return the step of `rr costs`, which is stale if any of the stages that have a model has another one now."""
    sources = {stage: workspace.stage_model(stage) for stage in workspace.made_stages()}
    fingerprints = {stage: model_fingerprint(source, workspace.directory) for stage, source in sources.items()}
    return _status("costs", None, workspace.costs_file, costs_inputs(settings, fingerprints))


def _status(kind: str, one: Replicate | None, result: Path, expected: str, *models: Path) -> Step:
    """Compare what a result was made from with what it would be made from now, `models` and all else."""
    recorded = recorded_inputs(result)
    if recorded is None:
        return Step(kind, one, "missing")
    if recorded != expected:
        return Step(kind, one, "stale", CHANGED)
    if again := rewritten(result, *models):
        return Step(kind, one, "stale", f"{Path(again).name} was written again")
    return Step(kind, one, DONE)


def _exists(kind: str, one: Replicate | None, directory: Path, load: Load) -> bool:
    workspace = Workspace(directory, load(CommonSettings))
    if one is None:
        return workspace.costs_file.is_file()
    if kind == "eval":
        return workspace.results_file(one.name).is_file()
    if kind == "exit":
        found = checkpoints(workspace.run_folder(one.name))
        return bool(found) and recorded_exit(used_checkpoint(found[-1].parent)) is not None
    return bool(checkpoints(workspace.run_folder(one.name)))
