"""The commands. Each parses, loads its settings, calls one service, and shows what it returned.

Options are declared once, in `settings`; `_command` turns a settings class into the command's flags.
"""

from __future__ import annotations

import inspect
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperGroup

from rrcli import __version__, settings, ui
from rrcli.errors import CheckFailed, Interrupted, RRError, UsageError, suggest
from rrcli.files import make_folder
from rrcli.settings import STAGES
from rrcli.training.launching import speaks

FILES, OUTPUT = settings.FILES, settings.OUTPUT
STAGE_HELP = f"Stage: {', '.join(STAGES)}."


class Commands(TyperGroup):
    """Turns our errors into an `error:` and a `hint:` line and an exit code, also for names that are not known."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command; SIGTERM ends it as Ctrl-C does, so that what it was writing is cleaned up."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            return super().invoke(ctx)
        except RRError as error:
            if os.environ.get("RR_DEBUG"):
                raise
            if speaks(on_this_machine=True):
                ui.show_error(error)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            ui.show_error(
                Interrupted(
                    "by the user", "What was published stays; the same command goes on, or begins its last part anew."
                )
            )
            raise typer.Exit(Interrupted.exit_code) from None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find a command by its name."""
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            error = UsageError(f"unknown command '{args[0]}'", suggest(args[0], self.commands))
            ui.show_error(error)
            raise typer.Exit(error.exit_code)
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=Commands,
    name="rr",
    help="Give a language model a second thought, and find out honestly whether it helped.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.", rich_help_panel=OUTPUT)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.", rich_help_panel=FILES)]
Stage = Annotated[str, typer.Option("--stage", help=STAGE_HELP)]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"rr {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Accept the options that stand before a command."""


