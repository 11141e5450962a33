"""The files and folders of one experiment. Stages exchange results on disk, in these places alone. Loads no torch."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rrcli.errors import RRError, UsageError, suggest
from rrcli.experiment.replicates import TRAINED, Replicate, replicate, replicates
from rrcli.files import MANIFEST, METRICS_FILE, checkpoints, read_json, safe_name, step_of
from rrcli.models.source import ModelSource, resolve
from rrcli.schemas import CheckpointMetrics
from rrcli.settings import STAGES, CommonSettings, TrainSettings, with_changes

SURGERY_STAGE = "after_surgery"
COSTS_FILE = "costs.json"
MAKERS = {
    "baseline": "rr setup",
    "after_surgery": "rr surgery",
    "finetuned_vanilla": "rr train --mode vanilla",
    "finetuned_recursive": "rr train --mode recursive",
    "vanilla_equal_flops": "rr train --mode vanilla --match-flops finetuned_recursive",
}


@dataclass(frozen=True)
class Workspace:
    """Where an experiment's files are.

    Attributes:
        directory: the working directory (`--dir`); every relative path in the settings starts here.
        settings: their `seed` says which replicate of a stage is meant.
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

    def results_file(self, name: str) -> Path:
        """The results of a replicate, by its name; the first one's name is that of the stage."""
        return self.directory / self.settings.output_dir / f"{safe_name(name, 'stage')}_results.json"

    def exits_file(self, name: str) -> Path:
        """The frontier of exit rules of a stage or a replicate."""
        return self.directory / self.settings.output_dir / f"{name}_exits.json"

    @property
    def costs_file(self) -> Path:
        """What `rr costs` writes."""
        return self.directory / self.settings.output_dir / COSTS_FILE

    def at(self, one: Replicate) -> Workspace:
        """The same workspace, in which the seed of a replicate is meant."""
        return Workspace(self.directory, with_changes(self.settings, seed=one.seed))

    def replicate(self, stage: str) -> Replicate:
        """The replicate of a stage that the settings' seed means."""
        return replicate(check_stage(stage), self.settings)

    def replicates(self, stage: str) -> tuple[Replicate, ...]:
        """All replicates that the experiment has of a stage, whether they were made yet or not."""
        return replicates(check_stage(stage), self.settings)

    def measured(self, stage: str) -> tuple[Replicate, ...]:
        """Those replicates of a stage that have results."""
        return tuple(one for one in self.replicates(stage) if self.results_file(one.name).is_file())

    def made_stages(self) -> list[str]:
        """Return the stages that have a model."""
        found = []
        for stage in STAGES:
            with suppress(RRError):
                self.stage_model(stage)
                found.append(stage)
        return found

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
        """Find a model. Of the folder of a training run, take the checkpoint that its stage would use."""
        path = self.directory / Path(name).expanduser()
        if name != "default" and path.is_dir() and checkpoints(path):
            return resolve(str(used_checkpoint(path)), self.directory)
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

    def as_operated(self, settings: TrainSettings) -> TrainSettings:
        """Return the settings of a recursive training with what the surgery decides where they leave it open.

        So a run with `--max-steps 2` is the same run as one without, after a surgery of 2.

        Raises:
            RRError: there was no surgery yet. UsageError: more passes are to be trained than it made.
        """
        manifest = self.stage_model(SURGERY_STAGE).manifest
        if manifest is None:
            return settings
        shape = manifest["recursion"]
        check_passes(settings, shape["max_steps"])
        return with_changes(
            settings,
            max_steps=settings.max_steps or shape["max_steps"],
            chunk_width=settings.chunk_width or shape["chunk_width"],
        )

    def spent_flops(self, run: str) -> float:
        """Return the FLOPs that a training has spent; of a stage, that of the settings' seed.

        Raises:
            RRError: it has no checkpoint, is not finished, or ran something whose FLOPs were not counted.
        """
        name = self.replicate(run).name if run in TRAINED else run
        made_by = maker(self.replicate(run)) if run in TRAINED else "rr train"
        found = checkpoints(self.run_folder(name))
        if not found:
            raise RRError(f"--match-flops: the run '{name}' has no checkpoint", f"Train it first: '{made_by}'.")
        about = read_json(found[-1] / METRICS_FILE, made_by, CheckpointMetrics)
        done, steps = about.get("step", 0), about.get("steps", 0)
        if done < steps:
            raise RRError(
                f"--match-flops: the run '{name}' is at step {done} of {steps}: its whole cost is not known yet",
                f"Finish it first: '{made_by}'.",
            )
        uncounted = about["training"].get("uncounted", ["what an older version of rr did not count"])
        if uncounted:
            raise RRError(
                f"--match-flops: the FLOPs of the run '{name}' leave out {', '.join(uncounted)}",
                f"Train it again, with kernels that are counted: '{made_by} --restart'.",
            )
        return float(about["training"]["flops"])

    def stage_model(self, stage: str) -> ModelSource:
        """Return the model that a stage measures: that of the settings' seed, where the stage has several.

        Raises:
            RRError: it was not made yet; the hint names the command that makes it.
        """
        if check_stage(stage) == "baseline":
            return self.base()
        if stage == SURGERY_STAGE:
            folder = self.surgery_folder
        else:
            run = self.run_folder(self.replicate(stage).name)
            folder = used_checkpoint(run) if checkpoints(run) else run
        if not (folder / MANIFEST).is_file():
            raise RRError(
                f"stage '{stage}' has no model yet: {folder} holds no {MANIFEST}",
                f"'{maker(self.replicate(stage))}' makes it.",
            )
        return resolve(str(folder), self.directory)


def used_checkpoint(run: Path) -> Path:
    """Return the checkpoint of a run that its stage uses: the last one, or an earlier one that the last one names.

    Raises:
        RRError: that one is gone.
    """
    found = checkpoints(run)
    step = read_json(found[-1] / METRICS_FILE, "rr train", CheckpointMetrics).get("use")
    if step is None:
        return found[-1]
    chosen = next((path for path in found if step_of(path) == step), None)
    if chosen is None:
        raise RRError(
            f"the best checkpoint of {run}, that of step {step}, is gone",
            "'rr train' with --no-load-best uses the last one; --restart trains the run again.",
        )
    return chosen


def maker(one: Replicate) -> str:
    """Return the command that makes the model of a replicate."""
    return MAKERS[one.stage] + one.flag


def check_passes(settings: TrainSettings, made: int) -> None:
    """Refuse to train more passes than the surgery has `made`.

    Raises:
        UsageError: `max_steps` is larger.
    """
    if settings.max_steps > made:
        raise UsageError(
            f"max_steps of the training is {settings.max_steps}, but the surgery made a recursion of at most {made}",
            f"Train at most {made} passes after pass 0, or 'rr surgery --overwrite --max-steps {settings.max_steps}'.",
        )


def check_stage(stage: str) -> str:
    """Return `stage` if it is the name of a stage.

    Raises:
        UsageError: it is not; the hint suggests the closest, or names the replicate as options do.
    """
    if stage not in STAGES:
        name, _, seed = stage.partition("-seed")
        named = name in STAGES and seed.isdigit()
        hint = f"Write --stage {name} --seed {seed}." if named else suggest(stage, STAGES)
        raise UsageError(f"unknown stage '{stage}'", hint)
    return stage
