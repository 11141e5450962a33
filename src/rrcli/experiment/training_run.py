"""What one training run is: a value that is made from settings and folders before any model is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rrcli.errors import UsageError, suggest
from rrcli.experiment.identity import data_identity, model_fingerprint, train_inputs, within_context
from rrcli.experiment.replicates import EQUAL_FLOPS_STAGE, RECURSIVE_STAGE, Replicate, reserved
from rrcli.experiment.template_date import with_template_date
from rrcli.experiment.workspace import SURGERY_STAGE, Workspace, maker
from rrcli.files import step_of
from rrcli.models.source import ModelSource
from rrcli.settings import TrainSettings
from rrcli.training.callbacks import StepContext, load_callback

MODES = ("vanilla", "recursive")


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """What one training run is, as far as it is known before anything is loaded.

    Attributes:
        mode: 'vanilla' or 'recursive'. directory: the working directory.
        replicate: the stage and the seed that the training is of.
        name: the run's name. folder: where its checkpoints are. logs: where its TensorBoard events are.
        start: the model that step 0 starts from.
        span: the layers that get adapters in vanilla training in phase b; None means all of them.
        inputs: a hash of everything that determines the weights; a run with another hash is not continued.
        flops: how many FLOPs to spend, for `--match-flops`; 0 means that the settings give the number of steps.
        callback: called after every step; None means that nothing is.
        resumed_from: the checkpoint to continue from; None means that the run starts at step 0.
    """

    settings: TrainSettings
    mode: str
    directory: Path
    replicate: Replicate
    name: str
    folder: Path
    logs: Path
    start: ModelSource
    span: list[int] | None
    inputs: str
    flops: float
    callback: Callable[[StepContext], object] | None
    resumed_from: Path | None = None

    @property
    def first_step(self) -> int:
        """The step to begin with, from 0: as many are done already."""
        return step_of(self.resumed_from) if self.resumed_from else 0

    @property
    def made_by(self) -> str:
        """The command that makes this run, for error messages."""
        return maker(self.replicate) if self.name == self.replicate.name else "rr train"


def prepare_training(settings: TrainSettings, mode: str, directory: Path, *, match_flops: str = "") -> TrainingRun:
    """Return what the training of a mode is.

    Args:
        directory: the working directory. match_flops: train to the FLOPs that the run of this name spent.

    Raises:
        UsageError: settings that contradict each other. RRError: a model or a run that is not there yet.
    """
    if mode not in MODES:
        raise UsageError(f"mode is '{mode}'", suggest(mode, MODES))
    if mode == "vanilla" and settings.phase == "a":
        raise UsageError("vanilla training in phase a has nothing to train", "Phase a trains the sidecar only.")
    if settings.load_best and not settings.eval_interval:
        raise UsageError("--load-best needs measurements in training", "Give an --eval-interval above 0.")
    workspace = Workspace(directory, settings)
    if match_flops and mode != "vanilla":
        raise UsageError("--match-flops is for vanilla training", "Use it with --mode vanilla.")
    if match_flops not in ("", RECURSIVE_STAGE) and not settings.run_name:
        raise UsageError(
            f"--match-flops {match_flops} needs a name for the run",
            f"Add --run-name NAME. (The stage {EQUAL_FLOPS_STAGE} matches {RECURSIVE_STAGE}.)",
        )
    flops = workspace.spent_flops(match_flops) if match_flops else 0.0
    replicate = workspace.replicate(EQUAL_FLOPS_STAGE if match_flops else f"finetuned_{mode}")
    name = settings.run_name or replicate.name
    if reserved(name) and name != replicate.name:
        raise UsageError(f"run name '{name}' is that of another stage or seed", "Choose another --run-name.")
    folder = workspace.run_folder(name)
    callback = load_callback(settings.callback, directory)
    start = workspace.base() if mode == "vanilla" else workspace.stage_model(SURGERY_STAGE)
    span = workspace.vanilla_span(settings) if mode == "vanilla" else None
    settings = settings if mode == "vanilla" else workspace.as_operated(settings)
    settings = with_template_date(settings, start, directory)
    identity = data_identity(settings, directory)
    used = within_context(settings, start, directory)
    inputs = train_inputs(used, mode, model_fingerprint(start, directory), identity, span=span, matched_flops=flops)
    return TrainingRun(
        settings=settings,
        mode=mode,
        directory=directory,
        replicate=replicate,
        name=name,
        folder=folder,
        logs=workspace.log_folder(name),
        start=start,
        span=span,
        inputs=inputs,
        flops=flops,
        callback=callback,
    )
