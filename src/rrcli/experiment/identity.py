"""Identify what a result was made from by a hash: if the hash is equal, making the result again would give the same.

Models and data are identified by their content. Options count by their values, and only those that reach the result:
each option declares that in `settings`. Loads no torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from rrcli import __version__
from rrcli.data.problem_files import task_fingerprints
from rrcli.data.problem_rows import is_file_task
from rrcli.data.prompts import prompts_file
from rrcli.data.splits import SPLIT_RULE
from rrcli.data.training_data import source_fingerprint, task_specs
from rrcli.errors import RRError
from rrcli.evaluation.harness import task_files as harness_files
from rrcli.experiment.replicates import evaluated_seeds
from rrcli.experiment.template_date import template_date
from rrcli.files import METRICS_FILE, combine, read_json
from rrcli.models.inspection import stated_context
from rrcli.models.source import ModelSource, base_of
from rrcli.models.weights import written_since
from rrcli.schemas import CheckpointMetrics, ExitChoice, Inputs
from rrcli.settings import (
    EXIT,
    NUMBERS,
    SIDECAR,
    WEIGHTS,
    CommonSettings,
    EvalSettings,
    SurgerySettings,
    TrainSettings,
    reaching,
    with_changes,
)

# Settings with the length of an example, or of a window.
Windowed = TypeVar("Windowed", TrainSettings, EvalSettings)


def surgery_inputs(settings: SurgerySettings, base_fingerprint: str) -> str:
    """Identify a surgery by the base model and the recursion's shape."""
    return combine("surgery", base_fingerprint, list(reaching(settings, SIDECAR).values()))


def train_inputs(
    settings: TrainSettings,
    mode: str,
    start_fingerprint: str,
    data_fingerprint: str,
    *,
    span: Any = None,
    matched_flops: float = 0.0,
) -> str:
    """Identify a training by the model it starts from, its data, and every setting that reaches the weights.

    Args:
        span: the layers that have LoRA adapters in vanilla training; see `Workspace.vanilla_span`.
        matched_flops: what it is to spend, in FLOPs; 0 where the settings give its number of steps.
    """
    kinds = [kind for kind, is_one in (("recursive", mode == "recursive"), ("lora", settings.phase == "b")) if is_one]
    values = reaching(settings, WEIGHTS, kinds)
    if mode == "vanilla":
        values |= {"phase": "b", "span": span} if settings.phase == "b" else {"phase": "c"}
    inputs = combine("train", mode, start_fingerprint, data_fingerprint, values)
    return combine(inputs, "equal FLOPs", matched_flops) if matched_flops else inputs


def eval_inputs(settings: EvalSettings, stage: str, model_fingerprint: str, data_fingerprint: str) -> str:
    """Identify an evaluation by the model, the data, the seeds of its problems, and every setting that reaches numbers.

    What else the seed decides is drawn from the experiment's first seed, so that it is alike in all replicates.
    """
    values = reaching(settings, NUMBERS, ["sampled"] if settings.samples else [])
    values |= {"seed": settings.all_seeds[0], "seeds": evaluated_seeds(stage, settings)}
    return combine("eval", stage, model_fingerprint, data_fingerprint, values, __version__)


def exit_inputs(settings: EvalSettings, directory: Path) -> str:
    """Identify the choice of an exit by its data and every setting that reaches it; it lies in the checkpoint itself.

    Args:
        settings: with the seed of the training, whose validation problems are asked.
    """
    data = data_identity(with_changes(settings, prompts="", harness=()), directory)
    return combine("exit", data, reaching(settings, EXIT), __version__)


def costs_inputs(settings: EvalSettings, fingerprints: Mapping[str, str]) -> str:
    """Identify a measurement of costs by the models of its stages and how they are run.

    Args:
        fingerprints: stage -> that of its model (`model_fingerprint`).
    """
    return combine(
        *("costs", settings.device, settings.dtype, settings.depth, settings.exit),
        *(sorted(fingerprints.items()), __version__),
    )


def within_context(settings: Windowed, source: ModelSource, directory: Path) -> Windowed:
    """Return settings whose `max_length` is what is used of it: longer examples and windows are cut to the context."""
    context = stated_context(base_of(source, directory).path)
    return settings if context is None or settings.max_length <= context else with_changes(settings, max_length=context)


def model_fingerprint(source: ModelSource, directory: Path) -> str:
    """Identify the weights of a stage: the folder's own, and the base's where it refers to one."""
    base = base_of(source, directory)
    return source.fingerprint() if base is source else combine(source.fingerprint(), base.fingerprint())


def best_checkpoint(found: Sequence[Path], *, last: bool = False) -> Path:
    """Return the checkpoint with the lowest perplexity among those of a run; the last one if none was measured.

    Args:
        last: take the last one anyway.
    """
    marked = (path for path in found if read_json(path / METRICS_FILE, "rr train", CheckpointMetrics).get("best"))
    return found[-1] if last else next(marked, found[-1])


def recorded_steps(checkpoint: Path) -> int:
    """Return how many steps the training of a checkpoint is to have."""
    return read_json(checkpoint / METRICS_FILE, "rr train", CheckpointMetrics).get("steps", 0)


def recorded_exit(checkpoint: Path) -> ExitChoice | None:
    """Return the choice of the exit of a checkpoint; None if none was made."""
    file = checkpoint / METRICS_FILE
    return read_json(file, "rr train", CheckpointMetrics).get("exit") if file.is_file() else None


def recorded_seeds(results: Path) -> list[int]:
    """Return the seeds whose problems a results file was measured on; none where there is no file."""
    return _recorded(results).get("test_seeds", [])


def recorded_inputs(path: Path) -> str | None:
    """Return the inputs that a results file or a checkpoint folder was made from, or None if there is none."""
    return _recorded(path).get("inputs")


def rewritten(path: Path, *sources: Path) -> str:
    """Return a large weight file of `sources` that was written again after the result at `path`, or ''."""
    return written_since(_recorded(path).get("stamps"), *sources)


def _recorded(path: Path) -> Inputs:
    file = path / METRICS_FILE if path.is_dir() else path
    try:
        return read_json(file, "rr run", Inputs) if file.is_file() else {}
    except RRError:
        return {}


def data_identity(settings: CommonSettings, directory: Path) -> str:
    """Identify the text, the tasks and the prompts that the settings name, by the bytes of their files.

    The rule of the split belongs to them, and the day that a chat template writes, where there is one.
    """
    files: list[Path] = []
    if isinstance(settings, EvalSettings):
        files += [prompts_file(settings.prompts, directory)] if settings.prompts else []
        files += harness_files(settings.harness, directory)
    grading = isinstance(settings, EvalSettings)
    tasks = [task_fingerprints(s, directory, grading=grading) for s in task_specs(settings) if is_file_task(s)]
    hashes = [*chain(*tasks), *(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)]
    day = template_date(settings, directory)
    more = [part for part in (hashes, day) if part]
    return combine(SPLIT_RULE, source_fingerprint(settings, directory), task_specs(settings), *more)
