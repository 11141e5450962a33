"""`rr compare --report`: a comparison as one HTML file that needs no network. Loads no torch.

The page is `report.html.j2`, which escapes every text; the charts are `charts`, the problems that flipped are shown by
`flip_browser`. Only that part needs a script.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import groupby
from pathlib import Path
from typing import Any

from rrcli.comparison import flip_browser, formats
from rrcli.comparison.comparison import Comparison
from rrcli.comparison.curves import Curves, read_curves
from rrcli.comparison.flips import flips_of
from rrcli.comparison.frontier import lines_of
from rrcli.comparison.results import Cell, MetricRow, Results, Stage, generations_of
from rrcli.errors import RRError, UsageError
from rrcli.evaluation.metrics import PERPLEXITY, REASONING_ACCURACY, TOKEN_ACCURACY
from rrcli.evaluation.seeds import across_seeds
from rrcli.evaluation.stats import CONFIDENCE, wilson

CHARTED = (PERPLEXITY, TOKEN_ACCURACY, REASONING_ACCURACY)
# Tags of the training curves, and their labels.
CURVE_LABELS = {
    "train/loss/final_ce": "loss of the last pass, nats",
    "train/loss/total": "total loss",
    "evaluation/during_training/perplexity": "perplexity of held-out text",
    "evaluation/during_training/reasoning_accuracy": "reasoning accuracy, %",
}
COST_LABELS = {"decode_flops_per_token": "MFLOP per new token", "time_per_output_token": "ms per new token"}


# Quality, cost and labels of the charts of exits.
EXIT_CHARTS = (
    ("accuracy", "mflop", "accuracy of answers, %", "MFLOP per answer"),
    ("accuracy", "passes", "accuracy of answers, %", "passes per token"),
    ("nats", "text_mflop", "nats per token", "MFLOP per token"),
)


@dataclass(frozen=True)
class Chart:
    """A drawing and its title; `svg` is an element that goes into the page as it is."""

    title: str
    svg: str


@dataclass(frozen=True)
class Section:
    """Charts of one kind.

    Attributes:
        about: what they show, in words. missing: shown instead if there are no charts.
    """

    title: str
    about: str
    charts: list[Chart]
    missing: str


def check_report_path(path: str) -> None:
    """Check that a report can be written, before anything is computed.

    Raises:
        UsageError: the file is not HTML. RRError: the libraries are not installed.
    """
    from importlib.util import find_spec

    if Path(path).suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--report is '{path}'", "Name an .html file; a browser prints it to PDF.")
    missing = [name for name in ("jinja2", "matplotlib") if find_spec(name) is None]
    if missing:
        raise RRError(f"a report needs {' and '.join(missing)}", "pip install 'rrcli[report]'")


def render(comparison: Comparison, logs: Path) -> str:
    """Return the report as HTML.

    Args:
        logs: TensorBoard's folder, for the training curves.
    """
    from importlib.resources import files

    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    source = files("rrcli.comparison").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["as_is"] = Markup  # made by `charts` and `flip_browser`, where text of users is escaped
    runs = [run for stage in comparison.stages for run in stage.runs]
    curves = read_curves(logs, dict.fromkeys(stage.name for stage in comparison.stages), CURVE_LABELS)
    flips, code = flips_of(comparison.stages), flip_browser.script()
    return environment.from_string(source).render(
        stages=comparison.labels,
        sentences=comparison.sentences,
        warnings=comparison.warnings,
        gates=comparison.gates,
        note=comparison.note,
        rows=[_table_row(row, comparison.labels) for row in comparison.rows],
        sections=_sections(comparison, curves),
        generations=[_marked(g.prompt, g.texts) for g in generations_of(comparison.stages)],
        flips=flips if flips.problems else None,
        flips_data=flip_browser.data(flips),
        script=code,
        policy=flip_browser.policy(code),
        provenance=_provenance(runs),
    )


# -- the table ---------------------------------------------------------------------------------------------------------


def _table_row(row: MetricRow, stages: Sequence[str]) -> dict[str, Any]:
    cells = [{"stage": stage} | _table_cell(cell, row) for stage, cell in zip(stages, row.cells, strict=True)]
    for cell, depths in zip(cells, row.depths or [[]] * len(cells), strict=True):
        cell["depths"] = formats.depth_line(depths, row)
    for cell, made in zip(cells, row.cells, strict=True):
        cell["seeds"] = formats.seed_line(made, row)
    label = formats.row_label(row)
    return {"name": row.metric.name, "label": label.strip(), "indented": label.startswith(" "), "cells": cells}


def _table_cell(cell: Cell, row: MetricRow) -> dict[str, Any]:
    value, *interval = formats.value_lines(cell, row)
    difference = formats.difference_lines(cell, row)
    if cell.verdict:
        difference = difference[:-1]
    verdict = {"class": cell.verdict.replace(" ", "-"), "verdict": cell.verdict}
    return {"raw": cell.value, "value": value, "lines": [*interval, *difference]} | verdict


# -- the charts --------------------------------------------------------------------------------------------------------


def _sections(comparison: Comparison, curves: dict[str, Curves]) -> list[Section]:
    from rrcli.comparison import charts

    stages = comparison.labels
    labels = {metric.name: ", ".join(filter(None, (metric.label, metric.unit))) for metric in CHARTED}
    named = dict(zip(stages, comparison.stages, strict=True))
    rows = {row.metric.name: row for row in comparison.rows}

    def stage_charts() -> Iterator[Chart]:
        for name, label in labels.items():
            cells = rows[name].cells if name in rows else []
            points = [charts.point({"value": c.value, "low": c.low, "high": c.high}) for c in cells]
            if any(points):
                yield Chart(label, charts.by_stage(points, stages, label))

    def depth_charts() -> Iterator[Chart]:
        for name, label in labels.items():
            row = rows.get(name)
            values = {label: _depths(stage, row, n) for n, (label, stage) in enumerate(named.items())}
            if any(len(line) > 1 for line in values.values()):
                yield Chart(label, charts.against(values, stages, "passes after pass 0", label, whole=True))

    def difficulty_charts() -> Iterator[Chart]:
        runs = [run for stage in comparison.stages for run in stage.runs]
        levels = sorted({r["difficulty"] for run in runs for r in _graded(run)}, key=_natural)
        label = labels[REASONING_ACCURACY.name]
        # One chart for each task, because a line from one task to another has no meaning.
        for words, group in groupby(levels, lambda level: _natural(level)[0]):
            same = list(group)
            values = {stage: _by_difficulty(measured, same) for stage, measured in named.items()}
            ticks = [str(level).removeprefix(words).strip() or str(level) for level in same]
            yield Chart(f"{label}: {words}" if words else label,
                        charts.against(values, stages, words or "difficulty", label, ticks=ticks))  # fmt: skip

    def cost_charts() -> Iterator[Chart]:
        for cost, x_label in COST_LABELS.items():
            for name in (REASONING_ACCURACY.name, PERPLEXITY.name):
                values: dict[str, list[tuple[float, Any]]] = {}
                for column, (label, stage) in enumerate(named.items()):
                    own = _cost(rows, column, cost, name)
                    line = _cost_by_depth(stage, rows, column, cost=cost, name=name)
                    values[label] = line or own
                    if line and stage.first["model"].get("exit"):
                        values[f"{label}:exit"] = own
                if any(values.values()):
                    title = f"{labels[name]} against {x_label}"
                    yield Chart(title, charts.against(values, list(values), x_label, labels[name]))

    def curve_charts() -> Iterator[Chart]:
        runs = [stage.name for stage in comparison.stages]
        for tag, label in CURVE_LABELS.items():
            if tag in curves:
                yield Chart(label, charts.training(curves[tag], runs, label))

    def exit_charts() -> Iterator[Chart]:
        for stage, frontier in comparison.frontiers.items():
            for quality, cost, y_label, x_label in EXIT_CHARTS:
                if lines := lines_of(frontier, quality, cost):
                    count = frontier["n"]["test"]["problems" if quality == "accuracy" else "tokens"]
                    what = "problems" if quality == "accuracy" else "tokens"
                    yield Chart(f"{stage}: {y_label} against {x_label}, {count:,} {what}",
                                charts.frontier(lines, x_label, y_label))  # fmt: skip

    exits = [
        Section("Exits", "When tokens stop being refined, on the test side; left is cheaper. Prefill and tokens "
                "that catch up are counted. A random exit has the histogram of passes of a threshold of 'probability'.",
                list(exit_charts()), ""),
    ]  # fmt: skip
    return [
        Section("By stage", "With 95 % intervals; the dotted line marks the value of the first stage.",
                list(stage_charts()), "No stage has perplexity or an accuracy."),
        Section("By depth", "Every stage with a recursion, measured with 0, 1, ... passes after pass 0.",
                list(depth_charts()), "No stage was measured at more than one depth."),
        Section("By difficulty", "Reasoning accuracy with 95 % intervals: Wilson's, or of the mean over seeds.",
                list(difficulty_charts()), "No problem in these results has a difficulty."),
        Section("Quality against cost",
                "A stage's depths from left to right, and the stage with its exit if it has one; left is cheaper. "
                "FLOPs and times are those of decoding.",
                list(cost_charts()), "No stage has both a quality and a cost ('rr costs' measures costs)."),
        *(exits if exits[0].charts else ()),
        Section("Training", "The thin line shows every step of the first seed, the strong line their moving average.",
                list(curve_charts()), "The log folder holds no training curves of these stages."),
    ]  # fmt: skip


def _depths(stage: Stage, row: MetricRow | None, column: int) -> list[tuple[float, Any]]:
    """Return a stage's values at depth 0, 1, ...: with their intervals, or, over several seeds, without."""
    from rrcli.comparison.charts import Point, point

    if len(stage.runs) > 1:
        values = row.depths[column] if row is not None and row.depths else []
        return [(float(depth), Point(value)) for depth, value in enumerate(values) if value is not None]
    entries = stage.first.get("by_depth", {}).get(row.metric.name, ()) if row is not None else ()
    points = [point(entry) for entry in entries]
    return [(float(depth), found) for depth, found in enumerate(points) if found is not None]


