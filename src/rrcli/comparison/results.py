"""The values that a comparison consists of: stages, pairs, cells, rows, judgements, gates and texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rrcli import schemas
from rrcli.comparison.claims import Claim
from rrcli.errors import RRError
from rrcli.evaluation.metrics import Metric
from rrcli.evaluation.paired import Evidence, Needed
from rrcli.evaluation.stats import CONFIDENCE
from rrcli.files import read_json

# The content of a results file.
Results = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """A stage with the results of all its trainings.

    Attributes:
        label: its name, or the path of a results file.
        runs: one for each seed that was trained, in their order; a stage that needs no training has one.
        shared_costs: whether all runs hold the costs of one of them, which `rr costs` measured.
    """

    label: str
    runs: tuple[Results, ...]
    shared_costs: bool = False

    @property
    def first(self) -> Results:
        """The results of the first seed."""
        return self.runs[0]

    @property
    def name(self) -> str:
        """The stage that was measured: 'baseline', ..."""
        return str(self.first["stage"])

    @property
    def by_seed(self) -> dict[int, Results]:
        """Seed -> results."""
        return {seed_of(run): run for run in self.runs}

    def value(self, metric: Metric) -> float | None:
        """Return the value of a metric, over all seeds (`Metric.middle`); None if a run has none."""
        return metric.middle([(run["metrics"].get(metric.name) or {}).get("value") for run in self.runs])


Stages = Mapping[str, Stage]


@dataclass(frozen=True)
class Pair:
    """The difference of one metric between a stage and a reference stage, over the records that both hold.

    Attributes:
        evidence: what the records say about it, on the scale of the test (nats, shares, scores); None if the two stages
            cannot be paired.
        same: whether all records have the same outcome in both stages.
        seeds: how many trainings were paired.
        common, of, others: number of records in both stages, in the reference, and in the other stage.
        conflicts: number of records with the same key but of different content (`Part.identity`).
    """

    evidence: Evidence | None = None
    same: bool = False
    seeds: int = 1
    common: int = 0
    of: int = 0
    others: int = 0
    conflicts: int = 0


@dataclass
class Cell:
    """One stage's value of one metric, and its difference to a reference stage; in a table, that is the first stage.

    Attributes:
        value, low, high: the metric with its interval (None where it was not measured, or is not known).
        by_seed: the value of each training, if there are several.
        difference, difference_low, difference_high: with its interval, over the records in both stages; in percent for
            perplexity and costs, in points for shares, else in the metric's unit.
        confidence: that of the interval of the difference.
        role: 'primary' if a declared claim is about this difference, 'exploratory' if it is tested without one, or ''.
        p_value: of the hypothesis "no difference", before any correction. p_adjusted: that of the primary claim, after
            Holm's correction for all primary claims; None for everything else.
        verdict: of a primary claim: better, worse, differs, equivalent, not worse, inconclusive, or no claim (it rests
            on a broken surgery). Of any difference: same (identical records), too few (units for a test), not
            comparable. Else ''.
        n: number of records that the difference is computed from.
        pair: the records and evidence that the difference comes from; None for the first stage and for costs.
    """

    value: float | None = None
    low: float | None = None
    high: float | None = None
    by_seed: list[float | None] = field(default_factory=list)
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    confidence: float = CONFIDENCE
    role: str = ""
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
class Judgement:
    """A primary claim and what the measurements say about it.

    Attributes:
        cell: the stage's value and its difference to the reference stage. before: the reference stage's value.
        p_value, p_adjusted: of the claim's own hypothesis; 1 if it cannot be tested, which keeps its place among the
            claims that are corrected together. level: what Holm's procedure compares `p_value` with.
        low, high, confidence: the interval of the difference that agrees with the test at this level, as it is shown.
        verdict: see `Cell`. shown: whether the claim is shown. why: why it could not be tested, or ''.
        late: whether the claim was declared after its numbers were known, which makes it exploratory.
        detectable: the smallest difference that would be shown with 80 % power if it were there (for a claim with a
            margin: the smallest such margin if there were no difference), in the unit in which differences are shown.
        needed: how many units or seeds would show a difference of the size measured with 80 % power.
    """

    claim: Claim
    cell: Cell
    before: float | None
    p_value: float
    p_adjusted: float
    level: float
    verdict: str = "inconclusive"
    shown: bool = False
    low: float | None = None
    high: float | None = None
    confidence: float = CONFIDENCE
    detectable: float | None = None
    needed: Needed | None = None
    why: str = ""
    late: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        values = {name: value for name, value in vars(self).items() if name not in ("claim", "cell", "needed")}
        needed = {"needed": self.needed.count, "needed_of": self.needed.what} if self.needed else {}
        cell = {name: getattr(self.cell, name) for name in ("value", "difference", "by_seed", "n")}
        return {"claim": self.claim.text, "metric": self.claim.metric.name} | cell | values | needed


@dataclass(frozen=True)
class GateResult:
    """A gate as the user wrote it, the values of its two sides, and whether it holds.

    Attributes:
        p_adjusted: of the test that it asks for, after correction; None if it compares values alone.
    """

    gate: str
    left: float
    right: float
    holds: bool
    p_adjusted: float | None = None


@dataclass(frozen=True)
class PromptTexts:
    """The texts that the stages wrote after one prompt; None for a stage without this prompt."""

    prompt: str
    texts: list[str | None]


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


def seed_of(run: Results) -> int:
    """Return the seed that a run was trained and evaluated with."""
    return int(run.get("seed", run["provenance"].get("seed", 0)))


def speakers(stages: Stages) -> dict[str, str]:
    """Return name of a stage -> the label of its results; if two files are of the same stage, the first one counts."""
    labels: dict[str, str] = {}
    for label, stage in stages.items():
        labels.setdefault(stage.name, label)
    return labels


def generations_of(stages: Sequence[Stage]) -> list[PromptTexts]:
    """Return every prompt of any stage, with the text that each stage (its first seed) wrote after it."""
    texts = [
        {r["prompt"]: r["text"] for r in stage.first["records"].get("generations", ()) if "prompt" in r}
        for stage in stages
    ]
    prompts = dict.fromkeys(prompt for stage in texts for prompt in stage)
    return [PromptTexts(prompt, [stage.get(prompt) for stage in texts]) for prompt in prompts]
