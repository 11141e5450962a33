"""Writes the numbers of a comparison as text: a value, a difference, an interval, a line of depths.

`ui` draws the table of the terminal from the same texts and adds colour; `written` makes documents of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rrcli.comparison.results import Cell, MetricRow

# Widths of a narrow table: of the names of the metrics, and of the widest column of a stage.
NARROW_LABEL, NARROW_WIDTH = 14, 15


def narrow_width(width: int, stages: int) -> int:
    """Return how wide a stage's column can be in a narrow table of this width: 15 for four stages in 80 characters."""
    return max(8, min(NARROW_WIDTH, (width - NARROW_LABEL - 2) // stages - 1))


def number(value: float | None, *, percent: bool = False) -> str:
    """Write a value with three or four digits; a percentage with one decimal."""
    if value is None:
        return "-"
    size = abs(value)
    if size >= 1000 or isinstance(value, int):
        return f"{value:,.0f}"
    if percent or size >= 100:
        return f"{value:.1f}"
    return f"{value:.2f}" if size >= 1 else f"{value:.3f}"


def signed(value: float, *, percent: bool = False) -> str:
    """Write a difference with its sign."""
    return f"{'+' if value >= 0 else '−'}{number(abs(value), percent=percent)}"


def row_label(row: MetricRow) -> str:
    """Return a metric's name, unit, and the direction that is better."""
    arrow = {"lower": " ↓", "higher": " ↑"}.get(row.metric.better, "")
    unit = f", {row.metric.unit}" if row.metric.unit else ""
    return f"{row.metric.label}{unit}{arrow}"


def value_lines(cell: Cell, row: MetricRow, *, width: int | None = None) -> list[str]:
    """Return a cell's value and, if no difference is shown after it, its interval."""
    if cell.value is None:
        return ["-"]
    percent = row.metric.unit == "%"
    value = number(cell.value, percent=percent)
    if cell.low is None or cell.high is None or cell.difference_low is not None or cell.verdict:
        return [value]
    return [value, _interval(number(cell.low, percent=percent), number(cell.high, percent=percent), width)]


def difference_lines(cell: Cell, row: MetricRow, *, width: int | None = None) -> list[str]:
    """Return a cell's difference to the first stage with its interval, and its verdict or its uncorrected p-value."""
    if cell.verdict == "same" or cell.difference is None:
        return [cell.verdict] if cell.verdict else []
    percent = row.metric.relative or row.metric.unit == "%"
    lines = [signed(cell.difference, percent=percent) + (" %" if row.metric.relative else "")]
    if cell.difference_low is not None and cell.difference_high is not None:
        low, high = (signed(bound, percent=percent) for bound in (cell.difference_low, cell.difference_high))
        interval = _interval(low, high, width)
        lines = [f"{lines[0]} {interval}"] if width is None else [*lines, interval]
    last = cell.verdict or (p_text(cell.p_value) if cell.p_value is not None else "")
    return [*lines, last] if last else lines


def p_text(p: float) -> str:
    """Write a p-value."""
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.4f}"


def _interval(low: str, high: str, width: int | None) -> str:
    """Write an interval; in a narrow table, a long one gets a line break between its bounds."""
    if width is None:
        return f"[{low}, {high}]"
    fits = len(low) + len(high) + 3 <= width and "," not in low + high
    return f"[{low},{high}]" if fits else f"[{low},\n{high}]"


def depth_line(depths: list[float | None], row: MetricRow, *, width: int | None = None) -> str:
    """Return a stage's values at depth 0, 1, ... in one line, or nothing if it has only one."""
    return _joined(depths, row, width=width)


def seed_line(cell: Cell, row: MetricRow, *, width: int | None = None) -> str:
    """Return the values of a stage's trainings in one line, or nothing if it was trained once."""
    return _joined(cell.by_seed, row, width=width)


def _joined(found: list[float | None], row: MetricRow, *, width: int | None) -> str:
    if len(found) < 2 or all(value is None for value in found):
        return ""
    values = [number(value, percent=row.metric.unit == "%") for value in found]
    line = (" / " if width is None else "/").join(values)
    return line if width is None or len(line) <= width else "\n".join(values)


def line_label(row: MetricRow, what: str) -> str:
    """Return the label of a line of depths, or of seeds."""
    indent = " " * (len(row.metric.label) - len(row.metric.label.lstrip()))
    return f"{indent}  by {what}"


def own_lines(row: MetricRow, *, width: int | None = None) -> list[list[str]]:
    """Return the lines below a metric's own, with their label: the values of each seed, and at each depth."""
    seeds = [seed_line(cell, row, width=width) for cell in row.cells]
    depths = [depth_line(depths, row, width=width) for depths in row.depths]
    found = [[line_label(row, what), *line] for what, line in (("seed", seeds), ("depth", depths))]
    return [line for line in found if any(line[1:])]
