"""`rr train`: find or make the run, train it to its last step (see `trainer`), and keep its checkpoints.

Ctrl-C and SIGTERM finish the step and save; checkpoints are published whole or not at all. With several processes the
main one writes checkpoints and logs and speaks; the others wait for it.
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rrcli.data.problem_files import FileTask
from rrcli.data.training_data import TrainingData, task_specs
from rrcli.errors import RRError, UsageError, suggest
from rrcli.evaluation.held_out import held_out_data
from rrcli.experiment.locks import dropping, holding, lock
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
    TRAINER_STATE,
    checkpoints,
    combine,
    make_folder,
    publish_folder,
    read_json,
    remove_folder,
    step_of,
    sweep,
    unwritable,
    write_json,
)
from rrcli.models.loading import ModelSource, base_of, load_for, save_folder
from rrcli.reporting import Reporter, Silent
from rrcli.settings import STAGES, TrainSettings, with_changes
from rrcli.training.callbacks import load_callback
from rrcli.training.launching import launch, launched

if TYPE_CHECKING:
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
    """Train a run to its last step, going on from its last complete checkpoint if there is one.

    Args:
        mode: 'vanilla' or 'recursive' (which starts from what surgery wrote).
        restart: drop the run's checkpoints and begin anew.
        match_flops: train to the FLOPs that the run of this name spent; its number of steps follows from them.

    Raises:
        UsageError: settings that contradict each other. RRError: no surgery yet, checkpoints of other settings, broken
            data, a loss that is not finite. Interrupted: stopped by the user after saving.
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
    if flops:
        inputs = combine(inputs, "equal FLOPs", flops)
    if settings.num_processes > 1 and not launched():
        _share_out(settings, settings.num_processes)
        return launch(
            settings.num_processes,
            train, settings, mode, directory, reporter, restart=restart, match_flops=match_flops,
        )  # fmt: skip

    from rrcli.training.processes import join

    processes = join(settings.device)
    _share_out(settings, processes.count)

    def make_room() -> None:
        held.enter_context(lock(folder, f"the run '{name}'"))
        if restart and folder.exists():
            _drop(folder)
        if restart:
            shutil.rmtree(workspace.log_folder(name), ignore_errors=True)
        sweep(folder.parent, name)
        make_folder(folder)
        sweep(folder)

    if processes.sharded and settings.packing:
        raise UsageError(
            "--packing and shards do not go together: processes would have different numbers of rows",
            "Leave out --packing, or train without FSDP.",
        )
    if processes.sharded and settings.phase != "c":
        raise UsageError(
            f"phase {settings.phase} cannot be sharded", "Shard phase c; a and b need memory for the base."
        )
    processes.on_main(make_room)
    reporter = reporter if processes.main else Silent()
    found = checkpoints(folder)
    if found and recorded_inputs(found[-1]) != inputs:
        raise RRError(
            f"{folder} holds a run of other settings, data or model",
            "Use --restart to replace it, or --run-name for another folder.",
        )

    from rrcli.data.packing import check_packing
    from rrcli.tracker import SUMMARY, MetricsTracker
    from rrcli.training.sharding import whole, whole_state
    from rrcli.training.trainer import INTERVAL_TAG, Trainer

    placed = with_changes(settings, device=processes.device)
    model, tokenizer = load_for(placed, ModelSource(str(found[-1]), found[-1]) if found else start, directory)
    if "float16" in str(model.dtype).split("."):
        raise UsageError("float16 cannot be trained: its small gradients become zero", "Use --dtype bfloat16.")
    if settings.phase == "b" and not found:
        from rrcli.recursion.lora import add_lora

        add_lora(model, settings.lora_rank, settings.lora_alpha, settings.seed, span)
    if model.config.get_text_config().vocab_size < len(tokenizer):
        raise RRError(f"the tokenizer has {len(tokenizer)} tokens, the model {model.config.vocab_size}")
    if settings.gradient_checkpointing:
        model.config.use_cache = False
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    if settings.compile:
        from rrcli.training.compiling import compile_layers

        compile_layers(model)
    samples = settings.eval_samples
    evaluation = held_out_data(settings, directory, samples, samples) if settings.eval_interval else None
    first = step_of(found[-1]) if found else 0

    def save(trainer: Trainer, step: int) -> None:
        base = base_of(start, directory)
        identity: dict[str, Any] = {"mode": mode, "run": name, "phase": settings.phase}
        identity["chat_template"] = settings.chat_template
        identity["tasks"] = list(task_specs(settings)) if settings.task_share > 0 else []
        optimizer, states = trainer.optimizer, None
        state, raw = (whole(tensors, processes) for tensors in (optimizer.state(), optimizer.weights()))
        with optimizer.published():
            if processes.sharded:
                parts = [part for part in (model, trainer.recursion) if part is not None]
                states = tuple(whole_state(part, optimizer.dtype, processes) for part in parts)
            processes.on_main(lambda: _save(trainer, step, folder, identity, inputs, base, state, raw, states))

    data = TrainingData(_within_context(settings, model, reporter), directory, tokenizer)
    _tell_about(data, reporter)
    try:
        logs = workspace.log_folder(name) if processes.main else None
        with MetricsTracker(logs, purge_step=first + 1) as tracker, _stop_signals() as stopped:
            trainer = Trainer(
                settings, name, model, tokenizer, data, evaluation, tracker, reporter, save, callback, processes
            )
            if settings.packing:
                check_packing(trainer.computation.readout)
            if found:
                _resume(trainer, found[-1], MAKERS.get(name, "rr train"))
            if flops:
                trainer.settings = trainer.optimizer.settings = with_changes(settings, steps=trainer.steps_for(flops))
            shown = ["train/loss/total"] + [f"evaluation/{INTERVAL_TAG}/perplexity"] * (evaluation is not None)
            shown += [f"final/{metric}" for metric in SUMMARY]  # `rr eval` logs them into the same run
            tracker.log_hparams({"mode": mode, **asdict(trainer.settings)}, shown)
            data.drawn = data.cut = data.skipped = 0
            try:
                trainer.train(first, stopped)
                processes.on_main(lambda: _prune(folder, settings.keep, trainer.progress.best.get("step")))
            finally:
                if warning := data.warning():
                    reporter.warn(warning)
        processes.leave()
    except OSError as error:
        raise unwritable(workspace.log_folder(name), error) from error
    except RRError as error:
        kept = checkpoints(folder)
        if error.exit_code == 1 and kept:
            error.hint = f"The last good checkpoint is {kept[-1]}. {error.hint}".strip()
        raise
    spent, steps = trainer.progress.spent, trainer.settings.steps
    return TrainResult(
        name, mode, checkpoints(folder)[-1], first, steps, spent.tokens, spent.flops, spent.seconds, trainer.losses
    )


