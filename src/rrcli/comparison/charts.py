"""The report's charts as SVG, drawn by matplotlib. Loads no torch.

Colours are written as CSS variables (`var(--ink)`, `var(--series-0)`, ...), so that the page that holds a chart gives
it a light, a dark and a printed palette. Series differ in marker and line style too, not in colour alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from typing import Any

from rrcli.comparison.curves import Curves

MARKERS, LINES = "osD^vPX*", ("-", "--", "-.", ":")
SERIES = 6
# Placeholders that matplotlib accepts as colours; `_svg` replaces them with CSS variables.
INK, GRID = "#0a00f1", "#0b00f1"
# Inches of 72 points each: as wide as a phone, so that text is never made much smaller.
WIDTH, HEIGHT = 5.0, 3.1
# The share of a moving average that a training curve keeps at each of its points.
SMOOTHING = 0.9


@dataclass(frozen=True)
class Point:
    """A value with its interval, if it has one."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def reach(self) -> tuple[float, float]:
        """How far the interval goes below and above the value."""
        if self.low is None or self.high is None:
            return 0.0, 0.0
        return max(0.0, self.value - self.low), max(0.0, self.high - self.value)


def point(entry: Mapping[str, Any] | None) -> Point | None:
    """Return a metric of a results file as a point; None if it was not measured or is not finite."""
    if entry is None or entry.get("value") is None:
        return None
    return Point(entry["value"], entry.get("low"), entry.get("high"))


def by_stage(points: Sequence[Point | None], stages: Sequence[str], label: str) -> str:
    """Draw one value for each stage with its interval; a dotted line marks the first stage's value."""
    with _figure(f"stage {label}", height=0.55 + 0.42 * len(stages)) as (figure, axes):
        for number, found in enumerate(points):
            if found is not None:
                _mark(axes, [found.value], [number], number, xerr=[found])
        if points[0] is not None:
            axes.axvline(points[0].value, color=GRID, linestyle=":", zorder=0)
        axes.set_yticks(range(len(stages)), [_short(stage) for stage in stages])
        axes.set_ylim(len(stages) - 0.5, -0.5)
        axes.set_xlabel(label)
        return _svg(figure, f"stage {label}")


def against(
    lines: Mapping[str, Sequence[tuple[float, Point]]],
    stages: Sequence[str],
    x_label: str,
    label: str,
    *,
    ticks: Sequence[str] = (),
    whole: bool = False,
    joined: bool = True,
) -> str:
    """Draw values over x (a depth, a difficulty, a cost), a line for each stage.

    Args:
        lines: stage -> (x, value). ticks: names for x = 0, 1, ...
        whole: mark only whole numbers on the x axis. joined: connect the values of a stage.
    """
    from matplotlib.ticker import MaxNLocator

    name = f"{x_label} {label}"
    with _figure(name) as (figure, axes):
        for number, stage in enumerate(stages):
            if found := lines.get(stage):
                # Shifted a little, so that the intervals of several stages do not cover each other.
                shift = 0.04 * (number - (len(stages) - 1) / 2) if ticks or whole else 0.0
                xs, values = [x + shift for x, _ in found], [value for _, value in found]
                if joined:
                    axes.plot(xs, [v.value for v in values], LINES[number % len(LINES)], color=_series(number))
                _mark(axes, xs, [v.value for v in values], number, yerr=values, label=_short(stage))
        if ticks:
            axes.set_xticks(range(len(ticks)), ticks)
        elif whole:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel(x_label)
        axes.set_ylabel(label)
        _legend(figure, axes)
        return _svg(figure, name)


def frontier(lines: Mapping[str, Sequence[tuple[float, float]]], x_label: str, label: str) -> str:
    """Draw one line for each exit rule: (cost, quality) of its thresholds, joined from cheap to dear."""
    name = f"exits {x_label} {label}"
    with _figure(name, height=HEIGHT + 0.6) as (figure, axes):
        for number, (rule, points) in enumerate(lines.items()):
            xs, ys = zip(*points, strict=True)
            axes.plot(
                xs, ys, LINES[number % len(LINES)], marker=MARKERS[number % len(MARKERS)], markersize=4.5,
                color=_series(number), label=rule,
            )  # fmt: skip
        axes.set_xlabel(x_label)
        axes.set_ylabel(label)
        _legend(figure, axes)
        return _svg(figure, name)


def training(curves: Curves, stages: Sequence[str], label: str) -> str:
    """Draw the curve of each run over its steps: a thin line for the values, a strong one for their moving average."""
    with _figure(f"training {label}") as (figure, axes):
        for run, points in curves.items():
            number = stages.index(run) if run in stages else len(stages)
            steps, values = zip(*points, strict=True)
            few = len(points) <= 20
            style = {"color": _series(number), "linestyle": LINES[number % len(LINES)], "label": _short(run)}
            if few:
                axes.plot(steps, values, marker=MARKERS[number % len(MARKERS)], **style)
            else:
                axes.plot(steps, values, color=_series(number), alpha=0.35, linewidth=0.8)
                axes.plot(steps, smoothed(values), **style)
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        _legend(figure, axes)
        return _svg(figure, f"training {label}")


def smoothed(values: Sequence[float], keep: float = SMOOTHING) -> list[float]:
    """Return the exponential moving average, corrected for its start (as Adam does, Kingma & Ba 2015)."""
    mean, averages = 0.0, []
    for number, value in enumerate(values, start=1):
        mean = keep * mean + (1 - keep) * value
        averages.append(mean / (1 - keep**number))
    return averages


# -- how every chart looks ---------------------------------------------------------------------------------------------


@contextmanager
def _figure(name: str, height: float = HEIGHT) -> Iterator[tuple[Any, Any]]:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none",  # text stays text in the SVG
        "svg.hashsalt": name,  # the same chart gives the same file
        "font.family": "sans-serif",
        "font.size": 10,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": GRID,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.grid": True,
        "grid.color": GRID,
        "grid.alpha": 0.4,
        "grid.linewidth": 0.6,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "lines.linewidth": 1.6,
        "text.parse_math": False,  # a stage's name is not a formula
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        yield figure, figure.add_subplot()


def _mark(axes: Any, x: Sequence[float], y: Sequence[float], number: int, label: str = "", **errors: Any) -> None:
    """Draw markers with their intervals."""
    reach = {axis: list(zip(*[found.reach for found in points], strict=True)) for axis, points in errors.items()}
    axes.errorbar(
        x, y, fmt=MARKERS[number % len(MARKERS)], color=_series(number), markersize=6.5, capsize=3, linestyle="none",
        label=label or None, **reach,
    )  # fmt: skip


def _legend(figure: Any, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        figure.legend(handles, labels, loc="outside upper left", ncols=2, frameon=False, fontsize=9)


def _series(number: int) -> str:
    return f"#0{number % SERIES}00f0"


def _short(stage: str) -> str:
    """Return a short name for a stage: without folder and `.json`, and at most 24 characters."""
    name = stage.rpartition("/")[2].removesuffix(".json")
    return name if len(name) <= 24 else f"{name[:23]}…"


def _svg(figure: Any, name: str) -> str:
    """Return the figure as an `<svg>` element: with CSS variables as colours, and ids that no other chart has."""
    file = StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    own = "c" + re.sub(r"\W+", "-", name)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{own}-", text)
    text = text.replace(INK, "var(--ink)").replace(GRID, "var(--grid)")
    text = re.sub(r"#0(\d)00f0", r"var(--series-\1)", text)
    # The page sets the width; the view box keeps the proportions.
    return re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', text, count=1)
