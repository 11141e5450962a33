"""The training loop: one for vanilla and recursive fine-tuning.

What it does, and its limits:
- batches, their order, depths and sampled windows follow from (seed, step), so a resumed run continues exactly
- losses are summed and divided by the counts of the whole step, so it does not matter in which parts it is computed
- weights train in fp32; a model that was loaded in bfloat16 computes in bfloat16, under autocast
- when memory runs out, the step is computed again in parts of half the size
- a non-finite loss or gradient stops the training before the optimiser step; the last checkpoint stays
- several processes have a device each, and each computes its rows of every batch (see `processes`)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from rrcli.data.training_data import TrainingData
from rrcli.errors import Interrupted, RRError
from rrcli.evaluation.decoding import room_for
from rrcli.evaluation.evaluate import evaluate_model
from rrcli.evaluation.held_out import EvalData
from rrcli.recursion.batch import Batch
from rrcli.recursion.chunk_metrics import ChunkTotals
from rrcli.recursion.flops import counted_flops
from rrcli.recursion.losses import LossTerms, StepPlan, compute_losses
from rrcli.recursion.parts import together
from rrcli.recursion.products import through_onednn
from rrcli.recursion.readout import Readout
from rrcli.reporting import Reporter, sparkline
from rrcli.settings import EvalSettings, TrainSettings, with_changes
from rrcli.tracker import MetricsTracker
from rrcli.training.callbacks import StepContext
from rrcli.training.memory import give_back, memory_use, too_large, too_large_for_the_optimizer
from rrcli.training.optimizer import Optimizer, prepare_parameters
from rrcli.training.processes import Processes
from rrcli.training.red_flags import RedFlags
from rrcli.training.sharding import clip_gradients
from rrcli.training.state import DepthCost, TrainingState
from rrcli.training.step_plan import plan_step, step_seed

# The same tag in every run, so that TensorBoard draws vanilla and recursive into one chart.
INTERVAL_TAG = "during_training"
SPARK_STEPS = 60
# How many batches stand for all when the mean size of a batch is estimated, and the FLOPs of a position.
SAMPLED_BATCHES, COUNTED_BATCHES = 64, 4


@dataclass(frozen=True)
class Share:
    """What one process computed of a step: its part of the scalars by tag, of the chunk totals and of the FLOPs.

    Attributes:
        flops, uncounted: what was counted, and the names of what could not be; 0 in a step that is not counted.
    """

    scalars: dict[str, float]
    chunks: ChunkTotals
    flops: int = 0
    uncounted: Sequence[str] = ()


class Computation(torch.nn.Module):
    """The forward of a part of a step, as one module that holds all weights it reads."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.recursion = model, getattr(model, "recursion", None)
        self.readout = Readout(model)

    def forward(self, batch: Batch, plan: StepPlan) -> tuple[torch.Tensor, LossTerms]:
        """Return the loss to call `backward` on, and all of them; see `compute_losses`."""
        terms = compute_losses(self.readout, batch, plan=plan)
        return terms.total, terms


