"""`rr train`: prepare the run, build what it needs, and train it to its last step.

    prepare   what the run is, from settings and folders (see `experiment/training_run`); its folder; its processes
    build     the model with its adapters, the data to train on and to evaluate on
    loop      train (see `training/trainer`) with logs and checkpoints (see `training/checkpoint`)

Ctrl-C and SIGTERM end the training after the current step, which is saved. With several processes, the main one writes
checkpoints and logs and reports to the user; the others wait for it.
"""

from __future__ import annotations

import shutil
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rrcli.data.corpus import reads_stdin
from rrcli.data.problem_files import FileTask
from rrcli.data.splits import SPLIT_RULE
from rrcli.data.tokens import end_notice
from rrcli.data.training_data import TrainingData, task_specs
from rrcli.errors import RRError, UsageError
from rrcli.evaluation.held_out import EvalData, held_out_data, showable
from rrcli.experiment.identity import recorded_inputs, rewritten
from rrcli.experiment.revisions import moved
from rrcli.experiment.template_date import fix_date
from rrcli.experiment.training_run import TrainingRun, prepare_training
from rrcli.experiment.workspace import Workspace
from rrcli.files import (
    checkpoints,
    make_folder,
    sweep,
    unwritable,
)
from rrcli.locks import holding, lock
from rrcli.models.loading import load_for
from rrcli.models.placement import read_placement
from rrcli.models.quantisation import NONE, check_gradients, is_quantised
from rrcli.models.source import ModelSource, base_of
from rrcli.models.weights import stamps
from rrcli.other_trackers import check_trackers, start_trackers
from rrcli.reporting import Reporter, Silent
from rrcli.settings import TrainSettings, with_changes
from rrcli.training.launching import launch, launched
from rrcli.training.processes import Processes, join
from rrcli.training.stop_signals import stop_signals

if TYPE_CHECKING:
    from rrcli.training.checkpoint import Checkpoints
    from rrcli.training.trainer import Trainer

# With fewer parameters a step is over soon in any format.
WORTH_A_CHOICE = 50_000_000


@dataclass(frozen=True)
class TrainResult:
    """What a training produced and what it cost.

    Attributes:
        checkpoint: the last complete checkpoint.
        stage, seed: what was trained; a `run` with a name of its own is beside that stage.
        first_step: the step that this call began with (0 unless it resumed a run). steps: of the whole run.
        tokens, flops, seconds: spent on the whole run; tokens are those that bear loss.
        losses: the losses of the last step, by name.
    """

    run: str
    mode: str
    stage: str
    seed: int
    checkpoint: Path
    first_step: int
    steps: int
    tokens: int
    flops: float
    seconds: float
    losses: dict[str, float]


@holding
def train(
    held: ExitStack,
    settings: TrainSettings,
    mode: str,
    directory: Path,
    reporter: Reporter,
    *,
    restart: bool = False,
    match_flops: str = "",
) -> TrainResult:
    """Train a run to its last step, continuing from its last complete checkpoint if there is one.

    Args:
        mode: 'vanilla', or 'recursive', which starts from the result of surgery.
        directory: the working directory.
        restart: delete the run's checkpoints and logs, and start at step 0.
        match_flops: train to the FLOPs that the run of this name spent; its number of steps follows from them.

    Raises:
        UsageError: settings that contradict each other. RRError: no surgery yet, checkpoints of other settings, broken
            data, a loss that is not finite. Interrupted: stopped by the user after saving.
    """
    check_trackers(settings.tracker)
    training = prepare_training(settings, mode, directory, match_flops=match_flops)
    if mode == "vanilla" and not launched() and (said := moved(Workspace(directory, settings))):
        reporter.warn(said)
    placement = read_placement(settings, directory)
    parallel, count = placement.parallel, placement.processes
    # Before processes are started or wait for each other: one that has refused would leave the others connecting.
    _check_shares(settings, Processes(settings.device, 0, count, parallel))
    if count > 1 and not launched():
        return launch(
            count,
            train, settings, mode, directory, reporter, restart=restart, match_flops=match_flops,
        )  # fmt: skip

    processes = join(settings.device, parallel)
    _check_shares(settings, processes)
    reporter = reporter if processes.main else Silent()
    training = replace(training, resumed_from=_lock_run(training, processes, held, restart=restart))
    try:
        model, tokenizer = _load_model(training, processes)
        if notice := end_notice(model, tokenizer):
            reporter.note(notice)
        if notice := _slow_format(model, training.settings):
            reporter.note(notice)
        evaluation, data = _load_data(training, model, tokenizer, reporter)
        processes.on_main(lambda: _make_room(training, restart=restart))
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
    finally:
        with suppress(OSError):  # a refused training leaves no empty folder: only such a one can be removed
            training.folder.rmdir()
    spent = trainer.state.spent
    return TrainResult(
        run=training.name,
        mode=mode,
        stage=training.replicate.stage,
        seed=training.replicate.seed,
        checkpoint=checkpoints(training.folder)[-1],
        first_step=training.first_step,
        steps=trainer.settings.steps,
        tokens=spent.tokens,
        flops=spent.flops,
        seconds=spent.seconds,
        losses=trainer.losses,
    )