def _within_context(settings: TrainSettings, model: Any, reporter: Reporter) -> TrainSettings:
    """Lower the longest example to what the model can take."""
    from rrcli.data.batching import context_length

    context = context_length(model)
    if settings.max_length <= context:
        return settings
    reporter.warn(f"--max-length is {settings.max_length}, the model's context {context} tokens: the latter holds")
    return with_changes(settings, max_length=context)


def _share_out(settings: TrainSettings, count: int) -> None:
    if count > 1 and settings.data == "-":
        raise UsageError("standard input cannot be read by several processes", "Save the data, and name the file.")
    if settings.batch_size % count:
        raise UsageError(
            f"--batch-size {settings.batch_size} cannot be shared out evenly among {count} processes",
            "Take a multiple of their number.",
        )


def _tell_about(data: TrainingData, reporter: Reporter) -> None:
    """Say what was left out of the text, and how much of each file of problems is trained on."""
    if data.notice:
        reporter.note(data.notice)
    for task in data.tasks:
        if isinstance(task, FileTask):
            used = sum(problem.question not in data.evaluated for problem in task.side(held_out=False))
            reporter.note(f"{task.spec}: {used} of its {len(task.all)} problems are trained on, the rest is held out")


def _spent_flops(workspace: Workspace, run: str) -> float:
    """Return the FLOPs that a run spent on training.

    Raises:
        RRError: it has no checkpoint.
    """
    found = checkpoints(workspace.run_folder(run))
    if not found:
        raise RRError(f"--match-flops: the run '{run}' has no checkpoint", "Train it first.")
    return read_json(found[-1] / METRICS_FILE, MAKERS.get(run, "rr train"))["training"]["flops"]


