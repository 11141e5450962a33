"""Everything that a person sees: the only user of rich. Results go to stdout, progress and notices to stderr."""

from __future__ import annotations

import codecs
import functools
import io
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape as without_markup
from rich.table import Table
from rich.text import Text

from rrcli.comparison import formats

if TYPE_CHECKING:
    from rrcli.comparison.comparison import Comparison
    from rrcli.comparison.flips import Flips
    from rrcli.comparison.results import Cell, MetricRow
    from rrcli.errors import RRError
    from rrcli.evaluation.tracing import Piece
    from rrcli.experiment.exits import ExitChosen, ExitsResult
    from rrcli.experiment.planning import Step
    from rrcli.services.board import Board, Found
    from rrcli.services.costs import CostsResult
    from rrcli.services.eval import EvalResult
    from rrcli.services.export import ExportResult
    from rrcli.services.generate import GenerateResult
    from rrcli.services.plan import PlanResult
    from rrcli.services.push import PushResult
    from rrcli.services.serve import Served
    from rrcli.services.setup import SetupResult
    from rrcli.services.status import Status
    from rrcli.services.surgery import SurgeryResult
    from rrcli.services.train import TrainResult

# Wide enough for every table where the output is a file or a pipe.
PIPED_WIDTH = 160
# Columns that a stage needs for a difference beside its interval, and the names of the metrics.
STAGE_WIDTH, LABEL_WIDTH = 25, 20
# Characters of a prompt or an answer that are shown.
LONGEST_TEXT = 400
VERDICT_STYLES = {"better": "green", "not worse": "green", "worse": "red", "equivalent": "cyan", "same": "cyan"}
VERDICT_STYLES |= {"inconclusive": "yellow", "not comparable": "yellow", "too few": "yellow"}
# The colour of a token by the passes that it took after pass 0.
PASS_STYLES = ("", "cyan", "magenta", "yellow", "green", "blue", "red")
STATUS_STYLES = {"done": "green", "missing": "yellow", "stale": "yellow", "unfinished": "cyan", "impossible": "red"}
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
    print(_json(schema, value), end="")


def _json(schema: str, value: Mapping[str, Any], version: int = 1) -> str:
    from rrcli.files import finite

    return json.dumps({"schema": f"rr.{schema}/{version}", **finite(value)}, allow_nan=False, default=str) + "\n"


def show_next(what: str, where: Any, command: str) -> None:
    """Say where the output is and which command comes next."""
    out().print(f"{what} [bold]{escape(str(where))}[/bold]\nNext: [bold]{escape(command)}[/bold]", soft_wrap=True)


def show_setup(result: SetupResult) -> None:
    """Print the table of checks."""
    table = Table(box=SIMPLE_HEAD)
    for name in ("Check", "", "Found"):
        table.add_column(name, overflow="fold")
    for check in result.checks:
        mark = "[green]ok[/green]" if check.ok else "[red]failed[/red]"
        table.add_row(check.name, mark, escape(check.found + (f"\n{check.hint}" if check.hint else "")))
    out().print(table)


