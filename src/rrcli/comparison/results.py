"""The values that `rr compare` computes: pairs, cells, rows, claims, and the comparison as a whole. Data only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rrcli import schemas
from rrcli.errors import RRError
from rrcli.evaluation.metrics import Metric
from rrcli.evaluation.stats import Estimate
from rrcli.files import finite, read_json

# The content of a results file.
Results = dict[str, Any]


@dataclass(frozen=True)
class Pair:
    """The difference of one metric between a stage and a reference stage, over the records that both hold.

    Attributes:
        estimate: on the scale of the test (nats, shares, scores); None if the two stages cannot be paired.
        same: whether all records have the same outcome in both stages.
        discordant: the share of problems that exactly one of the two stages solves.
        common, of, others: number of records in both stages, in the reference, and in the other stage.
        conflicts: number of records with the same key but of different content (`Part.identity`).
    """

    estimate: Estimate | None = None
    same: bool = False
    discordant: float = 0.0
    common: int = 0
    of: int = 0
    others: int = 0
    conflicts: int = 0


@dataclass
class Cell:
    """One stage's value of one metric, and its difference to a reference stage; in a table, that is the first stage.

    Attributes:
        value, low, high: the metric with its interval (None where it was not measured).
        difference, difference_low, difference_high: with its interval, over the records in both stages; in percent for
            perplexity and costs, in points for shares, else in the metric's unit.
        p_value, p_adjusted: of the hypothesis "no difference", before and after Holm's correction.
        verdict: better, worse, differs, within noise, same, not comparable, no claim (it rests on a broken surgery), or
            '' (the first stage, costs).
        n: number of records that the difference is computed from.
        pair: the records and estimate that the difference comes from; None for the first stage and for costs.
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
    pair: Pair | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {name: value for name, value in vars(self).items() if name != "pair"}


@dataclass
class MetricRow:
    """One metric over all stages.

    Attributes:
        cells: one for each stage.
        depths: each stage's values at depth 0, 1, ...; empty if no stage was measured at more than one depth.
    """

    metric: Metric
    cells: list[Cell]
    depths: list[list[float | None]] = field(default_factory=list)


@dataclass(frozen=True)
class Claim:
    """A difference that a sentence speaks about.

    Attributes:
        what: what makes the difference, in words. against: the reference stage, in words.
        before: the value of the reference stage. cell: the stage's value and its difference to the reference stage.
        pair, estimate: those of the cell, which are never None for a claim.
    """

    what: str
    against: str
    metric: Metric
    before: float
    cell: Cell
    pair: Pair
    estimate: Estimate

    @property
    def p_adjusted(self) -> float:
        """The corrected p-value; 1 if all records are identical, so that there is nothing to test."""
        return 1.0 if self.cell.p_adjusted is None else self.cell.p_adjusted


@dataclass(frozen=True)
class GateResult:
    """A gate as the user wrote it, the values of its two sides, and whether it holds."""

    gate: str
    left: float
    right: float
    holds: bool


@dataclass(frozen=True)
class PromptTexts:
    """The texts that the stages wrote after one prompt; None for a stage without this prompt."""

    prompt: str
    texts: list[str | None]


@dataclass
class Comparison:
    """Everything that `rr compare` shows.

    Attributes:
        stages: labels of the stages: their names, or paths of results files. results: the content of their files.
        broken_surgery: a sentence that is shown first if surgery did not preserve the baseline; the command then fails.
    """

    stages: list[str]
    rows: list[MetricRow]
    claims: list[Claim] = field(default_factory=list)
    sentences: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    generations: list[PromptTexts] = field(default_factory=list)
    gates: list[GateResult] = field(default_factory=list)
    alpha: float = 0.05
    results: list[Results] = field(default_factory=list)
    broken_surgery: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "schema": 1,
            "kind": "comparison",
            "stages": self.stages,
            "alpha": self.alpha,
            "rows": [
                {name: getattr(row.metric, name) for name in ("name", "label", "unit", "better")}
                | {"cells": [cell.to_dict() for cell in row.cells]}
                | ({"by_depth": row.depths} if row.depths else {})
                for row in self.rows
            ],
            "claims": [
                finite(vars(claim.estimate))
                | {"what": claim.what, "metric": claim.metric.name, "p_adjusted": claim.p_adjusted}
                for claim in self.claims
            ],
            "broken_surgery": self.broken_surgery or None,
            "sentences": self.sentences,
            "warnings": self.warnings,
            "generations": [vars(generation) for generation in self.generations],
            "gates": [vars(gate) for gate in self.gates],
        }


def read_results(file: Path, made_by: str) -> Results:
    """Read the results of a stage.

    Raises:
        RRError: the file is missing, or is not what `rr eval` writes (the message names the field); the hint names
            `made_by`, a command.
    """
    results: Results = dict(read_json(file, made_by, schemas.Results))
    if problem := schemas.check_records(results):
        raise RRError(f"{file}: {problem}", f"Make it again with '{made_by}'.")
    return results


def speakers(stages: Mapping[str, Results]) -> dict[str, str]:
    """Return stage -> the label of its results; if two files are of the same stage, the first one counts."""
    labels: dict[str, str] = {}
    for label, result in stages.items():
        labels.setdefault(result["stage"], label)
    return labels


def generations_of(results: list[Results]) -> list[PromptTexts]:
    """Return every prompt of any stage, with the text that each stage wrote after it."""
    texts = [
        {r["prompt"]: r["text"] for r in result["records"].get("generations", ()) if "prompt" in r}
        for result in results
    ]
    prompts = dict.fromkeys(prompt for stage in texts for prompt in stage)
    return [PromptTexts(prompt, [stage.get(prompt) for stage in texts]) for prompt in prompts]
