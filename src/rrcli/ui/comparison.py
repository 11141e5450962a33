"""What `rr compare` and `rr costs` show: a column for each stage."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from rrcli.comparison import formats
from rrcli.ui.console import PIPED_WIDTH, escape, json_line, out

if TYPE_CHECKING:
    from rrcli.comparison.comparison import Comparison
    from rrcli.comparison.flips import Flips
    from rrcli.comparison.results import Cell, MetricRow
    from rrcli.services.costs import CostsResult

# Columns that a stage needs for a difference beside its interval, and the names of the metrics.
STAGE_WIDTH, LABEL_WIDTH = 25, 20
# Characters of a prompt or an answer that are shown.
LONGEST_TEXT = 400
VERDICT_STYLES = {"better": "green", "not worse": "green", "worse": "red", "equivalent": "cyan", "same": "cyan"}
VERDICT_STYLES |= {"inconclusive": "yellow", "not comparable": "yellow", "too few": "yellow"}


def comparison_text(comparison: Comparison, form: str) -> str:
    """Return a comparison as 'table', 'json', 'csv', 'markdown' or 'latex', without colour."""
    if form == "json":
        value = comparison.to_dict()
        return json_line("comparison", {key: each for key, each in value.items() if key != "schema"}, value["schema"])
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
