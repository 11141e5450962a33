"""The terminal: consoles, progress, errors, JSON, and text from outside. Results go to stdout, all else to stderr.

No text from a model or a file acts on a terminal or on rich: `escape` it, or `visible` where there is no markup.
"""

from __future__ import annotations

import codecs
import io
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape as without_markup
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rrcli.errors import RRError
    from rrcli.evaluation.tracing import Piece

# Wide enough for every table where the output is a file or a pipe.
PIPED_WIDTH = 160
# The colour of a token by the passes that it took after pass 0.
PASS_STYLES = ("", "cyan", "magenta", "yellow", "green", "blue", "red")
# Control characters that act on a terminal: all of C0 and C1, and DEL, but for line feeds and tabs.
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
# What is written for the few characters of ours that an output of another encoding than UTF-8 may lack: one for one, so
# that columns stay aligned.
SUBSTITUTES = str.maketrans("↓↑−–…▁▂▃▄▅▆▇█", "v^--~12345678")


def visible(text: str) -> str:
    """Return a text with its control characters as escapes, such as `\\x1b`, so that none acts on a terminal."""
    return CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def escape(text: str) -> str:
    """Return a text from outside as rich prints it to the letter: no markup, no control characters."""
    return without_markup(visible(text))


def never_fail_to_write() -> None:
    """Let stdout and stderr write what their encoding lacks as substitutes or escapes, instead of raising an error."""
    codecs.register_error("rr", _substituted)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="rr")