# -- saving and resuming -----------------------------------------------------------------------------------------------


def _save(
    trainer: Trainer, step: int, folder: Path, identity: dict[str, Any], inputs: str, base: ModelSource,
    state: dict[str, Any], weights: dict[str, Any], states: tuple[dict[str, Any], ...] | None,
) -> None:  # fmt: skip
    """Publish the checkpoint of a step, then drop those that are neither among the last `--keep` nor the best."""
    from safetensors.torch import save_file

    settings, progress = trainer.settings, trainer.progress
    best_step = progress.best.get("step")
    trainer.tracker.flush()  # first: what a checkpoint has behind it must be logged, even if killed right after
    with publish_folder(folder / f"step-{step:06d}", overwrite=True) as target:
        inner = target / TRAINER_STATE
        inner.mkdir()
        save_file(state, inner / "optimizer.safetensors")
        if weights:
            save_file(weights, inner / "weights.safetensors")
        write_json(inner / "progress.json", {"schema": 1, "step": step, **asdict(progress)})
        trainer.tracker.save_checkpoint_metrics(
            target,
            inputs=inputs,
            step=step,
            steps=settings.steps,
            best=best_step == step,
            training=identity | vars(progress.spent),
        )
        save_folder(
            target, trainer.model, trainer.tokenizer, base, base.fingerprint(),
            own_weights=settings.phase == "c", states=states,
        )  # fmt: skip
    _prune(folder, settings.keep, best_step)
    for other in checkpoints(folder):
        metrics = read_json(other / METRICS_FILE, "rr train")
        if metrics.get("best") and step_of(other) != best_step:
            write_json(other / METRICS_FILE, metrics | {"best": False})


def _prune(folder: Path, keep: int, best_step: float | None) -> None:
    """Drop the checkpoints that are neither among the last nor the best; one that is being read, another time."""
    for old in checkpoints(folder)[:-keep]:
        if step_of(old) != best_step:
            with dropping(old) as free:
                if free:
                    remove_folder(old)


def _drop(folder: Path) -> None:
    """Drop a run.

    Raises:
        RRError: one of its checkpoints is being read.
    """
    with ExitStack() as held:
        for checkpoint in checkpoints(folder):
            if not held.enter_context(dropping(checkpoint)):
                raise RRError(
                    f"{checkpoint} is being read by another command, and --restart would remove it",
                    "Wait until that has ended, or take another --run-name.",
                )
        remove_folder(folder)


def _resume(trainer: Trainer, checkpoint: Path, made_by: str) -> None:
    from safetensors.torch import load_file

    from rrcli.training.trainer import Progress, Spent

    folder = checkpoint / TRAINER_STATE
    trainer.optimizer.load_state(load_file(folder / "optimizer.safetensors"))
    if (folder / "weights.safetensors").exists():
        trainer.optimizer.load_weights(load_file(folder / "weights.safetensors"))
    saved = read_json(folder / "progress.json", made_by)
    trainer.tracker.restore(checkpoint)
    trainer.progress = Progress(
        rows=saved["rows"],
        spent=Spent(**saved["spent"]),
        flops_by_depth={int(depth): flops for depth, flops in saved["flops_by_depth"].items()},
        best=saved["best"],
        raised=saved["raised"],
    )


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying; the list is empty until one comes."""
    import threading

    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def remember(number: int, _: Any) -> None:
        if received:  # a second Ctrl-C means now
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