# -- prepare -----------------------------------------------------------------------------------------------------------


def _check_shares(settings: TrainSettings, processes: Processes) -> None:
    """Refuse what these processes cannot share.

    Raises:
        UsageError: data from standard input, a batch size that is no multiple of the shares, or a phase that cannot be
            trained in such parts.
    """
    shares, parallel = processes.shares, processes.parallel
    if processes.count > 1 and reads_stdin(settings):
        raise UsageError("standard input cannot be read by several processes", "Save the data, and name the file.")
    if settings.batch_size % shares:
        raise UsageError(
            f"--batch-size {settings.batch_size} cannot be shared out evenly among {shares} processes",
            "Take a multiple of their number.",
        )
    if parallel is None:
        return
    if not parallel.trains(settings.phase):
        raise UsageError(f"phase {settings.phase} cannot be trained with --parallel {parallel}", "Take fsdp alone.")
    if not parallel.trains(settings.phase, experts=settings.lora_experts):
        raise UsageError(
            f"--lora-experts needs whole experts, with --parallel {parallel} each process has a part of them",
            "Leave --lora-experts out, or take replicas alone.",
        )
    if settings.phase == "c" and settings.histograms:
        raise UsageError("--histograms needs whole weights, each process has a part of them", "Leave it out.")


def _lock_run(training: TrainingRun, processes: Processes, held: ExitStack, *, restart: bool) -> Path | None:
    """Lock the run, and return the checkpoint to continue from; None for a new run, or a restart.

    Raises:
        RRError: another command is training it, or the folder holds a run of other inputs.
    """

    def lock_and_sweep() -> None:
        held.enter_context(lock(training.folder, f"the run '{training.name}'"))
        sweep(training.folder.parent, training.name)
        if training.folder.is_dir():
            sweep(training.folder)

    processes.on_main(lock_and_sweep)
    found = [] if restart else checkpoints(training.folder)
    if found and (recorded_inputs(found[-1]) != training.inputs or rewritten(found[-1], training.start.path)):
        raise RRError(
            f"{training.folder} holds a run of other settings, data or model",
            "Use --restart to replace it, or --run-name for another folder.",
        )
    return found[-1] if found else None


def _make_room(training: TrainingRun, *, restart: bool) -> None:
    """Make the run's folder, empty for a restart: as late as can be, so that what is refused removes nothing."""
    from rrcli.training.checkpoint import remove_run

    if restart and training.folder.exists():
        remove_run(training.folder)
    if restart:
        shutil.rmtree(training.logs, ignore_errors=True)
    make_folder(training.folder)


# -- build -------------------------------------------------------------------------------------------------------------


def _load_model(training: TrainingRun, processes: Processes) -> tuple[Any, Any]:
    """Return the model with what the phase adds to it, and its tokenizer.

    Raises:
        UsageError: the model is in float16. RRError: it cannot be compiled.
    """
    settings, resumed = training.settings, training.resumed_from
    source = ModelSource(str(resumed), resumed) if resumed else training.start
    changes = {"device": processes.device, "parallel": str(processes.parallel or "")}
    model, tokenizer = load_for(with_changes(settings, **changes), source, training.directory)
    fix_date(tokenizer, settings.template_date)
    if is_quantised(model):
        check_gradients(model)
    if "float16" in str(model.dtype).split("."):
        raise UsageError("float16 cannot be trained: its small gradients become zero", "Use --dtype bfloat16.")
    if training.mode == "recursive" and not resumed and model.recursion.config.seed != settings.seed:
        # Surgery is made once; every seed trains a sidecar of its own. As W_out is zero, no output changes.
        model.recursion.redraw(settings.seed)
    if settings.phase == "b" and not resumed:
        from rrcli.recursion.lora import add_lora

        add_lora(
            model, settings.lora_rank, settings.lora_alpha, settings.seed, training.span,
            experts=settings.lora_experts,
        )  # fmt: skip
    if settings.gradient_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    if settings.compile:
        from rrcli.training.compiling import compile_layers

        compile_layers(model)
    return model, tokenizer


def _slow_format(model: Any, settings: TrainSettings) -> str:
    """Say that a CPU computes in fp32 by default where bfloat16 is faster; '' if the user chose, or if it is not."""
    from rrcli.recursion.products import bfloat16_gain

    parameters = sum(parameter.numel() for parameter in model.parameters())
    if settings.dtype != "auto" or model.device.type != "cpu" or parameters < WORTH_A_CHOICE:
        return ""
    gain = bfloat16_gain()
    if gain < 1.5:
        return ""
    return (
        f"this processor multiplies bfloat16 {gain:.1f} times as fast as float32: --dtype bfloat16 computes in it and "
        "keeps what trains in float32 (give it to every command: its numbers are not those of float32)"
    )


