"""What the commands of an experiment take: memory on each device, FLOPs, and time, from the model's skeleton alone.

Memory and FLOPs are those of `models/footprint`, shared out as `models/shares` says. Times are at least these: figures
of the device times the efficiency that programs reach; loading, saving and waiting are not in them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

from rrcli.data.batching import CPU_TOKENS
from rrcli.errors import RRError, first_line
from rrcli.evaluation.performance import DECODE_TOKENS, TEXTS
from rrcli.evaluation.windows import DEFAULT_LENGTH
from rrcli.experiment.planning import chooses_exit, has_equal_flops
from rrcli.experiment.workload import Workload
from rrcli.models.costs import OneToken, decode_one
from rrcli.models.devices import Device
from rrcli.models.footprint import Use, operate, prompted, scored_batch, training_step
from rrcli.models.shares import Arrangement, Machine, Reading, Work, held_by_each, reading
from rrcli.recursion.config import RecursionConfig, parse_span
from rrcli.recursion.facts import context_length, vocabulary
from rrcli.settings import EvalSettings, SurgerySettings, TrainSettings, with_changes

RECURSIVE, VANILLA, EVALUATE, GENERATE = "train recursive", "train vanilla", "eval", "generate"
# Rounds of `rr costs`, with its warm-up and its counting.
ROUNDS_BESIDE = 3


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What one device holds while a command runs, in bytes.

    Attributes:
        command: train recursive, train vanilla, eval or generate. arrangement: how the model is laid over devices.
        base, sidecar: weights; adapters are with the sidecar. gradients, optimiser: of what trains.
        together: parts of the model that are put together while they run.
        activations, logits, caches: at the moment when most is held.
        rows: texts at a time, of this device.
    """

    command: str
    arrangement: Arrangement
    base: int
    sidecar: int
    gradients: int = 0
    optimiser: int = 0
    together: int = 0
    activations: int
    logits: int
    caches: int = 0
    rows: int

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(getattr(self, name) for name in PARTS)


PARTS = tuple(item.name for item in fields(Memory) if item.name not in ("command", "arrangement", "rows"))


@dataclass(frozen=True)
class Pace:
    """How fast tokens come at the most.

    Attributes:
        what: in words. depth: of the passes. flops: for each token.
        tokens_per_second: of all devices together. bound: what limits it: compute, memory or link.
    """

    what: str
    depth: int
    flops: float
    tokens_per_second: float
    bound: str


@dataclass(frozen=True)
class StageCost:
    """What a command of the experiment takes, all seeds together: how often it is done, FLOPs, and seconds."""

    command: str
    times: int
    flops: float
    seconds: float


