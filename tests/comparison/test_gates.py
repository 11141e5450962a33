"""Gates: how they are read, what they look at, and how a command with one ends."""

from __future__ import annotations

from pathlib import Path

import pytest
import scipy.stats

from comparing import four_stages, publish, results
from rrcli.comparison.gates import require_gates
from rrcli.comparison.results import GateResult
from rrcli.errors import CheckFailed, UsageError
from rrcli.services.compare import compare
from rrcli.settings import CompareSettings

NOISE = "finetuned_vanilla.reasoning_accuracy > baseline.reasoning_accuracy"


def checked(directory: Path, *gates: str, significant: bool = False) -> list[GateResult]:
    return compare(CompareSettings(gate=gates, gate_significant=significant), [], directory).gates


@pytest.fixture
def stages(tmp_path: Path) -> Path:
    publish(tmp_path, *four_stages())
    return tmp_path


@pytest.mark.parametrize(
    ("gate", "left", "right", "holds"),
    [
        ("finetuned_recursive.reasoning_accuracy > finetuned_vanilla.reasoning_accuracy", 69, 52.5, True),
        ("finetuned_recursive.reasoning_accuracy<finetuned_vanilla.reasoning_accuracy", 69, 52.5, False),
        ("after_surgery.reasoning_accuracy == baseline.reasoning_accuracy", 40, 40, True),
        ("after_surgery.reasoning_accuracy > baseline.reasoning_accuracy", 40, 40, False),
        ("after_surgery.reasoning_accuracy >= baseline.reasoning_accuracy", 40, 40, True),
        ("baseline.reasoning_accuracy <= 39.5", 40, 39.5, False),
        ("1e3 >= baseline.memory_mb", 1000, 800, True),
        ("finetuned_recursive.memory_mb <= 1.02 * baseline.memory_mb", 800, 816, True),
        ("baseline.memory_mb*0.5 > -2 * finetuned_vanilla.memory_mb", 400, -1600, True),
        ("baseline.reasoning_accuracy/chain_sum > 10", 40, 10, True),
    ],
)
def test_a_gate_compares_two_values(stages: Path, gate: str, left: float, right: float, holds: bool) -> None:
    assert checked(stages, gate) == [GateResult(gate, pytest.approx(left), pytest.approx(right), holds)]


