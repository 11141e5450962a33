"""`rr train`: find or make the run, train it to its last step (see `trainer`), and keep its checkpoints.

Ctrl-C and SIGTERM finish the step and save; checkpoints are published whole or not at all. With several processes the
main one writes checkpoints and logs and speaks; the others wait for it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rrcli.data.problem_files import FileTask
from rrcli.data.training_data import TrainingData, task_specs
from rrcli.errors import RRError, UsageError, suggest
from rrcli.evaluation.held_out import EvalData, held_out_data
from rrcli.experiment.workspace import (
    MAKERS,
    Workspace,
    data_identity,
    model_fingerprint,
    recorded_inputs,
    train_inputs,
)
from rrcli.files import (
    METRICS_FILE,
    checkpoints,
    combine,
    make_folder,
    read_json,
    remove_folder,
    step_of,
    sweep,
    unwritable,
)
from rrcli.models.loading import ModelSource, base_of, load_for
from rrcli.reporting import Reporter, Silent
from rrcli.settings import STAGES, TrainSettings, with_changes
from rrcli.training.callbacks import StepContext, load_callback
from rrcli.training.launching import launch, launched
from rrcli.training.stop_signals import stop_signals

if TYPE_CHECKING:
    from rrcli.training.checkpoint import Checkpoints
    from rrcli.training.processes import Processes
    from rrcli.training.trainer import Trainer

MODES = ("vanilla", "recursive")
MATCHED_RUN = "vanilla_equal_flops"


@dataclass(frozen=True)
class TrainResult:
    """What a training left behind.

    Attributes:
        checkpoint: the last complete checkpoint. first_step: where this call began (0 unless resumed).
        losses: the named losses of the last step.
    """

    run: str
    mode: str
    checkpoint: Path
    first_step: int
    steps: int
    tokens: int
    flops: float
    seconds: float
    losses: dict[str, float]


def train(
    settings: TrainSettings,
    mode: str,
    directory: Path,
    reporter: Reporter,
    *,
    restart: bool = False,
    match_flops: str = "",
) -> TrainResult:
    """Train a run to its last step, going on from its last complete checkpoint if there is one.

    Args:
        mode: 'vanilla' or 'recursive' (which starts from what surgery wrote).
        restart: drop the run's checkpoints and begin anew.
        match_flops: train to the FLOPs that the run of this name spent; its number of steps follows from them.

    Raises:
        UsageError: settings that contradict each other. RRError: no surgery yet, checkpoints of other settings, broken
            data, a loss that is not finite. Interrupted: stopped by the user after saving.
    """
    training = _prepare(settings, mode, directory, match_flops)
    if settings.num_processes > 1 and not launched():
        _check_shares(settings, settings.num_processes)
        return launch(
            settings.num_processes,
            train, settings, mode, directory, reporter, restart=restart, match_flops=match_flops,
        )  # fmt: skip

    from rrcli.training.processes import join

    processes = join(settings.device)
    _check_shares(settings, processes.count)
    _check_shards(settings, processes)
    reporter = reporter if processes.main else Silent()
    training = replace(training, resumed_from=_open_folder(training, processes, restart=restart))
    model, tokenizer = _load_model(training, processes.device)
    evaluation, data = _load_data(training, model, tokenizer, reporter)
    try:
        trainer = _run(
            training, model, tokenizer, data=data, evaluation=evaluation, reporter=reporter, processes=processes
        )
        processes.leave()
    except OSError as error:
        raise unwritable(training.logs, error) from error
    except RRError as error:
        kept = checkpoints(training.folder)
        if error.exit_code == 1 and kept:
            error.hint = f"The last good checkpoint is {kept[-1]}. {error.hint}".strip()
        raise
    spent = trainer.state.spent
    return TrainResult(
        run=training.name,
        mode=mode,
        checkpoint=checkpoints(training.folder)[-1],
        first_step=training.first_step,
        steps=trainer.settings.steps,
        tokens=spent.tokens,
        flops=spent.flops,
        seconds=spent.seconds,
        losses=trainer.losses,
    )


# -- prepare -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Training:
    """What one training is: all that is known of it before anything is loaded.

    Attributes:
        name: of the run. folder: of its checkpoints. logs: of its TensorBoard events.
        start: the model it starts from. span: the layers that vanilla adapts in phase b; None means all of them.
        inputs: the hash of what the run is made from: a run of other inputs is not continued.
        flops: what it shall spend, where `--match-flops` says so; 0 means that the settings say how many steps.
        callback: what is called after every step, or None.
        resumed_from: the checkpoint that it goes on from; None where it begins.
    """

    settings: TrainSettings
    mode: str
    directory: Path
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
        """How many steps are done already."""
        return step_of(self.resumed_from) if self.resumed_from else 0

    @property
    def made_by(self) -> str:
        """The command that makes the run, for error messages."""
        return MAKERS.get(self.name, "rr train")


def _prepare(settings: TrainSettings, mode: str, directory: Path, match_flops: str) -> _Training:
    """Return what the training is.

    Raises:
        UsageError: settings that contradict each other. RRError: a model or a run that is not there yet.
    """
    if mode not in MODES:
        raise UsageError(f"mode is '{mode}'", suggest(mode, MODES))
    if mode == "vanilla" and settings.phase == "a":
        raise UsageError("vanilla training in phase a has nothing to train", "Phase a trains the sidecar only.")
    workspace = Workspace(directory, settings)
    if match_flops and mode != "vanilla":
        raise UsageError("--match-flops is for vanilla training", "Use it with --mode vanilla.")
    flops = _spent_flops(workspace, match_flops) if match_flops else 0.0
    name = settings.run_name or (MATCHED_RUN if match_flops else f"finetuned_{mode}")
    if name in STAGES and name != f"finetuned_{mode}":
        raise UsageError(f"run name '{name}' is a stage of its own", "Choose another --run-name.")
    folder = workspace.run_folder(name)
    callback = load_callback(settings.callback, directory)
    start = workspace.base() if mode == "vanilla" else workspace.stage_model("after_surgery")
    span = workspace.vanilla_span(settings) if mode == "vanilla" else None
    identity = data_identity(settings, directory)
    inputs = train_inputs(settings, mode, model_fingerprint(start, directory), identity, span)
    return _Training(
        settings=settings,
        mode=mode,
        directory=directory,
        name=name,
        folder=folder,
        logs=workspace.log_folder(name),
        start=start,
        span=span,
        inputs=combine(inputs, "equal FLOPs", flops) if flops else inputs,
        flops=flops,
        callback=callback,
    )


def _spent_flops(workspace: Workspace, run: str) -> float:
    """Return the FLOPs that a run spent on training.

    Raises:
        RRError: it has no checkpoint.
    """
    found = checkpoints(workspace.run_folder(run))
    if not found:
        raise RRError(f"--match-flops: the run '{run}' has no checkpoint", "Train it first.")
    return read_json(found[-1] / METRICS_FILE, MAKERS.get(run, "rr train"))["training"]["flops"]


def _check_shares(settings: TrainSettings, count: int) -> None:
    """Refuse what several processes cannot share.

    Raises:
        UsageError: standard input, or a batch that they cannot share evenly.
    """
    if count > 1 and settings.data == "-":
        raise UsageError("standard input cannot be read by several processes", "Save the data, and name the file.")
    if settings.batch_size % count:
        raise UsageError(
            f"--batch-size {settings.batch_size} cannot be shared out evenly among {count} processes",
            "Take a multiple of their number.",
        )


def _check_shards(settings: TrainSettings, processes: Processes) -> None:
    """Refuse what cannot be done where every process holds a part of the weights only.

    Raises:
        UsageError: packing, or a phase with a frozen base.
    """
    if processes.sharded and settings.packing:
        raise UsageError(
            "--packing and shards do not go together: processes would have different numbers of rows",
            "Leave out --packing, or train without FSDP.",
        )
    if processes.sharded and settings.phase != "c":
        raise UsageError(
            f"phase {settings.phase} cannot be sharded", "Shard phase c; a and b need memory for the base."
        )


def _open_folder(training: _Training, processes: Processes, *, restart: bool) -> Path | None:
    """Make the run's folder, or empty it for a restart; return the checkpoint to go on from.

    Raises:
        RRError: the folder holds a run of other inputs.
    """

    def make_room() -> None:
        if restart and training.folder.exists():
            remove_folder(training.folder)
        if restart:
            shutil.rmtree(training.logs, ignore_errors=True)
        make_folder(training.folder)
        sweep(training.folder)

    processes.on_main(make_room)
    found = checkpoints(training.folder)
    if found and recorded_inputs(found[-1]) != training.inputs:
        raise RRError(
            f"{training.folder} holds a run of other settings, data or model",
            "Use --restart to replace it, or --run-name for another folder.",
        )
    return found[-1] if found else None


# -- build -------------------------------------------------------------------------------------------------------------


def _load_model(training: _Training, device: str) -> tuple[Any, Any]:
    """Return the model, with what the phase adds to it, and its tokenizer.

    Raises:
        UsageError: a model in float16. RRError: one that does not go with its tokenizer, or that cannot be compiled.
    """
    settings, resumed = training.settings, training.resumed_from
    source = ModelSource(str(resumed), resumed) if resumed else training.start
    model, tokenizer = load_for(with_changes(settings, device=device), source, training.directory)
    if "float16" in str(model.dtype).split("."):
        raise UsageError("float16 cannot be trained: its small gradients become zero", "Use --dtype bfloat16.")
    if settings.phase == "b" and not resumed:
        from rrcli.recursion.lora import add_lora

        add_lora(model, settings.lora_rank, settings.lora_alpha, settings.seed, training.span)
    if model.config.get_text_config().vocab_size < len(tokenizer):
        raise RRError(f"the tokenizer has {len(tokenizer)} tokens, the model {model.config.vocab_size}")
    if settings.gradient_checkpointing:
        model.config.use_cache = False
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    if settings.compile:
        from rrcli.training.compiling import compile_layers

        compile_layers(model)
    return model, tokenizer


def _load_data(
    training: _Training, model: Any, tokenizer: Any, reporter: Reporter
) -> tuple[EvalData | None, TrainingData]:
    """Return what is measured at intervals (None: nothing is), and what is trained on."""
    settings, directory = training.settings, training.directory
    samples = settings.eval_samples
    evaluation = held_out_data(settings, directory, samples, samples) if settings.eval_interval else None
    data = TrainingData(_within_context(settings, model, reporter), directory, tokenizer)
    _tell_about(data, reporter)
    return evaluation, data


def _within_context(settings: TrainSettings, model: Any, reporter: Reporter) -> TrainSettings:
    """Lower the longest example to what the model can take."""
    from rrcli.data.batching import context_length

    context = context_length(model)
    if settings.max_length <= context:
        return settings
    reporter.warn(f"--max-length is {settings.max_length}, the model's context {context} tokens: the latter holds")
    return with_changes(settings, max_length=context)


def _tell_about(data: TrainingData, reporter: Reporter) -> None:
    """Say what was left out of the text, and how much of each file of problems is trained on."""
    if data.notice:
        reporter.note(data.notice)
    for task in data.tasks:
        if isinstance(task, FileTask):
            used = sum(problem.question not in data.evaluated for problem in task.side(held_out=False))
            reporter.note(f"{task.spec}: {used} of its {len(task.all)} problems are trained on, the rest is held out")


# -- loop --------------------------------------------------------------------------------------------------------------


def _run(
    training: _Training,
    model: Any,
    tokenizer: Any,
    *,
    data: TrainingData,
    evaluation: EvalData | None,
    reporter: Reporter,
    processes: Processes,
) -> Trainer:
    """Train to the last step with logs and checkpoints; return the trainer as it is then."""
    from rrcli.data.packing import check_packing
    from rrcli.tracker import SUMMARY, MetricsTracker
    from rrcli.training.flops import steps_for
    from rrcli.training.trainer import INTERVAL_TAG, Trainer

    kept = _checkpoints_of(training)
    logs = training.logs if processes.main else None
    with MetricsTracker(logs, purge_step=training.first_step + 1) as tracker, stop_signals() as stopped:
        trainer = Trainer(
            training.settings,
            model,
            tokenizer,
            name=training.name,
            data=data,
            tracker=tracker,
            reporter=reporter,
            save=kept.save,
            evaluation=evaluation,
            callback=training.callback,
            processes=processes,
        )
        if training.settings.packing:
            check_packing(trainer.computation.readout)
        if training.resumed_from:
            kept.resume(trainer, training.resumed_from)
        if training.flops:
            trainer.set_steps(steps_for(trainer, training.flops))
        shown = ["train/loss/total"] + [f"evaluation/{INTERVAL_TAG}/perplexity"] * (evaluation is not None)
        shown += [f"final/{metric}" for metric in SUMMARY]  # `rr eval` logs them into the same run
        tracker.log_hparams({"mode": training.mode, **asdict(trainer.settings)}, shown)
        data.drawn = data.cut = data.skipped = 0
        try:
            trainer.train(training.first_step, stopped)
        finally:
            if warning := data.warning():
                reporter.warn(warning)
    return trainer


def _checkpoints_of(training: _Training) -> Checkpoints:
    from rrcli.training.checkpoint import Checkpoints

    settings = training.settings
    return Checkpoints(
        folder=training.folder,
        inputs=training.inputs,
        base=base_of(training.start, training.directory),
        training={
            "mode": training.mode,
            "run": training.name,
            "phase": settings.phase,
            "chat_template": settings.chat_template,
            "tasks": list(task_specs(settings)) if settings.task_share > 0 else [],
        },
        made_by=training.made_by,
    )
