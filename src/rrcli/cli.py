"""The commands. Each reads its command line, loads its settings, calls one service, and shows the result.

Options are declared once, in `settings`; `_command` makes them the options of a command.
"""

from __future__ import annotations

import inspect
import os
import shlex
import signal
import threading
import time
from collections.abc import Callable, Collection, Sequence
from copy import copy
from dataclasses import Field, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from rrcli import __version__, configuration, settings, ui
from rrcli.errors import CheckFailed, Interrupted, RRError, UsageError, suggest
from rrcli.files import make_folder
from rrcli.settings import STAGES, CommonSettings
from rrcli.training.launching import speaks

FILES, OUTPUT = settings.FILES, settings.OUTPUT
STAGE_HELP = f"Stage: {', '.join(STAGES)}."
# The panels of `--help` from top to bottom; in `rr run` each command that it performs has one.
PANELS = (
    *settings.PANELS[:-2],
    *(f"Options of rr {cls.SECTION}" for cls in settings.PERFORMED),
    *settings.PANELS[-2:],
)
# Switch -> whether it is on by default. `--help` shows the half of a switch that changes its default.
SWITCHES = {item.name: item.default for cls in settings.SECTIONS for item in fields(cls) if item.type == "bool"}
# Groups of common options, for the commands that do not read all of them.
PLACEMENT = ("device", "dtype", "quantize", "parallel", "device_map", "max_memory")
LOADING = ("model", *PLACEMENT, "trust_remote_code", "seed", "checkpoint_dir")
LOGS = ("log_dir", "output_dir")
# How long a process that does not print an error waits for the one that does, in seconds: a launcher ends all processes
# once one has ended.
PATIENCE = 5.0
# Of the commands that hand a model on.
EXPORTING = ("trust_remote_code", "seed", "checkpoint_dir", "output_dir")
TEXT = ("data", "eval_data", "text_field", "on_bad_row", "template_date")
DATA = (*TEXT, "task")
# The options of `rr run` that decide what an experiment takes.
PLANNED = (
    *("model", "data", "eval_data", "text_field", "task", "dtype", "trust_remote_code", "seed", "seeds", "equal_flops"),
    *("span", "max_steps", "cell_width", "chunk_width", "phase", "steps", "batch_size", "train_max_length"),
    *(
        "train_max_steps",
        "lora_rank",
        "lora_experts",
        "ema",
        "gradient_accumulation",
        "gradient_checkpointing",
        "packing",
        "task_share",
    ),
    *("supervised_share", "eval_interval", "eval_samples"),
    *("problems", "max_samples", "samples", "eval_max_length", "max_new_tokens", "batch_tokens"),
    *("skip_perplexity", "skip_reasoning", "skip_performance"),
)
# Suffix of a file -> the form of a comparison; and those forms that hold its values alone, without its texts.
FORMS = {".json": "json", ".csv": "csv", ".md": "markdown", ".tex": "latex", ".parquet": "parquet"}
VALUES_ALONE = ("csv", "latex", "parquet")


