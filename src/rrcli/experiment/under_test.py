"""The model that a command measures: found, locked, and loaded; the same for every command that measures one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rrcli.experiment.replicates import Replicate
from rrcli.experiment.template_date import fix_date, with_template_date
from rrcli.experiment.workspace import Workspace, check_stage
from rrcli.locks import lock, reading
from rrcli.models.loading import load_for
from rrcli.models.source import ModelSource
from rrcli.reporting import Reporter
from rrcli.settings import EvalSettings, with_changes
from rrcli.training.processes import Processes


@dataclass(frozen=True)
class UnderTest:
    """The model of a stage, or another one in its place, as far as it is known before it is loaded.

    Attributes:
        settings: with the experiment's day, if a chat template asks for one.
        replicate: the stage and the seed that is meant. file: what is to be written about it, which is locked.
        processes: those that measure it; one of them writes.
    """

    workspace: Workspace
    settings: EvalSettings
    replicate: Replicate
    source: ModelSource
    file: Path
    processes: Processes

    def load(self, reporter: Reporter) -> tuple[Any, Any]:
        """Return the model and its tokenizer."""
        placed = with_changes(self.settings, device=self.processes.device)
        model, tokenizer = load_for(placed, self.source, self.workspace.directory, reporter)
        fix_date(tokenizer, self.settings.template_date)
        return model, tokenizer


def put_under_test(
    held: ExitStack,
    settings: EvalSettings,
    stage: str,
    directory: Path,
    *,
    processes: Processes,
    model: str | None,
    file: Callable[[Workspace, str], Path],
    what: str,
) -> UnderTest:
    """Find the model to measure, and lock what is to be written about it until `held` ends.

    Args:
        processes: those that measure it. model: a model to measure instead of the stage's own.
        file: gives the file that is written, from the name of the replicate. what: its name in the message that
            another command is writing it.

    Raises:
        RRError: the stage has no model, or another command is measuring it. UsageError: no such stage or model.
    """
    check_stage(stage)
    workspace = Workspace(directory, settings)
    replicate = workspace.replicate(stage)
    source = held.enter_context(reading(lambda: workspace.resolve(model) if model else workspace.stage_model(stage)))
    path = file(workspace, replicate.name)
    processes.on_main(lambda: held.enter_context(lock(path, f"{what} '{replicate.name}'")))
    settings = processes.decided(partial(with_template_date, settings, source, directory))
    return UnderTest(workspace, settings, replicate, source, path, processes)