def _cost(rows: Mapping[str, MetricRow], column: int, cost: str, name: str) -> list[tuple[float, Any]]:
    from rrcli.comparison.charts import Point

    if cost not in rows or name not in rows:
        return []
    x, y = rows[cost].cells[column], rows[name].cells[column]
    return [] if x.value is None or y.value is None else [(x.value, Point(y.value, y.low, y.high))]


def _cost_by_depth(
    stage: Stage, rows: Mapping[str, MetricRow], column: int, *, cost: str, name: str
) -> list[tuple[float, Any]]:
    """Return (cost, quality) at depth 0, 1, ...; nothing for a stage with one depth."""
    costs = rows[cost].depths[column] if cost in rows and rows[cost].depths else []
    quality = dict(_depths(stage, rows.get(name), column))
    known = [(costs[k], quality.get(float(k))) for k in range(len(costs))]
    return [(x, y) for x, y in known if x is not None and y is not None] if len(costs) > 1 else []


def _graded(result: Results) -> list[dict[str, Any]]:
    return [r for r in result["records"].get("problems", ()) if r.get("difficulty") is not None]


def _natural(level: Any) -> tuple[str, float]:
    """Sort by the words and then by the number at the end of `chain_sum, num_terms 10`; bare numbers come first."""
    words, _, number = str(level).rpartition(" ")
    return (words, float(number)) if number.replace(".", "", 1).isdigit() else (str(level), 0.0)