class Commands(TyperGroup):
    """Show an `RRError` as an `error:` and a `hint:` line, and exit with its code; so too for unknown commands."""

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
            else:
                time.sleep(PATIENCE)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            ui.show_error(
                Interrupted("by the user", "Finished files are kept; run the same command again to continue from them.")
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
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what exists already.", rich_help_panel=FILES)]
Merge = Annotated[
    bool, typer.Option("--merge", help="Add the LoRA adapters of a model without recursion to its weights.")
]
Exportable = Annotated[
    str, typer.Argument(metavar="RUN", help="Stage, name of a run, folder of a checkpoint, or export.")
]
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


@dataclass(frozen=True)
class Flag:
    """An option of a command that `settings` declares.

    Attributes:
        name: its name in this command. item: its declaration. kind: its type.
        sections: the sections of `rr.toml` that it belongs to. panel: where `--help` shows it.
    """

    name: str
    item: Field[Any]
    kind: Any
    sections: tuple[str, ...]
    panel: str

    def parameter(self) -> inspect.Parameter:
        """Return the annotated parameter of a function that typer makes an option of."""
        metadata, default, written = self.item.metadata, self.item.default, settings.flag_name(self.name)
        if isinstance(default, tuple):
            default = "; ".join(default).replace("\n", "\\n")
        shown = f" [default: {default}]" if default not in ("", ()) and self.kind is not bool else ""
        text = metadata["help"]
        if len(self.sections) > 1:
            text += f" For {' and '.join(f'rr {section}' for section in self.sections)}."
        names = [f"{written}/--no-{written[2:]}"] if self.kind is bool else [written, *metadata["aliases"]]
        kind = str if self.kind == tuple[int, ...] else self.kind
        annotation = list[str] | None if kind == tuple[str, ...] else kind | None
        option = typer.Option(
            *names,
            help=(text + shown).replace("[", r"\["),  # help is rich markup
            rich_help_panel=self.panel,
            show_default=False,
        )
        return _parameter(self.name, None, Annotated[annotation, option])


def _flags(cls: type[CommonSettings], common: Collection[str] | None) -> list[Flag]:
    """Return the options of a command: those of its section, then the common ones named (None = all)."""
    types = get_type_hints(cls)
    own = [] if cls is CommonSettings else settings.own_fields(cls)
    flags = [Flag(item.name, item, types[item.name], (cls.SECTION,), item.metadata["panel"]) for item in own]
    for item in fields(CommonSettings):
        if common is None or item.name in common:
            flags.append(Flag(item.name, item, types[item.name], ("common",), item.metadata["panel"]))
    return flags


def _run_flags() -> list[Flag]:
    """Return the options of `rr run`: those of the commands that it performs, each in a panel, and the common ones.

    Where several commands have an option of one name in `rr run`, one flag sets it for all of them.
    """
    flags: dict[str, Flag] = {}
    for cls in settings.PERFORMED:
        types = get_type_hints(cls)
        for item in settings.own_fields(cls):
            name = item.metadata["in_run"] if item.metadata["in_run"] != "" else item.name
            if name in flags:
                flags[name] = replace(flags[name], sections=(*flags[name].sections, cls.SECTION))
            elif name is not None:
                flags[name] = Flag(name, item, types[item.name], (cls.SECTION,), f"Options of rr {cls.SECTION}")
    return [*flags.values(), *_flags(CommonSettings, None)]


def _parameter(name: str, default: Any, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


class Command(TyperCommand):
    """Show each option under one name in the help; aliases and the other half of a switch work, but are not shown."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help, panel by panel."""
        shown = copy(self)
        shown.params = [self._under_one_name(p) for p in sorted(self.get_params(ctx), key=self._place)]
        shown.add_help_option = False  # it is among the parameters
        TyperCommand.format_help(shown, ctx, formatter)

    @staticmethod
    def _place(parameter: Any) -> int:
        return PANELS.index(getattr(parameter, "rich_help_panel", None) or settings.EVERYDAY)

    @staticmethod
    def _under_one_name(parameter: Any) -> Any:
        if parameter.param_type_name == "argument":
            return parameter
        shown = copy(parameter)
        shown.metavar = "" if parameter.is_flag else parameter.metavar  # a switch takes no value
        long, short = (
            [name for name in parameter.opts if name.startswith("--") is is_long] for is_long in (True, False)
        )
        shown.opts, shown.secondary_opts = long[:1] + short, []
        if parameter.secondary_opts and SWITCHES.get(parameter.name, parameter.default):
            shown.opts, shown.show_default = parameter.secondary_opts[:1], False
            shown.help = f"Do not {parameter.help[0].lower()}{parameter.help[1:]}"
        return shown


def _command(
    panel: str, flags: Sequence[Flag], *, writes: bool = False
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a command of a function `f(ctx, **own options)`; its options are the function's own and `flags`.

    Args:
        writes: whether the command creates its working directory, so that `--dir` may name a new one.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
        mine = [flag for flag in flags if flag.name not in {p.name for p in own}]
        text = "Working directory" + ("; created if it does not exist." if writes else ".")
        directory = Annotated[Path, typer.Option("--dir", help=text, rich_help_panel=FILES)]
        debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.", rich_help_panel=OUTPUT)]

        def call(**values: Any) -> None:
            if values.pop("debug"):
                os.environ["RR_DEBUG"] = "1"
            context = Context(values.pop("dir").resolve(), [(flag, values.pop(flag.name)) for flag in mine])
            if writes and not values.get("dry_run"):
                make_folder(context.directory)
            elif not writes and not context.directory.is_dir():
                raise UsageError(f"the directory {context.directory} does not exist", "'rr setup --dir' makes it.")
            function(context, **values)

        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        parameters += [flag.parameter() for flag in mine]
        parameters += [_parameter("dir", Path("."), directory), _parameter("debug", False, debug)]
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {p.name: p.annotation for p in parameters}
        paragraphs = inspect.getdoc(function).split("\n\n")  # type: ignore[union-attr]
        call.__doc__ = "\n\n".join(paragraph.replace("\n", " ") for paragraph in paragraphs)
        switch = next((flag.name for flag in mine if flag.kind is bool and not flag.item.default), "")
        opposite = "--no-" + switch.replace("_", "-")
        epilog = f"Every switch has an opposite, such as {opposite}, to override rr.toml. " if switch else ""
        epilog += "An option that is not given is taken from its RR_ variable, else from rr.toml, else its default."
        app.command(function.__name__, rich_help_panel=panel, cls=Command, epilog=epilog)(call)
        return function

    return register


class Context:
    """One call of a command: where it works, and the options that were given on the command line.

    Attributes:
        given: section of `rr.toml` -> option -> value. names: section -> option -> how it is written (`--max-steps`).
    """

    def __init__(self, directory: Path, values: Sequence[tuple[Flag, Any]]) -> None:
        self.directory = directory
        self.given: dict[str, dict[str, Any]] = {}
        self.names: dict[str, dict[str, str]] = {}
        for flag, value in values:
            for section in flag.sections if value not in (None, []) else ():
                self.given.setdefault(section, {})[flag.item.name] = tuple(value) if isinstance(value, list) else value
                self.names.setdefault(section, {})[flag.item.name] = settings.flag_name(flag.name)

    def arguments(self) -> list[str]:
        """Return the options that were given, as they are written on the command line."""
        found: dict[str, list[str]] = {}
        for section, options in self.given.items():
            for key, value in options.items():
                flag = self.names[section][key]
                if isinstance(value, bool):
                    found[flag] = [flag if value else f"--no-{flag[2:]}"]
                else:
                    values = value if isinstance(value, tuple) else (value,)
                    found[flag] = [f"{flag}={one}" for one in values]
        return [word for words in found.values() for word in words]

    def load(self, cls: type[settings.S], *, use_file: bool = True) -> settings.S:
        """Return the settings of a command from rr.toml, the environment and the command line."""
        given, names = (part.get("common", {}) | part.get(cls.SECTION, {}) for part in (self.given, self.names))
        return configuration.load(cls, self.directory, given, names=names, use_file=use_file)


# -- the commands ------------------------------------------------------------------------------------------------------

EXPERIMENT, LOOK, SHARE = "Run the experiment", "Look at the results", "Use the model elsewhere"


@_command(EXPERIMENT, _flags(CommonSettings, None), writes=True)
def setup(ctx: Context, overwrite: Overwrite = False, json: Json = False) -> None:
    """Create folders and rr.toml, and check that everything is there."""
    from rrcli.services import setup as service

    loaded = ctx.load(CommonSettings, use_file=not overwrite)
    result = service.setup(loaded, ctx.directory, _reporter(), given=ctx.given, overwrite=overwrite)
    if json:
        ui.show_json("setup", {"ok": result.ok, "checks": [vars(check) for check in result.checks]})
    else:
        ui.show_setup(result)
    failed = [check.name for check in result.checks if not check.ok]
    if failed:
        raise CheckFailed(f"failed: {', '.join(failed)}", "Correct what the table says, then run 'rr setup' again.")
    if not json:
        ui.show_next("Settings:", result.settings_file, "rr eval --stage baseline   (or 'rr run' for everything)")


@_command(EXPERIMENT, _flags(settings.SurgerySettings, LOADING), writes=True)
def surgery(
    ctx: Context,
    overwrite: Overwrite = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write nothing.")] = False,
    verify: Annotated[
        bool,
        typer.Option(help="Prove on probe prompts that no logit changed; without this proof, weights are not loaded."),
    ] = True,
    hash: Annotated[
        bool, typer.Option("--hash", help="Record the SHA-256 of every weight file of the base, which reads them all.")
    ] = False,
    export: Annotated[
        Path | None,
        typer.Option(
            "--export", help="Also make this folder, which needs no other: base (hard links), tokenizer and sidecar.",
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
    if not speaks():
        return
    if json:
        ui.show_json("surgery", asdict(result))
        return
    ui.show_surgery(result)
    if result.export:
        ui.show_export(result.export)
    if result.folder:
        ui.show_next("Sidecar:", result.folder, "rr eval --stage after_surgery")


@_command(EXPERIMENT, _flags(settings.TrainSettings, (*LOADING, *DATA, "log_dir", "tracker")), writes=True)
def train(
    ctx: Context,
    mode: Annotated[str, typer.Option("--mode", help="Training mode: recursive or vanilla.")] = "recursive",
    restart: Annotated[
        bool, typer.Option("--restart", help="Delete the run's checkpoints and start again.", rich_help_panel=FILES)
    ] = False,
    match_flops: Annotated[
        str,
        typer.Option(
            "--match-flops",
            help="Train vanilla until it has spent the FLOPs of the run of this name.",
            rich_help_panel=settings.OPTIMISER,
        ),
    ] = "",
    json: Json = False,
) -> None:
    """Fine-tune with or without recursion; continues from the last checkpoint."""
    from rrcli.experiment.replicates import RECURSIVE_STAGE, replicate
    from rrcli.services import train as service

    loaded = ctx.load(settings.TrainSettings)
    result = service.train(loaded, mode, ctx.directory, _reporter(), restart=restart, match_flops=match_flops)
    if not speaks():
        return
    if json:
        ui.show_json("train", vars(result))
        return
    ui.show_train(result)
    one = replicate(result.stage, loaded)
    other = "" if result.run == one.name else f" --model {result.checkpoint}"
    choice = " --choose-exit" if one.stage == RECURSIVE_STAGE else ""
    command = f"rr eval --stage {one.stage}{choice}{one.flag}{other}"
    ui.show_next("Checkpoint:", result.checkpoint, command)


@_command(EXPERIMENT, _flags(settings.EvalSettings, (*LOADING, *DATA, *LOGS, "tracker")), writes=True)
def eval(
    ctx: Context,
    stage: Stage = "baseline",
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "--model-path", "--model-name",
            help="Model to measure as this stage. \\[default: the stage's own]",
            rich_help_panel=settings.MODEL, show_default=False,
        ),
    ] = None,
    use_recursive: Annotated[
        bool | None,
        typer.Option(
            "--use-recursive/--no-use-recursive",
            help="Measure with recursion; --no-use-recursive measures without. \\[default: as the stage]",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
) -> None:  # fmt: skip
    """Measure a stage: perplexity, accuracy, reasoning, generations, speed."""
    from rrcli.comparison.preservation import require_preserved
    from rrcli.services import eval as service

    loaded = ctx.load(settings.EvalSettings)
    if loaded.exits or loaded.choose_exit:
        _eval_exits(ctx, loaded, stage, model, json)
        return
    result = service.evaluate(loaded, stage, ctx.directory, _reporter(), model=model, use_recursive=use_recursive)
    if not speaks():
        return
    if json:
        ui.show_json("evaluation", {key: value for key, value in result.results.items() if key != "schema"})
    else:
        ui.show_eval(result)
    require_preserved(result.preserved)
    if json:
        return
    command = "rr surgery" if stage == "baseline" else f"rr compare baseline {stage}"
    ui.show_next("Results:", result.file, command)


def _eval_exits(ctx: Context, loaded: settings.EvalSettings, stage: str, model: str | None, json: bool) -> None:
    from rrcli.experiment.exits import choose_exit, measure_exits
    from rrcli.experiment.replicates import replicate

    one = replicate(stage, loaded)
    command = f"rr eval --stage {one.stage}{one.flag}" + (f" --model {model}" if model else "")
    if not loaded.exits:
        chosen = choose_exit(loaded, stage, ctx.directory, _reporter(), model=model)
        if not speaks():
            return
        if json:
            ui.show_json("exit", chosen.to_dict())
        else:
            ui.show_exit(chosen)
            ui.show_next("Checkpoint:", chosen.checkpoint, command)
        return
    result = measure_exits(loaded, stage, ctx.directory, _reporter(), model=model)
    if not speaks():
        return
    if json:
        ui.show_json("exits", {key: value for key, value in result.results.items() if key not in ("schema", "kind")})
        return
    ui.show_exits(result)
    ui.show_next("Exits:", result.file, command)


@_command(EXPERIMENT, _flags(settings.CostsSettings, (*LOADING, *TEXT, *LOGS, "tracker")), writes=True)
def costs(
    ctx: Context,
    stages: Annotated[
        list[str] | None, typer.Argument(help=r"Stages to measure. \[default: all that have a model]")
    ] = None,
    json: Json = False,
) -> None:
    """Measure speed, memory and FLOPs of several stages in turns, a process for each.

    Speeds that were measured one after the other differ because the machine does: only these can be compared. What is
    measured at which depth follows the options of rr eval in rr.toml.
    """
    from rrcli.services import costs as service

    loaded, evaluation = ctx.load(settings.CostsSettings), ctx.load(settings.EvalSettings)
    result = service.costs(loaded, evaluation, stages or [], ctx.directory, _reporter())
    if json:
        ui.show_json("costs", {key: value for key, value in result.costs.items() if key != "schema"})
        return
    ui.show_costs(result)
    ui.show_next("Costs:", result.file, "rr compare")


@_command(LOOK, _flags(settings.CompareSettings, LOGS))
def compare(
    ctx: Context,
    stages: Annotated[
        list[str] | None, typer.Argument(help="Stages or results files; the first is the reference. \\[default: all]")
    ] = None,
    json: Json = False,
) -> None:
    """Compare stages: which differences are shown, which may be noise, and what they cost."""
    from rrcli.services import compare as service

    loaded = ctx.load(settings.CompareSettings)
    form = _form(loaded, json)
    _show_comparison(service.compare(loaded, stages or [], ctx.directory), loaded, ctx.directory, form)


@_command(LOOK, _flags(settings.GenerateSettings, LOADING))
def generate(
    ctx: Context,
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads standard input.")],
    stage: Annotated[str | None, typer.Option("--stage", help=f"{STAGE_HELP} \\[default: the last one made]")] = None,
    trace: Annotated[
        bool,
        typer.Option("--trace", help="Colour each token by its passes; underline what a later pass changed."),
    ] = False,
    json: Json = False,
) -> None:
    """Continue a prompt; a recursive model drafts, refines and commits chunks."""
    from rrcli.services import generate as service

    text = _standard_input() if prompt == "-" else prompt
    loaded, writer = ctx.load(settings.GenerateSettings), ui.PieceWriter(text, trace=trace)
    emit = (lambda piece: None) if json else writer
    result = service.generate(loaded, text, ctx.directory, emit, stage=stage, reporter=_reporter())
    if not speaks():
        return
    if json:
        ui.show_json("generation", result.to_dict())
        return
    writer.end()
    ui.show_generation(result, trace=trace)


@_command(SHARE, _flags(CommonSettings, EXPORTING))
def export(
    ctx: Context,
    name: Exportable,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="New folder.")],
    merge: Merge = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Make a folder of a model that needs no other, for transformers, lm-eval and peft.

    AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True) loads it with its recursion, where rrcli is
    installed. Weight files are hard links where they can be.
    """
    from rrcli.services import export as service

    result = service.export(
        ctx.load(CommonSettings), name, folder, ctx.directory, _reporter(),
        overwrite=overwrite, merge=merge, comparison=_comparison_text(ctx),
    )  # fmt: skip
    if json:
        ui.show_json("export", asdict(result))
    else:
        ui.show_exported(result)


@_command(SHARE, _flags(settings.ServeSettings, ("device", "dtype", *EXPORTING[:-1])))
def serve(
    ctx: Context,
    name: Exportable,
    json: Json = False,
) -> None:
    """Serve a model on this machine with transformers' own server, in the form of OpenAI's API.

    It listens on 127.0.0.1 and answers one request at a time, without continuous batching, which would leave the
    recursion out. Ctrl-C ends it.
    """
    from rrcli.services import serve as service

    started = (lambda served: ui.show_json("serve", vars(served))) if json else ui.show_served
    service.serve(ctx.load(settings.ServeSettings), name, ctx.directory, _reporter(), started=started)


@_command(SHARE, _flags(CommonSettings, EXPORTING))
def push(
    ctx: Context,
    name: Exportable,
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Repository of the hub: OWNER/NAME.")],
    public: Annotated[bool, typer.Option("--public", help="Let everybody see a repository that is made here.")] = False,
    merge: Merge = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Upload also where something else lies.", rich_help_panel=FILES)
    ] = False,
    json: Json = False,
) -> None:
    """Upload a model to the Hugging Face hub, as rr export makes it, in one commit.

    A new repository is private unless --public is given. 'hf auth login' logs in.
    """
    from rrcli.services import push as service

    result = service.push(
        ctx.load(CommonSettings), name, repo, ctx.directory, _reporter(),
        public=public, overwrite=overwrite, merge=merge, comparison=_comparison_text(ctx),
    )  # fmt: skip
    if json:
        ui.show_json("push", asdict(result))
    else:
        ui.show_pushed(result)


def _comparison_text(ctx: Context) -> str:
    """Return the comparison of what was measured as Markdown; '' where there is none."""
    from rrcli.services import compare as comparing

    loaded = replace(ctx.load(settings.CompareSettings), generations=False, report="", gate=())
    try:
        return ui.comparison_text(comparing.compare(loaded, [], ctx.directory), "markdown")
    except RRError:
        return ""


@_command(LOOK, _flags(settings.BoardSettings, ("log_dir",)))
def board(
    ctx: Context,
    check: Annotated[
        bool, typer.Option("--check", help="Print the runs and tags that TensorBoard finds, and exit.")
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
    service.board(ctx.load(settings.BoardSettings), ctx.directory, _reporter(), started=started)


@_command(EXPERIMENT, [*_flags(settings.PlanSettings, ()), *(f for f in _run_flags() if f.name in PLANNED)])
def plan(
    ctx: Context,
    device: Annotated[
        str,
        typer.Option(
            "--device",
            help="Device whose figures count: a100, h100, h200, b200, l40s, rtx4090, mi300x, or cpu (measured). "
            "\\[default: by the GiB of --gpus, else this machine's]",
            show_default=False,
        ),
    ] = "",
    json: Json = False,
) -> None:
    """Estimate memory, FLOPs and hours of the whole experiment, and say which placement fits, before weights are read.

    Exit code 1 if nothing fits.
    """
    from rrcli.services import plan as service

    result = service.plan(
        ctx.load(settings.PlanSettings), ctx.load, ctx.directory, _reporter(), hardware=device, given=ctx.given
    )
    if json:
        ui.show_json("footprint", result.to_dict())
    else:
        ui.show_footprint(result)
    if result.misfits:
        hint = f"What would fit: {'; or '.join(result.would_fit)}." if result.would_fit else ""
        devices = f"{result.count} x {result.device.memory / 2**30:.3g} GiB"
        raise RRError(f"{', '.join(result.misfits)}: does not fit on {devices}", hint)


@_command(EXPERIMENT, _run_flags(), writes=True)
def run(
    ctx: Context,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan, or the script of --slurm, and do nothing.")
    ] = False,
    slurm: Annotated[
        str,
        typer.Option(
            "--slurm",
            help="Do it in a job of SLURM: nodes=2,gpus=8,time=4h,partition=gpu and further options of sbatch. The "
            "processes on all machines share the work, as --parallel says. The job goes on when it is queued again.",
            rich_help_panel=settings.COMPUTE,
        ),
    ] = "",
    launcher: Annotated[
        str,
        typer.Option(
            "--launcher",
            help="Program that starts each training and evaluation, such as 'torchrun --nproc-per-node 8 -m rrcli'.",
            rich_help_panel=settings.COMPUTE,
        ),
    ] = "",
    json: Json = False,
) -> None:
    """Run the whole experiment: every stage that is missing or out of date, their costs, then the comparison.

    Options that are given here are written to rr.toml, as by 'rr setup', so that the next 'rr run' is of the same
    experiment. --max-steps and --chunk-width are those of the surgery, which training follows; --train-max-steps and
    --train-chunk-width train with others.
    """
    from rrcli.comparison.claims import read_declaration
    from rrcli.experiment.planning import plan, refuse_phase_a
    from rrcli.services import compare as comparing
    from rrcli.services import run as service

    for section in settings.PERFORMED:  # so that a wrong value is refused before any work is done
        ctx.load(section)
    refuse_phase_a(ctx.load(settings.TrainSettings))
    read_declaration(ctx.load(settings.CompareSettings))
    form = _form(ctx.load(settings.CompareSettings), json)
    if slurm:
        _in_a_job(ctx, slurm, dry_run=dry_run, json=json)
        return
    if dry_run:
        steps = plan(ctx.directory, ctx.load, new_options=bool(ctx.given))
        if json:
            ui.show_json("plan", {"steps": [step.to_dict() for step in steps]})
        else:
            ui.show_plan(steps)
        return
    service.run(
        ctx.directory, ctx.load, _reporter(),
        perform=lambda step: _perform(step, ctx, launcher), new_options=bool(ctx.given),
    )  # fmt: skip
    loaded = ctx.load(settings.CompareSettings)
    result = comparing.compare(loaded, [], ctx.directory)
    _show_comparison(result, loaded, ctx.directory, form)
    if json:
        return
    ui.show_next("Results:", ctx.directory / ctx.load(CommonSettings).output_dir, "rr board")


@_command(LOOK, _flags(CommonSettings, ("checkpoint_dir", "output_dir")))
def status(ctx: Context, json: Json = False) -> None:
    """Show what is done, stale or missing, and which command comes next."""
    from rrcli.services import status as service

    found = service.status(ctx.directory, ctx.load)
    if json:
        ui.show_json("status", asdict(found))
    else:
        ui.show_status(found)


def _form(chosen: settings.CompareSettings, json: bool) -> str:
    """Return the form in which a comparison is shown or written; refuse one that cannot be, before it is computed."""
    form = "json" if json else chosen.format
    if form == "auto":
        form = FORMS.get(Path(chosen.out).suffix.lower(), "table")
    if chosen.generations and form in VALUES_ALONE:
        raise UsageError(f"--generations and --format {form} do not go together", "Take table, json or markdown.")
    if form == "parquet":
        from rrcli.comparison.tables import check_parquet

        check_parquet()
        if not chosen.out:
            raise UsageError("parquet cannot be shown on the screen", "Name a file: --out FILE.parquet.")
    return form


def _show_comparison(result: Any, chosen: settings.CompareSettings, directory: Path, form: str) -> None:
    """Show a comparison in the form that was asked for, or write it to a file; then fail if a gate does not hold."""
    from rrcli.comparison.gates import require_gates
    from rrcli.files import write_bytes, write_text

    if chosen.out:
        file = directory / Path(chosen.out).expanduser()
        if form == "parquet":
            from rrcli.comparison import written

            write_bytes(file, written.parquet(result))
        else:
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
            "'rr setup' checks the installation; 'rr surgery --overwrite' and 'rr eval' make the stages again.",
        )
    require_gates(result.gates)


def _in_a_job(ctx: Context, slurm: str, *, dry_run: bool, json: bool) -> None:
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
        ui.show_json("job", {"job": number, "log": log, "script": script})
    elif dry_run:
        typer.echo(script, nl=False)
    else:
        ui.show_next(f"Job {number}:", log, "rr status")


def _perform(step: Any, ctx: Context, launcher: str = "") -> None:
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

    directory, reporter = ctx.directory, _reporter()
    if step.kind == "setup":
        result = setting_up.setup(ctx.load(CommonSettings), directory, reporter, given=ctx.given)
        if not result.ok:
            ui.show_setup(result)
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


def _standard_input() -> str:
    """Return standard input as it is, but for the line ends at its end.

    Raises:
        UsageError: it is not UTF-8.
    """
    try:
        return typer.get_binary_stream("stdin").read().decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"standard input is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}"
        ) from None


def _reporter() -> ui.TerminalReporter:
    return ui.TerminalReporter()
