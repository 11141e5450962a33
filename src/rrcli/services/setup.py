"""`rr setup`: create the folders and `rr.toml`, and check that an experiment has everything that it needs."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import filterfalse
from pathlib import Path
from typing import Any

import psutil

from rrcli.configuration import SETTINGS_FILE, load, read_file, write_file
from rrcli.data.corpus import refuse_stdin
from rrcli.data.problem_files import open_task
from rrcli.data.problem_rows import is_file_task
from rrcli.data.training_data import task_specs
from rrcli.demo import defaults
from rrcli.errors import RRError, UsageError
from rrcli.evaluation.held_out import held_out_data, problems_of
from rrcli.experiment.planning import has_equal_flops
from rrcli.experiment.replicates import refuse_one_seed
from rrcli.experiment.workspace import Workspace
from rrcli.files import back_up, make_folder, write_text
from rrcli.locks import holding, lock
from rrcli.models.config import load_config
from rrcli.models.loading import load_tokenizer, pick_device
from rrcli.other_trackers import check_trackers
from rrcli.reporting import Reporter
from rrcli.settings import CommonSettings, EvalSettings

PACKAGES = ("torch", "transformers", "accelerate", "peft", "tensorboard", "safetensors", "reasoning-gym")


@dataclass(frozen=True)
class Check:
    """The result of one check."""

    name: str
    ok: bool
    found: str
    hint: str = ""


@dataclass(frozen=True)
class SetupResult:
    """The checks, and the file that holds the settings."""

    checks: list[Check]
    settings_file: Path

    @property
    def ok(self) -> bool:
        """Whether every check holds."""
        return all(check.ok for check in self.checks)


@holding
def setup(
    held: ExitStack,
    settings: CommonSettings,
    directory: Path,
    reporter: Reporter,
    *,
    given: Mapping[str, Mapping[str, Any]],
    overwrite: bool = False,
) -> SetupResult:
    """Create folders and `rr.toml`, then check versions, device, disk, memory, TensorBoard, model, data and tasks.

    Args:
        given: section -> option -> value, as given on the command line; they are written into `rr.toml`.
        overwrite: write a new `rr.toml` instead of keeping the values of an existing one.
    """
    refuse_stdin(settings, "setup")
    check_trackers(settings.tracker)
    refuse_one_seed(settings, "rr.toml is for all of them")
    held.enter_context(lock(directory / SETTINGS_FILE, str(directory / SETTINGS_FILE)))
    workspace = Workspace(directory, settings)
    for folder in (settings.log_dir, settings.checkpoint_dir, settings.output_dir):
        make_folder(directory / folder)
    file = _write_settings(directory, given, overwrite)
    checks: list[Check] = []
    looks: tuple[tuple[str, Callable[[], str]], ...] = (
        ("versions", _versions),
        ("self-test", lambda: _self_test(reporter)),
        ("device", lambda: _device(settings)),
        ("memory", _memory),
        ("disk", lambda: _disk(directory)),
        ("tensorboard", _tensorboard),
        ("model", lambda: _model(workspace)),
        ("tokenizer", lambda: _tokenizer(workspace)),
        ("data", lambda: _data(settings, directory)),
    )
    with reporter.progress("checks", len(looks), "checks") as progress:
        for name, look in looks:
            try:
                checks.append(Check(name, True, look()))
            except RRError as error:
                checks.append(Check(name, False, error.message, error.hint))
            progress.advance(note=name)
    return SetupResult(checks, file)


def _write_settings(directory: Path, given: Mapping[str, Mapping[str, Any]], overwrite: bool) -> Path:
    path = directory / SETTINGS_FILE
    before = None if overwrite or not path.exists() else path.read_text(encoding="utf-8")
    if before is not None and not given:
        return path
    common, sections = given.get("common", {}), {name: v for name, v in given.items() if name != "common"}
    # The file gets what was given on the command line; what the environment says is for this shell alone.
    chosen = load(CommonSettings, directory, common, environment={}, use_file=not overwrite)
    changes: dict[str, Mapping[str, Any]] = {}
    if before is not None:
        changes |= {name: values for name, values in read_file(directory).items() if name != "common"}
    elif common.get("model", "default") == "default":
        changes |= defaults.SETTINGS
        changes["compare"] = {"primary": defaults.claims(equal_flops=has_equal_flops(chosen))}
    changes |= {name: {**changes.get(name, {}), **values} for name, values in sections.items()}
    text = write_file(chosen, changes)
    if text == before:
        return path
    back_up(path)
    write_text(path, text)
    return path


def _versions() -> str:
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name).partition('+')[0]}")
        except PackageNotFoundError:
            raise RRError(f"{name} is not installed", "Install rrcli again.") from None
    return f"Python {sys.version.split()[0]}, " + ", ".join(found)


def _self_test(reporter: Reporter) -> str:
    from rrcli.recursion.selftest import self_test
    from rrcli.upstream import untested

    strange = f"not tested with {', '.join(untested())}" if untested() else ""
    try:
        found = self_test()
    except Exception as error:
        # Another version of a library may raise anything: to find that is what the test is for.
        said = error.message if isinstance(error, RRError) else f"{type(error).__name__}: {error}"
        hint = "Install the versions that rr was tested with: 'pipx reinstall rrcli', or 'pip install' it again."
        raise RRError(f"{said}{f' ({strange})' if strange else ''}", hint) from error
    if strange:
        reporter.warn(f"rr was {strange}; the self-test found: {found}")
    return f"{found}{f'; {strange}' if strange else ''}"


def _device(settings: CommonSettings) -> str:
    import torch

    device = pick_device(settings.device)
    if device.startswith("cuda"):
        return f"{device}: {torch.cuda.get_device_name(device)}"
    return f"{device}, {torch.get_num_threads()} threads"


def _memory() -> str:
    memory = psutil.virtual_memory()
    return f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free"


def _disk(directory: Path) -> str:
    free = shutil.disk_usage(directory).free
    if free < 2**30:
        raise RRError(f"{free / 2**20:.0f} MiB free", "Checkpoints need space; make at least 1 GiB.")
    return f"{free / 2**30:.1f} GiB free"


def _tensorboard() -> str:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from rrcli.tracker import MetricsTracker

    problems: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        with MetricsTracker(folder, warn=problems.append) as tracker:
            tracker.log_scalar("setup/check", 0.5, 1)
        if problems:
            raise RRError(
                problems[0], "Free some space if the disk is full; TMPDIR names another folder for this check."
            )
        events = EventAccumulator(folder).Reload()
        if [event.value for event in events.Scalars("setup/check")] != [0.5]:
            raise RRError("an event was written but not read back", "Install tensorboard again.")
    return "an event was written and read back"


def _model(workspace: Workspace) -> str:
    from rrcli.recursion.facts import described

    source = workspace.base()
    config = load_config(source, trust_remote_code=workspace.settings.trust_remote_code)
    return f"{source.name}: {described(config)}"


def _tokenizer(workspace: Workspace) -> str:
    tokenizer = load_tokenizer(workspace.base(), trust_remote_code=workspace.settings.trust_remote_code)
    template = getattr(tokenizer, "chat_template", None)
    chat = "with a chat template" if template else "without a chat template"
    if isinstance(template, dict) and "default" not in template:
        chat = f"with chat templates of which none is the default ({', '.join(sorted(template))})"
    return f"{len(tokenizer):,} tokens, {chat}"


def _data(settings: CommonSettings, directory: Path) -> str:
    data = held_out_data(settings, directory, problems_per_task=1)
    names = ", ".join(task.name for task in data.tasks)
    found = f"{len(data.documents):,} test documents; tasks {names}"
    return "\n".join(filter(None, [found, data.notice, _too_few(settings, directory)]))


def _too_few(settings: CommonSettings, directory: Path) -> str:
    """Say whether a generator has too few problems for the evaluations of all seeds; '' if it has enough.

    That is no failure: fewer problems can be asked for. The embedded tasks have enough for a single seed.
    """
    evaluation = load(EvalSettings, directory)
    if evaluation.skip_reasoning or not (settings.task or len(settings.all_seeds) > 1):
        return ""
    try:
        for spec in filterfalse(is_file_task, task_specs(settings)):
            problems_of(open_task(spec, directory), evaluation.problems, settings.all_seeds, "test")
    except UsageError as error:
        return f"{error.message}. {error.hint}".strip()
    return ""