def _load_data(
    training: TrainingRun, model: Any, tokenizer: Any, reporter: Reporter
) -> tuple[EvalData | None, TrainingData]:
    """Return the validation data, which is measured at intervals (None where nothing is), and what is trained on."""
    from rrcli.recursion.facts import vocabulary

    settings, directory = training.settings, training.directory
    samples = settings.eval_samples
    evaluation = None
    if settings.eval_interval:
        evaluation = held_out_data(settings, directory, samples, samples, side="validation")
        evaluation = showable(evaluation, tokenizer, settings)
        evaluation.texts(tokenizer, settings)  # what the chat template refuses is found before the first step
        if evaluation.empty:
            reporter.warn(f"{evaluation.notice}: training goes without measurements, and keeps no best checkpoint")
            evaluation = None
    within = _within_context(settings, model, reporter)
    data = TrainingData(within, directory, tokenizer, vocabulary=vocabulary(model))
    _tell_about(data, evaluation, reporter)
    return evaluation, data


def _within_context(settings: TrainSettings, model: Any, reporter: Reporter) -> TrainSettings:
    """Return settings whose longest example fits into the model's context; warn where that is shorter."""
    from rrcli.recursion.facts import context_length

    context = context_length(model)
    if settings.max_length <= context:
        return settings
    reporter.warn(
        f"--max-length is {settings.max_length}, but the model's context is {context} tokens: examples are cut to those"
    )
    return with_changes(settings, max_length=context)


def _tell_about(data: TrainingData, evaluation: EvalData | None, reporter: Reporter) -> None:
    """Report what was left out of the text, and how many problems of each file are trained on."""
    notices = data.notice.splitlines() + (evaluation.notice.splitlines() if evaluation is not None else [])
    for notice in dict.fromkeys(notices):
        reporter.note(notice)
    for task in data.tasks:
        if isinstance(task, FileTask):
            used = sum(problem.question not in data.kept for problem in task.on("train"))
            reporter.note(f"{task.spec}: {used} of its {len(task.all)} problems are trained on, the rest is evaluated")


# -- loop --------------------------------------------------------------------------------------------------------------


def _run(
    training: TrainingRun,
    model: Any,
    tokenizer: Any,
    *,
    data: TrainingData,
    evaluation: EvalData | None,
    reporter: Reporter,
    processes: Processes,
) -> Trainer:
    """Train to the last step, with logs and checkpoints, and return the trainer."""
    from rrcli.data.packing import check_packing
    from rrcli.tracker import SUMMARY, MetricsTracker
    from rrcli.training.trainer import INTERVAL_TAG, Trainer

    saved = _checkpoints_of(training)
    logs = training.logs if processes.main else None
    purge_step = training.first_step + 1
    others = start_trackers(
        training.settings.tracker if processes.main else (),
        project=training.directory.resolve().name,
        run=training.name,
        folder=training.logs,
        hold=False,
        warn=reporter.warn,
    )
    with MetricsTracker(logs, purge_step, others=others, warn=reporter.warn) as tracker, stop_signals() as stopped:
        trainer = Trainer(
            training.settings,
            model,
            tokenizer,
            name=training.name,
            data=data,
            tracker=tracker,
            reporter=reporter,
            save=saved.save,
            evaluation=evaluation,
            callback=training.callback,
            processes=processes,
        )
        if training.settings.packing:
            check_packing(trainer.computation.readout)
        if training.resumed_from:
            saved.resume(trainer, training.resumed_from)
        if training.flops:
            trainer.set_steps(trainer.steps_for(training.flops))
        shown = ["train/loss/total"] + [f"evaluation/{INTERVAL_TAG}/perplexity"] * (evaluation is not None)
        shown += [f"final/{metric}" for metric in SUMMARY]  # `rr eval` logs them into the same run
        about = {"stage": training.replicate.stage, "mode": training.mode}
        tracker.log_hparams(about | asdict(trainer.settings), shown)
        data.drawn = data.cut = data.skipped = 0  # what was drawn to estimate costs does not count
        try:
            trainer.train(training.first_step, stopped)
            processes.on_main(lambda: saved.prune(trainer))
            processes.on_main(lambda: saved.choose(trainer))
            if training.settings.load_best and not trainer.state.best:
                reporter.warn("--load-best: no perplexity was measured in training, so the last checkpoint is used")
        finally:
            if warning := data.warning():
                reporter.warn(warning)
    return trainer


def _checkpoints_of(training: TrainingRun) -> Checkpoints:
    from rrcli.training.checkpoint import Checkpoints

    settings, base = training.settings, base_of(training.start, training.directory)
    return Checkpoints(
        folder=training.folder,
        inputs=training.inputs,
        base=base,
        base_fingerprint=base.fingerprint(),
        base_stamps=stamps(base.path),
        directory=training.directory,
        training={
            "mode": training.mode,
            "run": training.name,
            "phase": settings.phase,
            "chat_template": settings.chat_template,
            "split": SPLIT_RULE,
            "tasks": list(task_specs(settings)) if settings.task_share > 0 else [],
            "text": settings.data if settings.task_share < 1 else "",
            **({"quantize": settings.quantize} if settings.quantize != NONE else {}),
        },
        made_by=training.made_by,
    )
