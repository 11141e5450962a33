"""What a notebook or a script asks of an experiment: its results, samples, training curves and comparisons.

All of it is read from the experiment's folder, as `rr compare` reads it, and comes as data frames of pandas. Nothing
here loads torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rrcli.comparison import measurements
from rrcli.comparison.comparison import Comparison
from rrcli.comparison.costs import with_costs
from rrcli.comparison.curves import read_curves
from rrcli.configuration import load
from rrcli.errors import RRError, UsageError, suggest
from rrcli.experiment.measured import named_stages, read_stage
from rrcli.experiment.workspace import Workspace
from rrcli.services import compare as service
from rrcli.settings import CompareSettings

if TYPE_CHECKING:
    from pandas import DataFrame

Folder = str | PathLike[str]


def results(directory: Folder = ".", stages: Sequence[str] = ()) -> DataFrame:
    """Return every number of an experiment: a row for each metric of each stage and seed, at each depth.

    Costs are those that `rr costs` measured in turns, where it did.

    Args:
        directory: the experiment's folder. stages: names of stages, or paths of results files; all stages if empty.

    Returns:
        Columns stage, seed, metric, label, unit, better, depth, exit, final, value, low, high, n; where `final` is true
        the row is the stage's own value, as in the table of `rr compare`.

    Raises:
        RRError: no results, or some that cannot be read. UsageError: an unknown stage.
    """
    workspace = _workspace(directory)
    measured = {name: read_stage(workspace, name) for name in named_stages(_listed(stages), workspace)}
    return measurements.results_frame(with_costs(measured, workspace.costs_file)[0])


def samples(directory: Folder, stage: str, part: str = "", *, depth: int | None = None) -> DataFrame:
    """Return what a stage was measured on: a row for each document, problem, generation, and sample of lm-eval.

    Args:
        stage: its name, or the path of a results file.
        part: 'documents', 'problems', 'generations' or 'harness'; '' for all, in one frame with the columns of all.
        depth: of documents and problems; None for the stage's own, with its exit.

    Raises:
        RRError: no results, or no such records. UsageError: an unknown stage or part, or a depth that was not measured.
    """
    return measurements.samples_frame(stage, read_stage(_workspace(directory), stage), part, depth)


def curves(directory: Folder = ".", runs: Sequence[str] = (), tags: Sequence[str] = ()) -> DataFrame:
    """Return the scalars that trainings and evaluations logged: a row (run, tag, step, value) for each point.

    Args:
        runs: names of runs; all that the log folder holds if empty. tags: such as 'train/loss/total'; all if empty.

    Raises:
        RRError: nothing was logged. UsageError: an unknown run or tag.
    """
    logs = _workspace(directory).log_folder()
    known = sorted({str(file.parent.relative_to(logs)) for file in logs.rglob("events.out.tfevents.*")})
    if not known:
        raise RRError(f"{logs} holds no logs", "'rr train' and 'rr eval' write them.")
    for run in _listed(runs):
        if run not in known:
            raise UsageError(f"there is no run '{run}' in {logs}", suggest(run, known))
    found = read_curves(logs, _listed(runs) or known, _listed(tags) or None, points=0)
    for tag in _listed(tags):
        if tag not in found:
            raise UsageError(f"no run logged '{tag}'", suggest(tag, read_curves(logs, known, None)))
    return measurements.curves_frame(found)


def compare(directory: Folder = ".", stages: Sequence[str] = (), **options: Any) -> Comparison:
    """Compare stages with the first of them, as `rr compare` does.

    The comparison is shown as a table in a notebook; `to_frame()` gives its numbers, `sentences` and `warnings` what
    they mean.

    Args:
        stages: names of stages, or paths of results files; all stages if empty.
        options: those of `[compare]` in rr.toml, for example `alpha=0.01` or `gate=["baseline.perplexity < 3"]`.

    Raises:
        RRError: no results, or some that cannot be read. UsageError: an unknown stage or option, or a claim or a gate
            that cannot be read.
    """
    unknown = next((name for name in options if name not in CompareSettings.__dataclass_fields__), None)
    if unknown is not None:
        raise UsageError(f"unknown option '{unknown}'", suggest(unknown, CompareSettings.__dataclass_fields__))
    folder = _folder(directory)
    return service.compare(load(CompareSettings, folder, options), _listed(stages), folder)


def _workspace(directory: Folder) -> Workspace:
    folder = _folder(directory)
    return Workspace(folder, load(CompareSettings, folder))


def _folder(directory: Folder) -> Path:
    folder = Path(directory).expanduser().resolve()
    if not folder.is_dir():
        raise UsageError(f"the directory {folder} does not exist", "Name the folder of an experiment.")
    return folder


def _listed(names: Sequence[str]) -> list[str]:
    """Return names as a list; a single text is one name."""
    return [names] if isinstance(names, str) else list(names)