@pytest.mark.parametrize(
    ("gate", "message", "hint"),
    [
        ("baseline.perplexity", "needs exactly one of >=, <=, ==, >, <", "STAGE.METRIC > STAGE.METRIC"),
        ("1 < baseline.perplexity < 3", "exactly one", "STAGE.METRIC"),
        ("baseline.perplexity => 3", "cannot be read", "STAGE.METRIC"),
        ("baseline.perplexity > ", "neither a number nor STAGE.METRIC", "STAGE.METRIC"),
        ("baseline.perplexity > nan", "neither a number", "STAGE.METRIC"),
        ("2 > 1", "two numbers", "STAGE.METRIC"),
        ("x * baseline.perplexity > 1", "no number before its *", "STAGE.METRIC"),
        ("basline.perplexity > 1", "stage 'basline', which is not compared", "'baseline'"),
        ("baseline.perplexty > 1", "metric 'perplexty', which baseline does not have", "'perplexity'"),
    ],
)
def test_a_gate_that_cannot_be_read_is_a_usage_error(stages: Path, gate: str, message: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        checked(stages, gate)
    assert message in caught.value.message
    assert f"'{gate}'" in caught.value.message
    assert hint in caught.value.hint


def test_a_stage_may_be_a_file(stages: Path) -> None:
    file = "eval_results/finetuned_vanilla_results.json"
    gate = f"{file}.perplexity < baseline.perplexity"
    (found,) = compare(CompareSettings(gate=(gate,)), ["baseline", file], stages).gates
    assert found.holds


def test_a_value_that_was_not_finite_passes_no_gate(tmp_path: Path) -> None:
    value = results("baseline")
    value["metrics"]["perplexity"]["value"] = float("inf")
    publish(tmp_path, value)
    assert not any(found.holds for found in checked(tmp_path, "baseline.perplexity > 1", "baseline.perplexity < 1"))


def test_a_gate_looks_at_values_unless_significance_is_asked_for(tmp_path: Path) -> None:
    publish(tmp_path, results("baseline"), results("finetuned_vanilla", solved=5, spoiled=3))
    assert checked(tmp_path, NOISE)[0].holds
    assert not checked(tmp_path, NOISE, significant=True)[0].holds
    publish(tmp_path, results("finetuned_vanilla", solved=30, spoiled=3, gain=0.1, wobble=0.02))
    assert checked(tmp_path, NOISE, significant=True)[0].holds
    assert checked(tmp_path, "finetuned_vanilla.perplexity < baseline.perplexity", significant=True)[0].holds
    assert not checked(tmp_path, "finetuned_vanilla.perplexity > baseline.perplexity", significant=True)[0].holds


@pytest.mark.parametrize("gate", ["baseline.perplexity < 9", "baseline.memory_mb < finetuned_vanilla.memory_mb"])
def test_significance_of_what_has_no_test_is_a_usage_error(stages: Path, gate: str) -> None:
    with pytest.raises(UsageError, match="has no test of significance"):
        checked(stages, gate, significant=True)


@pytest.mark.parametrize(
    ("gate", "holds"),
    [
        ("perplexity: finetuned_vanilla < baseline + 1 %", True),
        ("perplexity: finetuned_vanilla ~ baseline within 1 %", True),
        ("perplexity: finetuned_vanilla ~ baseline", True),
        ("perplexity: finetuned_vanilla ~ baseline within 0.01 %", False),
        ("perplexity: finetuned_vanilla < baseline", False),
        ("reasoning_accuracy: finetuned_vanilla > baseline - 10 points", True),
        ("reasoning_accuracy: finetuned_vanilla > baseline - 1 point", False),
    ],
)
def test_a_gate_may_ask_for_equivalence_or_for_no_harm(tmp_path: Path, gate: str, holds: bool) -> None:
    publish(tmp_path, results("baseline"), results("finetuned_vanilla", solved=4, spoiled=4, wobble=0.01))
    (found,) = checked(tmp_path, gate)
    assert found.holds == holds
    assert found.p_adjusted is not None
    assert (found.p_adjusted <= 0.05) == holds


def test_a_factor_with_significance_is_a_margin(tmp_path: Path) -> None:
    publish(tmp_path, results("baseline"), results("finetuned_vanilla", gain=-0.005, wobble=0.01))
    worse, margin = (f"finetuned_vanilla.perplexity < {factor} * baseline.perplexity" for factor in ("1.001", "1.02"))
    assert not checked(tmp_path, worse, significant=True)[0].holds
    (found,) = checked(tmp_path, margin, significant=True)
    (claim,) = checked(tmp_path, "perplexity: finetuned_vanilla < baseline + 2 %")
    assert found.holds
    assert found.p_adjusted == claim.p_adjusted


def test_a_gate_uses_the_corrected_level(tmp_path: Path) -> None:
    """Twelve against three is p = 0.035; beside two primary claims that is not enough."""
    publish(tmp_path, results("baseline"), results("finetuned_vanilla", solved=12, spoiled=3))
    (found,) = checked(tmp_path, NOISE, significant=True)
    assert not found.holds
    assert found.p_adjusted == pytest.approx(3 * scipy.stats.binomtest(3, 15).pvalue)
    claim = "reasoning_accuracy: finetuned_vanilla > baseline"
    (found,) = compare(CompareSettings(gate=(NOISE,), gate_significant=True, primary=(claim,)), [], tmp_path).gates
    assert found.holds, "as the only primary claim it needs no correction"


def test_gates_do_not_change_the_correction_of_primary_claims(stages: Path) -> None:
    gate = "perplexity: finetuned_vanilla < baseline"
    plain, gated = (compare(CompareSettings(gate=gates), [], stages) for gates in ((), (gate,)))
    assert [each.to_dict() for each in plain.judgements] == [each.to_dict() for each in gated.judgements]


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        ("perplexity: finetuned_vanila < baseline", "names stage 'finetuned_vanila'"),
        ("perplexity: finetuned_vanilla < baseline + 1", "are in %"),
        ("memory_mb: finetuned_vanilla < baseline", "not one that is tested"),
    ],
)
def test_a_claim_that_cannot_be_read_is_a_usage_error_of_the_gate(stages: Path, gate: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        checked(stages, gate)
    assert f"the gate '{gate}'" in caught.value.message
    assert message in caught.value.message


def test_gates_that_fail_are_named_with_both_values() -> None:
    passed, failed = GateResult("a.x > b.x", 2, 1, True), GateResult("a.y > b.y", 0.25, 3, False)
    require_gates([passed])
    with pytest.raises(CheckFailed) as caught:
        require_gates([passed, failed])
    assert caught.value.message == "the gate does not hold: 'a.y > b.y' (0.25 and 3)"
    assert caught.value.exit_code == 3
    with pytest.raises(CheckFailed, match=r"2 of 3 gates do not hold: .*; .*"):
        require_gates([failed, passed, failed])
