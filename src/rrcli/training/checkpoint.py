"""Checkpoints of a training: saved whole or not at all, pruned, and resumed from.

A checkpoint is a folder `step-NNNNNN` with the model (see `models/loading`), `metrics.json`, and in `trainer_state/`

    optimizer.safetensors   the optimiser's state
    weights.safetensors     the fp32 weights in training and their average, where the model's own files do not hold them
    progress.json           the `TrainingState`

All else follows from the step's number: the data, the depths, the learning rate, and what is drawn.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file

from rrcli.files import (
    METRICS_FILE,
    TRAINER_STATE,
    checkpoints,
    publish_folder,
    read_json,
    remove_folder,
    step_of,
    write_json,
)
from rrcli.models.saving import save_folder
from rrcli.models.source import ModelSource
from rrcli.training.sharding import whole, whole_state

if TYPE_CHECKING:
    from torch import Tensor

    from rrcli.training.trainer import Trainer

OPTIMIZER_FILE = "optimizer.safetensors"
WEIGHTS_FILE = "weights.safetensors"
STATE_FILE = "progress.json"


@dataclass
class Spent:
    """What a run has cost so far; `positions` are those of its batches, with padding."""

    steps: int = 0
    tokens: int = 0
    positions: int = 0
    seconds: float = 0.0
    flops: float = 0.0


@dataclass
class TrainingState:
    """What a checkpoint remembers beside the weights and the optimiser.

    Attributes:
        rows: how many rows of a batch are computed at a time (fewer than asked for after running out of memory).
        flops_by_depth: FLOPs for each position of a batch, forward and backward, by depth.
        best: `step` and `perplexity` of the best evaluation so far; empty before the first one.
        raised: the red flags that were shown.
    """

    rows: int
    spent: Spent = field(default_factory=Spent)
    flops_by_depth: dict[int, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    raised: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """The checkpoints of one run.

    Attributes:
        folder: where they lie.
        inputs: the hash of what the run is made from.
        base: the model that a checkpoint refers to where the base's weights are frozen.
        base_fingerprint, base_stamps: what it was when the training began; see `models/weights`.
        directory: the working directory; a base inside it is named relative to it.
        training: what `metrics.json` says of the training, beside its costs: mode, run, phase, ...
        made_by: the command that writes them, for error messages.
    """

    folder: Path
    inputs: str
    base: ModelSource
    base_fingerprint: str
    base_stamps: dict[str, Any]
    directory: Path
    training: dict[str, Any]
    made_by: str

    def save(self, trainer: Trainer, step: int) -> None:
        """Publish the checkpoint of a step, then remove those that are neither among the last `--keep` nor the best.

        Every process calls it: they put shards together, and the main one writes while the others wait.
        """
        optimizer, processes = trainer.optimizer, trainer.processes
        state, weights = (whole(tensors, processes) for tensors in (optimizer.state(), optimizer.weights()))
        states = None
        with optimizer.published():
            if processes.sharded:
                parts = [part for part in (trainer.model, trainer.recursion) if part is not None]
                states = tuple(whole_state(part, trainer.dtype, processes) for part in parts)

            def publish_and_prune() -> None:
                self._publish(trainer, step, state=state, weights=weights, states=states)
                self._prune(trainer.settings.keep, trainer.state.best.get("step"))

            processes.on_main(publish_and_prune)

    def resume(self, trainer: Trainer, checkpoint: Path) -> None:
        """Bring the optimiser, the weights in training and the state back from a checkpoint."""
        folder = checkpoint / TRAINER_STATE
        trainer.optimizer.load_state(load_file(folder / OPTIMIZER_FILE))
        if (folder / WEIGHTS_FILE).exists():
            trainer.optimizer.load_weights(load_file(folder / WEIGHTS_FILE))
        saved = read_json(folder / STATE_FILE, self.made_by)
        trainer.state = TrainingState(
            rows=saved["rows"],
            spent=Spent(**saved["spent"]),
            flops_by_depth={int(depth): flops for depth, flops in saved["flops_by_depth"].items()},
            best=saved["best"],
            raised=saved["raised"],
        )

    def _publish(
        self,
        trainer: Trainer,
        step: int,
        *,
        state: dict[str, Tensor],
        weights: dict[str, Tensor],
        states: tuple[dict[str, Tensor], ...] | None,
    ) -> None:
        """Write the checkpoint of a step; `states` are the model's and the recursion's own, where they are sharded."""
        settings = trainer.settings
        # First: what led to a checkpoint must be in the logs, even if the process is killed right after it is written.
        trainer.tracker.flush()
        with publish_folder(self.folder / f"step-{step:06d}", overwrite=True) as target:
            inner = target / TRAINER_STATE
            inner.mkdir()
            save_file(state, inner / OPTIMIZER_FILE)
            if weights:
                save_file(weights, inner / WEIGHTS_FILE)
            write_json(inner / STATE_FILE, {"schema": 1, "step": step, **asdict(trainer.state)})
            trainer.tracker.save_checkpoint_metrics(
                target,
                inputs=self.inputs,
                step=step,
                steps=settings.steps,
                best=trainer.state.best.get("step") == step,
                training=self.training | vars(trainer.state.spent),
                **({"stamps": self.base_stamps} if self.base_stamps else {}),
            )
            save_folder(
                target, trainer.model, trainer.tokenizer,
                base=self.base, directory=self.directory, base_fingerprint=self.base_fingerprint,
                own_weights=settings.phase == "c", states=states,
            )  # fmt: skip

    def _prune(self, keep: int, best_step: float | None) -> None:
        """Remove all but the last `keep` checkpoints and the best one, which alone stays marked as the best."""
        for old in checkpoints(self.folder)[:-keep]:
            if step_of(old) != best_step:
                remove_folder(old)
        for other in checkpoints(self.folder):
            metrics = read_json(other / METRICS_FILE, self.made_by)
            if metrics.get("best") and step_of(other) != best_step:
                write_json(other / METRICS_FILE, metrics | {"best": False})
