"""The results of stages as data frames: a row for each metric at each depth, or for each record."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rrcli.comparison import tables
from rrcli.comparison.curves import Curves
from rrcli.comparison.records import PARTS, difficulty_text
from rrcli.comparison.results import Results, Stage, Stages, seed_of
from rrcli.errors import RRError, UsageError, suggest
from rrcli.evaluation.metrics import metrics_of
from rrcli.recursion.exits import ExitRule
from rrcli.schemas import BY_DEPTH

if TYPE_CHECKING:
    from pandas import DataFrame

RESULTS = (
    *("stage", "seed", "metric", "label", "unit", "better", "depth", "exit", "final"),
    *("value", "low", "high", "n"),
)
CURVES = ("run", "tag", "step", "value")
# What every record has, and what those of each part have besides.
OF_ALL = ("stage", "seed", "part", "key", "depth", "exit")
OF_PART = {
    "documents": ("tokens", "bytes", "words", "nll", "hits", "passes"),
    "problems": (
        *("task", "difficulty", "question", "prompt", "answer", "output", "extracted", "correct", "strict", "score"),
        *("length", "ended", "lookup", "passes", "samples", "samples_right"),
    ),
    "generations": ("prompt", "text", "length", "finished", "distinct_2", "rep_4", "relevance"),
    "harness": ("task", "metric", "score", "target", "output"),
}
# Field of a record -> its column, where that has another name: of a document, `correct` is a number of tokens.
NAMES = {("documents", "correct"): "hits", ("problems", "outputs"): "output"}


def results_frame(stages: Stages) -> DataFrame:
    """Return a row for each metric of each stage, of each of its seeds, and at each depth that was measured.

    Columns: stage, seed, metric, label, unit, better ('lower', 'higher' or ''), depth, exit (the rule, if tokens left
    by one), final (whether this is the stage's own value; the others are at smaller depths, or without its exit),
    value, low, high (95 % interval, of costs the range of their rounds) and n (records).
    """
    found = [row for label, stage in stages.items() for run in stage.runs for row in _result_rows(label, run)]
    return tables.frame(found, RESULTS)


def samples_frame(label: str, stage: Stage, part: str = "", depth: int | None = None) -> DataFrame:
    """Return a row for each record of a stage: document, problem, generation, or sample of lm-eval.

    Args:
        part: 'documents', 'problems', 'generations' or 'harness', with the columns of that part; '' for all of them.
        depth: the depth at which documents and problems are looked at; None for the stage's own, with its exit.

    Raises:
        UsageError: there is no such part, or the stage was not measured at this depth. RRError: it has no such records.
    """
    if part and part not in OF_PART:
        raise UsageError(f"unknown part '{part}'", suggest(part, OF_PART))
    parts = [part] if part else [name for name in OF_PART if any(run["records"].get(name) for run in stage.runs)]
    found = [row for run in stage.runs for name in parts for row in _sample_rows(label, run, name, depth)]
    if not found:
        raise RRError(f"the results of {label} hold no {PARTS[part].noun if part else 'records'}")
    columns = dict.fromkeys([*OF_ALL, *(column for name in parts for column in OF_PART[name])])
    levels = [row["difficulty"] for row in found if row.get("difficulty") is not None]
    if all(isinstance(level, (int, float)) for level in levels):
        return tables.frame(found, columns, numbers=["difficulty"])
    # Some tasks name their difficulties, others number them: then all of them are texts.
    return tables.frame(
        [row | {"difficulty": difficulty_text(row.get("difficulty")) or None} for row in found], columns
    )


def curves_frame(curves: Mapping[str, Curves]) -> DataFrame:
    """Return a row for each point of training curves (tag -> run -> points)."""
    points = [
        {"run": run, "tag": tag, "step": step, "value": value}
        for tag, runs in curves.items()
        for run, line in runs.items()
        for step, value in line
    ]
    return tables.frame(sorted(points, key=lambda point: (point["run"], point["tag"])), CURVES)


def _result_rows(label: str, run: Results) -> Iterator[dict[str, Any]]:
    depth, rule = run["model"].get("depth") or 0, _exit(run)
    for metric in metrics_of(run["metrics"]):
        about = {"stage": label, "seed": seed_of(run), "metric": metric.name, "label": metric.label.strip()}
        about |= {"unit": metric.unit, "better": metric.better}
        for k, entry in enumerate(run.get("by_depth", {}).get(metric.name, ())):
            if k != depth or rule is not None:  # the last one is the stage's own, unless that has an exit
                yield about | entry | {"depth": k, "final": False}
        yield about | run["metrics"][metric.name] | {"depth": depth, "exit": rule, "final": True}


def _sample_rows(label: str, run: Results, part: str, depth: int | None) -> Iterator[dict[str, Any]]:
    own, rule = run["model"].get("depth") or 0, _exit(run)
    by_depth = BY_DEPTH.get(part, ())
    for record in run["records"].get(part, ()):
        lengths = {len(record[name]) for name in by_depth if name in record}
        if depth is not None and lengths and not 0 <= depth < min(lengths) - (rule is not None):
            raise UsageError(
                f"{label} was not measured at depth {depth}", f"Its depths are 0 to {min(lengths) - 1 - bool(rule)}."
            )
        row = {NAMES.get((part, name), name): value for name, value in record.items()}
        for name in by_depth:
            if name in record:
                row[NAMES.get((part, name), name)] = record[name][-1 if depth is None else depth]
        passes = row.pop("passes", None)
        if passes is not None and depth is None:
            row["passes"] = sum(passes) if isinstance(passes, list) else passes
        if sampled := row.pop("sampled", None):
            row |= {"samples": len(sampled), "samples_right": sum(answer["correct"] for answer in sampled)}
        row |= {"stage": label, "seed": seed_of(run), "part": part}
        yield (
            row
            | ({"depth": own if depth is None else depth} if by_depth else {"depth": own})
            | {"exit": rule if depth is None else None}
        )


def _exit(run: Results) -> str | None:
    chosen = run["model"].get("exit")
    return None if chosen is None else str(ExitRule.from_dict(chosen))
