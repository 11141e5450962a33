"""How `rr run` performs its steps: in this process, by a launcher, or as a job of SLURM."""

from __future__ import annotations

import shlex
from typing import Any

import typer

from rrcli import settings
from rrcli.cli.options import Context
from rrcli.errors import CheckFailed, RRError, UsageError
from rrcli.settings import CommonSettings
from rrcli.ui.console import TerminalReporter, show_json, show_next
from rrcli.ui.results import show_setup


def in_a_job(ctx: Context, slurm: str, *, dry_run: bool, json: bool) -> None:
    """Submit `rr run` with the options of this call as a job of SLURM, or print its script."""
    from rrcli.models.placement import read_placement
    from rrcli.training.slurm import read_job, submit

    job = read_job(slurm)
    parallel = read_placement(ctx.load(settings.EvalSettings), ctx.directory).parallel
    if parallel is not None and parallel.processes != job.count:
        raise UsageError(
            f"--parallel {parallel} needs {parallel.processes} processes, --slurm has {job.count}",
            "There is one for each GPU of each node.",
        )
    script = job.script(ctx.arguments(), ctx.directory)
    number = "" if dry_run else submit(script, ctx.directory)
    log = str(ctx.directory / f"slurm-{number}.out") if number else ""
    if json:
        show_json("job", {"job": number, "log": log, "script": script})
    elif dry_run:
        typer.echo(script, nl=False)
    else:
        show_next(f"Job {number}:", log, "rr status")


def perform(step: Any, ctx: Context, launcher: str = "") -> None:
    """Do one step of `rr run`; trainings, evaluations and surgery by a launcher, if there is one."""
    if launcher and step.kind in ("surgery", "train", "exit", "eval"):
        _perform_elsewhere(step, ctx, launcher)
        return
    from rrcli.experiment.exits import choose_exit
    from rrcli.experiment.replicates import EQUAL_FLOPS_STAGE, RECURSIVE_STAGE, TRAINED
    from rrcli.services import costs as costing
    from rrcli.services import eval as evaluating
    from rrcli.services import setup as setting_up
    from rrcli.services import surgery as operating
    from rrcli.services import train as training

    directory, reporter = ctx.directory, TerminalReporter()
    if step.kind == "setup":
        result = setting_up.setup(ctx.load(CommonSettings), directory, reporter, given=ctx.given)
        if not result.ok:
            show_setup(result)
            raise CheckFailed("the setup checks failed", "Correct what the table says, then run 'rr run' again.")
    elif step.kind == "surgery":
        operating.surgery(ctx.load(settings.SurgerySettings), directory, reporter, overwrite=True)
    elif step.kind == "train":
        one = step.replicate
        train_settings = settings.with_changes(ctx.load(settings.TrainSettings), seed=one.seed)
        restart, matched = step.status == "stale", RECURSIVE_STAGE if one.stage == EQUAL_FLOPS_STAGE else ""
        training.train(train_settings, TRAINED[one.stage], directory, reporter, restart=restart, match_flops=matched)
    elif step.kind == "exit":
        loaded = settings.with_changes(ctx.load(settings.EvalSettings), seed=step.replicate.seed)
        reporter.note(choose_exit(loaded, step.replicate.stage, directory, reporter).sentence())
    elif step.kind == "costs":
        costing.costs(ctx.load(settings.CostsSettings), ctx.load(settings.EvalSettings), [], directory, reporter)
    else:
        # Costs are measured at the end, of all stages in turns.
        changes = {"seed": step.replicate.seed, "skip_performance": True}
        measuring = settings.with_changes(ctx.load(settings.EvalSettings), **changes)
        evaluating.evaluate(measuring, step.replicate.stage, directory, reporter)


def _perform_elsewhere(step: Any, ctx: Context, launcher: str) -> None:
    from rrcli.experiment.planning import DONE, status_of
    from rrcli.training.launching import launch_elsewhere

    more = {"surgery": ["--overwrite"], "eval": ["--skip-performance"]}.get(step.kind, [])
    more += ["--restart"] * (step.kind == "train" and step.status == "stale")
    arguments = [*shlex.split(step.command)[1:], *more, "--dir", str(ctx.directory)]
    code = launch_elsewhere(launcher, arguments, ctx.directory)
    # Launchers have exit codes of their own: what counts is the result.
    if code and status_of(step.kind, step.replicate, ctx.directory, ctx.load).status != DONE:
        raise RRError(f"'{step.command}' ended with exit code {code}", "What was wrong stands above.")
