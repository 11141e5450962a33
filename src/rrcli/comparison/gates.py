"""Gates: conditions on values, for example `finetuned_recursive.perplexity <= 1.02 * baseline.perplexity`.

A gate is `SIDE OPERATOR SIDE` with one of > < >= <= ==. A side is a number, STAGE.METRIC, or a number times
STAGE.METRIC. A gate compares only the values; with `significant`, the difference also has to be significant.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass

from rrcli.comparison.pairing import Cells, backed
from rrcli.comparison.results import GateResult, Results
from rrcli.errors import CheckFailed, UsageError, suggest
from rrcli.evaluation.metrics import metrics_of

OPERATORS = {">=": operator.ge, "<=": operator.le, "==": operator.eq, ">": operator.gt, "<": operator.lt}
FORM = "Write 'STAGE.METRIC > STAGE.METRIC', with > < >= <= or ==; a side may be NUMBER or NUMBER * STAGE.METRIC."


@dataclass(frozen=True)
class Side:
    """One side of a gate: `factor` times a stage's metric, or `factor` alone where `stage` is empty."""

    factor: float
    stage: str = ""
    metric: str = ""


@dataclass(frozen=True)
class Gate:
    """A gate, read from its text."""

    text: str
    left: Side
    operator: str
    right: Side


def read_gate(text: str, stages: Mapping[str, Results]) -> Gate:
    """Read a gate.

    Args:
        stages: label -> results of the stages that it may name.

    Raises:
        UsageError: it has another form, or names a stage or metric that does not exist; suggests the closest one.
    """
    parts = re.split(r"(>=|<=|==|>|<)", text)
    if len(parts) != 3 or parts[0].rstrip().endswith("=") or parts[2].startswith("="):
        raise UsageError(f"the gate '{text}' cannot be read: it needs exactly one of {', '.join(OPERATORS)}", FORM)
    left, right = (_side(part.strip(), text, stages) for part in (parts[0], parts[2]))
    if not left.stage and not right.stage:
        raise UsageError(f"the gate '{text}' compares two numbers", FORM)
    return Gate(text, left, parts[1], right)


def check(gate: Gate, cells: Cells, alpha: float, *, significant: bool = False) -> GateResult:
    """Check whether a gate holds.

    Args:
        significant: whether the difference of the two stages also has to be significant: by the paired test at level
            `alpha`, and by the 95 % interval, which must not contain zero.

    Raises:
        UsageError: `significant` was asked for a gate that has no such test.
    """
    left, right = (_value(side, cells.stages) for side in (gate.left, gate.right))
    shown = not significant or _shown(gate, cells, alpha)
    return GateResult(gate.text, left, right, shown and OPERATORS[gate.operator](left, right))


def require_gates(results: list[GateResult]) -> None:
    """Stop the command if a gate does not hold.

    Raises:
        CheckFailed: names the gates that do not hold, with both values.
    """
    failed = [f"'{r.gate}' ({r.left:.6g} and {r.right:.6g})" for r in results if not r.holds]
    if failed:
        noun = "the gate does" if len(failed) == 1 else f"{len(failed)} of {len(results)} gates do"
        raise CheckFailed(f"{noun} not hold: {'; '.join(failed)}", "The table says by how much the stages differ.")


def _side(text: str, gate: str, stages: Mapping[str, Results]) -> Side:
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
    metric = text[len(stage) + 1 :]
    if metric not in stages[stage]["metrics"]:
        hint = suggest(metric, sorted(stages[stage]["metrics"]))
        raise UsageError(f"the gate '{gate}' names metric '{metric}', which {stage} does not have", hint)
    return Side(factor, stage, metric)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _value(side: Side, stages: Mapping[str, Results]) -> float:
    """Return the value of a side; NaN, with which no gate holds, for a metric that was not finite."""
    if not side.stage:
        return side.factor
    value = stages[side.stage]["metrics"][side.metric]["value"]
    return math.nan if value is None else side.factor * value


def _shown(gate: Gate, cells: Cells, alpha: float) -> bool:
    a, b = gate.left, gate.right
    found = metrics_of(*(result["metrics"] for result in cells.stages.values()))
    metric = next((m for m in found if m.name == a.metric and m.compared and m.test), None)
    if metric is None or not (a.metric == b.metric and a.factor == b.factor == 1 and gate.operator in "><"):
        raise UsageError(
            f"the gate '{gate.text}' has no test of significance",
            "With --gate-significant every gate is 'STAGE.METRIC > STAGE.METRIC' (or <) of one metric that is tested.",
        )
    cell = cells.of(metric, a.stage, b.stage)
    if cell.p_value is None or not backed(cell.p_value, cell.difference_low, cell.difference_high, alpha):
        return False
    return ((cell.difference or 0.0) > 0) == (gate.operator == ">")
