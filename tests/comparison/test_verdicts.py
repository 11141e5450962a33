"""Every sentence and every warning, against what was put into the results."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

from comparing import DOCUMENTS, PROBLEMS, cell, compared, four_stages, results, sentence
from rrcli.comparison import formats
from rrcli.comparison.results import Cell
from rrcli.evaluation import stats

# -- surgery -----------------------------------------------------------------------------------------------------------


def test_identical_records_are_preserved_exactly(tmp_path: Path) -> None:
    comparison = compared(tmp_path, results("baseline"), results("after_surgery"))
    assert comparison.sentences == [
        f"Surgery preserved the baseline exactly: {DOCUMENTS} documents' log-probabilities, {PROBLEMS} problems' "
        "answers and 4 generations are identical."
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
    assert "It is not known" in sentence(comparison, "surgery")
    assert cell(comparison, "perplexity", "after_surgery").verdict == "not comparable"
    assert cell(comparison, "reasoning_accuracy", "after_surgery").verdict == "not comparable"


@pytest.mark.parametrize(("shift", "told"), [(1e-9, "by no more than"), (1.0, "by up to")])
def test_rounding_is_told_from_another_model(tmp_path: Path, shift: float, told: str) -> None:
    """Another device sums in another order: as far as everything else is the same, the change has a size."""
    after = results("after_surgery")
    row = after["records"]["documents"][3]
    row["nll"] = [row["nll"][0] + shift * row["tokens"]]
    text = sentence(compared(tmp_path, results("baseline"), after), "Surgery")
    assert "did NOT preserve" in text
    assert f"{told} {shift:.2g} nats per token" in text
    assert ("which is rounding" in text) == (told == "by no more than")
    assert f"; {PROBLEMS} problems' answers and 4 generations are identical" in text


# -- what is shown and what is noise -----------------------------------------------------------------------------------


def test_a_real_gain_is_called_better_with_interval_and_p(tmp_path: Path) -> None:
    comparison = compared(tmp_path, *four_stages())
    text = sentence(comparison, "Recursion, beyond fine-tuning", "reasoning accuracy")
    assert "is better than vanilla fine-tuning's" in text
    assert "52.5 -> 69 %" in text
    assert re.search(r"\+16\.5 points \[95 % interval \+\d+\.\d to \+\d+\.\d\], p < 0\.0001", text)
    assert "n = 200" in text
    text = sentence(comparison, "Recursion, beyond fine-tuning", "perplexity")
    assert "is better" in text
    assert "n = 80" in text
    assert "better than the baseline's" in sentence(comparison, "without recursion", "reasoning accuracy")


def test_the_cost_of_recursion_is_told_beside_its_gain(tmp_path: Path) -> None:
    text = sentence(compared(tmp_path, *four_stages()), "Cost of recursion compared with vanilla fine-tuning")
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
    assert f"About {needed:,} problems" in text
    assert "no effect on perplexity is shown" in sentence(comparison, "perplexity")
    assert not any("better" in s or "worse" in s for s in comparison.sentences)
    assert cell(comparison, "reasoning_accuracy", "finetuned_recursive").verdict == "within noise"


def test_noise_in_text_asks_for_documents(tmp_path: Path) -> None:
    comparison = compared(tmp_path, results("baseline"), results("finetuned_vanilla", gain=0.002, wobble=0.05))
    claim = next(claim for claim in comparison.claims if claim.metric.name == "perplexity")
    needed = stats.units_needed(claim.estimate)
    assert needed is not None
    assert needed > DOCUMENTS
    assert f"About {needed:,} documents would be needed" in sentence(comparison, "perplexity")


def test_no_difference_at_all_asks_for_no_problems(tmp_path: Path) -> None:
    comparison = compared(tmp_path, results("baseline"), results("finetuned_vanilla", solved=6, spoiled=6))
    text = sentence(comparison, "reasoning accuracy")
    assert "no effect" in text
    assert "would be needed" not in text


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
    assert "measure stage finetuned_vanilla too" in comparison.sentences[-1]


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


def test_a_verdict_needs_its_interval_too(tmp_path: Path) -> None:
    """At any alpha, a difference whose interval holds zero is not called one."""
    vanilla = results("finetuned_vanilla", solved=6, spoiled=3)
    comparison = compared(tmp_path, results("baseline"), vanilla, alpha=1.0)
    found = cell(comparison, "reasoning_accuracy", "finetuned_vanilla")
    assert (found.difference_low or 0) < 0 < (found.difference_high or 0)
    assert found.verdict == "within noise"
    assert "no effect on reasoning accuracy is shown" in sentence(comparison, "reasoning accuracy")


def test_a_perplexity_that_was_not_finite_is_a_gap(tmp_path: Path) -> None:
    broken = results("finetuned_vanilla", solved=30)
    broken["metrics"]["perplexity"] |= {"value": math.inf, "high": math.inf}
    comparison = compared(tmp_path, results("baseline"), broken)
    assert cell(comparison, "perplexity", "finetuned_vanilla").value is None
    assert [claim.metric.name for claim in comparison.claims] == ["reasoning_accuracy"]
    assert "Perplexity" in formats.markdown(comparison)


# -- warnings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "key", "value", "told"),
    [
        ("data", "fingerprint", "f2", "data (default f1 and default f2)"),
        ("provenance", "seed", 1, "seed (0 and 1)"),
        ("provenance", "dtype", "bfloat16", "dtype (float32 and bfloat16)"),
        ("provenance", "device", "cuda:0", "device (cpu and cuda:0)"),
        ("provenance", "versions", {"torch": "2.14"}, "torch (2.13 and 2.14)"),
        ("provenance", "versions", {"torch": "2.13", "peft": "0.21"}, "peft (none and 0.21)"),
        ("provenance", "hardware", "H200", "hardware (Xeon and H200)"),
        ("model", "tokenizer", "t2", "tokenizer (so only bits per byte can be compared, not metrics per token)"),
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
    before = other["settings"][key]
    other["settings"][key] = value
    (warning,) = compared(tmp_path, results("baseline"), other).warnings
    assert f"{key} ({before} and {value})" in warning


def test_a_sample_is_told(tmp_path: Path) -> None:
    stages = [results("baseline"), results("after_surgery")]
    for stage in stages:
        stage["data"] |= {"documents": 20, "held_out": 20 if stage["stage"] == "baseline" else 392}
    (warning,) = compared(tmp_path, *stages).warnings
    assert "only a sample of the documents was scored (--max-samples)" in warning
    assert warning.endswith(": after_surgery (20 of 392)")


def test_what_an_older_version_did_not_record_is_not_said_to_differ(tmp_path: Path) -> None:
    older = results("baseline")
    del older["provenance"]["hardware"], older["settings"]
    assert compared(tmp_path, older, results("after_surgery")).warnings == []


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
    assert "bits per byte is better" in sentence(comparison, "bits per byte")
    assert "better" in sentence(comparison, "reasoning accuracy")


# -- records that are not the same -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "field", "metric", "told"),
    [
        ("documents", "tokens", "perplexity", "3 of the 80 documents in both have different content (tokens or bytes)"),
        ("problems", "answer", "reasoning_accuracy", "3 of the 200 problems in both have different content"),
        ("generations", "prompt", "distinct_2", "3 of the 4 prompts in both have different content"),
    ],
)
def test_records_of_one_key_that_are_not_the_same_are_not_paired(
    tmp_path: Path, kind: str, field: str, metric: str, told: str
) -> None:
    other = results("finetuned_vanilla", gain=0.1, solved=30, wobble=0.02)
    for row in other["records"][kind][:3]:
        row[field] = row["tokens"] + 1 if field == "tokens" else "another"
    comparison = compared(tmp_path, results("baseline"), other)
    found = cell(comparison, metric, "finetuned_vanilla")
    assert (found.verdict, found.difference, found.p_value) == ("not comparable", None, None)
    (warning,) = comparison.warnings
    assert told in warning
    assert not any(claim.metric.name == metric for claim in comparison.claims)


def test_the_part_that_is_common_is_compared_and_counted(tmp_path: Path) -> None:
    other = results("finetuned_vanilla", gain=0.1, solved=30, wobble=0.02)
    other["records"]["documents"] = other["records"]["documents"][:30]
    other["records"]["problems"][0]["key"] = "another"
    comparison = compared(tmp_path, results("baseline"), other)
    documents, problems = comparison.warnings
    assert "only the 30 documents in both are compared, of 80 and 30" in documents
    assert "only the 199 problems in both are compared, of 200 and 200" in problems
    assert cell(comparison, "reasoning_accuracy", "finetuned_vanilla").n == 199


def test_nothing_in_common_is_counted(tmp_path: Path) -> None:
    other = results("finetuned_vanilla")
    for row in other["records"]["documents"]:
        row["key"] += "'"
    (warning,) = compared(tmp_path, results("baseline"), other).warnings
    assert warning == "baseline and finetuned_vanilla have no documents in common (80 and 80)"