def show_surgery(result: SurgeryResult) -> None:
    """Print what was added, what it costs at every depth, and what was proved."""
    share = 100 * result.added_parameters / result.base_parameters
    rows = {
        "Family": result.family,
        "Layers": f"{result.layers}, of which {result.span[0]}:{result.span[1]} run again",
        "Passes after pass 0": f"up to {result.max_steps}",
        "Base": f"{result.base_parameters:,} parameters, {_bytes(result.base_bytes)}",
        "Added": f"{result.added_parameters:,} parameters ({share:.2f} %), {_bytes(result.sidecar_bytes)}",
        "Written": _bytes(result.bytes_written) if result.folder else "nothing (--dry-run)",
        "Verified": (
            "logits bit-identical to the base's, cached and uncached, at depths "
            + ", ".join(map(str, result.verified_depths))
            if result.verified_depths
            else "only that the output projection is zero (--no-verify)"
        ),
    }
    _show_pairs(rows)
    if result.costs is None:
        return
    costs = result.costs
    title = f"every pass for every token, {costs.dtype}: the most that a token can cost"
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left")
    for name in ("Depth", "Cache growth", "Cache, constant", "MFLOPs", "times depth 0"):
        table.add_column(name, justify="right")
    values = zip(costs.cache_bytes_per_token, costs.cache_bytes_constant, costs.flops_per_token, strict=True)
    for depth, (growth, constant, flops) in enumerate(values):
        times = f"{flops / costs.flops_per_token[0]:.2f}" if costs.flops_per_token[0] else "-"
        table.add_row(str(depth), f"{_bytes(growth)}/token", _bytes(constant), formats.number(flops / 1e6), times)
    out().print(table)
    out().print(
        f"[dim]{escape(costs.flops_formula)}. Recurrent and convolution states do not grow. Decoding drafts with pass "
        "0, refines in chunks and may leave by an exit: 'rr costs' counts what it runs.[/dim]"
    )


# Part of what a device holds -> how the table calls it.
HELD = {
    "base": "weights",
    "sidecar": "sidecar, LoRA",
    "gradients": "gradients",
    "optimiser": "optimiser",
    "together": "put together",
    "activations": "activations",
    "logits": "logits",
    "caches": "caches",
}


def show_footprint(result: PlanResult) -> None:
    """Print what an experiment takes: memory by part and by placement, speed, and the stages' hours."""
    about, device = result.model, result.device
    trained = ", ".join(f"{name.removeprefix('train ')} {count:,}" for name, count in about["trained"].items())
    extras = [f"{about['gradient_accumulation']} parts"] * (about["gradient_accumulation"] > 1)
    extras += ["activations recomputed"] * about["gradient_checkpointing"]
    _show_pairs(
        {
            "Model": f"{about['name']}: {about['family']}, {about['parameters']:,} parameters, {about['dtype']}",
            "Recursion": f"{about['sidecar']:,} parameters, layers {about['span'][0]}:{about['span'][1]} of "
            f"{about['layers']}, up to {about['max_steps']} passes after pass 0",
            "Training": f"phase {about['phase']}: {trained} weights; {about['batch_size']} examples of at most "
            f"{about['length']} tokens" + "".join(f", {extra}" for extra in extras),
            "Devices": f"{result.count} x {device.name}, {_bytes(device.memory)} each, of which {_bytes(result.room)} "
            "may be filled",
        }
    )
    commands = list(dict.fromkeys(one.command for one in result.memory))
    shown = {
        command: min(
            (one for one in result.memory if one.command == command),
            key=lambda one: (one.arrangement != result.chosen.get(one.command), one.total),
        )
        for command in commands
    }
    table = Table(box=SIMPLE_HEAD, title="memory of a device", title_justify="left")
    table.add_column("")
    for command in commands:
        table.add_column(command, justify="right")
    table.add_row("placement", *[str(one.arrangement).removeprefix("--parallel ") for one in shown.values()])
    table.add_row("texts at a time", *[str(one.rows) for one in shown.values()], end_section=True)
    for part, name in HELD.items():
        sizes = [getattr(one, part) for one in shown.values()]
        if any(sizes):
            table.add_row(name, *[_bytes(size) if size else "-" for size in sizes])
    table.add_section()
    table.add_row("together", *[_fitting(one.total, result.room) for one in shown.values()])
    out().print(table)
    _show_placements(result, commands)
    table = Table(box=SIMPLE_HEAD, title="speed, at most", title_justify="left")
    for name in ("", "Depth", "MFLOP/token", "Tokens/s", "Bound by"):
        table.add_column(name, justify="right" if name in ("Depth", "MFLOP/token", "Tokens/s") else "left")
    for pace in result.paces:
        numbers = formats.number(pace.flops / 1e6), formats.number(pace.tokens_per_second)
        depth = f"1-{pace.depth}" if pace.what.startswith("train") and pace.depth > 1 else str(pace.depth)
        table.add_row(pace.what, depth, *numbers, pace.bound)
    if result.paces:
        out().print(table)
    if result.stages:
        _show_hours(result)
    caches = ", ".join(f"{_bytes(size)} at depth {depth}" for depth, size in enumerate(result.caches))
    texts = "a text" if about["rows"] == 1 else f"{about['rows']} texts"
    lines = [f"Caches of {texts} of {about['context']:,} tokens: {caches}."]
    lines.append(
        f"Times are bounds at {result.efficiency:.0%} of what {device.name} can do ({device.source}); loading, saving "
        "and waiting are not in them."
    )
    out().print(f"[dim]{escape(' '.join(lines))}[/dim]")


