"""Gates: conditions on what was measured, for example `finetuned_recursive.perplexity <= 1.02 * baseline.perplexity`.

A gate has one of two forms. `SIDE OPERATOR SIDE`, with one of > < >= <= ==, compares values; a side is a number,
STAGE.METRIC, or a number times STAGE.METRIC. With `significant` the difference also has to be shown by a test.
`METRIC: STAGE > STAGE`, `METRIC: STAGE < STAGE + 1 %`, `METRIC: STAGE ~ STAGE within 1 %` are claims (`claims`), which
always have to be shown.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from rrcli.comparison.claims import Claim, Relation, read_claim
from rrcli.comparison.pairing import Cells
from rrcli.comparison.results import GateResult, Judgement, Stages
from rrcli.errors import CheckFailed, UsageError, suggest
from rrcli.evaluation.metrics import KNOWN, metrics_of, tested_metric

OPERATORS = {">=": operator.ge, "<=": operator.le, "==": operator.eq, ">": operator.gt, "<": operator.lt}
FORM = (
    "Write 'STAGE.METRIC > STAGE.METRIC', with > < >= <= or ==; a side may be NUMBER or NUMBER * STAGE.METRIC. "
    "Or a claim that has to be shown: 'METRIC: STAGE < STAGE + 1 %'."
)


@dataclass(frozen=True)
class Side:
    """One side of a gate: `factor` times a stage's metric, or `factor` alone where `stage` is empty."""

    factor: float
    stage: str = ""
    metric: str = ""


@dataclass(frozen=True)
class Gate:
    """A gate, read from its text: two sides and the operator between them, or a claim."""

    text: str
    left: Side
    operator: str
    right: Side
    claim: Claim | None = None


def read_gate(text: str, stages: Stages, margins: Mapping[str, float]) -> Gate:
    """Read a gate.

    Args:
        stages: label -> the stages that it may name. margins: those of a claim `~` without `within`.

    Raises:
        UsageError: it has another form, or names a stage or metric that does not exist; suggests the closest one.
    """
    name = text.rpartition(":")[0].strip()
    measured = {metric for stage in stages.values() for run in stage.runs for metric in run["metrics"]}
    if name in measured or name in KNOWN:
        claim = read_claim(text, margins, what="the gate", stages=list(stages))
        left, right = (_measured(label, claim.metric.name, text, stages) for label in (claim.stage, claim.reference))
        return Gate(text, left, claim.relation, right, claim)
    parts = re.split(r"(>=|<=|==|>|<)", text)
    if len(parts) != 3 or parts[0].rstrip().endswith("=") or parts[2].startswith("="):
        raise UsageError(f"the gate '{text}' cannot be read: it needs exactly one of {', '.join(OPERATORS)}", FORM)
    left, right = (_side(part.strip(), text, stages) for part in (parts[0], parts[2]))
    if not left.stage and not right.stage:
        raise UsageError(f"the gate '{text}' compares two numbers", FORM)
    return Gate(text, left, parts[1], right)


def claim_of(gate: Gate, *, significant: bool) -> Claim | None:
    """Return the claim that a gate asks to be shown, or None if it only compares values.

    With `significant`, `A.METRIC < 1.01 * B.METRIC` asks whether A is shown to be below B + 1 %.

    Raises:
        UsageError: `significant` was asked for a gate that has no such test.
    """
    if gate.claim is not None or not significant:
        return gate.claim
    a, b = gate.left, gate.right
    metric = tested_metric(a.metric)
    comparable = metric is not None and a.metric == b.metric and a.stage != b.stage and gate.operator in (">", "<")
    scaled = metric is not None and metric.scale == "exp" and 0 < b.factor < 2
    if metric is None or not comparable or a.factor != 1 or not (b.factor == 1 or scaled):
        raise UsageError(
            f"the gate '{gate.text}' has no test of significance",
            "With --gate-significant every gate is 'STAGE.METRIC > STAGE.METRIC' (or <) of one metric that is tested; "
            "for perplexity NUMBER * STAGE.METRIC too.",
        )
    relation = cast("Relation", gate.operator)
    return Claim(metric, a.stage, relation, b.stage, round(100 * (b.factor - 1), 9))


def check(gate: Gate, cells: Cells, judged: Judgement | None) -> GateResult:
    """Check whether a gate holds.

    Args:
        judged: what was found about the claim that the gate asks to be shown, corrected together with the primary ones;
            None if it asks for none.
    """
    left, right = (_value(side, cells.stages) for side in (gate.left, gate.right))
    holds = gate.claim is not None or OPERATORS[gate.operator](left, right)
    if judged is None:
        return GateResult(gate.text, left, right, holds)
    return GateResult(gate.text, left, right, holds and judged.shown, judged.p_adjusted)


def require_gates(results: list[GateResult]) -> None:
    """Stop the command if a gate does not hold.

    Raises:
        CheckFailed: names the gates that do not hold, with both values.
    """
    failed = [f"'{r.gate}' ({r.left:.6g} and {r.right:.6g})" for r in results if not r.holds]
    if failed:
        noun = "the gate does" if len(failed) == 1 else f"{len(failed)} of {len(results)} gates do"
        raise CheckFailed(f"{noun} not hold: {'; '.join(failed)}", "The table says by how much the stages differ.")


def _side(text: str, gate: str, stages: Stages) -> Side:
    factor = 1.0
    if (number := _number(text)) is not None:
        return Side(number)
    if "*" in text:
        first, _, second = (part.strip() for part in text.partition("*"))
        name, number = (second, _number(first)) if _number(first) is not None else (first, _number(second))
        if number is None:
            raise UsageError(f"the gate '{gate}' cannot be read: '{text}' has no number before its *", FORM)
        factor, text = number, name
    # Names of files hold dots themselves.
    stage = next((s for s in sorted(stages, key=len, reverse=True) if text.startswith(f"{s}.")), None)
    if stage is None:
        name, dot, _ = text.rpartition(".")
        if not dot:
            raise UsageError(f"the gate '{gate}' cannot be read: '{text}' is neither a number nor STAGE.METRIC", FORM)
        raise UsageError(f"the gate '{gate}' names stage '{name}', which is not compared", suggest(name, stages))
    return _measured(stage, text[len(stage) + 1 :], gate, stages, factor)


def _measured(stage: str, metric: str, gate: str, stages: Stages, factor: float = 1.0) -> Side:
    """Return the side of a stage's metric, after checking that the stage has it."""
    metrics = stages[stage].first["metrics"]
    if metric not in metrics:
        raise UsageError(
            f"the gate '{gate}' names metric '{metric}', which {stage} does not have", suggest(metric, sorted(metrics))
        )
    return Side(factor, stage, metric)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _value(side: Side, stages: Stages) -> float:
    """Return the value of a side, over all seeds; NaN, with which no gate holds, for a metric that was not finite."""
    if not side.stage:
        return side.factor
    metric = next(m for m in metrics_of(stages[side.stage].first["metrics"]) if m.name == side.metric)
    value = stages[side.stage].value(metric)
    return math.nan if value is None else side.factor * value