def _by_difficulty(stage: Stage, levels: Sequence[Any]) -> list[tuple[float, Any]]:
    line = []
    for number, level in enumerate(levels):
        seeds = [
            {r["key"]: (float(r["correct"][-1]), 0.0, 1.0) for r in _graded(run) if r["difficulty"] == level}
            for run in stage.runs
        ]
        if len(seeds) == 1 and seeds[0]:
            hits = [hit for hit, *_ in seeds[0].values()]
            share = wilson(round(sum(hits)), len(hits))
            line.append((float(number), _share_point(share.value, share.low, share.high)))
        elif all(seeds):
            found = across_seeds(seeds, answers=True)
            low, high = found.interval(1 - CONFIDENCE) or (None, None)
            line.append((float(number), _share_point(found.value, low, high)))
    return line


def _share_point(value: float, low: float | None, high: float | None) -> Any:
    from rrcli.comparison.charts import Point

    if low is None or high is None:
        return Point(100 * value)
    return Point(100 * value, 100 * max(0.0, low), 100 * min(1.0, high))


# -- generations and provenance ----------------------------------------------------------------------------------------


def _marked(prompt: str, texts: Sequence[str | None]) -> dict[str, Any]:
    """Return the texts of the stages in pieces: (text, whether it differs from the first stage's text)."""
    first = _tokens(texts[0] or "")
    marked: list[list[tuple[str, bool]] | None] = []
    for text in texts:
        if text is None:
            marked.append(None)
            continue
        tokens = _tokens(text)
        pieces = list[tuple[str, bool]]()
        for kind, _, _, begin, end in SequenceMatcher(None, first, tokens, autojunk=False).get_opcodes():
            if begin < end:
                pieces.append(("".join(tokens[begin:end]), kind != "equal" and texts[0] is not None))
        marked.append(pieces)
    return {"prompt": prompt, "texts": marked}