def _substituted(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(SUBSTITUTES)
    return text.encode("ascii", "backslashreplace").decode(), error.end


def out() -> Console:
    """Return the console for results."""
    return _console(sys.stdout)


def err() -> Console:
    """Return the console for progress, notices and errors."""
    return _console(sys.stderr)


def _console(stream: Any) -> Console:
    width = None if stream.isatty() or "COLUMNS" in os.environ else PIPED_WIDTH
    return Console(file=stream, width=width, highlight=False, soft_wrap=False, emoji=False)


class TerminalReporter:
    """Shows what a service is doing: live bars in a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        # While bars are shown only their own console knows how to print above them.
        self._console: Console | None = None

    def note(self, message: str) -> None:
        """Print a line."""
        (self._console or err()).print(escape(message))

    def warn(self, message: str) -> None:
        """Print a warning."""
        (self._console or err()).print(f"[yellow]warning:[/yellow] {escape(message)}")

    @contextmanager
    def progress(self, label: str, total: int, unit: str) -> Iterator[_Bar]:
        """Show a bar with done/total, speed and remaining time; a line with the total when it ends."""
        import time

        from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
        from rich.text import Text

        class Count(ProgressColumn):
            def render(self, task: Any) -> Text:
                whole = f"{task.total:,.0f}"
                return Text(f"{task.completed:>{len(whole)},.0f}/{whole} {task.fields['unit']}")

        class Speed(ProgressColumn):
            def render(self, task: Any) -> Text:
                speed = task.finished_speed or task.speed
                return Text(f"{speed:,.{0 if speed >= 10 else 1}f}/s".rjust(8) if speed else " " * 8)

        console, began = err(), time.monotonic()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            Count(),
            Speed(),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
        )

        class Bars(Progress):
            """The bar, and below it the note, which is cut rather than wrapped where the terminal is narrow."""

            def get_renderables(self) -> Iterator[Any]:
                yield self.make_tasks_table(self.tasks)
                for task in self.tasks:
                    if task.fields["note"]:
                        yield Text("  " + task.fields["note"], no_wrap=True, overflow="ellipsis")

        # The time that is left follows from the last minutes: with the evaluations and checkpoints between the steps.
        bars = Bars(
            *columns, console=console, transient=True, disable=not console.is_terminal, speed_estimate_period=600
        )
        bar = _Bar(bars, bars.add_task(escape(label), total=total, unit=unit, note=""), console, label, total)
        before, self._console = self._console, console
        try:
            with bars:
                yield bar
        finally:
            self._console = before
        seconds = time.monotonic() - began
        lines = [f"  {label}: {bar.done:,} {unit} in {seconds:.1f} s", *[bar.note] * bool(bar.note)]
        fits = sum(map(len, lines)) + 2 <= console.width
        console.print(escape((", " if fits else "\n    ").join(lines)), no_wrap=True, overflow="ellipsis")


class _Bar:
    """One bar; without a terminal it prints a line at every tenth of a long piece of work."""

    def __init__(self, bars: Any, task: Any, console: Console, label: str, total: int) -> None:
        self.bars, self.task, self.console, self.label, self.total = bars, task, console, label, total
        self.done, self.note, self.told = 0, "", 0

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Count work done."""
        self.done += amount
        self.note = note or self.note
        self.bars.update(self.task, advance=amount, note=self.note)
        tenth = 10 * self.done // max(1, self.total)
        if not self.console.is_terminal and self.total >= 100 and self.note and tenth > self.told:
            self.told = tenth
            self.console.print(f"  {escape(self.label)}: {self.done:,}/{self.total:,}  {escape(self.note)}")


def show_error(error: RRError) -> None:
    """Print `error:` and `hint:` lines."""
    label = "interrupted" if error.exit_code == 130 else "error"
    console = err()
    console.print(f"[bold red]{label}:[/bold red] {escape(error.message)}", soft_wrap=True)
    if error.hint:
        console.print(f"[bold]hint:[/bold] {escape(error.hint)}", soft_wrap=True)


def show_json(schema: str, value: Mapping[str, Any]) -> None:
    """Print one JSON object with a `schema` field on stdout."""
    print(json_line(schema, value), end="")


def json_line(schema: str, value: Mapping[str, Any], version: int = 1) -> str:
    """Return one JSON object with its `schema` on a line."""
    from rrcli.files import finite

    return json.dumps({"schema": f"rr.{schema}/{version}", **finite(value)}, allow_nan=False, default=str) + "\n"


def show_next(what: str, where: Any, command: str) -> None:
    """Say where the output is and which command comes next."""
    out().print(f"{what} [bold]{escape(str(where))}[/bold]\nNext: [bold]{escape(command)}[/bold]", soft_wrap=True)


def show_pairs(rows: dict[str, str]) -> None:
    """Print names and values, a line each."""
    table = Table(box=None, show_header=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, escape(value))
    out().print(table)


def bytes_text(size: int, digits: int = 2) -> str:
    """Return bytes in the unit in which they are easiest to read."""
    value, units = float(size), iter(("B", "KiB", "MiB", "GiB"))
    unit = next(units)
    while value >= 1024 and unit != "GiB":
        value, unit = value / 1024, next(units)
    return f"{size:,} B" if unit == "B" else f"{value:,.{digits}f} {unit}"


class PieceWriter:
    """Writes a text as it is generated: the prompt, then each piece.

    A file or a pipe gets the text as it is, as UTF-8, byte for byte. A terminal shows the prompt dim, and control
    characters as escapes.
    """

    def __init__(self, prompt: str, *, trace: bool) -> None:
        self.console, self.prompt, self.trace = out(), prompt, trace
        self.shown = self.console.file.isatty() or (trace and self.console.is_terminal)  # colours may be forced

    def __call__(self, piece: Piece) -> None:
        """Write a piece, after the prompt if it is the first."""
        self._write_prompt()
        style = PASS_STYLES[min(piece.passes, len(PASS_STYLES) - 1)] + (" underline" if piece.changed else "")
        self._write(piece.text, style if self.trace else "")

    def end(self) -> None:
        """End the text; of an empty one, the prompt is all that is written."""
        self._write_prompt()
        self._write("\n", "")

    def _write_prompt(self) -> None:
        if self.prompt:
            self._write(self.prompt, "dim")
            self.prompt = ""

    def _write(self, text: str, style: str) -> None:
        if self.shown:
            self.console.print(Text(visible(text), style=style), end="", soft_wrap=True)
        else:
            write_bytes(text)
        self.console.file.flush()


def write_bytes(text: str) -> None:
    """Write a text to stdout as UTF-8, whatever its encoding, and without touching line ends."""
    sys.stdout.flush()
    # A prompt that was not valid UTF-8 on the command line goes out as it came in.
    sys.stdout.buffer.write(text.encode("utf-8", "surrogateescape"))
    sys.stdout.buffer.flush()
