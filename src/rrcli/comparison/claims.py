"""The claims of an experiment, as they are declared in `rr.toml` before it runs: their grammar and their values.

    METRIC: STAGE > STAGE                 the first stage's value is larger
    METRIC: STAGE < STAGE + MARGIN        it is smaller, or larger by less than the margin: "not worse" of perplexity
    METRIC: STAGE > STAGE - MARGIN        it is larger, or smaller by less than the margin: "not worse" of an accuracy
    METRIC: STAGE ~ STAGE within MARGIN   the two differ by less than the margin: they are equivalent

A margin is in the unit in which differences are shown: `1 %` of the other stage's perplexity, `2 points` of an
accuracy, `0.01` of any other metric. `~` without `within` takes the margin of its metric from the option `margin`,
whose values have the form `METRIC: MARGIN`. Such a margin also decides when a difference is called equivalent.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal, cast

from rrcli.errors import UsageError, suggest
from rrcli.evaluation.metrics import KNOWN, Metric, tested_metric
from rrcli.settings import STAGES, CompareSettings

Relation = Literal[">", "<", "~"]
FORM = (
    "Write 'METRIC: STAGE > STAGE' or <, with '+ MARGIN' or '- MARGIN' after it if there is one, or "
    "'METRIC: STAGE ~ STAGE within MARGIN'."
)
MARGIN_FORM = "Write 'METRIC: MARGIN', for example 'perplexity: 1 %' or 'reasoning_accuracy: 1 point'."
_MARGIN = r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>%|\w*)"
_CLAIM = re.compile(
    rf"(?P<stage>[^\s~<>]+)\s*(?P<relation>[<>~])\s*(?P<reference>[^\s~<>]+?)(?:\s*(?P<sign>within|[+\-−])\s*{_MARGIN})?"
)


@dataclass(frozen=True)
class Claim:
    """What is claimed about the difference of two stages in one metric.

    Attributes:
        shift: the difference that must be passed, in the unit in which differences are shown; 0 for a claim without a
            margin. For `~`, the difference must stay within -shift and +shift.
    """

    metric: Metric
    stage: str
    relation: Relation
    reference: str
    shift: float = 0.0

    @property
    def text(self) -> str:
        """The claim in its one canonical form."""
        tail = ""
        if self.shift:
            sign = "within" if self.relation == "~" else "+" if self.shift > 0 else "-"
            tail = f" {sign} {with_unit(abs(self.shift), self.metric)}"
        return f"{self.metric.name}: {self.stage} {self.relation} {self.reference}{tail}"


@dataclass(frozen=True)
class Declaration:
    """The claims that an experiment stands for, and how they are tested.

    Attributes:
        primary: the claims that are corrected together (Holm). margins: metric -> the difference up to which two stages
            are called equivalent. alpha: the level of all primary claims together.
    """

    primary: tuple[Claim, ...]
    margins: Mapping[str, float]
    alpha: float

    def margin(self, metric: Metric) -> float | None:
        """Return the margin of a metric; a task has that of the accuracy over all tasks."""
        found = self.margins.get(metric.name)
        return self.margins.get("reasoning_accuracy") if found is None and metric.part == "problems" else found

    @property
    def texts(self) -> dict[str, object]:
        """What is declared, as it is recorded with results."""
        margins = [f"{name}: {with_unit(value, _metric(name, name))}" for name, value in self.margins.items()]
        return {"primary": [claim.text for claim in self.primary], "margin": sorted(margins), "alpha": self.alpha}


def read_declaration(settings: CompareSettings) -> Declaration:
    """Read what `[compare]` declares.

    Raises:
        UsageError: a claim or a margin cannot be read, or two claims are one and the same test; names it.
    """
    margins = dict(_read_margin(text) for text in settings.margin)
    claims = [read_claim(text, margins, what="the primary claim") for text in settings.primary]
    tests: dict[tuple[str, ...], str] = {}
    for claim, text in zip(claims, settings.primary, strict=True):
        metric = claim.metric.same_test or claim.metric.name
        test = (
            metric,
            *sorted((claim.stage, claim.reference)),
            "" if claim.relation in "<>" else "~",
            f"{claim.shift}",
        )
        if test in tests:
            raise UsageError(
                f"the primary claims '{tests[test]}' and '{text}' ([compare] primary) are one and the same test",
                "Declare one of them: each claim makes the level of all others stricter.",
            )
        tests[test] = text
    return Declaration(tuple(claims), margins, settings.alpha)


def read_claim(text: str, margins: Mapping[str, float], *, what: str, stages: Collection[str] = STAGES) -> Claim:
    """Read a claim.

    Args:
        margins: those of `~` without `within`. what: what the text is, for messages. stages: those it may name.

    Raises:
        UsageError: it has another form, or names a stage or a metric that does not exist or is not tested.
    """
    name, colon, rest = (part.strip() for part in text.rpartition(":"))
    found = _CLAIM.fullmatch(rest)
    signs = ("within", None) if found is not None and found["relation"] == "~" else ("+", "-", "−", None)
    if not colon or found is None or found["sign"] not in signs:
        raise UsageError(f"{what} '{text}' cannot be read", FORM)
    metric = _metric(name, f"{what} '{text}'")
    for stage in (found["stage"], found["reference"]):
        if stage not in stages:
            raise UsageError(f"{what} '{text}' names stage '{stage}', which there is not", suggest(stage, stages))
    if found["stage"] == found["reference"]:
        raise UsageError(f"{what} '{text}' compares a stage with itself", FORM)
    shift = _number(found["number"], found["unit"], metric, f"{what} '{text}'") if found["number"] else 0.0
    if found["relation"] == "~" and not found["number"]:
        shift = margins.get(name, 0.0)
        if not shift:
            raise UsageError(f"{what} '{text}' has no margin", f"Add 'within MARGIN', or a margin: {MARGIN_FORM}")
    shift = -shift if found["sign"] in ("-", "−") else shift
    return Claim(metric, found["stage"], cast("Relation", found["relation"]), found["reference"], shift)


def with_unit(value: float, metric: Metric) -> str:
    """Write a margin as it is read: a number and its unit."""
    unit = metric.difference_unit
    if unit == "points" and value == 1:
        unit = "point"
    return f"{value:g} {unit}" if unit in ("%", "points", "point") else f"{value:g}"


def _read_margin(text: str) -> tuple[str, float]:
    name, colon, rest = (part.strip() for part in text.rpartition(":"))
    found = re.fullmatch(_MARGIN, rest)
    if not colon or found is None:
        raise UsageError(f"the margin '{text}' ([compare] margin) cannot be read", MARGIN_FORM)
    place = f"the margin '{text}'"
    return name, _number(found["number"], found["unit"], _metric(name, place), place)


def _metric(name: str, place: str) -> Metric:
    metric = tested_metric(name)
    if metric is None:
        tested = [known for known, each in KNOWN.items() if each.test]
        raise UsageError(f"{place} names metric '{name}', which is not one that is tested", suggest(name, tested))
    return metric


def _number(number: str, unit: str, metric: Metric, place: str) -> float:
    """Return a margin's number after checking its unit."""
    right = {"%": ("%",), "points": ("points", "point", "")}.get(metric.difference_unit, ("", metric.unit))
    if unit not in right:
        raise UsageError(
            f"{place} has a margin of '{number} {unit}', but differences in {metric.name} are in "
            f"{metric.difference_unit or 'its own unit'}",
            f"Write it as {with_unit(float(number), metric)}.",
        )
    value = float(number)
    if value == 0 or (metric.scale == "exp" and value >= 100):
        raise UsageError(f"{place} has a margin of '{number} {unit}'", "A margin is above 0, and below 100 %.")
    return value
