"""Which stages of an experiment were measured, and their results with those of all seeds. Loads no torch."""

from __future__ import annotations

from collections.abc import Sequence

from rrcli.comparison.results import Stage, read_results
from rrcli.errors import RRError, UsageError, suggest
from rrcli.experiment.workspace import Workspace
from rrcli.settings import STAGES


def named_stages(names: Sequence[str], workspace: Workspace) -> list[str]:
    """Return the given names, or every stage that was measured if no name was given.

    Raises:
        RRError: no stage was measured. UsageError: a name is given twice.
    """
    names = list(names) or [stage for stage in STAGES if workspace.measured(stage)]
    if not names:
        raise RRError(
            f"{workspace.directory / workspace.settings.output_dir} holds no results", "'rr run' measures every stage."
        )
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UsageError(f"'{twice}' is named twice", "Name each stage or results file once.")
    return names


def read_stage(workspace: Workspace, name: str) -> Stage:
    """Read a stage with all its seeds, or the one results file that is named by its path.

    Raises:
        RRError: it was not measured, or its results cannot be read. UsageError: there is no such stage or file.
    """
    if name in STAGES:
        file, maker = workspace.results_file(name), f"rr eval --stage {name}"
        measured = workspace.measured(name)
        if not measured:
            raise RRError(f"stage '{name}' was not measured: {file} is not there", f"'{maker}' measures it.")
        files = [(workspace.results_file(one.name), maker + one.flag) for one in measured]
        return Stage(name, tuple(read_results(*each) for each in files))
    if "/" in name or name.endswith(".json"):
        file, maker = workspace.directory / name, "rr eval"
        if not file.exists():
            raise UsageError(f"the results file {file} does not exist", "'rr eval' writes one into eval_results/.")
        return Stage(name, (read_results(file, maker),))
    raise UsageError(f"unknown stage '{name}'", suggest(name, STAGES))
