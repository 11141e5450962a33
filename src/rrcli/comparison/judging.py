"""Judges the primary claims: each with the test that its form asks for, all corrected together (Holm)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rrcli.comparison.claims import Claim, Declaration
from rrcli.comparison.pairing import Cells, shown_interval
from rrcli.comparison.results import Cell, Judgement, speakers
from rrcli.evaluation import stats
from rrcli.evaluation.metrics import Metric, metrics_of
from rrcli.evaluation.paired import POWER, Evidence
from rrcli.evaluation.stats import LEAST_UNITS

# What a claim about recursion is called if surgery changed the model.
NO_CLAIM = "no claim"


@dataclass(frozen=True)
class _Tested:
    """A claim, the cell that it is about, and the p-value of its test; or why there is no test."""

    claim: Claim
    cell: Cell
    before: float | None = None
    evidence: Evidence | None = None
    p_value: float = 1.0
    why: str = ""


def judge(
    cells: Cells, declared: Declaration, *, sound: bool = True, more: Sequence[Claim] = ()
) -> tuple[list[Judgement], list[Judgement]]:
    """Judge the primary claims, and other claims that a gate asks for.

    A claim that cannot be tested has p = 1 and keeps its place in the correction: leaving a stage out of a comparison
    makes no other claim easier. Claims of gates that are not primary are corrected together with the primary ones; they
    do not change the correction of those.

    Args:
        sound: whether surgery preserved the baseline; if not, nothing is claimed about recursion.
    """
    primary = [_test(claim, cells, sound=sound) for claim in declared.primary]
    judged = _corrected(primary, declared)
    known = {found.claim.text: found for found in judged}
    extra = [_test(claim, cells, sound=sound) for claim in more if claim.text not in known]
    known |= {found.claim.text: found for found in _corrected([*primary, *extra], declared)[len(primary) :]}
    return judged, [known[claim.text] for claim in more]


def mark(cell: Cell, judgement: Judgement) -> None:
    """Let the cell of the table that a primary claim is about show the claim's own verdict and interval."""
    if judgement.why:
        return
    cell.role, cell.verdict, cell.confidence = "primary", judgement.verdict, judgement.confidence
    cell.p_value, cell.p_adjusted = judgement.p_value, judgement.p_adjusted
    cell.difference_low, cell.difference_high = judgement.low, judgement.high


def withdraw(cell: Cell) -> None:
    """Take back what a cell says about recursion, because surgery changed the model."""
    if cell.role:
        cell.role, cell.verdict, cell.p_value, cell.p_adjusted = "", NO_CLAIM, None, None


def _test(claim: Claim, cells: Cells, *, sound: bool) -> _Tested:
    labels = speakers(cells.stages) | {label: label for label in cells.stages}
    absent = [stage for stage in (claim.stage, claim.reference) if stage not in labels]
    if absent:
        return _Tested(claim, Cell(), why=f"{' and '.join(absent)} {'were' if len(absent) > 1 else 'was'} not measured")
    stage, reference = labels[claim.stage], labels[claim.reference]
    # Results say which direction of lm-eval's metrics is better.
    measured = metrics_of(cells.stages[stage].first["metrics"])
    claim = replace(claim, metric=next((m for m in measured if m.name == claim.metric.name), claim.metric))
    cell, before = cells.of(claim.metric, stage, reference), cells.stages[reference].value(claim.metric)
    tested = _Tested(claim, cell, before)
    if not sound and "finetuned_recursive" in {cells.stages[label].name for label in (stage, reference)}:
        return replace(tested, why="surgery changed the model")
    if cell.value is None or before is None:
        return replace(tested, why=f"{claim.metric.name} was not measured in both stages")
    evidence = cell.pair.evidence if cell.pair is not None else None
    if evidence is None:
        return replace(tested, why="the two stages cannot be paired")
    if evidence.n < LEAST_UNITS:
        return replace(tested, why=f"below {LEAST_UNITS} units there is no test")
    return replace(tested, evidence=evidence, p_value=_p_value(claim, evidence))


def _p_value(claim: Claim, evidence: Evidence) -> float:
    """Return the p-value of a claim: two-sided without a margin, one-sided with one, for `~` the larger of two such."""
    if claim.relation == "~":
        return _equivalence(claim.metric, claim.shift, evidence)
    null = claim.metric.tested_difference(claim.shift)
    two_sided = evidence.p_value(null) or 0.0
    if not claim.shift:
        return two_sided
    return _one_sided(two_sided, (evidence.value > null) == (claim.relation == ">"))


