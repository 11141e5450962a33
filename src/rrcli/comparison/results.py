"""What `rr compare` found: cells, rows, claims, and the whole. Data only; `pairing` fills it, `formats` writes it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rrcli.evaluation.metrics import Metric
from rrcli.evaluation.stats import Estimate
from rrcli.files import finite

Results = dict[str, Any]


@dataclass
class Cell:
    """One stage's value of one metric, and its difference to the first stage.

    Attributes:
        value, low, high: the metric with its interval (None where it was not measured).
        difference, difference_low, difference_high: paired; percent for perplexity and cost, points for shares.
        p_value, p_adjusted: of "no difference", before and after Holm's correction.
        verdict: better, worse, differs, within noise, same, not comparable, or '' (the first stage, costs).
        n: the records behind the difference: those that both stages hold.
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
class MetricRow:
    """One metric over all stages; `depths` has each stage's values at depth 0, 1, ..., where it was measured so."""

    metric: Metric
    cells: list[Cell]
    depths: list[list[float | None]] = field(default_factory=list)


@dataclass
class Claim:
    """A difference that a sentence speaks about: `metric` of `result` against `reference`."""

    what: str
    against: str
    metric: Metric
    estimate: Estimate
    result: Results
    reference: Results
    p_adjusted: float = 1.0


@dataclass(frozen=True)
class GateResult:
    """A gate as it was written, the values of its two sides, and whether it holds."""

    gate: str
    left: float
    right: float
    holds: bool


@dataclass(frozen=True)
class Generation:
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
    generations: list[Generation] = field(default_factory=list)
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
                | {"cells": [vars(cell) for cell in row.cells]}
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


def generations_of(results: list[Results]) -> list[Generation]:
    """Return every prompt of any stage, with what each stage wrote after it."""
    texts = [
        {r["prompt"]: r["text"] for r in result["records"].get("generations", ()) if "prompt" in r}
        for result in results
    ]
    prompts = dict.fromkeys(prompt for stage in texts for prompt in stage)
    return [Generation(prompt, [stage.get(prompt) for stage in texts]) for prompt in prompts]