def _show_placements(result: PlanResult, commands: list[str]) -> None:
    """Print what a device holds in each command, in every arrangement."""
    arrangements = list(dict.fromkeys(one.arrangement for one in result.memory))
    if len(arrangements) == 1:
        return
    table = Table(box=SIMPLE_HEAD, title="memory of a device, by placement", title_justify="left")
    table.add_column("Placement", no_wrap=True)
    for command in commands:
        table.add_column(command, justify="right")
    found = {(one.arrangement, one.command): one.total for one in result.memory}
    for arrangement in arrangements:
        sizes = [found.get((arrangement, command)) for command in commands]
        table.add_row(str(arrangement), *["-" if size is None else _fitting(size, result.room) for size in sizes])
    out().print(table)


def _show_hours(result: PlanResult) -> None:
    """Print what each command of the experiment takes, and all of them."""
    table = Table(box=SIMPLE_HEAD, title="rr run, at least", title_justify="left")
    for name in ("Command", "Times", "TFLOP", "Time", "Device hours"):
        table.add_column(name, justify="left" if name == "Command" else "right")
    for stage in result.stages:
        hours = stage.seconds * result.count / 3600
        table.add_row(
            stage.command, str(stage.times), formats.number(stage.flops / 1e12), _duration(stage.seconds),
            formats.number(hours),
        )  # fmt: skip
    table.add_section()
    flops = sum(stage.flops for stage in result.stages) / 1e12
    hours = result.seconds * result.count / 3600
    table.add_row("everything", "", formats.number(flops), _duration(result.seconds), formats.number(hours))
    out().print(table)


def _fitting(size: int, room: int) -> str:
    """Return a size, green where there is room for it; what does not fit is marked, also without colours."""
    return f"[green]{_bytes(size)}[/green]" if size <= room else f"[red]{_bytes(size)} no[/red]"


