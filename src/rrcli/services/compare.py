"""`rr compare`: put stages side by side, with paired statistics, and say in words what is shown and what is noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rrcli import stats
from rrcli.errors import RRError, UsageError, suggest
from rrcli.metrics import METRICS, Metric, document_totals, from_ratio, task_labels
from rrcli.settings import STAGES, CompareSettings
from rrcli.store import finite, read_json
from rrcli.workspace import Workspace

Results = dict[str, Any]


@dataclass
class Cell:
    """One stage's value of one metric, and its difference to the first stage.

    Attributes:
        value, low, high: the metric with its interval (None where it was not measured).
        difference, difference_low, difference_high: paired; percent for perplexity and cost, points for shares.
        p_value: of "no difference", before and after Holm's correction.
        verdict: better, worse, within noise, same, not comparable, or '' (the first stage, costs).
    """

    value: float | None = None
    low: float | None = None
    high: float | None = None
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    p_value: float | None = None
    p_adjusted: float | None = None
    verdict: str = ""
    n: int = 0


@dataclass
class Row:
    """One metric over all stages."""

    name: str
    metric: Metric
    cells: list[Cell]


@dataclass
class Claim:
    """A difference that a sentence speaks about: `name` of `result` against `reference`."""

    what: str
    against: str
    name: str
    estimate: stats.Estimate
    result: Results
    reference: Results
    p_adjusted: float = 1.0


@dataclass
class Comparison:
    """Everything that `rr compare` shows."""

    stages: list[str]
    rows: list[Row]
    claims: list[Claim] = field(default_factory=list)
    sentences: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    alpha: float = 0.05

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "schema": 1,
            "kind": "comparison",
            "stages": self.stages,
            "alpha": self.alpha,
            "rows": [
                {"name": row.name, "label": row.metric.label, "unit": row.metric.unit, "better": row.metric.better}
                | {"cells": [vars(cell) for cell in row.cells]}
                for row in self.rows
            ],
            "claims": [
                finite(vars(claim.estimate))
                | {"what": claim.what, "metric": claim.name, "p_adjusted": claim.p_adjusted}
                for claim in self.claims
            ],
            "sentences": self.sentences,
            "warnings": self.warnings,
        }


def compare(settings: CompareSettings, names: Sequence[str], directory: Path) -> Comparison:
    """Compare stages with the first one named; with no name, every stage that was measured.

    Args:
        names: stage names, or paths of results files.

    Raises:
        UsageError: an unknown stage. RRError: a stage without results, or results that cannot be read.
    """
    workspace = Workspace(directory, settings)
    if not names:
        names = [stage for stage in STAGES if workspace.results_file(stage).exists()]
        if not names:
            raise RRError(f"{directory / settings.output_dir} holds no results", "'rr run' measures every stage.")
    results = [_read(workspace, name) for name in names]
    labels = [r["stage"] if name in STAGES else name for name, r in zip(names, results, strict=True)]
    rows = [Row(name, metric, _cells(name, metric, results)) for name, metric in _metrics_of(results).items()]
    rows = [row for row in rows if any(cell.value is not None for cell in row.cells)]
    stages = {r["stage"]: r for r in results}
    claims = _claims(stages)
    _correct(rows, claims, results, settings.alpha)
    comparison = Comparison(labels, rows + _training_rows(results), claims, alpha=settings.alpha)
    comparison.warnings = _warnings(labels, results)
    comparison.sentences = _sentences(stages, claims, settings.alpha)
    return comparison


def _read(workspace: Workspace, name: str) -> Results:
    if name in STAGES:
        file, maker = workspace.results_file(name), f"rr eval --stage {name}"
        if not file.exists():
            raise RRError(f"stage '{name}' was not measured: {file} is not there", f"'{maker}' measures it.")
    elif "/" in name or name.endswith(".json"):
        file, maker = workspace.directory / name, "rr eval"
        if not file.exists():
            raise UsageError(f"the results file {file} does not exist")
    else:
        raise UsageError(f"unknown stage '{name}'", suggest(name, STAGES))
    results = read_json(file, maker)
    missing = [key for key in ("stage", "metrics", "records", "model", "data", "provenance") if key not in results]
    if missing:
        raise RRError(f"{file} is no evaluation: it has no '{missing[0]}'", f"Make it anew with '{maker}'.")
    return results


def _metrics_of(results: list[Results]) -> dict[str, Metric]:
    """Return the metrics to show: the known ones, with each reasoning task behind the overall accuracy."""
    shown: dict[str, Metric] = {}
    for name, metric in METRICS.items():
        shown[name] = metric
        if name == "reasoning_accuracy":
            tasks = dict.fromkeys(k for r in results for k in r["metrics"] if k.startswith("reasoning_accuracy/"))
            if len(tasks) > 1:
                label = "  {}".format
                shown |= {key: Metric(label(key.partition("/")[2]), "%", "higher", "problems") for key in tasks}
    return shown


# -- cells -------------------------------------------------------------------------------------------------------------


def _cells(name: str, metric: Metric, results: list[Results]) -> list[Cell]:
    first, cells = results[0], []
    for number, result in enumerate(results):
        entry = result["metrics"].get(name)
        cell = (
            Cell() if entry is None else Cell(entry["value"], entry.get("low"), entry.get("high"), n=entry.get("n", 0))
        )
        if number and cell.value is not None and first["metrics"].get(name) is not None:
            _difference(cell, name, metric, result, first)
        cells.append(cell)
    return cells


def _difference(cell: Cell, name: str, metric: Metric, result: Results, first: Results) -> None:
    if metric.kind == "cost":
        reference = first["metrics"][name]["value"]
        if reference and cell.value is not None:
            cell.difference = 100 * (cell.value / reference - 1)
        return
    estimate, same = paired(name, metric, result, first)
    if estimate is None:
        cell.verdict = "not comparable"
        return
    scale = _scale(name, metric)
    cell.n, cell.p_value = estimate.n, estimate.p_value
    cell.difference, cell.difference_low, cell.difference_high = (
        scale(x) if math.isfinite(x) else None for x in (estimate.value, estimate.low, estimate.high)
    )
    cell.verdict = "same" if same else _direction(metric, estimate.value)


def paired(name: str, metric: Metric, result: Results, first: Results) -> tuple[stats.Estimate | None, bool]:
    """Estimate a metric's difference over the records that both results hold.

    Returns:
        (the estimate on the scale of the test: nats, shares or scores; None where the two cannot be paired), and
        whether every common record is identical.
    """
    if metric.kind == "documents":
        if name != "bits_per_byte" and result["model"]["tokenizer"] != first["model"]["tokenizer"]:
            return None, False
        a, b = document_totals(result["records"], name), document_totals(first["records"], name)
        keys = [key for key in b if key in a]
        if not keys:
            return None, False
        sizes = [b[key][1] for key in keys]
        totals, reference = [a[key][0] for key in keys], [b[key][0] for key in keys]
        return stats.paired_ratio_difference(totals, reference, sizes), totals == reference
    if metric.kind == "problems":
        task = name.partition("/")[2]
        a, b = (_answers(r, task) for r in (result, first))
        keys = [key for key in b if key in a]
        if not keys:
            return None, False
        hits, reference = [a[key][0] for key in keys], [b[key][0] for key in keys]
        same = all(a[key][1] == b[key][1] for key in keys)
        return stats.mcnemar(hits, reference), same
    a, b = ({r["key"]: r for r in x["records"].get("generations", ())} for x in (result, first))
    keys = [key for key in b if key in a]
    if not keys:
        return None, False
    same = all(a[key]["text"] == b[key]["text"] for key in keys)
    return stats.paired_bootstrap([a[key][name] for key in keys], [b[key][name] for key in keys]), same


def _answers(result: Results, task: str) -> dict[str, tuple[bool, str]]:
    labels = task_labels(r["task"] for r in result["records"].get("problems", ()))
    return {
        r["key"]: (bool(r["correct"][-1]), r["outputs"][-1])
        for r in result["records"].get("problems", ())
        if not task or labels[r["task"]] == task
    }


def _scale(name: str, metric: Metric) -> Any:
    """Return how a difference on the test's scale is shown: percent of perplexity, points, or the metric's own unit."""
    if name == "perplexity":
        return lambda nats: 100 * math.expm1(min(nats, 700))
    if metric.kind == "documents":
        return lambda ratio: from_ratio(name, ratio)
    return lambda share: 100 * share if metric.kind == "problems" else share


def _direction(metric: Metric, difference: float) -> str:
    if not metric.better or difference == 0:
        return "differs" if difference else "within noise"
    return "better" if (difference < 0) == (metric.better == "lower") else "worse"


def _correct(rows: list[Row], claims: list[Claim], results: list[Results], alpha: float) -> None:
    """Adjust all p-values together, and call what does not survive noise.

    A claim against the first stage is a cell of the table and shares its value; other claims join the family.
    """
    cells = [cell for row in rows for cell in row.cells if cell.p_value is not None]
    others = [claim for claim in claims if claim.reference is not results[0]]
    adjusted = stats.holm([x.p_value or 0.0 for x in (*cells, *(claim.estimate for claim in others))])
    for cell, p_value in zip(cells, adjusted, strict=False):
        cell.p_adjusted = p_value
        if cell.verdict != "same" and p_value > alpha:
            cell.verdict = "within noise"
    for claim, p_value in zip(others, adjusted[len(cells) :], strict=True):
        claim.p_adjusted = p_value
    for claim in claims:
        if claim.reference is results[0]:
            row = next(row for row in rows if row.name == claim.name)
            column = next(i for i, result in enumerate(results) if result is claim.result)
            claim.p_adjusted = row.cells[column].p_adjusted or 0.0


def _training_rows(results: list[Results]) -> list[Row]:
    rows = []
    for key, label, unit, scale in (
        ("tokens", "Training tokens", "k", 1e3),
        ("seconds", "Training time", "s", 1.0),
        ("flops", "Training FLOPs", "T", 1e12),
    ):
        cells = [Cell(value=r["training"][key] / scale if r.get("training") else None) for r in results]
        if any(cell.value is not None for cell in cells):
            rows.append(Row(f"training_{key}", Metric(label, unit, "", "cost"), cells))
    return rows


# -- words -------------------------------------------------------------------------------------------------------------


def _warnings(labels: list[str], results: list[Results]) -> list[str]:
    first, warnings = results[0], []
    for label, result in zip(labels[1:], results[1:], strict=True):
        pairs = {
            "data": (result["data"]["fingerprint"], first["data"]["fingerprint"]),
            "seed": (result["provenance"]["seed"], first["provenance"]["seed"]),
            "dtype": (result["provenance"]["dtype"], first["provenance"]["dtype"]),
            "device": (result["provenance"]["device"], first["provenance"]["device"]),
            "tokenizer": (result["model"]["tokenizer"], first["model"]["tokenizer"]),
            "versions": (result["provenance"]["versions"], first["provenance"]["versions"]),
        }
        for name in ("max_length", "stride", "max_new_tokens", "chat_template"):
            pairs[name] = tuple(r.get("settings", {}).get(name) for r in (result, first))
        differ = [name for name, (a, b) in pairs.items() if a != b]
        if differ:
            told = [f"{name} ({pairs[name][1]} and {pairs[name][0]})" if name in ("seed", "dtype", "device") else name
                    for name in differ]  # fmt: skip
            warnings.append(f"{labels[0]} and {label} were measured with different {', '.join(told)}")
    return warnings


def _claims(stages: dict[str, Results]) -> list[Claim]:
    """Return the differences that the sentences speak about: fine-tuning, and recursion beyond it."""
    pairs = [("Fine-tuning without recursion", "finetuned_vanilla", "baseline", "the baseline")]
    if {"finetuned_vanilla", "finetuned_recursive"} <= stages.keys():
        words = ("Recursion, beyond fine-tuning", "vanilla fine-tuning")
        pairs.append((words[0], "finetuned_recursive", "finetuned_vanilla", words[1]))
    else:
        pairs.append(("Recursive fine-tuning", "finetuned_recursive", "baseline", "the baseline"))
    claims = []
    for what, stage, reference, against in pairs:
        if {stage, reference} <= stages.keys():
            result, other = stages[stage], stages[reference]
            for name in ("reasoning_accuracy", "perplexity"):
                if name in result["metrics"] and name in other["metrics"]:
                    estimate, _ = paired(name, METRICS[name], result, other)
                    if estimate is not None:
                        claims.append(Claim(what, against, name, estimate, result, other))
    return claims


def _sentences(stages: dict[str, Results], claims: list[Claim], alpha: float) -> list[str]:
    said = []
    if {"baseline", "after_surgery"} <= stages.keys():
        said.append(_preserved(stages["after_surgery"], stages["baseline"]))
    said += [_tell(claim, alpha) for claim in claims]
    if {"finetuned_vanilla", "finetuned_recursive"} <= stages.keys():
        said += _cost(stages["finetuned_recursive"], stages["finetuned_vanilla"])
    elif {"baseline", "finetuned_recursive"} <= stages.keys():
        said.append("What recursion adds to fine-tuning needs stage finetuned_vanilla beside it.")
    return said


def _preserved(after: Results, base: Results) -> str:
    checked, worst = [], 0.0
    for kind, name, noun in (
        ("documents", "perplexity", "documents' log-probabilities"),
        ("problems", "reasoning_accuracy", "problems' answers"),
        ("prompts", "length", "generations"),
    ):
        estimate, same = paired(name, METRICS[name], after, base)
        if estimate is None:
            continue
        checked.append((same, f"{estimate.n} {noun}"))
        if kind == "documents":
            worst = abs(estimate.value)
    if not checked:
        return "Whether surgery preserved the baseline cannot be told: the two stages share no record."
    listed = ", ".join(noun for _, noun in checked)
    if all(same for same, _ in checked):
        return f"Surgery preserved the baseline exactly: {listed} are identical."
    changed = ", ".join(noun for same, noun in checked if not same)
    return f"Surgery did NOT preserve the baseline: {changed} differ (ln perplexity by {worst:.2g})."


def _tell(claim: Claim, alpha: float) -> str:
    metric, scale, estimate = METRICS[claim.name], _scale(claim.name, METRICS[claim.name]), claim.estimate
    unit = "%" if claim.name == "perplexity" else "points"
    before, after = (r["metrics"][claim.name]["value"] for r in (claim.reference, claim.result))
    values = f"{before:.4g} -> {after:.4g}{' %' if metric.unit else ''}"
    interval = f"{scale(estimate.value):+.1f} {unit} [{_bound(scale, estimate.low)}, {_bound(scale, estimate.high)}]"
    facts = f"{values}, {interval}, {_p(claim.p_adjusted)}, n = {estimate.n}"
    if claim.p_adjusted <= alpha:
        direction = _direction(metric, estimate.value)
        return f"{claim.what}: {metric.label.lower()} is {direction} than {claim.against}'s, {facts}."
    text = f"{claim.what}: no effect on {metric.label.lower()} is shown, {facts}."
    if claim.name == "reasoning_accuracy":
        a, b = _answers(claim.result, ""), _answers(claim.reference, "")
        discordant = sum(a[key][0] != b[key][0] for key in b if key in a) / estimate.n
        needed = stats.problems_needed(estimate.value, discordant, alpha)
        if needed is not None:
            text += f" A difference of this size would take about {needed:,} problems to show."
    return text


def _cost(result: Results, reference: Results) -> list[str]:
    factors = []
    for name, label in (("flops_per_token", "FLOPs per token"), ("time_per_output_token", "time per output token")):
        if name in result["metrics"] and (reference["metrics"].get(name) or {}).get("value"):
            factors.append(
                f"{result['metrics'][name]['value'] / reference['metrics'][name]['value']:.2f} x the {label}"
            )
    if result.get("training") and (reference.get("training") or {}).get("flops"):
        factors.append(f"{result['training']['flops'] / reference['training']['flops']:.2f} x the training FLOPs")
    return [f"What recursion costs against vanilla: {', '.join(factors)}."] if factors else []


def _bound(scale: Any, value: float) -> str:
    return f"{scale(value):+.1f}" if math.isfinite(value) else "?"


def _p(p: float) -> str:
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.4f}"
