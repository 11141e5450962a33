"""Checkpoints of a training: saved whole or not at all, pruned, and resumed from.

A checkpoint is a folder `step-NNNNNN` with the model (see `models/loading`), `metrics.json`, and in `trainer_state/`

    optimizer.safetensors   the optimiser's state
    weights.safetensors     the fp32 weights in training and their average, where the model's own files do not hold them
    progress.json           the `TrainingState` (see `state`)

All else follows from the step's number: the data, the depths, the learning rate, and what is drawn.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file

from rrcli.errors import RRError
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
from rrcli.locks import dropping
from rrcli.models.loading import read_tensors
from rrcli.models.saving import save_folder
from rrcli.models.source import ModelSource
from rrcli.schemas import CheckpointMetrics, Progress, Stamps
from rrcli.training.sharding import whole, whole_state
from rrcli.training.state import DepthCost, Spent, TrainingState

if TYPE_CHECKING:
    from torch import Tensor

    from rrcli.training.trainer import Trainer

OPTIMIZER_FILE = "optimizer.safetensors"
WEIGHTS_FILE = "weights.safetensors"
STATE_FILE = "progress.json"


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
    base_stamps: Stamps | None
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
            if processes.parallel and trainer.settings.phase == "c":
                parts = [part for part in (trainer.model, trainer.recursion) if part is not None]
                states = tuple(whole_state(part, trainer.dtype, processes) for part in parts)

            def publish_and_prune() -> None:
                self._publish(trainer, step, state=state, weights=weights, states=states)
                self.prune(trainer)

            processes.on_main(publish_and_prune)

    def resume(self, trainer: Trainer, checkpoint: Path) -> None:
        """Bring the optimiser, the weights in training and the state back from a checkpoint.

        Raises:
            RRError: a file is missing or damaged, or holds the state of another model.
        """
        folder, optimizer = checkpoint / TRAINER_STATE, trainer.optimizer
        hint = f"Remove {checkpoint}, and the same command goes on from the checkpoint before it."
        try:
            optimizer.load_state(read_tensors(folder / OPTIMIZER_FILE, hint))
            if optimizer.weights() or (folder / WEIGHTS_FILE).exists():
                optimizer.load_weights(read_tensors(folder / WEIGHTS_FILE, hint))
        except ValueError as error:
            raise RRError(f"{folder} does not belong to this model: {error}", hint) from error
        saved = read_json(folder / STATE_FILE, self.made_by, Progress)
        trainer.tracker.restore(checkpoint)
        trainer.state = TrainingState(
            rows=saved["rows"],
            spent=Spent(**saved["spent"]),
            costs={int(depth): DepthCost(**cost) for depth, cost in saved["costs"].items()},
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

    def prune(self, trainer: Trainer) -> None:
        """Remove all but the last `--keep` checkpoints and the best one, which alone stays marked as the best.

        A checkpoint that another command is reading stays, until this is called the next time.
        """
        best_step = trainer.state.best.get("step")
        for old in checkpoints(self.folder)[: -trainer.settings.keep]:
            if step_of(old) != best_step:
                with dropping(old) as free:
                    if free:
                        remove_folder(old)
        for other in checkpoints(self.folder):
            metrics = read_json(other / METRICS_FILE, self.made_by, CheckpointMetrics)
            if metrics.get("best") and step_of(other) != best_step:
                write_json(other / METRICS_FILE, metrics | {"best": False})

    def choose(self, trainer: Trainer) -> None:
        """Note in the last checkpoint which one the stage uses: with `--load-best` the best, else the last itself."""
        last = checkpoints(self.folder)[-1]
        metrics = read_json(last / METRICS_FILE, self.made_by, CheckpointMetrics)
        best = trainer.state.best.get("step") if trainer.settings.load_best else None
        wanted = {} if best is None or best == step_of(last) else {"use": best}
        kept = {name: value for name, value in metrics.items() if name != "use"}
        if kept | wanted != metrics:
            write_json(last / METRICS_FILE, kept | wanted)


def remove_run(folder: Path) -> None:
    """Remove the folder of a run.

    Raises:
        RRError: another command is reading one of its checkpoints.
    """
    with ExitStack() as held:
        for checkpoint in checkpoints(folder):
            if not held.enter_context(dropping(checkpoint)):
                raise RRError(
                    f"{checkpoint} is being read by another command, and --restart would remove it",
                    "Wait until that command has ended, or take another --run-name.",
                )
        remove_folder(folder)