class Estimate:
    """An experiment with one model, of which everything is estimated.

    Args:
        skeleton: the base model on the meta device. device: whose kernels and figures count.
        context: tokens of a text that is generated, with its prompt. rows: such texts at a time.
    """

    def __init__(
        self,
        skeleton: Any,
        *,
        surgery: SurgerySettings,
        training: TrainSettings,
        evaluation: EvalSettings,
        device: Device,
        efficiency: float,
        context: int,
        rows: int,
    ) -> None:
        self.skeleton, self.device, self.efficiency = skeleton, device, efficiency
        self.surgery, self.training, self.evaluation = surgery, training, evaluation
        self.config = RecursionConfig(
            surgery.max_steps, parse_span(surgery.span), surgery.cell_width or None, surgery.chunk_width
        )
        self.context, self.rows = context, rows
        self.dtype = str(skeleton.dtype).removeprefix("torch.")
        self.length = min(training.max_length, context_length(skeleton))
        self.deepest = min(training.max_steps or surgery.max_steps, surgery.max_steps)
        self.uncounted: set[str] = set()
        self.steps: dict[tuple[str, int, int], Use] = {}

    # -- models as commands have them ---------------------------------------------------------------------------------

    @cached_property
    def running(self) -> Any:
        """The model with its recursion, as it is evaluated."""
        model = copy.deepcopy(self.skeleton)
        operate(model, recursion=self.config)
        return model

    @cached_property
    def trained(self) -> dict[str, tuple[Any, list[Any]]]:
        """Command -> the model in that training, and what of it trains."""
        found = {}
        lora = (self.training.lora_rank, self.training.lora_alpha)
        for command in (RECURSIVE, VANILLA):
            if command == VANILLA and self.training.phase == "a":  # there is nothing that could train
                continue
            model = copy.deepcopy(self.skeleton)
            config = self.config if command == RECURSIVE else None
            found[command] = (
                model,
                operate(model, recursion=config, phase=self.training.phase, lora=lora, span=self.config.span),
            )
            if self.training.gradient_checkpointing:
                model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        return found

    def with_training(self, **changes: Any) -> Estimate:
        """Return an estimate with other settings of the training."""
        other = copy.copy(self)
        other.training = with_changes(self.training, **changes)
        other.length = min(other.training.max_length, context_length(self.skeleton))
        other.__dict__.pop("trained", None)
        other.steps = {}
        return other

    def step(self, command: str, rows: int, depth: int) -> Use:
        """Return what a part of so many rows takes in a training."""
        key = command, rows, depth
        if key not in self.steps:
            model, trained = self.trained[command]
            settings = self.training
            parts = settings.gradient_accumulation > 1
            self.steps[key] = self._seen(
                lambda: training_step(
                    model, trained, rows=rows, length=self.length, depth=depth, share=settings.supervised_share,
                    device=self.device.kind, autocast=self.dtype != "float32", accumulates=parts,
                )
            )  # fmt: skip
        return self.steps[key]

    @cached_property
    def scored(self) -> tuple[Use, int]:
        """What scoring a batch takes, and its rows."""
        length = self.evaluation.max_length or min(DEFAULT_LENGTH, context_length(self.skeleton))
        budget = (
            self.evaluation.batch_tokens if self.device.kind != "cpu" else min(self.evaluation.batch_tokens, CPU_TOKENS)
        )
        rows = max(1, budget // length)
        use = self._seen(
            lambda: scored_batch(
                self.running, rows=rows, length=length, depth=self.config.max_steps, device=self.device.kind
            )
        )
        return replace(use, flops=round(use.flops / (rows * length))), rows

    @cached_property
    def prompt(self) -> Use:
        """What the prompts of generated texts take before the first new token."""
        depth = self.config.max_steps
        return self._seen(
            lambda: prompted(self.running, rows=self.rows, length=self.context, depth=depth, device=self.device.kind)
        )

    @cached_property
    def token(self) -> OneToken:
        """What one more token of the generated texts takes, for all rows together."""
        return self._seen(lambda: decode_one(self.running, self.rows, self.context))

    @cached_property
    def reads(self) -> Reading:
        """What a forward reads of the weights."""
        return reading(self.running)

    def _seen(self, measure: Callable[[], Any]) -> Any:
        """Return what is measured on shapes.

        Raises:
            RRError: the family cannot run on them.
        """
        try:
            found = measure()
        except RRError:
            raise
        except Exception as error:
            family = self.skeleton.config.model_type
            raise RRError(
                f"a '{family}' model cannot be run on shapes alone: {first_line(error)}",
                "Its memory can be measured alone: 'rr costs', and 'rr train' with few --steps.",
            ) from error
        self.uncounted |= set(getattr(found, "uncounted", ()))
        return found

    # -- memory --------------------------------------------------------------------------------------------------------

    def memory(self, arrangement: Arrangement, room: int) -> Iterator[Memory]:
        """Yield what a device holds in each command.

        Args:
            room: bytes that may be filled; a batch that is scored is made smaller where it does not fit.
        """
        for command, (model, trained) in self.trained.items() if arrangement.trains else ():
            shared = self.training.gradient_accumulation * arrangement.batches
            rows = math.ceil(self.training.batch_size / shared)
            use = self.step(command, rows, self.deepest if command == RECURSIVE else 0)
            held = held_by_each(model, trained, arrangement, average=self.training.ema > 0)
            weights = held.weights
            yield Memory(
                command=command, arrangement=arrangement, base=weights.base,
                sidecar=weights.sidecar + weights.adapters, gradients=weights.gradients, optimiser=weights.optimiser,
                together=held.together, activations=use.activations, logits=use.logits, rows=rows,
            )  # fmt: skip
        held = held_by_each(self.running, (), arrangement)
        sizes = {"base": held.weights.base, "sidecar": held.weights.sidecar, "together": held.together}
        use, rows = self.scored
        used = sum(sizes.values()) + use.logits
        there = max(1, min(rows, (room - used) * rows // max(1, use.activations)))
        yield Memory(
            command=EVALUATE,
            arrangement=arrangement,
            **sizes,
            activations=use.activations * there // rows,
            logits=use.logits,
            rows=there,
        )
        caches = self.token.held[-1] + self._of_chunks()
        yield Memory(
            command=GENERATE, arrangement=arrangement, **sizes, activations=self.prompt.activations,
            logits=self.prompt.logits, caches=math.ceil(caches / arrangement.mapped), rows=self.rows,
        )  # fmt: skip

    def _of_chunks(self) -> int:
        """Return the bytes of chunked decoding's own: logits of a chunk, its states, and copies of recurrent states."""
        tokens = self.rows * self.config.chunk_width
        size, width = self.skeleton.dtype.itemsize, self.skeleton.get_input_embeddings().weight.shape[1]
        logits = tokens * vocabulary(self.skeleton) * (size + 4)  # as they are, and in fp32
        states = tokens * width * size * (2 + self.config.max_steps)
        fixed = [
            held - grown * (self.context + 1) for held, grown in zip(self.token.held, self.token.growth, strict=True)
        ]
        return logits + states + max(0, fixed[-1]) + max(0, fixed[0])

    # -- time ----------------------------------------------------------------------------------------------------------

    def machine(self, arrangement: Arrangement) -> Machine:
        """Return the devices in an arrangement."""
        return Machine(self.device, arrangement, self.efficiency, self.dtype)

    def flops_per_position(self, command: str) -> float:
        """Return the FLOPs of a position in a training, the mean of the depths that it draws."""
        rows = math.ceil(self.training.batch_size / self.training.gradient_accumulation)
        ends = (0, 0) if command == VANILLA else (1, self.deepest)
        return sum(self.step(command, rows, depth).flops for depth in ends) / 2 / (rows * self.length)

    def of_step(self, command: str, work: Workload, arrangement: Arrangement) -> tuple[float, float, str]:
        """Return FLOPs, seconds and bound of an optimiser step."""
        positions = work.rows * work.width
        flops = self.flops_per_position(command) * positions
        passes = 0 if command == VANILLA else (1 + self.deepest) / 2
        # Every part of a step runs each layer forward, and backward at twice the cost.
        times = self.training.gradient_accumulation
        layers = 3 * times * (self.reads.layers + passes * self.reads.span)
        scale = 4 / self.skeleton.dtype.itemsize if self.training.phase == "c" else 1
        gathered = 2 * times * scale * (self._gathered(arrangement, 0) + passes * self._gathered(arrangement, 1))
        states = positions * self.reads.width / arrangement.batches / times
        own = Work(flops / arrangement.batches, gathered=gathered, layers=layers, states=states)
        return flops, *self.machine(arrangement).seconds(own)

    def _gathered(self, arrangement: Arrangement, step: int) -> int:
        """Return the bytes that a pass puts together where they are cut: not experts that lie whole on a device."""
        reads = self.reads
        dense, experts = (reads.span_dense, reads.span_experts) if step else (reads.dense, reads.experts)
        return dense if arrangement.ep > 1 else dense + experts

    def of_tokens(
        self, depth: int, rows: float, arrangement: Arrangement, *, chunk: int = 1
    ) -> tuple[float, float, str]:
        """Return FLOPs, seconds and bound of decoding `chunk` tokens in each of some rows, of one replica.

        Args:
            chunk: 1 runs every pass for every token; more are drafted by pass 0, refined together, and all accepted.
        """
        machine, token, reads = self.machine(arrangement), self.token, self.reads
        scale = rows / self.rows
        held, flops = ([size * scale for size in sizes] for sizes in (token.held, token.flops))
        works = [
            Work(
                flops[0],
                read=reads.of_model(rows) + held[0],
                gathered=self._gathered(arrangement, 0),
                layers=reads.layers,
                states=rows * reads.width,
            )
        ] * chunk
        works += [
            Work(
                chunk * (flops[step] - flops[step - 1]),
                read=reads.of_pass(rows * chunk) + held[step] - held[step - 1],
                gathered=self._gathered(arrangement, step),
                layers=reads.span,
                states=chunk * rows * reads.width,
            )
            for step in range(1, depth + 1)
        ]
        times = [machine.seconds(work) for work in works]
        return sum(work.flops for work in works), sum(time for time, _ in times), max(times)[1]

    def slowness(self, command: str, work: Workload, arrangement: Arrangement) -> float:
        """Return the seconds of a command's work in an arrangement, by which arrangements are compared."""
        if command in (RECURSIVE, VANILLA):
            return self.of_step(command, work, arrangement)[1]
        depth = self.config.max_steps
        if command == EVALUATE:
            return self._measured(depth, work.text, work.problems, work, arrangement)[1]
        return self.of_tokens(depth, self.rows, arrangement)[1] / arrangement.batches

    def paces(self, work: Workload, training: Arrangement | None, running: Arrangement | None) -> Iterator[Pace]:
        """Yield how fast tokens come, of training and of generation where they fit."""
        if training is not None:
            for command in self.trained:
                flops, seconds, bound = self.of_step(command, work, training)
                depth = self.deepest if command == RECURSIVE else 0
                yield Pace(command, depth, flops / work.tokens, work.tokens / seconds, bound)
        if running is None:
            return
        for depth in range(self.config.max_steps + 1):
            for chunk in (1, self.config.chunk_width)[: 1 + (depth > 0)]:
                flops, seconds, bound = self.of_tokens(depth, self.rows, running, chunk=chunk)
                tokens = self.rows * chunk
                what = "generate" if chunk == 1 else "generate, chunks accepted"
                yield Pace(what, depth, flops / tokens, tokens * running.batches / seconds, bound)

    def stages(self, work: Workload, training: Arrangement, running: Arrangement) -> Iterator[StageCost]:
        """Yield what the commands of `rr run` take, in their order; see `planning`."""
        seeds = len(self.training.all_seeds)
        steps, settings = self.training.steps, self.training
        yield self._evaluation("eval baseline", 0, work, running, times=1, seeds=seeds)
        yield self._evaluation("eval after_surgery", self.config.max_steps, work, running, times=1, seeds=seeds)
        flops = {command: self.of_step(command, work, training) for command in (VANILLA, RECURSIVE)}
        measured = steps // settings.eval_interval if settings.eval_interval else 0
        stages = ["finetuned_vanilla", "finetuned_recursive"]
        stages += ["vanilla_equal_flops"] * has_equal_flops(settings)
        for stage in stages:
            command = RECURSIVE if stage == "finetuned_recursive" else VANILLA
            depth = self.config.max_steps if command == RECURSIVE else 0
            own, seconds, _ = flops[command]
            count = steps * (flops[RECURSIVE][0] / own if stage == "vanilla_equal_flops" else 1)
            within = self._measured(depth, work.validation_text, work.validation_problems, work, running)
            yield StageCost(
                f"train {stage}", seeds, seeds * (count * own + measured * within[0]),
                seeds * (count * seconds + measured * within[1]),
            )  # fmt: skip
            if command == RECURSIVE and chooses_exit(self.evaluation):  # on the validation side, half of the test side
                choice = self._measured(depth, work.text // 2, work.problems, work, running)
                yield StageCost("eval --choose-exit", seeds, seeds * choice[0], seeds * choice[1])
            yield self._evaluation(f"eval {stage}", depth, work, running, times=seeds, seeds=1)
        if not self.evaluation.skip_performance:
            yield self._costs(2 + len(stages), running)

    def _evaluation(
        self, name: str, depth: int, work: Workload, arrangement: Arrangement, *, times: int, seeds: int
    ) -> StageCost:
        answers = seeds * work.problems * (1 + self.evaluation.samples)  # one greedy, the others drawn
        flops, seconds = self._measured(depth, work.text, answers, work, arrangement)
        return StageCost(name, times, times * flops, times * seconds)

    def _measured(
        self, depth: int, text: int, problems: int, work: Workload, arrangement: Arrangement
    ) -> tuple[float, float]:
        """Return FLOPs and seconds of scoring text and answering problems at every depth up to one."""
        of_token = self.scored[0].flops * (1 + depth) / (1 + self.config.max_steps)
        flops = of_token * (text + problems * work.prompt * (depth + 2) / 2)
        # Every batch puts each pass's weights together.
        batches = math.ceil((text + problems * work.prompt) / self.evaluation.batch_tokens / arrangement.batches)
        gathered = batches * sum(self._gathered(arrangement, step) for step in range(depth + 1))
        seconds = self.machine(arrangement).seconds(Work(flops / arrangement.batches, gathered=gathered))[0]
        new = self.evaluation.max_new_tokens
        rows = max(1, min(problems, self.evaluation.batch_tokens // round(work.prompt + new)))
        for current in range(depth + 1) if problems else ():
            once, time, _ = self.of_tokens(current, rows, arrangement)
            flops += once * new * problems / rows
            seconds += time * new * problems / rows / arrangement.batches
        return flops, seconds

    def _costs(self, stages: int, arrangement: Arrangement) -> StageCost:
        """Return what `rr costs` takes: its texts in every way, one row at a time."""
        flops = seconds = 0.0
        for depth in range(self.config.max_steps + 1):
            once, time, _ = self.of_tokens(depth, 1, arrangement)
            times = stages * TEXTS * DECODE_TOKENS * (ROUNDS_BESIDE + 3)
            flops, seconds = flops + once * times, seconds + time * times
        return StageCost("costs", 1, flops, seconds)