def _duration(seconds: float) -> str:
    """Return seconds in the unit in which they are easiest to read."""
    for limit, divisor, unit in ((100, 1, "s"), (6000, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{formats.number(seconds / divisor)} {unit}"
    return f"{formats.number(seconds / 86400)} d"


def show_export(folder: Any) -> None:
    """Say where the folder that stands alone is, and how to load it."""
    how = "from_pretrained: the base; with trust_remote_code=True: recursive"
    out().print(f"Export: [bold]{escape(str(folder))}[/bold] ({how})")


def show_exported(result: ExportResult) -> None:
    """Say what a folder that stands alone holds, and how it is loaded."""
    trust = ", trust_remote_code=True" if result.recursive else ""
    out().print(f"Export: [bold]{escape(str(result.folder))}[/bold] ({_bytes(result.bytes)})", soft_wrap=True)
    loaded = f'AutoModelForCausalLM.from_pretrained("{result.folder}"{trust})'
    out().print(f"In Python: {escape(loaded)}", soft_wrap=True)
    if result.adapters is not None:
        out().print(f"Adapters for peft: {escape(str(result.adapters))}", soft_wrap=True)


def show_pushed(result: PushResult) -> None:
    """Say where a model was uploaded to, and who can see it."""
    seen = {None: "as before", True: "private", False: "public"}[result.private]
    what = f"{result.files} files, {_bytes(result.bytes)}, commit {result.commit[:7]}, {seen}"
    out().print(f"Pushed: [bold]{escape(result.url)}[/bold] ({what})", soft_wrap=True)


def show_served(served: Served) -> None:
    """Print the address of the server, and how to ask it."""
    what = f"{escape(served.model)} on {served.device} in {served.dtype}"
    out().print(f"Serving {what}: [bold]{served.url}[/bold]   (Ctrl-C stops it)", soft_wrap=True)
    out().print(escape(served.curl), soft_wrap=True)
    if not served.listed:
        out().print("This version of transformers does not list the model in /v1/models; name it as above.")


def show_eval(result: EvalResult) -> None:
    """Print a stage's metrics, and a second table with their values at every depth if there is recursion."""
    from rrcli.evaluation.metrics import KNOWN, metrics_of

    metrics = result.results["metrics"]
    table = Table(box=SIMPLE_HEAD, title=result.stage, title_justify="left")
    for name in ("Metric", "Value", "95 % interval", "n"):
        table.add_column(name, justify="left" if name == "Metric" else "right")
    for metric in metrics_of(metrics):
        entry = metrics[metric.name]
        low, high = entry.get("low"), entry.get("high")
        number = functools.partial(formats.number, percent=metric.unit == "%")
        interval = f"{number(low)} to {number(high)}" if low is not None and high is not None else ""
        count = formats.number(entry["n"]) if "n" in entry else ""
        table.add_row(escape(metric.label), f"{number(entry['value'])} {metric.unit}".strip(), interval, count)
    out().print(table)
    if result.preserved is not None and not result.preserved.broken:  # a broken one is shown as an error
        style = "green" if result.preserved.exact else "yellow"
        out().print(f"[{style}]{escape(result.preserved.sentence())}[/{style}]", soft_wrap=True)
    depths = {name: values for name, values in result.results["by_depth"].items() if len(values) > 1}
    if depths:
        table = Table(box=SIMPLE_HEAD, title="by depth", title_justify="left")
        table.add_column("Metric")
        for depth in range(max(map(len, depths.values()))):
            table.add_column(f"pass {depth}", justify="right")
        for name, values in depths.items():
            table.add_row(KNOWN[name].label, *[formats.number(entry["value"]) for entry in values])
        out().print(table)


def show_exits(result: ExitsResult) -> None:
    """Print the frontier of exit rules on the test side, and what was chosen."""
    points, n = result.results["test"], result.results["n"]
    counts = [f"{n['test'][part]:,} {part}" for part in ("problems", "documents", "tokens") if n["test"][part]]
    answers, base = bool(n["test"]["problems"]), next(p for p in points if p["name"] == "depth:0")
    cost, passes = ("mflop", "passes") if answers else ("text_mflop", "text_passes")
    table = Table(box=SIMPLE_HEAD, title=f"{result.stage}: exits on {', '.join(counts)}", title_justify="left")
    table.add_column("Exit")
    for name in (*(["Accuracy, %"] if answers else []), "Nats", "Passes", "MFLOP", "x pass 0"):
        table.add_column(name, justify="right")
    chosen = "" if result.chosen.rule is None else str(result.chosen.rule)
    last = ""
    for point in points:
        if last not in ("", point["rule"]):
            table.add_section()
        last = point["rule"]
        name = f"random, as {point['like'].partition(':')[2]}" if "like" in point else point["name"]
        cells = [formats.number(point["accuracy"]["value"] if point["accuracy"] else None, percent=True)] * answers
        cells += [formats.number(point[key]) for key in ("nats", passes, cost)]
        ratio = point[cost] / base[cost] if point[cost] is not None and base[cost] else None
        style = "bold green" if point["name"] == chosen else ""
        table.add_row(escape(name), *cells, formats.number(ratio), style=style)
    out().print(table)
    show_exit(result.chosen)


def show_exit(chosen: ExitChosen) -> None:
    """Print which exit was chosen, and what it does on the validation side."""
    out().print(escape(chosen.sentence()) + ".", soft_wrap=True)
    values = []
    for name, point in chosen.points.items():
        parts = [f"{formats.number(point['accuracy']['value'], percent=True)} % right"] if point["accuracy"] else []
        parts += [f"{formats.number(point['nats'])} nats a token"] if point["nats"] is not None else []
        cost, what = (point["mflop"], "an answer") if point["accuracy"] else (point["text_mflop"], "a token")
        values.append(f"{name} {', '.join([*parts, f'{formats.number(cost)} MFLOP {what}'])}")
    if values:
        out().print(f"Validation: {'; '.join(values)}.", soft_wrap=True)


def show_train(result: TrainResult) -> None:
    """Print what a training ended with."""
    if result.first_step == result.steps:
        out().print(f"The run was finished already at step {result.steps}.")
    rows = {"Run": result.run, "Steps": f"{result.steps:,}", "Training tokens": f"{result.tokens:,}"}
    rows["Training FLOPs"] = f"{result.flops:.3g}"
    rows["Training time"] = f"{result.seconds:.1f} s"
    _show_pairs(rows | {f"Last {name}": f"{value:.4f}" for name, value in result.losses.items()})


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


def show_costs(result: CostsResult) -> None:
    """Print the costs of every stage, times with their range, and those of smaller depths."""
    from rrcli.evaluation.metrics import metrics_of

    stages = result.costs["stages"]
    table = _stage_table("Cost", list(stages), wide=True, justify="right")
    for metric in metrics_of(*(stage["metrics"] for stage in stages.values())):
        found = [stage["metrics"].get(metric.name, {}) for stage in stages.values()]
        unit = f", {metric.unit}" if metric.unit else ""
        table.add_row(escape(metric.label + unit), *[_measured(entry) for entry in found])
        depths = [[e["value"] for e in stage["by_depth"].get(metric.name, ())] for stage in stages.values()]
        if any(depths):
            lines = [" / ".join(formats.number(value) for value in line) or "-" for line in depths]
            table.add_row("  by depth", *lines, style="dim")
    out().print(table)


def _measured(entry: Mapping[str, Any]) -> str:
    """Return a value, and the range of its rounds in a second line."""
    value = formats.number(entry.get("value"))
    if entry.get("low") is None:
        return value
    low, high = (formats.number(entry[name]) for name in ("low", "high"))
    return f"{value}\n[dim]{escape(f'[{low}, {high}]')}[/dim]"


def show_generation(result: GenerateResult, *, trace: bool) -> None:
    """Say what there is to know about a text; with a trace, say in one line how it came about."""
    if result.notice:
        err().print(f"[dim]{escape(result.notice)}[/dim]", soft_wrap=True)
    if not trace:
        return
    tokens = len(result.pieces)
    parts = [f"{result.stage}, depth {result.depth}", f"{tokens} tokens in {result.seconds:.1f} s"]
    if result.metrics:
        changed = sum(piece.changed for piece in result.pieces)
        parts.append(f"{result.metrics['avg_chunk_length']:.1f} committed per chunk")
        parts.append(f"{100 * result.metrics['commit_rate']:.0f} % of drafts whole")
        parts.append(f"{changed} changed by refining (underlined)")
    err().print(f"[dim]{escape('; '.join(parts))}[/dim]", soft_wrap=True)


def show_board(board: Board) -> None:
    """Print TensorBoard's address."""
    out().print(f"TensorBoard on [bold]{escape(str(board.log_dir))}[/bold]: [bold]{board.url}[/bold]", soft_wrap=True)
    out().print(f"From another machine: {escape(board.tunnel)}   (Ctrl-C stops it)", soft_wrap=True)


def show_board_check(found: Found) -> None:
    """Print the runs that TensorBoard shows and the tags of each, one a line."""
    for run, plugins in found.runs.items():
        counts = ", ".join(f"{len(tags)} {plugin}" for plugin, tags in plugins.items() if tags)
        out().print(f"[bold]{escape(run)}[/bold]: {counts or 'no data'}")
        for plugin, tags in plugins.items():
            for tag in tags:
                out().print(f"  {plugin:<10}  {escape(tag)}", soft_wrap=True)
    out().print(f"{len(found.runs)} runs in {escape(str(found.log_dir))}", soft_wrap=True)


def show_plan(steps: list[Step]) -> None:
    """Print what `rr run` would do."""
    table = Table(box=SIMPLE_HEAD)
    for name in ("", "Step", "Status", "Why"):
        table.add_column(name)
    for number, step in enumerate(steps, start=1):
        style = STATUS_STYLES[step.status]
        table.add_row(str(number), step.command, f"[{style}]{step.status}[/{style}]", escape(step.detail))
    out().print(table)


def show_status(status: Status) -> None:
    """Print the workspace, a line for each stage with its seeds and for each run, and the next command."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("Stage", no_wrap=True)
    table.add_column("Model", no_wrap=True)
    table.add_column("Results", no_wrap=True)
    for name in ("Step", "Size", "PPL", "Reas. %"):
        table.add_column(name, justify="right", no_wrap=True)
    marked = False
    lines = status.lines()
    for line in lines:
        states = [line.state(part) for part in ("model", "results")]
        shown = [f"[{STATUS_STYLES[state]}]{text}[/]" if text else "-" for text, state in states]
        cells = []
        for name, percent in (("perplexity", False), ("reasoning_accuracy", True)):
            value, during = line.metric(name)
            marked = marked or during
            cells.append(formats.number(value, percent=percent) + "*" * during)
        size = sum(member.bytes for member in line.members)
        table.add_row(escape(line.name), *shown, line.step, _bytes(size, digits=1) if size else "-", *cells)
    console = out()
    console.print(table)
    for line in lines:
        for detail in line.details():
            console.print(f"{escape(line.name)}: {escape(detail)}", soft_wrap=True)
    if len(status.seeds) > 1:
        console.print(f"Seeds {', '.join(map(str, status.seeds))}; metrics are their means", soft_wrap=True)
    if marked:
        console.print("[dim]* measured during training, on a sample[/dim]", soft_wrap=True)
    console.print(f"Next: [bold]{escape(status.next)}[/bold]", soft_wrap=True)


def comparison_text(comparison: Comparison, form: str) -> str:
    """Return a comparison as 'table', 'json', 'csv', 'markdown' or 'latex', without colour."""
    if form == "json":
        value = comparison.to_dict()
        return _json("comparison", {key: each for key, each in value.items() if key != "schema"}, value["schema"])
    if form in ("csv", "markdown", "latex"):
        from rrcli.comparison import written

        write = {"csv": written.csv_text, "markdown": written.markdown, "latex": written.latex}[form]
        return write(comparison)
    file = io.StringIO()
    show_comparison(comparison, Console(file=file, width=PIPED_WIDTH, highlight=False, no_color=True, emoji=False))
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


def show_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Print the table, the sentences, the warnings, the gates and the generations."""
    console = console or out()
    if comparison.broken_surgery:
        console.print(f"[bold red]{escape(comparison.broken_surgery)}[/bold red]")
    wide = console.width >= LABEL_WIDTH + STAGE_WIDTH * len(comparison.stages)
    width = None if wide else formats.narrow_width(console.width, len(comparison.stages))
    table = _stage_table("Metric", comparison.labels, wide, justify="right")
    for row in comparison.rows:
        label = formats.row_label(row)
        if not wide:
            label = label.replace("  ", " ", 1).replace(", ", "\n", 1)
        table.add_row(escape(label), *[_cell(cell, row, width) for cell in row.cells])
        for line in formats.own_lines(row, width=width):
            table.add_row(*line, style="dim")
    console.print(table)
    console.print(f"[dim]{escape(comparison.note)}[/dim]")
    for sentence in comparison.sentences:
        if sentence != comparison.broken_surgery:  # shown above
            console.print(f"- {escape(sentence)}")
    for warning in comparison.warnings:
        console.print(f"[yellow]warning:[/yellow] {escape(warning)}")
    for gate in comparison.gates:
        mark = "[green]holds[/green]" if gate.holds else "[red]does not hold[/red]"
        console.print(f"gate {escape(gate.gate)}: {mark} ({gate.left:.6g} and {gate.right:.6g})")
    if comparison.generations:
        table = _stage_table("Prompt", comparison.labels, wide, justify="left", lines=True)
        for generation in comparison.generations:
            table.add_row(escape(generation.prompt), *["-" if t is None else escape(t) for t in generation.texts])
        console.print(table)
    if comparison.flips is not None:
        _show_flips(comparison.flips, console)


def _show_flips(flips: Flips, console: Console) -> None:
    """Print the first problems that were fixed, and that were broken, with both answers."""
    from rrcli.comparison.flips import KINDS, SHOWN

    console.print(escape(flips.sentence()))
    for kind in KINDS:
        if not (found := flips.of(kind)):
            continue
        style = "green" if kind == "fixed" else "red"
        table = Table(box=SIMPLE_HEAD, title=f"[{style}]{kind}[/{style}]", title_justify="left", show_lines=True)
        names = ("Problem", "Expected", flips.views[flips.before].name, flips.views[flips.after].name)
        for name, share in zip(names, (4, 1, 2, 2), strict=True):
            table.add_column(escape(name), overflow="fold", ratio=share)
        for problem, before, after in found[:SHOWN]:
            texts = (problem.prompt, problem.expected, before.output, after.output)
            table.add_row(*[escape(_cut(text.strip("\n"))) for text in texts])
        console.print(table)
        if more := flips.more(kind):
            console.print(escape(more))


def _cut(text: str) -> str:
    """Return the end of a text that is too long for a cell: there a prompt asks its question."""
    return text if len(text) <= LONGEST_TEXT else f"…{text[-LONGEST_TEXT:]}"


def _stage_table(first: str, stages: list[str], wide: bool, *, justify: Any, lines: bool = False) -> Table:
    """Return an empty table with a column for each stage; a narrow one breaks their names at underscores."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1) if wide else 0, show_lines=lines, pad_edge=wide)
    table.add_column(first, overflow="fold", max_width=None if wide else formats.NARROW_LABEL)
    for stage in stages:
        table.add_column(escape(stage if wide else stage.replace("_", "_\n")), justify=justify, overflow="fold")
    return table


def _cell(cell: Cell, row: MetricRow, width: int | None) -> str:
    value, *interval = formats.value_lines(cell, row, width=width)
    lines = [value if cell.value is not None else f"[dim]{value}[/dim]", *[f"[dim]{escape(x)}[/dim]" for x in interval]]
    style = VERDICT_STYLES.get(cell.verdict, "dim")
    lines += [f"[{style}]{escape(x)}[/{style}]" for x in formats.difference_lines(cell, row, width=width)]
    return "\n".join(lines)


def _show_pairs(rows: dict[str, str]) -> None:
    table = Table(box=None, show_header=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, escape(value))
    out().print(table)


def _bytes(size: int, digits: int = 2) -> str:
    """Return bytes in the unit in which they are easiest to read."""
    value, units = float(size), iter(("B", "KiB", "MiB", "GiB"))
    unit = next(units)
    while value >= 1024 and unit != "GiB":
        value, unit = value / 1024, next(units)
    return f"{size:,} B" if unit == "B" else f"{value:,.{digits}f} {unit}"
