"""`rr train`: one loop for vanilla and recursive fine-tuning, on accelerate.

What the loop does, and its limits:
- every batch, its order, its depth and its sampled windows follow from (seed, step), so a resumed run continues exactly
- loss is summed and divided by the step's count of loss-bearing tokens, whatever parts the batch is computed in
- a non-finite loss or gradient stops before the optimiser step; the last checkpoint stays
- Ctrl-C and SIGTERM finish the step and save; checkpoints are published whole or not at all
- one process; the weights train in the dtype they are loaded in
"""

from __future__ import annotations

import math
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from rrcli.data import EvalData, TrainingData, held_out_data, task_specs
from rrcli.errors import Interrupted, RRError, UsageError, suggest
from rrcli.models import ModelSource, base_of, load_for, save_folder
from rrcli.problem_files import FileTask
from rrcli.reporting import Reporter
from rrcli.settings import STAGES, EvalSettings, TrainSettings
from rrcli.store import TRAINER_STATE, checkpoints, make_folder, publish_folder, read_json, step_of, sweep, write_json
from rrcli.workspace import MAKERS, Workspace, data_identity, model_fingerprint, recorded_inputs, train_inputs

if TYPE_CHECKING:
    from rrcli.batching import Batch

MODES = ("vanilla", "recursive")
FEEDBACK_CHECK_STEP = 20
# The same tag in every run, so that TensorBoard draws vanilla and recursive into one chart.
INTERVAL_TAG = "during_training"


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
    seconds: float
    losses: dict[str, float]


@dataclass
class Spent:
    """What a run cost so far, over all its processes."""

    steps: int = 0
    tokens: int = 0
    positions: int = 0
    seconds: float = 0.0
    flops: float = 0.0


@dataclass
class _Run:
    """Everything the loop works with."""

    settings: TrainSettings
    workspace: Workspace
    name: str
    mode: str
    model: Any
    tokenizer: Any
    start: ModelSource
    inputs: str
    data: TrainingData
    eval_data: EvalData | None
    reporter: Reporter
    spent: Spent = field(default_factory=Spent)
    flops_by_depth: dict[int, float] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return self.workspace.run_folder(self.name)


def train(
    settings: TrainSettings, mode: str, directory: Path, reporter: Reporter, *, restart: bool = False
) -> TrainResult:
    """Train a run to its last step, going on from its last complete checkpoint if there is one.

    Args:
        mode: 'vanilla' or 'recursive' (which starts from what surgery wrote).
        restart: drop the run's checkpoints and begin anew.

    Raises:
        UsageError: settings that contradict each other. RRError: no surgery yet, checkpoints of other settings, broken
            data, a loss that is not finite. Interrupted: stopped by the user after saving.
    """
    if mode not in MODES:
        raise UsageError(f"mode is '{mode}'", suggest(mode, MODES))
    if mode == "vanilla" and settings.phase == "a":
        raise UsageError("vanilla training in phase a has nothing to train", "Phase a trains the sidecar only.")
    workspace = Workspace(directory, settings)
    name = settings.run_name or f"finetuned_{mode}"
    if name in STAGES and name != f"finetuned_{mode}":
        raise UsageError(f"run name '{name}' is a stage of its own", "Choose another --run-name.")
    folder = workspace.run_folder(name)
    start = workspace.base() if mode == "vanilla" else workspace.stage_model("after_surgery")
    identity = data_identity(settings, directory)
    span = workspace.vanilla_span(settings) if mode == "vanilla" else None
    inputs = train_inputs(settings, mode, model_fingerprint(start, directory), identity, span)
    if restart:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(workspace.log_folder(name), ignore_errors=True)
    make_folder(folder)
    sweep(folder)
    found = checkpoints(folder)
    if found and recorded_inputs(found[-1]) != inputs:
        raise RRError(
            f"{folder} holds a run of other settings, data or model",
            "Use --restart to replace it, or --run-name for another folder.",
        )

    from rrcli.tracker import MetricsTracker

    model, tokenizer = load_for(settings, ModelSource(str(found[-1]), found[-1]) if found else start, directory)
    if settings.phase == "b" and not found:
        from rrcli.recursion.lora import add_lora

        add_lora(model, settings.lora_rank, settings.lora_alpha, settings.seed, span)
    if model.config.get_text_config().vocab_size < len(tokenizer):
        raise RRError(f"the tokenizer has {len(tokenizer)} tokens, the model {model.config.vocab_size}")
    data = TrainingData(settings, directory, tokenizer)
    if data.notice:
        reporter.note(data.notice)
    samples = settings.eval_samples
    evaluation = held_out_data(settings, directory, samples, samples) if settings.eval_interval else None
    run = _Run(
        settings,
        workspace,
        name,
        mode,
        model,
        tokenizer,
        start,
        inputs,
        data,
        evaluation,
        reporter,
    )
    for task in run.data.tasks:
        if isinstance(task, FileTask):
            used = sum(problem.question not in run.data.evaluated for problem in task.side(held_out=False))
            reporter.note(f"{task.spec}: {used} of its {len(task.all)} problems are trained on, the rest is held out")
    first = step_of(found[-1]) if found else 0
    with MetricsTracker(workspace.log_folder(name), purge_step=first + 1 if first else None) as tracker:
        losses = _loop(run, first, found[-1] if found else None, tracker)
    return TrainResult(
        name, mode, checkpoints(folder)[-1], first, settings.steps, run.spent.tokens, run.spent.seconds, losses
    )