def _command(
    cls: type[settings.CommonSettings], panel: str, *, writes: bool = False
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a command of a function `f(ctx, **own options)`; every option of `cls` becomes a flag beside its own.

    Args:
        writes: whether it makes what it works in: then `--dir` may name a folder that is not there yet.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
        types = get_type_hints(cls)
        flags = [_flag(item, types[item.name]) for item in fields(cls) if item.name not in {p.name for p in own}]
        help_text = "Working directory" + ("; made if it is not there." if writes else ".")
        directory = inspect.Parameter(
            "dir", inspect.Parameter.KEYWORD_ONLY, default=Path("."),
            annotation=Annotated[Path, typer.Option("--dir", help=help_text, rich_help_panel=FILES)],
        )  # fmt: skip
        debug = inspect.Parameter(
            "debug", inspect.Parameter.KEYWORD_ONLY, default=False,
            annotation=Annotated[bool, typer.Option("--debug", help="Show tracebacks.", rich_help_panel=OUTPUT)],
        )  # fmt: skip

        def call(**values: Any) -> None:
            if values.pop("debug"):
                os.environ["RR_DEBUG"] = "1"
            flagged = {flag.name: values.pop(flag.name) for flag in flags}
            context = Context(values.pop("dir").resolve(), cls, flagged)
            if writes and not values.get("dry_run"):
                make_folder(context.directory)
            elif not writes and not context.directory.is_dir():
                raise UsageError(f"the directory {context.directory} does not exist", "'rr setup --dir' makes it.")
            function(context, **values)

        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + [*flags, directory, debug]
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {p.name: p.annotation for p in parameters}
        call.__doc__ = function.__doc__
        app.command(function.__name__, rich_help_panel=panel)(call)
        return function

    return register


def _flag(item: Any, kind: Any) -> inspect.Parameter:
    name = "--" + item.name.replace("_", "-")
    default = item.default
    if isinstance(default, tuple):
        default = "; ".join(default).replace("\n", "\\n")
    shown = f" [default: {default}]" if default not in ("", ()) and kind is not bool else ""
    choices = item.metadata["choices"]
    text = item.metadata["help"] + (f" One of {', '.join(choices)}." if choices else "") + shown
    text = text.replace("[", r"\[")  # help is rich markup
    names = [f"{name}/--no-{name[2:]}"] if kind is bool else [name, *item.metadata["aliases"]]
    annotation = list[str] | None if kind == tuple[str, ...] else kind | None
    option = typer.Option(*names, help=text, rich_help_panel=item.metadata["panel"], show_default=False)
    return inspect.Parameter(
        item.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[annotation, option]
    )


class Context:
    """One call of a command: where it works, and the flags that were given."""

    def __init__(self, directory: Path, cls: type[settings.CommonSettings], flags: dict[str, Any]) -> None:
        self.directory, self.cls = directory, cls
        self.flags = {key: tuple(v) if isinstance(v, list) else v for key, v in flags.items() if v not in (None, [])}

    def load(self, cls: type[settings.S], *, use_file: bool = True) -> settings.S:
        """Return the settings of a command from rr.toml, the environment and the flags."""
        return settings.load(cls, self.directory, self.flags, use_file=use_file)


# -- the commands ------------------------------------------------------------------------------------------------------

EXPERIMENT, LOOK = "The experiment", "Look at it"


@_command(settings.SetupSettings, EXPERIMENT, writes=True)
def setup(ctx: Context, overwrite: Overwrite = False, json: Json = False) -> None:
    """Create folders and rr.toml, and check that everything is there."""
    from rrcli.services import setup as service

    loaded = ctx.load(settings.SetupSettings, use_file=not overwrite)
    result = service.setup(loaded, ctx.directory, ctx.flags, _reporter(), overwrite=overwrite)
    if json:
        ui.show_json("setup", {"ok": result.ok, "checks": [vars(check) for check in result.checks]})
    else:
        ui.show_setup(result)
    failed = [check.name for check in result.checks if not check.ok]
    if failed:
        raise CheckFailed(f"failed: {', '.join(failed)}", "Correct what the table says, then run 'rr setup' again.")
    if not json:
        ui.show_next("Settings:", result.settings_file, "rr eval --stage baseline   (or 'rr run' for everything)")


@_command(settings.SurgerySettings, EXPERIMENT, writes=True)
def surgery(
    ctx: Context,
    overwrite: Overwrite = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write nothing.")] = False,
    verify: Annotated[
        bool,
        typer.Option(help="Prove on probe prompts that no logit changed; without, the weights are not even loaded."),
    ] = True,
    hash: Annotated[
        bool, typer.Option("--hash", help="Record the SHA-256 of every weight file of the base: reads them whole.")
    ] = False,
    export: Annotated[
        Path | None,
        typer.Option(
            "--export", help="Also make this folder, which stands alone: base (hard links), tokenizer and sidecar.",
            rich_help_panel=FILES, show_default=False,
        ),
    ] = None,
    json: Json = False,
) -> None:  # fmt: skip
    """Attach a zero-initialised recursion to the base model, and prove that nothing changed."""
    from rrcli.services import surgery as service

    result = service.surgery(
        ctx.load(settings.SurgerySettings), ctx.directory, _reporter(),
        overwrite=overwrite, dry_run=dry_run, verify=verify, hash_weights=hash, export=export,
    )  # fmt: skip
    if json:
        ui.show_json("surgery", asdict(result))
        return
    ui.show_surgery(result)
    if result.export:
        ui.show_export(result.export)
    if result.folder:
        ui.show_next("Sidecar:", result.folder, "rr eval --stage after_surgery")


@_command(settings.TrainSettings, EXPERIMENT, writes=True)
def train(
    ctx: Context,
    mode: Annotated[str, typer.Option("--mode", help="vanilla or recursive.")] = "recursive",
    restart: Annotated[bool, typer.Option("--restart", help="Drop the run's checkpoints and begin anew.")] = False,
    match_flops: Annotated[
        str, typer.Option("--match-flops", help="Train vanilla to the FLOPs that this run (its name) spent.")
    ] = "",
    json: Json = False,
) -> None:
    """Fine-tune, with recursion or without; goes on from the last checkpoint."""
    from rrcli.services import train as service

    loaded = ctx.load(settings.TrainSettings)
    result = service.train(loaded, mode, ctx.directory, _reporter(), restart=restart, match_flops=match_flops)
    if not speaks():
        return
    if json:
        ui.show_json("train", vars(result))
        return
    ui.show_train(result)
    standard = result.run in STAGES
    command = f"rr eval --stage finetuned_{mode}" + ("" if standard else f" --model {result.checkpoint}")
    ui.show_next("Checkpoint:", result.checkpoint, command)


@_command(settings.EvalSettings, EXPERIMENT, writes=True)
def eval(
    ctx: Context,
    stage: Stage = "baseline",
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "--model-path", "--model-name",
            help="Measure this model as the stage.  \\[default: the stage's own]",
            rich_help_panel=settings.MODEL, show_default=False,
        ),
    ] = None,
    use_recursive: Annotated[
        bool | None,
        typer.Option("--use-recursive/--no-use-recursive", help="With or without recursion. \\[default: as the stage]",
                     show_default=False),
    ] = None,
    json: Json = False,
) -> None:  # fmt: skip
    """Measure a stage: perplexity, accuracy, reasoning, generations, speed."""
    from rrcli.comparison.preservation import require
    from rrcli.services import eval as service

    result = service.evaluate(
        ctx.load(settings.EvalSettings), stage, ctx.directory, _reporter(), model=model, use_recursive=use_recursive
    )
    if json:
        ui.show_json("evaluation", {key: value for key, value in result.results.items() if key != "schema"})
    else:
        ui.show_eval(result)
    require(result.preserved)
    if json:
        return
    following = STAGES.index(stage) + 1
    command = f"rr compare baseline {stage}" if following > 1 else "rr surgery"
    ui.show_next("Results:", result.file, command)


