"""Differences, intervals and verdicts of the cells, against `stats` on the records."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from comparing import DOCUMENTS, cell, compared, four_stages, publish, results
from rrcli.comparison import pairing
from rrcli.comparison.pairing import pair
from rrcli.comparison.results import Cell, Stage
from rrcli.evaluation import metrics, stats
from rrcli.evaluation.paired import PairedAnswers, PairedTotals
from rrcli.services.compare import compare
from rrcli.settings import STAGES, CompareSettings


def test_every_stage_is_shown_in_the_order_of_the_experiment(tmp_path: Path) -> None:
    comparison = compared(tmp_path, *reversed(four_stages()))
    assert comparison.labels == list(STAGES[:4])
    names = [row.metric.name for row in comparison.rows]
    assert names[:6] == [
        "perplexity",
        "bits_per_byte",
        "token_accuracy",
        "reasoning_accuracy",
        "reasoning_accuracy/leg_counting",
        "reasoning_accuracy/chain_sum",
    ]
    assert names[-3:] == ["training_tokens", "training_seconds", "training_flops"]
    assert all(len(row.cells) == 4 for row in comparison.rows)
    assert comparison.warnings == []


def test_values_and_intervals_are_those_of_the_results(tmp_path: Path) -> None:
    stages = four_stages()
    comparison = compared(tmp_path, *stages)
    for stage in stages:
        for name in ("perplexity", "bits_per_byte", "token_accuracy", "reasoning_accuracy", "distinct_2"):
            shown, measured = cell(comparison, name, stage["stage"]), stage["metrics"][name]
            assert shown.value == measured["value"]
            assert (shown.low, shown.high) == (measured.get("low"), measured.get("high"))


@pytest.mark.parametrize("stage", [2, 3])
def test_document_differences_are_the_paired_ratio(tmp_path: Path, stage: int) -> None:
    stages = four_stages()
    comparison = compared(tmp_path, *stages)
    a, b = stages[stage]["records"]["documents"], stages[0]["records"]["documents"]
    for name, field, size, scale in (
        ("perplexity", "nll", "tokens", lambda x: 100 * (math.exp(x) - 1)),
        ("bits_per_byte", "nll", "bytes", lambda x: x / math.log(2)),
        ("token_accuracy", "correct", "tokens", lambda x: 100 * x),
    ):
        expected = PairedTotals([d[field][-1] for d in a], [d[field][-1] for d in b], [d[size] for d in b])
        found = cell(comparison, name, stages[stage]["stage"])
        assert found.difference == pytest.approx(scale(expected.value))
        low, high = expected.interval(0.05) or (0, 0)
        assert (found.difference_low, found.difference_high) == pytest.approx((scale(low), scale(high)))
        assert (found.n, found.verdict) == (DOCUMENTS, "")
        # The nats of perplexity are those of bits per byte: one test.
        shared = name == "bits_per_byte"
        assert (found.p_value, found.role) == ((None, "") if shared else (expected.p_value(), "exploratory"))


def test_problem_differences_are_mcnemar(tmp_path: Path) -> None:
    stages = four_stages()
    comparison = compared(tmp_path, *stages)
    a, b = ([p["correct"][-1] for p in stages[i]["records"]["problems"]] for i in (3, 0))
    found, expected = cell(comparison, "reasoning_accuracy", "finetuned_recursive"), PairedAnswers.of(a, b)
    assert found.difference == pytest.approx(100 * (60 - 2) / 200)
    low, high = expected.interval(0.05) or (0, 0)
    assert (found.difference_low, found.difference_high) == pytest.approx((100 * low, 100 * high))
    assert found.p_value == expected.p_value()
    by_task = cell(comparison, "reasoning_accuracy/chain_sum", "finetuned_recursive")
    assert by_task.p_value == PairedAnswers.of(a[1::2], b[1::2]).p_value()
    assert by_task.n == 100


def test_only_primary_claims_are_corrected_and_the_rest_is_exploratory(tmp_path: Path) -> None:
    """Tests of tasks, of bits per byte and of four prompts made a family of 25, and the effect on perplexity noise."""
    comparison = compared(tmp_path, *four_stages())
    p_values = [each.p_value for each in comparison.judgements]
    assert [each.p_adjusted for each in comparison.judgements] == stats.holm(p_values)
    assert len(p_values) == 2
    for row in comparison.rows:
        for found in row.cells:
            assert found.p_adjusted is None
            assert found.verdict in {"", "same"}
            assert found.role == ("exploratory" if found.p_value is not None else "")
            if row.metric.part == "generations":
                assert (found.p_value, found.difference_low) == (None, None)


def test_every_pair_is_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed = []

    def counted(metric: metrics.Metric, stage: Stage, reference: Stage) -> Any:
        computed.append((metric.name, stage.name, reference.name))
        return pair(metric, stage, reference)

    monkeypatch.setattr(pairing, "pair", counted)
    publish(tmp_path, *four_stages())
    gate = "finetuned_recursive.perplexity < finetuned_vanilla.perplexity"
    compare(CompareSettings(gate=(gate,), gate_significant=True), [], tmp_path)
    assert len(computed) == len(set(computed))
    assert ("perplexity", "finetuned_recursive", "finetuned_vanilla") in computed


def test_costs_are_shown_and_never_tested(tmp_path: Path) -> None:
    comparison = compared(tmp_path, *four_stages())
    for row in comparison.rows:
        if row.metric.relative and not row.metric.test:
            assert all(c.p_value is None and c.verdict == "" for c in row.cells)
    assert cell(comparison, "decode_flops_per_token", "finetuned_recursive").difference == pytest.approx(150)
    assert cell(comparison, "training_tokens", "finetuned_vanilla").value == 40
    assert cell(comparison, "training_flops", "finetuned_recursive").value == 5
    assert cell(comparison, "training_tokens", "baseline").value is None


def test_only_common_records_are_paired(tmp_path: Path) -> None:
    base, vanilla = results("baseline"), results("finetuned_vanilla", gain=0.1, solved=30, wobble=0.03)
    vanilla["records"]["documents"] = list(reversed(vanilla["records"]["documents"][:30]))
    vanilla["records"]["problems"] = vanilla["records"]["problems"][50:120]
    comparison = compared(tmp_path, base, vanilla)
    found = cell(comparison, "perplexity", "finetuned_vanilla")
    pairs = [(v["nll"][0], b["nll"][0], b["tokens"]) for v in vanilla["records"]["documents"]
             for b in base["records"]["documents"] if b["key"] == v["key"]]  # fmt: skip
    assert found.n == 30
    assert found.difference == pytest.approx(
        100 * math.expm1(sum(v - b for v, b, _ in pairs) / sum(t for *_, t in pairs))
    )
    assert cell(comparison, "reasoning_accuracy", "finetuned_vanilla").n == 70


def test_the_first_stage_named_is_the_reference(tmp_path: Path) -> None:
    publish(tmp_path, *four_stages())
    comparison = compare(CompareSettings(), ["finetuned_vanilla", "finetuned_recursive"], tmp_path)
    assert comparison.labels == ["finetuned_vanilla", "finetuned_recursive"]
    assert cell(comparison, "reasoning_accuracy", "finetuned_recursive").difference == pytest.approx(100 * 33 / 200)
    assert cell(comparison, "reasoning_accuracy", "finetuned_vanilla").difference is None


def test_depths_are_compared_at_the_last(tmp_path: Path) -> None:
    base, recursive = results("baseline"), results("finetuned_recursive", gain=0.2, wobble=0.01)
    for row, before in zip(recursive["records"]["documents"], base["records"]["documents"], strict=True):
        row["nll"] = [before["nll"][0], *row["nll"]]
        row["correct"] = [before["correct"][0], *row["correct"]]
    for i, row in enumerate(recursive["records"]["problems"]):
        row["correct"] = [*row["correct"], i < 140]
        row["strict"] = row["correct"]
        row["outputs"] = [*row["outputs"], str(i < 140)]
    comparison = compared(tmp_path, base, recursive)
    found = cell(comparison, "perplexity", "finetuned_recursive")
    assert (found.p_value or 1) < 0.001
    assert found.difference == pytest.approx(100 * math.expm1(-0.2), abs=1)
    assert cell(comparison, "reasoning_accuracy", "finetuned_recursive").difference == pytest.approx(100 * 60 / 200)


# -- other kinds of rows -----------------------------------------------------------------------------------------------


def with_harness(
    result: dict[str, Any], scores: list[float], metric: str = "exact_match/strict-match", better: str = "higher"
) -> dict[str, Any]:
    """Add a task of lm-eval, and a group of tasks, which has no samples of its own."""
    result["records"]["harness"] = [
        {"key": f"h{i}", "target": "t", "task": "gsm8k", "metric": metric, "score": score, "output": ""}
        for i, score in enumerate(scores)
    ]
    entry = {"value": sum(scores) / len(scores), "n": len(scores), "better": better}
    result["metrics"] |= {f"harness/gsm8k/{metric}": entry, f"harness/group/{metric}": entry}
    return result


def test_harness_scores_of_0_and_1_are_mcnemar(tmp_path: Path) -> None:
    before, after = [0.0] * 60 + [1.0] * 40, [1.0] * 50 + [0.0] * 10 + [1.0] * 40
    comparison = compared(
        tmp_path, with_harness(results("baseline"), before), with_harness(results("finetuned_vanilla"), after)
    )
    found = cell(comparison, "harness/gsm8k/exact_match/strict-match", "finetuned_vanilla")
    expected = PairedAnswers.of(list(map(bool, after)), list(map(bool, before)))
    assert (found.value, found.difference, found.p_value) == (0.9, 0.5, expected.p_value())
    assert (found.role, found.n) == ("exploratory", 100)
    assert any("gsm8k exact_match strict-match 0.4 -> 0.9, a difference of +0.500" in t for t in comparison.sentences)


def test_a_metric_without_records_is_shown_without_a_verdict(tmp_path: Path) -> None:
    stages = [with_harness(results(stage), [1.0, 0.0]) for stage in ("baseline", "after_surgery")]
    comparison = compared(tmp_path, *stages)
    assert cell(comparison, "harness/group/exact_match/strict-match", "after_surgery") == Cell(value=0.5, n=2)
    assert cell(comparison, "harness/gsm8k/exact_match/strict-match", "after_surgery").verdict == "same"
    assert comparison.warnings == []


@pytest.mark.parametrize(("better", "verdict"), [("lower", "better"), ("higher", "worse"), ("", "differs")])
def test_other_harness_scores_are_compared_by_their_mean(tmp_path: Path, better: str, verdict: str) -> None:
    before = [5.0 + i / 10 for i in range(40)]
    after = [score - 1 - i % 3 / 10 for i, score in enumerate(before)]
    stages = [
        with_harness(results(stage), scores, "word_perplexity", better)
        for stage, scores in (("baseline", before), ("finetuned_vanilla", after))
    ]
    claim = "harness/gsm8k/word_perplexity: finetuned_vanilla < baseline"
    comparison = compared(tmp_path, *stages, primary=(claim,))
    found = cell(comparison, "harness/gsm8k/word_perplexity", "finetuned_vanilla")
    assert found.p_value == PairedTotals(after, before, [1.0] * 40).p_value()
    assert found.difference == pytest.approx(-1.1, abs=0.02)
    assert found.verdict == verdict
    assert comparison.judgements[0].shown


def test_harness_samples_of_other_targets_are_not_paired(tmp_path: Path) -> None:
    stages = [with_harness(results(stage), [1.0, 0.0]) for stage in ("baseline", "after_surgery")]
    stages[1]["records"]["harness"][0]["target"] = "another"
    comparison = compared(tmp_path, *stages)
    assert cell(comparison, "harness/gsm8k/exact_match/strict-match", "after_surgery").verdict == "not comparable"
    (warning,) = comparison.warnings
    assert "1 of the 2 samples of gsm8k in both have different content (target)" in warning


def test_a_prompt_metric_is_shown_and_not_tested(tmp_path: Path) -> None:
    stages = [results("baseline"), results("finetuned_vanilla", gain=0.1)]
    for stage, level in zip(stages, (0.5, 0.9), strict=True):
        rows = stage["records"]["generations"]
        rows += [rows[0] | {"key": f"g{i}"} for i in range(4, 20)]
        for i, row in enumerate(rows):
            row["distinct_2"] = level + i / 1000
        stage["metrics"] |= metrics.from_records({"generations": rows})
    found = cell(compared(tmp_path, *stages), "distinct_2", "finetuned_vanilla")
    assert found.difference == pytest.approx(0.4)
    assert (found.p_value, found.difference_low) == (None, None), "sample generations are shown, never tested"


def test_chunk_metrics_are_shown_without_a_verdict(tmp_path: Path) -> None:
    recursive = results("finetuned_recursive", gain=0.1)
    chunks = {"avg_refine_steps": 1.2, "commit_rate": 0.4, "avg_chunk_length": 9.0, "stability@1": 0.8,
              "stability@2": 0.9, "fix_rate": 0.1, "break_rate": 0.05}  # fmt: skip
    recursive["metrics"] |= {name: {"value": value} for name, value in chunks.items()}
    comparison = compared(tmp_path, results("baseline"), recursive)
    for name, value in chunks.items():
        assert cell(comparison, name, "finetuned_recursive") == Cell(value=value)
        assert cell(comparison, name, "baseline") == Cell()


def test_every_depth_of_a_recursive_stage_is_there(tmp_path: Path) -> None:
    recursive = results("finetuned_recursive", gain=0.2, wobble=0.01)
    for row in recursive["records"]["documents"]:
        row["nll"] = [row["nll"][0] + 5, row["nll"][0]]
        row["correct"] = row["correct"] * 2
    recursive["by_depth"] = metrics.by_depth({"documents": recursive["records"]["documents"]})
    comparison = compared(tmp_path, results("baseline"), recursive)
    row = next(row for row in comparison.rows if row.metric.name == "perplexity")
    shallow, deep = row.depths[1]
    assert shallow > deep == pytest.approx(metrics.from_records(recursive["records"])["perplexity"]["value"])
    assert len(row.depths[0]) == 1
    assert next(row for row in comparison.rows if row.metric.name == "bits_per_byte").depths == []