def sampled_depth(seed: int, step: int, deepest: int) -> int:
    """Return the depth of a step, uniform in 1..deepest and the same for everyone who asks (0 without recursion)."""
    return Random(f"depth/{seed}/{step}").randint(1, deepest) if deepest else 0


def _loop(run: _Run, first: int, checkpoint: Path | None, tracker: Any) -> dict[str, float]:
    import torch
    from accelerate import Accelerator

    from rrcli.optimization import Optimizer

    settings, model = run.settings, run.model
    accelerator = Accelerator(cpu=model.device.type == "cpu")
    recursion = getattr(model, "recursion", None)
    deepest = min(settings.max_steps or 99, recursion.config.max_steps) if recursion is not None else 0
    optimizer = Optimizer(model, settings)
    if checkpoint is not None:
        _resume(run, optimizer, checkpoint)
    model, optimizer.adamw = accelerator.prepare(model, optimizer.adamw)
    losses: dict[str, float] = {}
    model.train()
    with _stop_signals() as stopped, run.reporter.progress(f"train {run.name}", settings.steps, "steps") as progress:
        progress.advance(first)
        for step in range(first, settings.steps):
            began = time.perf_counter()
            depth = sampled_depth(settings.seed, step, deepest)
            torch.manual_seed(settings.seed * 1_000_003 + step)
            lr = optimizer.set_step(step)
            batch = run.data.batch(step)
            scalars = _forward_backward(run, accelerator, batch, step, depth)
            norm = float(accelerator.clip_grad_norm_(optimizer.parameters(), settings.max_grad_norm or math.inf))
            if not math.isfinite(scalars["train/loss/total"]) or not math.isfinite(norm):
                raise _not_finite(run, step, scalars["train/loss/total"], norm)
            optimizer.adamw.step()
            optimizer.adamw.zero_grad(set_to_none=True)
            seconds = time.perf_counter() - began
            _count(run, batch, depth, seconds)
            scalars |= {
                "train/lr": lr,
                "train/gradient_norm": norm,
                "train/performance/tokens_per_sec": batch.tokens / seconds,
                "train/performance/memory_mb": _memory_mb(model.device),
            }
            for tag, value in scalars.items():
                tracker.log_scalar(tag, value, step + 1)
            losses = {tag.rpartition("/")[2]: v for tag, v in scalars.items() if tag.startswith("train/loss/")}
            _warn(run, step, scalars)
            progress.advance(note=_note(scalars))
            done = step + 1
            if run.eval_data and (done % settings.eval_interval == 0 or done == settings.steps):
                _evaluate(run, tracker, done)
            if done % settings.save_interval == 0 or done == settings.steps or stopped:
                _save(run, optimizer, tracker, done)
            if stopped and done < settings.steps:
                raise Interrupted(
                    f"{run.name} stopped after step {done} of {settings.steps}; it is saved",
                    "The same command goes on from there.",
                )
    return losses


