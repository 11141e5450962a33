"""How commands get their options: declared once in `settings`, they become those of typer."""

from __future__ import annotations

import inspect
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Sequence
from copy import copy
from dataclasses import Field, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from rrcli import __version__, configuration, settings
from rrcli.errors import Interrupted, RRError, UsageError, suggest
from rrcli.files import make_folder
from rrcli.settings import CommonSettings
from rrcli.training.launching import speaks
from rrcli.ui.console import show_error

FILES, OUTPUT = settings.FILES, settings.OUTPUT
# The panels of `--help` from top to bottom; in `rr run` each command that it performs has one.
PANELS = (
    *settings.PANELS[:-2],
    *(f"Options of rr {cls.SECTION}" for cls in settings.PERFORMED),
    *settings.PANELS[-2:],
)
# Switch -> whether it is on by default. `--help` shows the half of a switch that changes its default.
SWITCHES = {item.name: item.default for cls in settings.SECTIONS for item in fields(cls) if item.type == "bool"}
# How long a process that does not print an error waits for the one that does, in seconds: a launcher ends all processes
# once one has ended.
PATIENCE = 5.0


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
                show_error(error)
            else:
                time.sleep(PATIENCE)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            show_error(
                Interrupted("by the user", "Finished files are kept; run the same command again to continue from them.")
            )
            raise typer.Exit(Interrupted.exit_code) from None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find a command by its name."""
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            error = UsageError(f"unknown command '{args[0]}'", suggest(args[0], self.commands))
            show_error(error)
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


def section_flags(cls: type[CommonSettings], common: Collection[str] | None) -> list[Flag]:
    """Return the options of a command: those of its section, then the common ones named (None = all)."""
    types = get_type_hints(cls)
    own = [] if cls is CommonSettings else settings.own_fields(cls)
    flags = [Flag(item.name, item, types[item.name], (cls.SECTION,), item.metadata["panel"]) for item in own]
    for item in fields(CommonSettings):
        if common is None or item.name in common:
            flags.append(Flag(item.name, item, types[item.name], ("common",), item.metadata["panel"]))
    return flags


def run_flags() -> list[Flag]:
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
    return [*flags.values(), *section_flags(CommonSettings, None)]


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


def command(
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