def _equivalence(metric: Metric, margin: float, evidence: Evidence) -> float:
    """Return the p-value of two one-sided tests (Schuirmann 1987): the difference is between -margin and +margin."""
    low, high = metric.tested_difference(-margin), metric.tested_difference(margin)
    return max(
        _one_sided(evidence.p_value(low) or 0.0, evidence.value > low),
        _one_sided(evidence.p_value(high) or 0.0, evidence.value < high),
    )


def _one_sided(two_sided: float, towards: bool) -> float:
    return two_sided / 2 if towards else 1 - two_sided / 2


def _corrected(tested: Sequence[_Tested], declared: Declaration) -> list[Judgement]:
    p_values = [each.p_value for each in tested]
    corrected = zip(tested, stats.holm(p_values), stats.holm_levels(p_values, declared.alpha), strict=True)
    return [_judged(each, p, level, declared, len(tested)) for each, p, level in corrected]


def _judged(tested: _Tested, p_adjusted: float, level: float, declared: Declaration, claims: int) -> Judgement:
    claim, evidence = tested.claim, tested.evidence
    plain = Judgement(claim, tested.cell, tested.before, tested.p_value, p_adjusted, level, why=tested.why)
    if evidence is None:
        return replace(plain, verdict=NO_CLAIM if "surgery" in tested.why else "not tested")
    metric = claim.metric
    one_sided = bool(claim.shift)
    rejected = tested.p_value <= level
    towards = one_sided or (evidence.value > 0) == (claim.relation == ">")
    low, high = shown_interval(metric, evidence, 2 * level if one_sided else level)
    planned = declared.alpha / claims * (2 if one_sided else 1)
    power = (1 + POWER) / 2 if claim.relation == "~" else POWER  # both one-sided tests have to reject
    have = {"units": evidence.n, "seeds": tested.cell.pair.seeds if tested.cell.pair is not None else 1}
    detectable, needed = evidence.detectable(planned, power), None
    if not rejected:
        needed = evidence.needed(_distance(claim, evidence), planned)
    return replace(
        plain,
        verdict=_verdict(claim, evidence, level, declared, rejected=rejected),
        shown=rejected and towards,
        low=low,
        high=high,
        confidence=1 - (2 * level if one_sided else level),
        detectable=None if detectable is None else abs(metric.shown_difference(detectable)),
        needed=needed if needed is not None and needed.count > have[needed.what] else None,
    )


def _distance(claim: Claim, evidence: Evidence) -> float:
    """Return how far the estimate lies on the claimed side of what the test rejects; 0 if it lies on the other side."""
    metric = claim.metric
    if claim.relation == "~":
        low, high = metric.tested_difference(-claim.shift), metric.tested_difference(claim.shift)
        return max(0.0, min(evidence.value - low, high - evidence.value))
    distance = evidence.value - metric.tested_difference(claim.shift)
    if not claim.shift:
        return abs(distance)
    return max(0.0, distance if claim.relation == ">" else -distance)


def _verdict(claim: Claim, evidence: Evidence, level: float, declared: Declaration, *, rejected: bool) -> str:
    """Return better, worse, differs, equivalent, not worse or inconclusive, at the level of the claim.

    Only one of "no difference" and "a difference beyond the margin" can be true, so both can be tested at this level.
    """
    metric = claim.metric
    margin = claim.shift if claim.relation == "~" else declared.margin(metric)
    differs = (evidence.p_value() or 1.0) <= level
    equivalent = margin is not None and _equivalence(metric, margin, evidence) <= level
    if equivalent and (claim.shift or not differs):
        return "equivalent"
    if differs and evidence.value:
        if not metric.better:
            return "differs"
        return "better" if (evidence.value < 0) == (metric.better == "lower") else "worse"
    if rejected and claim.shift and claim.relation != "~":
        bad = "<" if metric.better == "lower" else ">"
        return "not worse" if claim.relation == bad else "within the margin"
    return "inconclusive"


def smallest_differences(judged: Sequence[Judgement]) -> list[tuple[Judgement, float]]:
    """Return the claims for which it is known how small a difference could be shown, with that difference."""
    return [(each, each.detectable) for each in judged if each.detectable is not None]