class Trainer:
    """Trains `model` in place.

    Args:
        name: the name of the run.
        save: writes the checkpoint of a step; every process calls it.
        evaluation: the data that is measured at intervals; None for no such measurement.
        callback: called after every step by the main process; None for nothing.
        processes: which of how many processes this is; by default the only one.
    """

    def __init__(
        self,
        settings: TrainSettings,
        model: Any,
        tokenizer: Any,
        *,
        name: str,
        data: TrainingData,
        tracker: MetricsTracker,
        reporter: Reporter,
        save: Callable[[Trainer, int], None],
        evaluation: EvalData | None = None,
        callback: Callable[[StepContext], object] | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.settings, self.model, self.tokenizer, self.name = settings, model, tokenizer, name
        self.data, self.evaluation, self.tracker, self.reporter = data, evaluation, tracker, reporter
        self.save, self.callback = save, callback
        self.recursion = getattr(model, "recursion", None)
        if self.recursion is not None:
            self.recursion.exit = None  # one that was chosen belongs to the weights that it was chosen for
            # A checkpoint says what its boundary head has learned.
            self.recursion.config = replace(self.recursion.config, commit_margin=settings.commit_margin)
        self.processes = processes or Processes(settings.device)
        self.computation = Computation(model)
        # What the forward computes in, under autocast, whatever the weights train in.
        self.dtype = vars(model).get("computes_in", model.dtype)
        formats = prepare_parameters(model, settings)
        self.optimizer = Optimizer(model, settings, formats)
        self.state = TrainingState(-(-settings.batch_size // (settings.gradient_accumulation * self.processes.count)))
        self.losses: dict[str, float] = {}

    def train(self, first: int, stopped: list[int]) -> None:
        """Train from step `first` (from 0) to the last one; `stopped` becomes non-empty when the user wants to stop.

        Raises:
            RRError: a loss is not finite, a callback failed, or memory ran out. Interrupted: stopped after saving.
        """
        settings, spent = self.settings, self.state.spent
        guessing = math.log(self.computation.readout.vocabulary)
        flags = RedFlags(settings.steps, self.state.raised, guessing)
        self.state.raised = flags.raised
        history: list[float] = []
        self.model.train()
        with self.reporter.progress(f"train {self.name}", settings.steps, "steps") as bar:
            bar.advance(first)
            for step in range(first, settings.steps):
                began, done = time.perf_counter(), step + 1
                lr = self.optimizer.set_step(step)
                batch, plan = self.planned(step)
                scalars = self.gradients(batch, plan, step=step)
                parameters = self.optimizer.parameters()
                norm = clip_gradients(parameters, settings.max_grad_norm or math.inf)
                if not math.isfinite(scalars["train/loss/total"]) or not math.isfinite(norm):
                    raise _not_finite(settings, step, scalars["train/loss/total"], norm)
                if settings.histograms and done % settings.histograms == 0:
                    self._log_histograms(done)
                self._update(step)
                seconds = time.perf_counter() - began
                spent.steps += 1
                spent.tokens += plan.tokens
                spent.positions += batch.positions
                spent.seconds += seconds
                self._charge(plan.depth, batch.positions)
                used, share = memory_use(self.model.device)
                scalars |= {
                    "train/lr": lr,
                    "train/gradient_norm": norm,
                    "train/performance/tokens_per_sec": plan.tokens / seconds,
                    "train/performance/memory_mb": used / 2**20,
                }
                for tag, value in scalars.items():
                    self.tracker.log_scalar(tag, value, done)
                self.losses = {t.rpartition("/")[2]: v for t, v in scalars.items() if t.startswith("train/loss/")}
                for message in flags.observe(done, scalars, plan.depth, share):
                    self._warn(message, done)
                history = [*history, scalars["train/loss/total"]][-SPARK_STEPS:]
                bar.advance(note=_note(scalars, history))
                stop = any(self.processes.gather(bool(stopped)))
                self._after_step(done, stop)
                if stop and done < settings.steps:
                    raise Interrupted(
                        f"{self.name} stopped after step {done} of {settings.steps}; it is saved",
                        "The same command goes on from there.",
                    )

    def planned(self, step: int) -> tuple[Batch, StepPlan]:
        """Return the batch of a step (from 0) and what holds for all parts of it."""
        config = None if self.recursion is None else self.recursion.config
        return plan_step(self.data.batch(step), step, self.settings, recursion=config)

    def steps_for(self, flops: float) -> int:
        """Return in how many steps a vanilla training spends `flops`, from the mean size of its first batches."""
        if not self.state.costs:
            for step in range(COUNTED_BATCHES):
                self.gradients(*self.planned(step), step=step)
                self.optimizer.forget_gradients()
        [cost] = self.state.costs.values()
        positions = sum(self.data.batch(step).positions for step in range(SAMPLED_BATCHES)) / SAMPLED_BATCHES
        return max(1, round(flops / (positions * cost.per_position)))

    def _charge(self, depth: int, positions: int) -> None:
        """Add a step to what the run has cost."""
        cost = self.state.costs[depth]
        cost.steps += 1
        cost.positions += positions
        self.state.spent.flops = sum(cost.flops for cost in self.state.costs.values())

    def set_steps(self, steps: int) -> None:
        """Change how many steps the run has; `train` reads it when it begins."""
        self.settings = self.optimizer.settings = with_changes(self.settings, steps=steps)

    def gradients(self, batch: Batch, plan: StepPlan, *, step: int) -> dict[str, float]:
        """Compute the gradients of a step, in as large parts as memory allows, and return its scalars by tag.

        Raises:
            RRError: memory does not even hold one example, or the rows at a time cannot become fewer because each
                process has a part of the weights.
        """
        while True:
            try:
                own = self._accumulate(batch, plan, step)
            except torch.OutOfMemoryError:
                if self.processes.parallel:  # the others are in the middle of the same layer
                    raise too_large(step, self.state.rows) from None
                own = None
            parts = self.processes.gather(own)
            if None not in parts:
                self.processes.add_gradients(self.optimizer.trained.values())
                return self._joined(batch, plan.depth, parts[:: self.processes.tensor], step=step)
            rows = self.state.rows
            self.optimizer.forget_gradients()
            give_back()
            if rows == 1:
                raise too_large(step, rows)
            self.state.rows = -(-rows // 2)
            self._warn(f"out of memory: going on with {self.state.rows} examples at a time instead of {rows}", step)

    def _update(self, step: int) -> None:
        """Take the optimiser step.

        Raises:
            RRError: memory ran out, where some weights may have changed and others not.
        """
        fits = True
        try:
            self.optimizer.step(step)
        except torch.OutOfMemoryError:
            fits = False
        if not all(self.processes.gather(fits)):
            raise too_large_for_the_optimizer(step)

    def _accumulate(self, batch: Batch, plan: StepPlan, step: int) -> Share:
        """Add up the gradients of this process's rows, and return its share of what a step is known by."""
        device = self.model.device
        # What processes draw in the forward (dropout) differs.
        torch.manual_seed(step_seed(self.settings.seed, step) + self.processes.share * 2**32)
        autocast = torch.autocast(
            device.type, dtype=torch.bfloat16, enabled=self.dtype != torch.float32, cache_enabled=False
        )
        chunks, sums = ChunkTotals(), dict[str, float]()
        with (
            nullcontext() if self.settings.compile else through_onednn(self.model),
            counted_flops() if self.state.costs.get(plan.depth, DepthCost()).due else nullcontext() as counter,
        ):
            for part in self._parts(batch):
                with autocast:
                    total, terms = self.computation(part.to(device), plan)
                total.backward()
                chunks.add(terms.chunks)
                values = {f"train/loss/{name}": value for name, value in terms.parts.items()}
                if plan.depth:
                    values["train/feedback_norm"] = terms.feedback_norm * (part.tokens / plan.tokens)
                    values |= {f"train/depth_ce/{k}": ce for k, ce in enumerate(terms.depth_ce)}
                for tag, value in values.items():
                    sums[tag] = sums.get(tag, 0.0) + float(value)
        return Share(sums, chunks) if counter is None else Share(sums, chunks, counter.total, sorted(counter.uncounted))

    def _parts(self, batch: Batch) -> Iterator[Batch]:
        """Yield this process's rows of a batch, in parts of `state.rows`.

        Parts without loss are left out, unless the processes have to run as many forwards as each other: then one that
        has fewer parts, as packed rows may be shared out unevenly, runs a row without loss in their place.
        """
        own, rows = self.processes.rows(len(batch.labels)), self.state.rows
        found = [batch.part(slice(begin, min(begin + rows, own.stop))) for begin in range(own.start, own.stop, rows)]
        if self.processes.parallel is None:
            yield from (part for part in found if part.tokens)
            return
        yield from found
        most = -(-len(batch.labels) // self.processes.shares)
        for _ in range(-(-most // rows) - len(found)):
            yield batch.part(slice(0, 1)).without_loss()

    def _joined(self, batch: Batch, depth: int, parts: list[Share], *, step: int) -> dict[str, float]:
        """Return the scalars of a step from the shares that the processes computed."""
        chunks, scalars, spent = ChunkTotals(), dict[str, float](), self.state.spent
        for part in parts:
            for tag, value in part.scalars.items():
                scalars[tag] = scalars.get(tag, 0.0) + value
            chunks.add(part.chunks)
        if flops := sum(part.flops for part in parts):
            cost = self.state.costs.setdefault(depth, DepthCost())
            cost.counted_flops += flops
            cost.counted_positions += batch.positions
        new = {name for part in parts for name in part.uncounted}.difference(spent.uncounted)
        if new:
            spent.uncounted = sorted(new.union(spent.uncounted))
            self._warn(f"the training FLOPs leave out what rr cannot count: {', '.join(sorted(new))}", step)
        return scalars | {f"train/generation/{name}": value for name, value in chunks.metrics().items()}

    def _after_step(self, done: int, stopped: bool) -> None:
        """Call the callback, then evaluate and save if this step is due."""
        settings, last = self.settings, done == self.settings.steps
        failed, cause = self._call_back(done)
        improved = False
        if self.evaluation and not failed and (done % settings.eval_interval == 0 or last):
            improved = self._evaluate(done)
        if done % settings.save_interval == 0 or last or stopped or improved or failed:
            self.save(self, done)
        if failed:
            raise RRError(failed, "The step is saved: correct the function, and the same command goes on.") from cause

    def _call_back(self, done: int) -> tuple[str, Exception | None]:
        """Let the main process call `--callback`; return to all what went wrong, and to it the exception."""
        failed, cause = "", None
        if self.callback is None:
            return failed, cause
        if self.processes.main:
            try:
                self.callback(StepContext(done, dict(self.losses), self.model, self.tracker))
            except Exception as error:
                failed = f"--callback {self.settings.callback} failed in step {done}: {type(error).__name__}: {error}"
                cause = error
        return self.processes.from_main(failed), cause

    def _evaluate(self, done: int) -> bool:
        """Measure the weights that would be saved; return whether they are the best so far.

        The processes share out the work.
        """
        settings = self.settings
        assert self.evaluation is not None
        limits = EvalSettings(
            seed=settings.seed, max_new_tokens=room_for(self.model, 32), skip_performance=True, depth=-1,
            task=settings.task, chat_template=settings.chat_template,
        )  # fmt: skip
        with self.optimizer.published(), together(self.model) if settings.phase == "c" else nullcontext():
            found = evaluate_model(
                self.model,
                self.tokenizer,
                self.evaluation,
                self.tracker,
                done,
                stage=INTERVAL_TAG,
                settings=limits,
                team=self.processes,
            )
        perplexity = self.processes.from_main(found["metrics"].get("perplexity", {}).get("value", math.inf))
        if not perplexity < self.state.best.get("perplexity", math.inf):
            return False
        self.state.best = {"step": done, "perplexity": perplexity}
        return True

    def _log_histograms(self, done: int) -> None:
        for name, parameter in self.optimizer.trained.items():
            self.tracker.log_histograms({f"parameters/{name}": parameter}, done)
            if parameter.grad is not None:
                self.tracker.log_histograms({f"gradients/{name}": parameter.grad}, done)

    def _warn(self, message: str, step: int) -> None:
        self.reporter.warn(message)
        self.tracker.log_text("train/red_flags", message, step)


def _not_finite(settings: TrainSettings, step: int, loss: float, norm: float) -> RRError:
    what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
    return RRError(
        f"{what} in step {step + 1} (batch {step} of seed {settings.seed}); no weight was changed by it",
        "Lower --lr, or try --dtype float32.",
    )


def _note(scalars: dict[str, float], history: list[float]) -> str:
    parts = [f"loss {scalars['train/loss/total']:.3f} {sparkline(history)}"]
    if "train/generation/avg_refine_steps" in scalars:
        parts.append(f"refine {scalars['train/generation/avg_refine_steps']:.2f}")
        parts.append(f"commit {scalars['train/generation/commit_rate']:.0%}")
    parts.append(f"{scalars['train/performance/tokens_per_sec']:,.0f} tok/s")
    return "  ".join([*parts, f"{scalars['train/performance/memory_mb']:,.0f} MB"])