def _tokens(text: str) -> list[str]:
    """Cut a text into words and punctuation marks, each with the space before it; joined, they are the text again."""
    return re.findall(r"\s*\w+|\s*[^\w\s]|\s+", text)


def _provenance(results: Sequence[Results]) -> list[tuple[str, list[str]]]:
    """Return the origin of each stage's results: (what, a text for each stage)."""
    columns = [_origin(result) for result in results]
    names = dict.fromkeys(name for column in columns for name in column)
    return [(name, [column.get(name, "-") for column in columns]) for name in names]


def _origin(result: Results) -> dict[str, str]:
    model, data, made = result["model"], result["data"], result["provenance"]
    recursion, training = model.get("recursion"), result.get("training") or {}
    found = {
        "Stage": result["stage"],
        "Measured": result.get("created"),
        "Model": model.get("source"),
        "Fingerprint": model.get("fingerprint"),
        "Parameters": f"{model['parameters']:,}" if "parameters" in model else None,
        "Recursion": ", ".join(f"{k} {v}" for k, v in recursion.items() if v is not None) if recursion else "none",
        "Depth": model.get("depth"),
        "Data": data.get("source"),
        "Data fingerprint": data.get("fingerprint"),
        "Documents": f"{data['documents']:,} of {data['held_out']:,}" if "documents" in data else None,
        "Tasks": ", ".join(data.get("tasks", ())) or None,
        "Training": ", ".join(f"{k} {formats.number(v)}" for k, v in training.items() if isinstance(v, (int, float))),
        "Seed": made.get("seed"),
        "Device": " ".join(str(made[key]) for key in ("device", "dtype") if key in made),
        "Hardware": made.get("hardware"),
        "Versions": ", ".join(f"{k} {v}" for k, v in ({"rr": made.get("rr", "?")} | made.get("versions", {})).items()),
        "Git commit": made.get("git_commit"),
    }
    return {name: str(value) for name, value in found.items() if value not in (None, "")}
