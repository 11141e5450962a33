"""The files and folders of one experiment. Stages exchange results on disk, in these places alone. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rrcli.errors import RRError, UsageError, suggest
from rrcli.files import MANIFEST, checkpoints, safe_name
from rrcli.models.source import ModelSource, resolve
from rrcli.settings import STAGES, CommonSettings, TrainSettings

SURGERY_STAGE = "after_surgery"
TRAINED = {"finetuned_vanilla": "vanilla", "finetuned_recursive": "recursive"}
MAKERS = {
    "baseline": "rr setup",
    "after_surgery": "rr surgery",
    "finetuned_vanilla": "rr train --mode vanilla",
    "finetuned_recursive": "rr train --mode recursive",
}


@dataclass(frozen=True)
class Workspace:
    """Where an experiment's files are.

    Attributes:
        directory: the working directory (`--dir`); every relative path in the settings starts here.
    """

    directory: Path
    settings: CommonSettings

    @property
    def surgery_folder(self) -> Path:
        """What `rr surgery` writes."""
        return self.directory / self.settings.checkpoint_dir / SURGERY_STAGE

    def run_folder(self, run: str) -> Path:
        """The checkpoints of a training run."""
        return self.directory / self.settings.checkpoint_dir / safe_name(run, "run name")

    def log_folder(self, run: str = "") -> Path:
        """The TensorBoard logs of a run, or of all."""
        root = self.directory / self.settings.log_dir
        return root / safe_name(run, "run name") if run else root

    def results_file(self, stage: str) -> Path:
        """The results of a stage."""
        return self.directory / self.settings.output_dir / f"{stage}_results.json"

    def base(self) -> ModelSource:
        """The base model of the experiment.

        Raises:
            RRError: it cannot be found, or it is only a LoRA adapter on another model.
        """
        source = self.resolve(self.settings.model)
        if source.manifest is not None and source.manifest.get("lora"):
            raise RRError(
                f"the base model {source.name} is a LoRA adapter on another model",
                "Merge it with peft's merge_and_unload() and save_pretrained(), or name the model it was made from.",
            )
        return source

    def resolve(self, name: str) -> ModelSource:
        """Find a model. Of the folder of a training run, take the last complete checkpoint."""
        path = self.directory / Path(name).expanduser()
        if name != "default" and path.is_dir() and checkpoints(path):
            return resolve(str(checkpoints(path)[-1]), self.directory)
        return resolve(name, self.directory)

    def vanilla_span(self, settings: TrainSettings) -> list[int] | None:
        """Return the layers that get LoRA in vanilla training in phase b: the span of the surgery; None = all layers.

        Raises:
            RRError: there was no surgery yet.
        """
        if settings.phase != "b":
            return None
        manifest = self.stage_model(SURGERY_STAGE).manifest
        return manifest["recursion"]["span"] if manifest else None

    def stage_model(self, stage: str) -> ModelSource:
        """Return the model that a stage measures.

        Raises:
            RRError: it was not made yet; the hint names the command that makes it.
        """
        if check_stage(stage) == "baseline":
            return self.base()
        if stage == SURGERY_STAGE:
            folder = self.surgery_folder
        else:
            found = checkpoints(self.run_folder(stage))
            folder = found[-1] if found else self.run_folder(stage)
        if not (folder / MANIFEST).is_file():
            raise RRError(
                f"stage '{stage}' has no model yet: {folder} holds no {MANIFEST}", f"'{MAKERS[stage]}' makes it."
            )
        return resolve(str(folder), self.directory)


def check_stage(stage: str) -> str:
    """Return `stage` if it is the name of a stage.

    Raises:
        UsageError: it is not; the hint suggests the closest.
    """
    if stage not in STAGES:
        raise UsageError(f"unknown stage '{stage}'", suggest(stage, STAGES))
    return stage
