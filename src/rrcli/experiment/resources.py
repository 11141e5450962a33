"""What the commands of an experiment take: memory on each device, and FLOPs, from the model's skeleton alone.

They are those of `models/footprint`, shared out as `models/shares` says.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

from rrcli.data.batching import CPU_TOKENS
from rrcli.evaluation.windows import DEFAULT_LENGTH
from rrcli.models.costs import OneToken, decode_one
from rrcli.models.devices import Device
from rrcli.models.footprint import Use, operate, prompted, scored_batch, seen, training_step
from rrcli.models.shares import Arrangement, held_by_each
from rrcli.recursion.facts import context_length, vocabulary
from rrcli.settings import EvalSettings, SurgerySettings, TrainSettings, with_changes

RECURSIVE, VANILLA, EVALUATE, GENERATE = "train recursive", "train vanilla", "eval", "generate"


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
        self.config = surgery.recursion
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
                operate(
                    model,
                    recursion=config,
                    phase=self.training.phase,
                    lora=lora,
                    span=self.config.span,
                    experts=self.training.lora_experts,
                ),
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

    def _seen(self, measure: Callable[[], Any]) -> Any:
        """Return what is measured on shapes.

        Raises:
            RRError: the family cannot run on them.
        """
        found = seen(self.skeleton, lambda _: measure())
        self.uncounted |= set(getattr(found, "uncounted", ()))
        return found

    # -- memory --------------------------------------------------------------------------------------------------------

    def memory(self, arrangement: Arrangement, room: int) -> Iterator[Memory]:
        """Yield what a device holds in each command.

        Args:
            room: bytes that may be filled; a batch that is scored is made smaller where it does not fit.
        """
        for command, (model, trained) in self.trained.items() if self._trains(arrangement) else ():
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

    def _trains(self, arrangement: Arrangement) -> bool:
        return arrangement.trains(self.training.phase, experts=self.training.lora_experts)

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
