"""`rr compare` on results made by hand: every number against `stats`, every sentence against what was put in."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rrcli import metrics, stats
from rrcli.errors import RRError, UsageError
from rrcli.services.compare import Cell, Comparison, compare
from rrcli.settings import STAGES, CompareSettings
from rrcli.store import finite, write_json

DOCUMENTS, PROBLEMS = 80, 200

# -- results by hand ---------------------------------------------------------------------------------------------------


def results(stage: str, *, gain: float = 0.0, solved: int = 0, spoiled: int = 0, wobble: float = 0.0) -> dict[str, Any]:
    """Return what `rr eval` writes, for a model that differs from the baseline as asked.

    Args:
        gain: nats per token by which every document is better. wobble: how much that varies over documents.
        solved, spoiled: problems that are newly right, newly wrong; the baseline has 80 of 200.
    """
    rng = np.random.default_rng(0)
    tokens = rng.integers(20, 200, DOCUMENTS)
    level = 2.0 + 0.4 * rng.standard_normal(DOCUMENTS)
    change = gain + wobble * rng.standard_normal(DOCUMENTS)
    documents = [
        {
            "key": f"d{i}",
            "tokens": int(tokens[i]),
            "words": int(tokens[i]) // 2,
            "bytes": 4 * int(tokens[i]),
            "nll": [float(tokens[i] * (level[i] - change[i]))],
            "correct": [int(tokens[i] * min(1.0, 0.4 + change[i] / 4))],
        }
        for i in range(DOCUMENTS)
    ]
    right = [(i < 80 and i >= spoiled) or 80 <= i < 80 + solved for i in range(PROBLEMS)]
    problems = [
        {
            "key": f"p{i}",
            "task": "chain_sum" if i % 2 else "leg_counting:max_animals=2",
            "correct": [hit],
            "strict": [hit],
            "outputs": [str(hit)],
        }
        for i, hit in enumerate(right)
    ]
    text = "a" if gain or solved or spoiled or wobble else "the same"
    generations = [
        {"key": f"g{i}", "text": text, "length": 20 + i, "finished": True, "distinct_2": 0.9, "rep_4": 0.1}
        for i in range(4)
    ]
    records = {"documents": documents, "problems": problems, "generations": generations}
    speed = {
        "decode_tokens_per_sec": {"value": 50.0, "low": 45.0, "high": 52.0, "n": 5},
        "time_per_output_token": {"value": 20.0, "low": 19.0, "high": 22.0, "n": 5},
        "memory_mb": {"value": 800.0},
        "flops_per_token": {"value": 12.0},
    }
    trained = {"tokens": 40_000, "seconds": 60.0, "flops": 2e12} if stage.startswith("finetuned") else None
    return {
        "schema": 1,
        "kind": "evaluation",
        "stage": stage,
        "model": {"tokenizer": "t1", "fingerprint": stage, "recursion": None, "depth": 0},
        "data": {"fingerprint": "f1", "source": "default"},
        "settings": {"max_length": 0, "stride": 0, "max_new_tokens": 48, "chat_template": True},
        "provenance": {"seed": 0, "dtype": "float32", "device": "cpu", "versions": {"torch": "2.13"}},
        "training": trained,
        "metrics": metrics.from_records(records) | speed,
        "by_depth": metrics.by_depth(records),
        "records": records,
    }


def publish(directory: Path, *stages: dict[str, Any]) -> None:
    for value in stages:
        write_json(directory / "eval_results" / f"{value['stage']}_results.json", finite(value))


def compared(directory: Path, *stages: dict[str, Any], alpha: float = 0.05) -> Comparison:
    publish(directory, *stages)
    return compare(CompareSettings(alpha=alpha), [], directory)


def cell(comparison: Comparison, name: str, stage: str) -> Cell:
    row = next(row for row in comparison.rows if row.name == name)
    return row.cells[comparison.stages.index(stage)]


def sentence(comparison: Comparison, *parts: str) -> str:
    found = [text for text in comparison.sentences if all(part in text for part in parts)]
    assert len(found) == 1, comparison.sentences
    return found[0]


def four_stages() -> list[dict[str, Any]]:
    recursive = results("finetuned_recursive", gain=0.12, solved=60, spoiled=2, wobble=0.03)
    recursive["metrics"]["flops_per_token"]["value"] = 30.0
    recursive["metrics"]["time_per_output_token"]["value"] = 50.0
    recursive["training"]["flops"] = 5e12
    return [
        results("baseline"),
        results("after_surgery"),
        results("finetuned_vanilla", gain=0.1, solved=30, spoiled=5, wobble=0.03),
        recursive,
    ]


# -- the numbers -------------------------------------------------------------------------------------------------------


def test_every_stage_is_shown_in_the_order_of_the_experiment(tmp_path: Path) -> None:
    comparison = compared(tmp_path, *reversed(four_stages()))
    assert comparison.stages == list(STAGES)
    names = [row.name for row in comparison.rows]
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
        expected = stats.paired_ratio_difference(
            [d[field][-1] for d in a], [d[field][-1] for d in b], [d[size] for d in b]
        )
        found = cell(comparison, name, stages[stage]["stage"])
        assert found.difference == pytest.approx(scale(expected.value))
        assert found.difference_low == pytest.approx(scale(expected.low))
        assert found.difference_high == pytest.approx(scale(expected.high))
        assert found.p_value == pytest.approx(expected.p_value)
        assert found.n == DOCUMENTS
        assert found.verdict == "better"


def test_problem_differences_are_mcnemar(tmp_path: Path) -> None:
    stages = four_stages()
    comparison = compared(tmp_path, *stages)
    a, b = ([p["correct"][-1] for p in stages[i]["records"]["problems"]] for i in (3, 0))
    found, expected = cell(comparison, "reasoning_accuracy", "finetuned_recursive"), stats.mcnemar(a, b)
    assert found.difference == pytest.approx(100 * (60 - 2) / 200)
    assert (found.difference_low, found.difference_high) == pytest.approx((100 * expected.low, 100 * expected.high))
    assert found.p_value == expected.p_value
    by_task = cell(comparison, "reasoning_accuracy/chain_sum", "finetuned_recursive")
    expected = stats.mcnemar(a[1::2], b[1::2])
    assert by_task.p_value == expected.p_value
    assert by_task.n == 100


def test_all_p_values_of_the_table_are_adjusted_together(tmp_path: Path) -> None:
    comparison = compared(tmp_path, *four_stages())
    tested = [c for row in comparison.rows for c in row.cells if c.p_value is not None]
    assert len(tested) > 15
    claims = [claim for claim in comparison.claims if claim.reference["stage"] != "baseline"]
    assert [claim.name for claim in claims] == ["reasoning_accuracy", "perplexity"]
    family = stats.holm([c.p_value or 0.0 for c in tested] + [claim.estimate.p_value or 0.0 for claim in claims])
    assert [item.p_adjusted for item in (*tested, *claims)] == pytest.approx(family)
    for c in tested:
        assert c.verdict in {"better", "worse", "differs", "same", "within noise"}
        assert (c.verdict in {"better", "worse", "differs"}) <= (c.p_adjusted <= 0.05)  # type: ignore[operator]


def test_costs_are_shown_and_never_tested(tmp_path: Path) -> None:
    comparison = compared(tmp_path, *four_stages())
    for row in comparison.rows:
        if row.metric.kind == "cost":
            assert all(c.p_value is None and c.verdict == "" for c in row.cells)
    assert cell(comparison, "flops_per_token", "finetuned_recursive").difference == pytest.approx(150)
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
    assert comparison.stages == ["finetuned_vanilla", "finetuned_recursive"]
    assert cell(comparison, "reasoning_accuracy", "finetuned_recursive").difference == pytest.approx(100 * 33 / 200)
    assert cell(comparison, "reasoning_accuracy", "finetuned_vanilla").difference is None


def test_depths_are_compared_at_the_last(tmp_path: Path) -> None:
    base, recursive = results("baseline"), results("finetuned_recursive", gain=0.2, wobble=0.01)
    for row, before in zip(recursive["records"]["documents"], base["records"]["documents"], strict=True):
        row["nll"] = [before["nll"][0], *row["nll"]]
        row["correct"] = [before["correct"][0], *row["correct"]]
    for i, row in enumerate(recursive["records"]["problems"]):
        row["correct"] = [*row["correct"], i < 140]
        row["outputs"] = [*row["outputs"], str(i < 140)]
    comparison = compared(tmp_path, base, recursive)
    found = cell(comparison, "perplexity", "finetuned_recursive")
    assert found.verdict == "better"
    assert found.difference == pytest.approx(100 * math.expm1(-0.2), abs=1)
    assert cell(comparison, "reasoning_accuracy", "finetuned_recursive").difference == pytest.approx(100 * 60 / 200)


# -- surgery -----------------------------------------------------------------------------------------------------------


def test_identical_records_are_preserved_exactly(tmp_path: Path) -> None:
    comparison = compared(tmp_path, results("baseline"), results("after_surgery"))
    assert comparison.sentences == [
        f"Surgery preserved the baseline exactly: {DOCUMENTS} documents' log-probabilities, {PROBLEMS} problems' "
        "answers, 4 generations are identical."
    ]
    for name in ("perplexity", "token_accuracy", "reasoning_accuracy", "distinct_2"):
        found = cell(comparison, name, "after_surgery")
        assert (found.verdict, found.difference, found.p_value) == ("same", 0, 1)


@pytest.mark.parametrize(
    ("kind", "field", "value", "told"),
    [
        ("documents", "nll", [123.0], "documents' log-probabilities differ"),
        ("problems", "outputs", ["something else"], "problems' answers differ"),
        ("generations", "text", "another", "generations differ"),
    ],
)
def test_one_changed_record_is_not_preserved(tmp_path: Path, kind: str, field: str, value: Any, told: str) -> None:
    after = results("after_surgery")
    after["records"][kind][2][field] = value
    text = sentence(compared(tmp_path, results("baseline"), after), "Surgery")
    assert "did NOT preserve" in text
    assert told in text
    assert "exactly" not in text


def test_the_smallest_change_of_one_log_probability_is_seen(tmp_path: Path) -> None:
    after = results("after_surgery")
    row = after["records"]["documents"][0]
    row["nll"] = [math.nextafter(row["nll"][0], math.inf)]
    assert "did NOT preserve" in sentence(compared(tmp_path, results("baseline"), after), "Surgery")


def test_an_identical_answer_by_other_words_is_no_preservation(tmp_path: Path) -> None:
    after = results("after_surgery")
    after["records"]["problems"][0]["outputs"] = ["True, I think"]
    comparison = compared(tmp_path, results("baseline"), after)
    assert "did NOT preserve" in sentence(comparison, "Surgery")
    assert cell(comparison, "reasoning_accuracy", "after_surgery").verdict == "within noise"


def test_nothing_in_common_cannot_be_told(tmp_path: Path) -> None:
    after = results("after_surgery")
    for rows in after["records"].values():
        for row in rows:
            row["key"] += "'"
    comparison = compared(tmp_path, results("baseline"), after)
    assert "cannot be told" in sentence(comparison, "surgery")
    assert cell(comparison, "perplexity", "after_surgery").verdict == "not comparable"
    assert cell(comparison, "reasoning_accuracy", "after_surgery").verdict == "not comparable"


# -- what is shown and what is noise -----------------------------------------------------------------------------------


def test_a_real_gain_is_called_better_with_interval_and_p(tmp_path: Path) -> None:
    comparison = compared(tmp_path, *four_stages())
    text = sentence(comparison, "Recursion, beyond fine-tuning", "reasoning accuracy")
    assert "is better than vanilla fine-tuning's" in text
    assert "52.5 -> 69 %" in text
    assert re.search(r"\+16\.5 points \[\+\d+\.\d, \+\d+\.\d\], p (= )?< 0\.0001", text)
    assert "n = 200" in text
    text = sentence(comparison, "Recursion, beyond fine-tuning", "perplexity")
    assert "is better" in text
    assert "n = 80" in text
    assert "better than the baseline's" in sentence(comparison, "without recursion", "reasoning accuracy")


def test_the_cost_of_recursion_is_told_beside_its_gain(tmp_path: Path) -> None:
    text = sentence(compared(tmp_path, *four_stages()), "costs against vanilla")
    assert "2.50 x the FLOPs per token" in text
    assert "2.50 x the time per output token" in text
    assert "2.50 x the training FLOPs" in text


def test_a_loss_is_called_worse(tmp_path: Path) -> None:
    worse = results("finetuned_vanilla", gain=-0.1, spoiled=40, wobble=0.02)
    comparison = compared(tmp_path, results("baseline"), worse)
    for name in ("perplexity", "bits_per_byte", "token_accuracy", "reasoning_accuracy"):
        assert cell(comparison, name, "finetuned_vanilla").verdict == "worse"
    assert "reasoning accuracy is worse than the baseline's" in sentence(comparison, "reasoning accuracy")
    assert (cell(comparison, "perplexity", "finetuned_vanilla").difference or 0) > 0


def test_noise_is_called_no_effect_with_the_problems_it_would_take(tmp_path: Path) -> None:
    vanilla = results("finetuned_vanilla")
    recursive = results("finetuned_recursive", solved=8, spoiled=5, wobble=0.05)
    comparison = compared(tmp_path, vanilla, recursive)
    text = sentence(comparison, "no effect on reasoning accuracy is shown")
    assert "+1.5 points" in text
    needed = stats.problems_needed(3 / 200, 13 / 200)
    assert needed is not None
    assert needed > 1000
    assert f"about {needed:,} problems" in text
    assert "no effect on perplexity is shown" in sentence(comparison, "perplexity")
    assert not any("better" in s or "worse" in s for s in comparison.sentences)
    assert cell(comparison, "reasoning_accuracy", "finetuned_recursive").verdict == "within noise"


def test_no_difference_at_all_asks_for_no_problems(tmp_path: Path) -> None:
    comparison = compared(tmp_path, results("baseline"), results("finetuned_vanilla", solved=6, spoiled=6))
    text = sentence(comparison, "reasoning accuracy")
    assert "no effect" in text
    assert "would take" not in text


def test_one_weak_result_among_many_metrics_is_noise(tmp_path: Path) -> None:
    """Twelve against three is p = 0.035 alone; among all the metrics of a table it is nothing."""
    vanilla = results("finetuned_vanilla", solved=12, spoiled=3)
    found = cell(compared(tmp_path, results("baseline"), vanilla), "reasoning_accuracy", "finetuned_vanilla")
    assert (found.p_value or 1) < 0.05 < (found.p_adjusted or 0)
    assert found.verdict == "within noise"


def test_the_sentences_do_not_contradict_the_table(tmp_path: Path) -> None:
    vanilla = results("finetuned_vanilla", solved=14, spoiled=3)
    comparison = compared(tmp_path, results("baseline"), vanilla)
    verdict = cell(comparison, "reasoning_accuracy", "finetuned_vanilla").verdict
    assert ("better" in sentence(comparison, "reasoning accuracy")) == (verdict == "better")


def test_alpha_is_the_users(tmp_path: Path) -> None:
    stages = results("baseline"), results("finetuned_vanilla", solved=12, spoiled=3)
    assert cell(compared(tmp_path, *stages), "reasoning_accuracy", "finetuned_vanilla").verdict == "within noise"
    assert cell(compared(tmp_path, *stages, alpha=0.9), "reasoning_accuracy", "finetuned_vanilla").verdict == "better"


def test_without_vanilla_the_missing_control_is_told(tmp_path: Path) -> None:
    comparison = compared(
        tmp_path, results("baseline"), results("finetuned_recursive", gain=0.1, solved=30, wobble=0.02)
    )
    assert "better than the baseline's" in sentence(comparison, "Recursive fine-tuning", "reasoning")
    assert "needs stage finetuned_vanilla" in comparison.sentences[-1]


def test_one_stage_alone_is_shown(tmp_path: Path) -> None:
    comparison = compared(tmp_path, results("baseline"))
    assert comparison.stages == ["baseline"]
    assert cell(comparison, "perplexity", "baseline").verdict == ""
    assert (comparison.sentences, comparison.warnings) == ([], [])


def test_a_skipped_part_leaves_a_gap_and_no_claim(tmp_path: Path) -> None:
    vanilla = results("finetuned_vanilla", gain=0.1, solved=30, wobble=0.02)
    del vanilla["records"]["problems"]
    vanilla["metrics"] = {k: v for k, v in vanilla["metrics"].items() if not k.startswith("reasoning")}
    comparison = compared(tmp_path, results("baseline"), vanilla)
    assert cell(comparison, "reasoning_accuracy", "finetuned_vanilla") == Cell()
    assert not any("reasoning" in text for text in comparison.sentences)


# -- warnings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "key", "value", "told"),
    [
        ("data", "fingerprint", "f2", "data"),
        ("provenance", "seed", 1, "seed (0 and 1)"),
        ("provenance", "dtype", "bfloat16", "dtype (float32 and bfloat16)"),
        ("provenance", "device", "cuda:0", "device (cpu and cuda:0)"),
        ("provenance", "versions", {"torch": "2.14"}, "versions"),
        ("model", "tokenizer", "t2", "tokenizer"),
    ],
)
def test_what_differs_beside_the_model_is_warned_of(
    tmp_path: Path, place: str, key: str, value: Any, told: str
) -> None:
    other = results("finetuned_vanilla", gain=0.1, wobble=0.02)
    other[place][key] = value
    (warning,) = compared(tmp_path, results("baseline"), results("after_surgery"), other).warnings
    assert warning == f"baseline and finetuned_vanilla were measured with different {told}"


@pytest.mark.parametrize(
    ("key", "value"), [("max_length", 128), ("stride", 64), ("max_new_tokens", 8), ("chat_template", False)]
)
def test_other_evaluation_settings_are_warned_of(tmp_path: Path, key: str, value: Any) -> None:
    other = results("finetuned_vanilla", gain=0.1, wobble=0.02)
    other["settings"][key] = value
    assert compared(tmp_path, results("baseline"), other).warnings


def test_other_tokenizers_compare_in_bits_per_byte_alone(tmp_path: Path) -> None:
    other = results("finetuned_vanilla", gain=0.1, solved=30, wobble=0.02)
    other["model"]["tokenizer"] = "t2"
    for row in other["records"]["documents"]:
        row["tokens"] *= 2
    comparison = compared(tmp_path, results("baseline"), other)
    for name in ("perplexity", "token_accuracy"):
        found = cell(comparison, name, "finetuned_vanilla")
        assert found.verdict == "not comparable"
        assert (found.difference, found.p_value) == (None, None)
    found = cell(comparison, "bits_per_byte", "finetuned_vanilla")
    assert found.verdict == "better"
    assert found.difference == pytest.approx(-0.1 / 4 / math.log(2), rel=0.1)
    assert not any("perplexity" in text for text in comparison.sentences)
    assert "better" in sentence(comparison, "reasoning accuracy")


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_missing_stage_names_the_command_that_measures_it(tmp_path: Path) -> None:
    publish(tmp_path, results("baseline"))
    with pytest.raises(RRError, match="stage 'after_surgery' was not measured") as caught:
        compare(CompareSettings(), ["baseline", "after_surgery"], tmp_path)
    assert "rr eval --stage after_surgery" in caught.value.hint
    assert str(tmp_path / "eval_results" / "after_surgery_results.json") in caught.value.message
    assert caught.value.exit_code == 1


def test_no_results_at_all(tmp_path: Path) -> None:
    with pytest.raises(RRError, match="holds no results") as caught:
        compare(CompareSettings(), [], tmp_path)
    assert "rr run" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "hint"),
    [("basline", "'baseline'"), ("finetuned-vanilla", "'finetuned_vanilla'"), ("x", "Known: baseline")],
)
def test_a_typo_in_a_stage_is_a_usage_error(tmp_path: Path, name: str, hint: str) -> None:
    publish(tmp_path, results("baseline"))
    with pytest.raises(UsageError, match=f"unknown stage '{name}'") as caught:
        compare(CompareSettings(), ["baseline", name], tmp_path)
    assert hint in caught.value.hint


def test_results_that_were_cut_off_are_refused(tmp_path: Path) -> None:
    publish(tmp_path, results("baseline"))
    file = tmp_path / "eval_results" / "baseline_results.json"
    file.write_text(file.read_text()[:-500])
    with pytest.raises(RRError, match="is cut off") as caught:
        compare(CompareSettings(), [], tmp_path)
    assert "rr eval --stage baseline" in caught.value.hint


@pytest.mark.parametrize("key", ["stage", "metrics", "records", "model", "data", "provenance"])
def test_a_file_that_is_no_evaluation_is_refused(tmp_path: Path, key: str) -> None:
    value = results("baseline")
    del value[key]
    write_json(tmp_path / "eval_results" / "baseline_results.json", value)
    with pytest.raises(RRError, match=f"is no evaluation: it has no '{key}'"):
        compare(CompareSettings(), ["baseline"], tmp_path)


def test_results_of_a_newer_version_are_refused(tmp_path: Path) -> None:
    publish(tmp_path, results("baseline") | {"schema": 2})
    with pytest.raises(RRError, match="has schema 2") as caught:
        compare(CompareSettings(), [], tmp_path)
    assert "Update" in caught.value.hint


def test_a_file_may_be_named_by_its_path(tmp_path: Path) -> None:
    publish(tmp_path, results("baseline"))
    write_json(tmp_path / "other.json", results("finetuned_vanilla", gain=0.1, solved=30, wobble=0.02))
    comparison = compare(CompareSettings(), ["baseline", "other.json"], tmp_path)
    assert comparison.stages == ["baseline", "other.json"]
    assert cell(comparison, "perplexity", "other.json").verdict == "better"
    with pytest.raises(UsageError, match="does not exist"):
        compare(CompareSettings(), ["baseline", "absent.json"], tmp_path)


def test_files_named_by_path_are_judged_in_words_too(tmp_path: Path) -> None:
    publish(tmp_path, results("baseline"), results("after_surgery"))
    names = [f"eval_results/{stage}_results.json" for stage in ("baseline", "after_surgery")]
    assert compare(CompareSettings(), names, tmp_path).sentences


# -- JSON --------------------------------------------------------------------------------------------------------------


def test_the_json_form_holds_no_nan(tmp_path: Path) -> None:
    """One document and one problem make infinite intervals; the JSON form must still be JSON."""
    stages = [results("baseline"), results("finetuned_vanilla", gain=0.1, solved=1)]
    for stage in stages:
        stage["records"] = {kind: rows[:1] for kind, rows in stage["records"].items()}
        stage["metrics"] = metrics.from_records(stage["records"])
    value = compared(tmp_path, *stages).to_dict()
    text = json.dumps(value, allow_nan=False)
    assert json.loads(text)["stages"] == ["baseline", "finetuned_vanilla"]


def test_the_json_form_is_what_is_shown(tmp_path: Path) -> None:
    comparison = compared(tmp_path, *four_stages())
    value = comparison.to_dict()
    assert value["alpha"] == 0.05
    assert value["sentences"] == comparison.sentences
    (row,) = [row for row in value["rows"] if row["name"] == "reasoning_accuracy"]
    assert row["better"] == "higher"
    assert row["cells"][3] == vars(cell(comparison, "reasoning_accuracy", "finetuned_recursive"))
    assert copy.deepcopy(value) == value
