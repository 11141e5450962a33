"""The folders of one experiment and what lies where: stages meet here, on disk, and nowhere else. Loads no torch."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rrcli import __version__
from rrcli.data.problem_files import is_file_task, task_file
from rrcli.data.prompts import prompts_file
from rrcli.data.training_data import source_fingerprint, task_specs
from rrcli.errors import RRError, UsageError, suggest
from rrcli.evaluation.harness import task_files as harness_files
from rrcli.files import METRICS_FILE, checkpoints, combine, read_json, safe_name
from rrcli.models.loading import ModelSource, base_of, resolve
from rrcli.settings import (
    NUMBERS,
    SIDECAR,
    STAGES,
    WEIGHTS,
    CommonSettings,
    EvalSettings,
    SurgerySettings,
    TrainSettings,
    reaching,
)

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
            RRError: it cannot be found, or is no more than adapters on another model.
        """
        source = self.resolve(self.settings.model)
        if source.manifest is not None and source.manifest.get("lora"):
            raise RRError(
                f"the base model {source.name} is a LoRA adapter on another model",
                "Merge it with peft's merge_and_unload() and save_pretrained(), or name the model it was made from.",
            )
        return source

    def resolve(self, name: str) -> ModelSource:
        """Find a model; the folder of a training run stands for its last complete checkpoint."""
        path = self.directory / Path(name).expanduser()
        if name != "default" and path.is_dir() and checkpoints(path):
            return resolve(str(checkpoints(path)[-1]), self.directory)
        return resolve(name, self.directory)

    def vanilla_span(self, settings: TrainSettings) -> list[int] | None:
        """Return the layers that vanilla training adapts in phase b: surgery's span, None being all of them.

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
            RRError: it was not made yet; the hint is the command that makes it.
        """
        if check_stage(stage) == "baseline":
            return self.base()
        if stage == SURGERY_STAGE:
            folder = self.surgery_folder
        else:
            found = checkpoints(self.run_folder(stage))
            folder = found[-1] if found else self.run_folder(stage)
        source = resolve(str(folder), self.directory) if folder.exists() else None
        if source is None or source.manifest is None:
            raise RRError(f"stage '{stage}' has no model yet: {folder} is not there", f"'{MAKERS[stage]}' makes it.")
        return source


def check_stage(stage: str) -> str:
    """Return `stage` if there is one of that name.

    Raises:
        UsageError: there is none; suggests the closest.
    """
    if stage not in STAGES:
        raise UsageError(f"unknown stage '{stage}'", suggest(stage, STAGES))
    return stage


# -- what an artefact was made from: with equal hashes, making it again would give the same ---------------------------


def surgery_inputs(settings: SurgerySettings, base_fingerprint: str) -> str:
    """Identify a surgery by the base model and the recursion's shape."""
    return combine("surgery", base_fingerprint, list(reaching(settings, SIDECAR).values()))


def train_inputs(
    settings: TrainSettings, mode: str, start_fingerprint: str, data_fingerprint: str, span: Any = None
) -> str:
    """Identify a training by the model it starts from, its data, and every setting that reaches the weights.

    Args:
        span: the layers that vanilla's adapters are on; see `Workspace.vanilla_span`.
    """
    kinds = [kind for kind, is_one in (("recursive", mode == "recursive"), ("lora", settings.phase == "b")) if is_one]
    values = reaching(settings, WEIGHTS, kinds)
    if mode == "vanilla":
        values |= {"phase": "b", "span": span} if settings.phase == "b" else {"phase": "c"}
    return combine("train", mode, start_fingerprint, data_fingerprint, values)


def eval_inputs(settings: EvalSettings, stage: str, model_fingerprint: str, data_fingerprint: str) -> str:
    """Identify an evaluation by the model, the data and every setting that reaches the numbers."""
    values = reaching(settings, NUMBERS)
    return combine("eval", stage, model_fingerprint, data_fingerprint, values, __version__)


def model_fingerprint(source: ModelSource, directory: Path) -> str:
    """Identify the weights of a stage: the folder's own, and the base's where it refers to one."""
    base = base_of(source, directory)
    return source.fingerprint() if base is source else combine(source.fingerprint(), base.fingerprint())


def recorded_inputs(path: Path) -> str | None:
    """Return the inputs that a results file or a checkpoint folder was made from, or None if it is not there."""
    file = path / METRICS_FILE if path.is_dir() else path
    if not file.is_file():
        return None
    try:
        return read_json(file, "rr run").get("inputs")
    except RRError:
        return None


def data_identity(settings: CommonSettings, directory: Path) -> str:
    """Identify the text, the tasks and the prompts that the settings name, by the bytes of their files."""
    files = [task_file(spec, directory) for spec in task_specs(settings) if is_file_task(spec)]
    if isinstance(settings, EvalSettings):
        files += [prompts_file(settings.prompts, directory)] if settings.prompts else []
        files += harness_files(settings.harness, directory)
    hashes = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    return combine(source_fingerprint(settings, directory), task_specs(settings), *([hashes] if hashes else []))


def provenance(settings: CommonSettings, directory: Path, device: str, dtype: str) -> dict[str, Any]:
    """Return what else a result depends on: versions, device, dtype, seed, and the git commit where there is one."""
    import platform
    import subprocess
    from importlib.metadata import version

    packages = ("torch", "transformers", "accelerate", "peft", "safetensors", "reasoning-gym")
    try:
        commit = subprocess.run(
            ["git", "-C", str(directory), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = ""
    return {
        "rr": __version__,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "device": device,
        "dtype": dtype,
        "machine": f"{platform.system()} {platform.machine()}",
        "hardware": _hardware(device),
        "seed": settings.seed,
        "git_commit": commit or None,
    }


def _hardware(device: str) -> str:
    """Return the name of the GPU or CPU that computed."""
    import platform

    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    try:
        cpus = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # no Linux
        cpus = []
    names = (line.partition(":")[2].strip() for line in cpus if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