@_command(settings.CompareSettings, LOOK)
def compare(
    ctx: Context,
    stages: Annotated[
        list[str] | None, typer.Argument(help="Stages or results files; the first is the reference. \\[default: all]")
    ] = None,
    json: Json = False,
) -> None:
    """Put stages side by side: what is shown, what is noise, what it cost."""
    from rrcli.services import compare as service

    loaded = ctx.load(settings.CompareSettings)
    _show_comparison(service.compare(loaded, stages or [], ctx.directory), loaded, ctx.directory, json)


@_command(settings.GenerateSettings, LOOK)
def generate(
    ctx: Context,
    prompt: Annotated[str, typer.Argument(help="Text to go on with; - reads standard input.")],
    stage: Annotated[str | None, typer.Option("--stage", help=f"{STAGE_HELP} \\[default: the last one made]")] = None,
    trace: Annotated[
        bool, typer.Option("--trace", help="Colour tokens by their passes; underline what a refine pass changed.")
    ] = False,
    json: Json = False,
) -> None:
    """Go on with a prompt; with recursion by drafting, refining and committing chunks."""
    from rrcli.services import generate as service

    text = typer.get_text_stream("stdin").read().rstrip("\n") if prompt == "-" else prompt
    emit = (lambda piece: None) if json else ui.PieceWriter(text, trace=trace)
    result = service.generate(ctx.load(settings.GenerateSettings), text, ctx.directory, emit, stage=stage)
    if json:
        ui.show_json("generation", result.to_dict())
        return
    ui.show_generation(result, trace=trace)


@_command(settings.BoardSettings, LOOK)
def board(
    ctx: Context,
    check: Annotated[
        bool, typer.Option("--check", help="Only print the runs and tags that TensorBoard finds, and exit.")
    ] = False,
    json: Json = False,
) -> None:
    """Open TensorBoard on the logs."""
    from rrcli.services import board as service

    if check:
        found = service.check(ctx.load(settings.BoardSettings), ctx.directory)
        if json:
            ui.show_json("board_check", vars(found))
        else:
            ui.show_board_check(found)
        return
    started = (lambda board: ui.show_json("board", vars(board))) if json else ui.show_board
    service.board(ctx.load(settings.BoardSettings), ctx.directory, _reporter(), started)


