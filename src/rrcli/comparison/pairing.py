"""Computes the cells of a comparison: a stage's value of a metric, and its difference to another stage.

Records are paired by key within a seed. A stage of one training speaks by its units alone; several trainings are a
second random factor (`evaluation.seeds`). A stage that needs no training, as the baseline, is paired with every seed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rrcli.comparison.records import PARTS
from rrcli.comparison.results import Cell, Pair, Results, Stage, Stages
from rrcli.evaluation.metrics import Metric, Record, is_cost
from rrcli.evaluation.paired import Evidence, PairedAnswers, PairedTotals
from rrcli.evaluation.seeds import Unit, across_seeds
from rrcli.evaluation.stats import CONFIDENCE, LEAST_UNITS, Estimate


class Cells:
    """The cells of a comparison, each made once."""

    def __init__(self, stages: Stages) -> None:
        """Take label -> stage."""
        self.stages = stages
        self._made: dict[tuple[str, str, str], Cell] = {}

    def of(self, metric: Metric, stage: str, reference: str) -> Cell:
        """Return a stage's cell of a metric, with its difference to the reference stage."""
        key = metric.name, stage, reference
        if key not in self._made:
            self._made[key] = _cell(metric, self.stages[stage], self.stages[reference])
        return self._made[key]


def pair(metric: Metric, stage: Stage, reference: Stage) -> Pair:
    """Collect what the records that both stages have say about their difference, `stage` minus `reference`.

    There is no evidence if they have no record in common, if a record with the same key has different content, or, for
    metrics per token, if the tokenizers differ.
    """
    part = PARTS[metric.part]
    fields = [field for field in part.identity if field != "tokens" or metric.per_token]
    shared, same = Pair(seeds=0), True
    units: list[dict[str, Unit]] = []
    runs = _runs(stage, reference)
    for run, other in runs:
        mine, theirs = (metric.records(r["records"]) for r in (run, other))
        keys = [key for key in theirs if key in mine]
        conflicts = sum(any(mine[key].get(f) != theirs[key].get(f) for f in fields) for key in keys)
        foreign = metric.per_token and run["model"]["tokenizer"] != other["model"]["tokenizer"]
        shared = replace(
            shared,
            seeds=shared.seeds + 1,
            common=shared.common + len(keys),
            # A reference that needs no training was measured once, on the records of all seeds.
            of=shared.of + (len(keys) if len(runs) > 1 and len(reference.runs) == 1 else len(theirs)),
            others=shared.others + len(mine),
            conflicts=shared.conflicts + conflicts,
        )
        if keys and not conflicts and not foreign:
            units.append({key: _unit(metric, mine[key], theirs[key]) for key in keys})
            same = same and all(_outcome(metric, mine[key]) == _outcome(metric, theirs[key]) for key in keys)
    if not runs or len(units) < len(runs):
        return shared
    return replace(shared, evidence=_evidence(metric, units), same=same)


def _runs(stage: Stage, reference: Stage) -> list[tuple[Results, Results]]:
    """Return which training is paired with which: those of the same seed, or all with one that needs no training."""
    if len(reference.runs) == 1 or len(stage.runs) == 1:
        return [(run, other) for run in stage.runs for other in reference.runs]
    return [(run, reference.by_seed[seed]) for seed, run in stage.by_seed.items() if seed in reference.by_seed]


def _outcome(metric: Metric, record: Record) -> Any:
    """Return what a stage made of a record, at its own depth."""
    if metric.samples:
        return [answer["output"] for answer in record["sampled"]]
    return PARTS[metric.part].outcome(record)[-1]


def _unit(metric: Metric, record: Record, other: Record) -> Unit:
    # A metric per token is paired only if both stages count the same tokens; bytes are those of the text.
    return metric.score(record), metric.score(other), float(other[metric.size]) if metric.size else 1.0


def _evidence(metric: Metric, seeds: Sequence[Mapping[str, Unit]]) -> Evidence:
    answers = metric.test != "ratio" and all(x in (0, 1) and y in (0, 1) for seed in seeds for x, y, _ in seed.values())
    if len(seeds) > 1:
        return across_seeds(seeds, answers=answers)
    x, y, sizes = zip(*seeds[0].values(), strict=True)
    return PairedAnswers.of([v > 0 for v in x], [v > 0 for v in y]) if answers else PairedTotals(x, y, sizes)


def _cell(metric: Metric, stage: Stage, reference: Stage) -> Cell:
    cell = _own(metric, stage)
    other = reference.value(metric)
    if stage is reference or cell.value is None or other is None:
        return cell
    if metric.part:
        found = pair(metric, stage, reference)
        if found.of or found.others:  # lm-eval's metrics of a whole group have no records
            _differ(cell, metric, found)
    elif metric.relative:
        cell.difference = 100 * (cell.value / other - 1) if other else None
    return cell


def _own(metric: Metric, stage: Stage) -> Cell:
    """Return a stage's own value with its interval."""
    entries = [run["metrics"].get(metric.name) or {} for run in stage.runs]
    values = [entry.get("value") for entry in entries]
    if len(entries) == 1 or (stage.shared_costs and is_cost(metric.name)):
        return Cell(values[0], entries[0].get("low"), entries[0].get("high"), n=entries[0].get("n", 0))
    cell = Cell(metric.middle(values), by_seed=values, n=sum(entry.get("n", 0) for entry in entries))
    if cell.value is None:
        return cell
    if metric.test:
        units = [
            {key: (metric.score(r), 0.0, float(r[metric.size]) if metric.size else 1.0)
             for key, r in metric.records(run["records"]).items()}
            for run in stage.runs
        ]  # fmt: skip
        if all(units):
            found = across_seeds(units, answers=metric.test == "mcnemar")
            low, high = found.interval(1 - CONFIDENCE) or (None, None)
            entry = metric.entry(Estimate(found.value, low, high, found.n))
            cell.low, cell.high, cell.n = entry["low"], entry["high"], entry["n"]
    elif metric.relative:
        bounds = [entry.get(name, entry["value"]) for entry in entries for name in ("low", "high")]
        cell.low, cell.high = min(bounds), max(bounds)
    return cell


def _differ(cell: Cell, metric: Metric, found: Pair) -> None:
    cell.pair, evidence = found, found.evidence
    if evidence is None:
        cell.verdict = "not comparable"
        return
    cell.n, cell.difference = evidence.n, metric.shown_difference(evidence.value)
    if metric.test:
        cell.difference_low, cell.difference_high = shown_interval(metric, evidence, 1 - CONFIDENCE)
    if found.same:
        cell.verdict = "same"
    elif metric.test and evidence.n < LEAST_UNITS:
        cell.verdict = "too few"
    elif metric.test:
        cell.role, cell.p_value = "exploratory", evidence.p_value()


def shown_interval(metric: Metric, evidence: Evidence, alpha: float) -> tuple[float | None, float | None]:
    """Return the interval of a difference in the unit in which it is shown; None for bounds that are not known."""
    found = evidence.interval(alpha)
    if found is None:
        return None, None
    if metric.scale == "percent":  # two or three seeds may leave room for more than there is between two shares
        found = max(-1.0, found[0]), min(1.0, found[1])
    low, high = (metric.shown_difference(x) if math.isfinite(x) else None for x in found)
    return low, high