def _forward_backward(run: _Run, accelerator: Any, batch: Batch, step: int, depth: int) -> dict[str, float]:
    """Accumulate the gradients of one step's batch, part by part, and return its scalars."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from rrcli.recursion.chunks import ChunkTotals
    from rrcli.recursion.losses import LossWeights, compute_losses
    from rrcli.recursion.readout import Readout

    settings, recursion = run.settings, getattr(run.model, "recursion", None)
    if recursion is not None:
        recursion.depth = depth
    readout = Readout(run.model)
    weights = LossWeights(
        settings.final_weight, settings.masked_weight, settings.halt_weight,
        settings.ponder_weight * min(1.0, (step + 1) / max(1, settings.steps // 4)),
        settings.stability_weight, settings.commit_margin, settings.supervised_share,
    )  # fmt: skip
    width = settings.chunk_width or (recursion.config.chunk_width if recursion is not None else 1)
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
    chunks, sums = ChunkTotals(), {}
    counter = FlopCounterMode(display=False) if depth not in run.flops_by_depth else None
    rows = -(-settings.batch_size // settings.gradient_accumulation)
    tokens, device = batch.tokens, run.model.device
    if tokens == 0:
        raise RRError(f"the batch of step {step + 1} has no token to learn from", "Raise --max-length.")
    if counter is not None:
        counter.__enter__()
    try:
        for begin in range(0, len(batch.labels), rows):
            part = slice(begin, begin + rows)
            if not batch.labels[part].ne(-100).any():
                continue
            terms = compute_losses(
                readout,
                batch.input_ids[part].to(device),
                batch.attention_mask[part].to(device),
                batch.labels[part].to(device),
                weights,
                tokens,
                width,
                generator,
            )
            accelerator.backward(terms.total)
            chunks.add(terms.chunks)
            for name, value in terms.parts.items():
                sums[f"train/loss/{name}"] = sums.get(f"train/loss/{name}", 0.0) + float(value)
    finally:
        if counter is not None:
            counter.__exit__(None, None, None)
    if counter is not None:
        run.flops_by_depth[depth] = counter.get_total_flops() / batch.input_ids.numel()
    if depth:
        sums["train/feedback_norm"] = float(terms.feedback_norm)
        sums |= {f"train/generation/{name}": value for name, value in chunks.metrics().items()}
        sums |= {f"train/depth_ce/{k}": float(ce) for k, ce in enumerate(terms.depth_ce)}
    return sums


def _count(run: _Run, batch: Batch, depth: int, seconds: float) -> None:
    spent, positions = run.spent, batch.input_ids.numel()
    spent.steps += 1
    spent.tokens += batch.tokens
    spent.positions += positions
    spent.seconds += seconds
    spent.flops += run.flops_by_depth[depth] * positions


def _evaluate(run: _Run, tracker: Any, step: int) -> None:
    from rrcli.evaluation import evaluate_model

    settings = EvalSettings(
        seed=run.settings.seed, max_new_tokens=32, skip_performance=True, depth=-1, task=run.settings.task
    )
    evaluate_model(run.model, run.tokenizer, run.eval_data, tracker, step, stage=INTERVAL_TAG, settings=settings)


# -- saving and resuming -----------------------------------------------------------------------------------------------


def _save(run: _Run, optimizer: Any, tracker: Any, step: int) -> None:
    from safetensors.torch import save_file

    target = run.folder / f"step-{step:06d}"
    base = base_of(run.start, run.workspace.directory)
    own = run.settings.phase == "c"
    with publish_folder(target, overwrite=True) as folder:
        state = folder / TRAINER_STATE
        state.mkdir()
        save_file(optimizer.state(), state / "optimizer.safetensors")
        progress = {"step": step, "spent": vars(run.spent), "flops_by_depth": run.flops_by_depth}
        write_json(state / "progress.json", {"schema": 1, **progress})
        training = {"mode": run.mode, "run": run.name, "phase": run.settings.phase, **vars(run.spent)}
        training["tasks"] = list(task_specs(run.settings)) if run.settings.task_share > 0 else []
        tracker.save_checkpoint_metrics(
            folder, inputs=run.inputs, step=step, steps=run.settings.steps, training=training
        )
        save_folder(folder, run.model, run.tokenizer, base, base.fingerprint(), own_weights=own)
    tracker.flush()
    for old in checkpoints(run.folder)[: -run.settings.keep]:
        shutil.rmtree(old, ignore_errors=True)


def _resume(run: _Run, optimizer: Any, checkpoint: Path) -> None:
    from safetensors.torch import load_file

    folder = checkpoint / TRAINER_STATE
    optimizer.load_state(load_file(folder / "optimizer.safetensors"))
    progress = read_json(folder / "progress.json", MAKERS.get(run.name, "rr train"))
    run.spent = Spent(**progress["spent"])
    run.flops_by_depth = {int(depth): flops for depth, flops in progress["flops_by_depth"].items()}


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


# -- words -------------------------------------------------------------------------------------------------------------


def _not_finite(run: _Run, step: int, loss: float, norm: float) -> RRError:
    what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
    found = checkpoints(run.folder)
    kept = f"The last good checkpoint is {found[-1]}. " if found else ""
    return RRError(
        f"{what} in step {step + 1} (batch {step} of seed {run.settings.seed}); no weight was changed by it",
        f"{kept}Lower --lr, or try --dtype float32.",
    )


def _warn(run: _Run, step: int, scalars: dict[str, float]) -> None:
    if step + 1 == FEEDBACK_CHECK_STEP and scalars.get("train/feedback_norm") == 0:
        run.reporter.warn("the feedback is still exactly zero: recursion is silently off (is --sidecar-lr 0?)")


def _note(scalars: dict[str, float]) -> str:
    text = f"loss {scalars['train/loss/total']:.3f}"
    if "train/feedback_norm" in scalars:
        text += f"  feedback {scalars['train/feedback_norm']:.3f}"
    return text + f"  {scalars['train/performance/tokens_per_sec']:,.0f} tok/s"


def _memory_mb(device: Any) -> float:
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    import psutil

    return psutil.Process().memory_info().rss / 2**20