@_command(settings.SetupSettings, EXPERIMENT, writes=True)
def run(
    ctx: Context,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and do nothing.")] = False,
    json: Json = False,
) -> None:
    """Run the whole experiment: every stage that is missing or out of date, then the comparison."""
    from rrcli.experiment.planning import plan
    from rrcli.services import compare as comparing
    from rrcli.services import run as service

    if dry_run:
        steps = plan(ctx.directory, ctx.load, new_options=bool(ctx.flags))
        if json:
            ui.show_json("plan", {"steps": [vars(step) | {"command": step.command} for step in steps]})
        else:
            ui.show_plan(steps)
        return
    service.run(ctx.directory, ctx.load, _reporter(), lambda step: _perform(step, ctx), new_options=bool(ctx.flags))
    loaded = ctx.load(settings.CompareSettings)
    result = comparing.compare(loaded, [], ctx.directory)
    _show_comparison(result, loaded, ctx.directory, json)
    if json:
        return
    ui.show_next("Results:", ctx.directory / ctx.load(settings.SetupSettings).output_dir, "rr board")


@_command(settings.SetupSettings, LOOK)
def status(ctx: Context, json: Json = False) -> None:
    """Show what is done, stale or missing, and which command comes next."""
    from rrcli.services import status as service

    found = service.status(ctx.directory, ctx.load)
    if json:
        ui.show_json("status", asdict(found))
    else:
        ui.show_status(found)


def _show_comparison(result: Any, chosen: settings.CompareSettings, directory: Path, json: bool) -> None:
    """Show a comparison in the form that was asked for, or write it to a file; then fail if a gate does not hold."""
    from rrcli.comparison.gates import require
    from rrcli.files import write_text

    form = "json" if json else chosen.format
    if form == "auto":
        form = {".json": "json", ".csv": "csv", ".md": "markdown"}.get(Path(chosen.out).suffix, "table")
    if chosen.generations and form == "csv":
        raise UsageError("--generations and --format csv do not go together", "Take table, json or markdown.")
    if chosen.out:
        file = directory / Path(chosen.out).expanduser()
        write_text(file, ui.comparison_text(result, form))
        ui.TerminalReporter().note(f"Comparison: {file}")
    elif form == "table":
        ui.show_comparison(result)
    else:
        typer.echo(ui.comparison_text(result, form), nl=False)
    if chosen.report:
        from rrcli.comparison.report import render
        from rrcli.experiment.workspace import Workspace

        page = directory / Path(chosen.report).expanduser()
        write_text(page, render(result, Workspace(directory, chosen).log_folder()))
        ui.TerminalReporter().note(f"Report: {page}")
    if result.broken_surgery:
        raise CheckFailed(
            "surgery did not preserve the baseline, so nothing is said about recursion",
            "'rr setup' checks the installation; 'rr surgery --overwrite' and 'rr eval' make the stages anew.",
        )
    require(result.gates)


def _perform(step: Any, ctx: Context) -> None:
    """Do one step of `rr run`."""
    from rrcli.services import eval as evaluating
    from rrcli.services import setup as setting_up
    from rrcli.services import surgery as operating
    from rrcli.services import train as training

    directory, reporter = ctx.directory, _reporter()
    if step.kind == "setup":
        result = setting_up.setup(ctx.load(settings.SetupSettings), directory, ctx.flags, reporter)
        if not result.ok:
            ui.show_setup(result)
            raise CheckFailed("the setup checks failed", "Correct what the table says, then run 'rr run' again.")
    elif step.kind == "surgery":
        operating.surgery(ctx.load(settings.SurgerySettings), directory, reporter, overwrite=True)
    elif step.kind == "train":
        restart = step.status == "stale"
        training.train(ctx.load(settings.TrainSettings), step.target, directory, reporter, restart=restart)
    else:
        evaluating.evaluate(ctx.load(settings.EvalSettings), step.target, directory, reporter)


def _reporter() -> ui.TerminalReporter:
    return ui.TerminalReporter()
