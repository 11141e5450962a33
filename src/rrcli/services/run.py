"""`rr run`: the whole experiment. Runs what is missing or stale, skips what is done, continues where it stopped."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from rrcli.comparison.preservation import check_preserved, require_preserved
from rrcli.comparison.results import read_results
from rrcli.experiment.planning import DONE, IMPOSSIBLE, Load, Step, plan, status_of
from rrcli.experiment.replicates import Replicate
from rrcli.experiment.workspace import SURGERY_STAGE, Workspace
from rrcli.locks import holding, lock
from rrcli.reporting import Reporter
from rrcli.settings import CommonSettings


@holding
def run(
    held: ExitStack,
    directory: Path,
    load: Load,
    reporter: Reporter,
    *,
    perform: Callable[[Step], None],
    new_options: bool = False,
) -> list[Step]:
    """Perform every step that is not done, in order; return the plan as it was at the start.

    A control that is impossible is left out with a warning, and all else is done.

    Args:
        perform: does one step. The command line provides it, since services do not import one another.

    Raises:
        CheckFailed: surgery did not preserve the baseline; nothing is trained on it.
    """
    held.enter_context(lock(directory / "experiment", f"the experiment in {directory}"))
    planned = plan(directory, load, new_options=new_options)
    impossible: set[Replicate | None] = set()
    for number, step in enumerate(planned, start=1):
        if step.replicate in impossible:  # there is nothing to evaluate
            continue
        # Its status is looked up again: the steps before it may have changed what it is made from.
        now = step if step.kind == "setup" else status_of(step.kind, step.replicate, directory, load)
        if now.status == DONE:
            reporter.note(f"[{number}/{len(planned)}] {now.command}: done already")
        elif now.status == IMPOSSIBLE:
            reporter.warn(f"[{number}/{len(planned)}] {now.command} is left out: {now.detail}")
            impossible.add(now.replicate)
        else:
            reporter.note(f"[{number}/{len(planned)}] {now.command}{': ' + now.detail if now.detail else ''}")
            perform(now)
        if step.kind == "eval" and step.replicate is not None and step.replicate.stage == SURGERY_STAGE:
            _require_preserved(Workspace(directory, load(CommonSettings)))
    return planned


def _require_preserved(workspace: Workspace) -> None:
    after, base = (read_results(workspace.results_file(s), "rr run") for s in (SURGERY_STAGE, "baseline"))
    require_preserved(check_preserved(after, base))
