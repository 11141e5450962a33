"""How long an experiment takes at least: the pace of training and generation, and the hours of every command.

Times are figures of the device times the efficiency that programs reach. Loading, saving and waiting are not in them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from rrcli.evaluation.performance import DECODE_TOKENS, TEXTS
from rrcli.experiment.planning import chooses_exit, has_equal_flops
from rrcli.experiment.resources import EVALUATE, RECURSIVE, VANILLA, Estimate
from rrcli.experiment.workload import Workload
from rrcli.models.shares import Arrangement, Machine, Reading, Work, reading

# Rounds of `rr costs`, with its warm-up and its counting.
ROUNDS_BESIDE = 3


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


class TimedEstimate(Estimate):
    """An estimate of an experiment that also says how long it takes."""

    @cached_property
    def reads(self) -> Reading:
        """What a forward reads of the weights."""
        return reading(self.running)

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
