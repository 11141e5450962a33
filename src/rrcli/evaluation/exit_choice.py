"""Chooses an exit rule from what every rule did on the validation side. Loads no torch.

An exit may lose what the user allows, so many points of accuracy and as many percent of perplexity, against the best
fixed depth, whichever that is: so against every fixed depth, on the same problems and documents. A rule is taken only
where the data show that it loses no more: the upper bound of each loss, at a confidence of 90 %, has to lie within what
is allowed (Tango's score interval for problems, sign flips for documents; see `paired`). So a few lucky answers do not
make a cheap rule a good one, and with too few problems for such a statement nothing is chosen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING

from rrcli.evaluation.paired import Evidence, PairedAnswers, PairedTotals
from rrcli.evaluation.stats import LEAST_UNITS
from rrcli.recursion.exits import CHOOSABLE, ExitRule

if TYPE_CHECKING:
    from rrcli.evaluation.exits import Point

# Of the bound of a loss, which is one-sided: the end of a two-sided interval at twice the level.
CONFIDENCE = 0.9
LEVEL = 2 * (1 - CONFIDENCE)


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Attributes:
        rule: None where every pass is run for every token. best: the fixed depth that did best on the validation side;
            None where nothing was measured. why: the reason why no rule was chosen, or ''.
    """

    rule: ExitRule | None = None
    best: ExitRule | None = None
    why: str = ""


def least_problems(loss: float) -> float:
    """Return how many problems show that a rule loses at most `loss` points, if it answers all of them as well.

    The upper end of Tango's interval without a discordant problem is z² / (n + z²).
    """
    share, z = loss / 100, NormalDist().inv_cdf(CONFIDENCE)
    return max(LEAST_UNITS, math.ceil(z * z * (1 - share) / share)) if share > 0 else math.inf


def too_few(problems: int, documents: int, loss: float) -> str:
    """Say why nothing can be chosen with so much data, before anything is measured; '' where there is enough.

    Without a problem, the text alone decides.
    """
    if loss <= 0:
        return "--exit-loss 0 allows no loss, which no amount of data can show"
    if problems and problems < (least := least_problems(loss)):
        points = f"{loss:g} point{'s' * (loss != 1)} of accuracy"
        return f"{problems} validation problems cannot show that an exit loses at most {points}: that takes {least:,}"
    if not problems and documents < LEAST_UNITS:
        return f"there is no validation problem, and {documents} validation documents are fewer than {LEAST_UNITS}"
    return ""


def choose(points: Sequence[Point], loss: float) -> Choice:
    """Return the cheapest rule that is shown to lose at most `loss` against every fixed depth.

    Args:
        points: what each rule did on the validation side, the fixed depths among them. loss: in points of accuracy and
            in percent of perplexity.
    """
    depths = [point for point in points if point.rule.kind == "depth"]
    full = max(depths, key=lambda point: point.rule.threshold)
    if why := too_few(len(full.hits), len(full.text_nats), loss):
        return Choice(why=why)
    best = max(depths, key=_quality).rule
    candidates = [point for point in points if point.rule.kind in CHOOSABLE and point.cost < full.cost]
    for point in sorted(candidates, key=lambda point: (point.cost, -_quality(point))):
        if all(point is depth or _keeps(point, depth, loss) for depth in depths):
            return Choice(point.rule, best)
    return Choice(None, best, "no exit is shown to lose so little, at less cost than every pass")


def _quality(point: Point) -> float:
    """Return what a point is better by: accuracy; without problems, less nats."""
    return -float(point.nats or 0.0) if point.accuracy is None else point.accuracy.value


def _keeps(point: Point, depth: Point, loss: float) -> bool:
    """Tell whether a rule is shown to lose at most `loss` against a depth; too few documents are not asked."""
    if point.hits and -100 * _bounds(PairedAnswers.of(point.hits, depth.hits))[0] > loss:
        return False
    if len(point.text_nats) < LEAST_UNITS:
        return True
    texts = PairedTotals(point.text_nats, depth.text_nats, point.text_tokens)
    return 100 * math.expm1(_bounds(texts)[1]) <= loss


def _bounds(evidence: Evidence) -> tuple[float, float]:
    """Return both one-sided bounds of a difference; infinite where so few units say nothing."""
    return evidence.interval(LEVEL) or (-math.inf, math.inf)
