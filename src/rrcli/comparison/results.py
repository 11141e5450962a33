"""What `rr compare` found: pairs, cells, rows, claims, and the whole. Data only: other modules fill and write it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rrcli.evaluation.metrics import Metric
from rrcli.evaluation.stats import Estimate
from rrcli.files import finite

# What a results file holds.
Results = dict[str, Any]


@dataclass(frozen=True)
class Pair:
    """The difference of one metric between a stage and a reference stage, over the records that both hold.

    Attributes:
        estimate: on the scale of the test (nats, shares, scores); None where the two cannot be paired.
        same: whether every common record is identical. discordant: the share of problems that one of them solves.
        common, of, others: records in both stages, in the reference, and in the other stage.
        conflicts: common records that are not the same ones (`Part.identity`).
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
    """One stage's value of one metric, and its difference to a reference stage: in a table, the first one.

    Attributes:
        value, low, high: the metric with its interval (None where it was not measured).
        difference, difference_low, difference_high: paired; percent for perplexity and cost, points for shares.
        p_value, p_adjusted: of "no difference", before and after Holm's correction.
        verdict: better, worse, differs, within noise, same, not comparable, or '' (the first stage, costs).
        n: the records behind the difference: those that both stages hold.
        pair: what the difference was taken from; None where there is none, as for costs.
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
    """One metric over all stages; `depths` has each stage's values at depth 0, 1, ..., where it was measured so."""

    metric: Metric
    cells: list[Cell]
    depths: list[list[float | None]] = field(default_factory=list)


@dataclass(frozen=True)
class Claim:
    """A difference that a sentence speaks about.

    Attributes:
        what, against: what is said to make the difference, and the reference, in words.
        before: the reference's value. cell: the stage's value and its difference to the reference.
        pair, estimate: the cell's, where they are known to be there.
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
        """The corrected p-value; 1 where identical records left nothing to test."""
        return 1.0 if self.cell.p_adjusted is None else self.cell.p_adjusted


@dataclass(frozen=True)
class GateResult:
    """A gate as it was written, the values of its two sides, and whether it holds."""

    gate: str
    left: float
    right: float
    holds: bool


@dataclass(frozen=True)
class PromptTexts:
    """What each stage wrote after one prompt; None where a stage has no such prompt."""

    prompt: str
    texts: list[str | None]


@dataclass
class Comparison:
    """Everything that `rr compare` shows; `results` are what it was made from, in the order of `stages`.

    Attributes:
        broken_surgery: said first, where surgery did not preserve the baseline; the command then fails.
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


def speakers(stages: Mapping[str, Results]) -> dict[str, str]:
    """Return the label of the results that speak for each stage: of two files of one stage, the first."""
    labels: dict[str, str] = {}
    for label, result in stages.items():
        labels.setdefault(result["stage"], label)
    return labels


def generations_of(results: list[Results]) -> list[PromptTexts]:
    """Return every prompt of any stage, with what each stage wrote after it."""
    texts = [
        {r["prompt"]: r["text"] for r in result["records"].get("generations", ()) if "prompt" in r}
        for result in results
    ]
    prompts = dict.fromkeys(prompt for stage in texts for prompt in stage)
    return [PromptTexts(prompt, [stage.get(prompt) for stage in texts]) for prompt in prompts]
