"""Every sentence and every warning, against what was put into the results."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import scipy.stats

from comparing import DOCUMENTS, PROBLEMS, cell, compared, four_stages, judged, publish, results, sentence
from rrcli.comparison import written
from rrcli.comparison.results import Cell
from rrcli.evaluation import metrics
from rrcli.evaluation.paired import PairedAnswers, PairedTotals, problems_needed
from rrcli.services.compare import compare
from rrcli.settings import CompareSettings

# -- surgery -----------------------------------------------------------------------------------------------------------


def test_identical_records_are_preserved_exactly(tmp_path: Path) -> None:
    comparison = compared(tmp_path, results("baseline"), results("after_surgery"))
    assert comparison.sentences[:-1] == [  # after it, how speed was measured
        f"Surgery preserved the baseline exactly: {DOCUMENTS} documents' log-probabilities, {PROBLEMS} problems' "
        "answers and 4 generations are identical."
    ]
    for name in ("perplexity", "token_accuracy", "reasoning_accuracy", "distinct_2"):
        found = cell(comparison, name, "after_surgery")
        assert (found.verdict, found.difference, found.p_value) == ("same", 0, None)


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
    assert cell(comparison, "reasoning_accuracy", "after_surgery").p_value == 1


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


# -- primary claims ----------------------------------------------------------------------------------------------------

GAIN = "reasoning_accuracy: finetuned_vanilla > baseline"


def test_a_real_gain_is_shown_with_its_interval_and_p(tmp_path: Path) -> None:
    comparison = compared(tmp_path, *four_stages())
    text = sentence(comparison, "Primary claim 'reasoning_accuracy: finetuned_recursive > finetuned_vanilla' is shown")
    assert "is shown: better (52.5 -> 69 %, a difference of +16.5 points" in text
    assert re.search(r"\[9[57][.\d]* % interval \+\d+\.\d to \+\d+\.\d\], p < 0\.0001 \(Holm", text)
    assert "n = 200 problems" in text
    text = sentence(comparison, "Primary claim 'perplexity: finetuned_recursive <", "is shown: better")
    assert "n = 80 documents" in text


def test_intervals_are_at_the_level_at_which_holm_tested_the_claim(tmp_path: Path) -> None:
    comparison = compared(tmp_path, *four_stages())
    accuracy, perplexity = comparison.judgements
    assert accuracy.p_value < perplexity.p_value
    assert (accuracy.level, accuracy.confidence) == (0.025, 0.975)
    # A claim with a margin is one-sided: its interval at 1 - 2·level agrees with the test.
    assert (perplexity.level, perplexity.confidence) == (0.05, 0.9)
    low, high = PairedAnswers(33, 0, 200).interval(0.025) or (0, 0)
    assert (accuracy.low, accuracy.high) == pytest.approx((100 * low, 100 * high))


def test_what_no_claim_is_about_is_exploratory_and_uncorrected(tmp_path: Path) -> None:
    comparison = compared(tmp_path, *four_stages())
    text = sentence(comparison, "Fine-tuning without recursion, compared with the baseline (exploratory)")
    assert re.search(
        r"reasoning accuracy 40 -> 52\.5 %, a difference of \+12\.5 points \[95 % interval .*uncorrected p", text
    )
    assert re.search(r"perplexity .*uncorrected p", text)
    assert not re.search("better|worse|shown", text)


def test_the_cost_of_recursion_is_told_beside_its_gain(tmp_path: Path) -> None:
    text = sentence(compared(tmp_path, *four_stages()), "Cost of recursion compared with vanilla fine-tuning")
    assert "2.50 x the FLOPs per new token" in text
    assert "2.50 x the time per output token" in text
    assert "2.50 x the training FLOPs" in text


@pytest.mark.parametrize("metric", ["perplexity", "bits_per_byte", "token_accuracy", "reasoning_accuracy"])
def test_a_loss_is_called_worse(tmp_path: Path, metric: str) -> None:
    stages = results("baseline"), results("finetuned_vanilla", gain=-0.1, spoiled=40, wobble=0.02)
    sign = "<" if metric in ("perplexity", "bits_per_byte") else ">"
    comparison = compared(tmp_path, *stages, primary=(f"{metric}: finetuned_vanilla {sign} baseline",))
    (found,) = comparison.judgements
    assert (found.verdict, found.shown) == ("worse", False)
    assert cell(comparison, metric, "finetuned_vanilla").verdict == "worse"
    assert "is NOT shown: worse" in sentence(comparison, "Primary claim")


def test_an_inconclusive_claim_says_what_it_would_take(tmp_path: Path) -> None:
    stages = results("finetuned_vanilla"), results("finetuned_recursive", solved=8, spoiled=5, wobble=0.05)
    comparison = compared(tmp_path, *stages)
    found = judged(comparison, "reasoning_accuracy")
    assert (found.verdict, found.shown) == ("inconclusive", False)
    text = sentence(comparison, "reasoning_accuracy: finetuned_recursive")
    assert "is NOT shown: inconclusive" in text
    assert "+1.5 points" in text
    # At the level of the first of two claims, with its power stated.
    needed = problems_needed(3 / 200, 13 / 200, 0.025)
    assert needed is not None
    assert needed > 2000
    assert f"About {needed:,} problems would show it with 80 % power if this is the true difference" in text
    smallest = PairedAnswers(8, 5, 200).detectable(0.025)
    assert smallest is not None
    told = sentence(comparison, "Smallest differences that data like these show with 80 % power (alpha 0.025")
    assert f"reasoning accuracy {round(100 * smallest, 2):g} points" in told
    assert "perplexity" in told


def test_documents_that_would_be_needed(tmp_path: Path) -> None:
    stages = results("baseline"), results("finetuned_vanilla", gain=0.002, wobble=0.05)
    comparison = compared(tmp_path, *stages, primary=("perplexity: finetuned_vanilla < baseline",))
    found = judged(comparison, "perplexity")
    assert found.verdict in ("inconclusive", "equivalent")
    assert found.needed is not None
    assert found.needed.count > DOCUMENTS
    assert f"About {found.needed.count:,} documents" in sentence(comparison, "Primary claim 'perplexity")


def test_no_difference_at_all_asks_for_no_problems(tmp_path: Path) -> None:
    comparison = compared(
        tmp_path, results("baseline"), results("finetuned_vanilla", solved=6, spoiled=6), primary=(GAIN,)
    )
    text = sentence(comparison, "Primary claim 'reasoning_accuracy")
    assert "inconclusive" in text
    assert "would show" not in text


@pytest.mark.parametrize(
    ("gain", "claim", "verdict", "shown"),
    [
        (0.0, "perplexity: finetuned_vanilla ~ baseline within 2 %", "equivalent", True),
        (0.0, "perplexity: finetuned_vanilla ~ baseline", "equivalent", True),
        (0.0, "perplexity: finetuned_vanilla < baseline + 1 %", "equivalent", True),
        (0.0, "perplexity: finetuned_vanilla < baseline", "equivalent", False),
        (-0.004, "perplexity: finetuned_vanilla < baseline + 1 %", "equivalent", True),
        (-0.03, "perplexity: finetuned_vanilla < baseline + 1 %", "worse", False),
        (-0.03, "perplexity: finetuned_vanilla ~ baseline within 1 %", "worse", False),
        (0.03, "perplexity: finetuned_vanilla < baseline + 1 %", "better", True),
        (0.03, "perplexity: finetuned_vanilla < baseline - 1 %", "better", True),
        (0.03, "perplexity: finetuned_vanilla < baseline - 5 %", "better", False),
        (0.03, "perplexity: finetuned_vanilla > baseline", "better", False),
    ],
)
def test_verdicts_about_text(tmp_path: Path, gain: float, claim: str, verdict: str, shown: bool) -> None:
    stages = results("baseline"), results("finetuned_vanilla", gain=gain, wobble=0.01)
    (found,) = compared(tmp_path, *stages, primary=(claim,)).judgements
    assert (found.verdict, found.shown) == (verdict, shown)


@pytest.mark.parametrize(
    ("solved", "spoiled", "claim", "verdict", "shown"),
    [
        (30, 3, "reasoning_accuracy: finetuned_vanilla > baseline", "better", True),
        (30, 3, "reasoning_accuracy: finetuned_vanilla > baseline + 5 points", "better", True),
        (30, 3, "reasoning_accuracy: finetuned_vanilla > baseline + 12 points", "better", False),
        (5, 5, "reasoning_accuracy: finetuned_vanilla > baseline - 10 points", "not worse", True),
        (5, 5, "reasoning_accuracy: finetuned_vanilla > baseline - 1 point", "inconclusive", False),
        (0, 0, "reasoning_accuracy: finetuned_vanilla ~ baseline within 3 points", "equivalent", True),
    ],
)
def test_verdicts_about_answers(
    tmp_path: Path, solved: int, spoiled: int, claim: str, verdict: str, shown: bool
) -> None:
    stages = results("baseline"), results("finetuned_vanilla", solved=solved, spoiled=spoiled)
    (found,) = compared(tmp_path, *stages, primary=(claim,)).judgements
    assert (found.verdict, found.shown) == (verdict, shown)


def test_the_p_value_of_equivalence_is_that_of_two_one_sided_tests(tmp_path: Path) -> None:
    stages = results("baseline"), results("finetuned_vanilla", gain=0.003, wobble=0.03)
    claim = "perplexity: finetuned_vanilla ~ baseline within 1 %"
    (found,) = compared(tmp_path, *stages, primary=(claim,)).judgements
    nats = [[r["nll"][0] for r in stage["records"]["documents"]] for stage in stages]
    evidence = PairedTotals(nats[1], nats[0], [r["tokens"] for r in stages[0]["records"]["documents"]])
    sides = [evidence.p_value(math.log1p(sign / 100)) or 0.0 for sign in (1, -1)]
    assert found.p_value == max(sides) / 2
    assert found.shown == (max(sides) / 2 <= 0.05)
    low, high = evidence.interval(0.1) or (0, 0)
    assert (found.low, found.high) == pytest.approx((100 * math.expm1(low), 100 * math.expm1(high)))
    assert found.shown == (math.log1p(-0.01) < low and high < math.log1p(0.01))


def test_a_claim_is_corrected_for_the_other_claims_and_for_nothing_else(tmp_path: Path) -> None:
    """Twelve against three is p = 0.035: shown alone, and not among two claims of which the other says nothing."""
    stages = results("baseline"), results("finetuned_vanilla", solved=12, spoiled=3)
    comparison = compared(tmp_path, *stages, primary=(GAIN,))
    assert comparison.judgements[0].p_adjusted == pytest.approx(scipy.stats.binomtest(3, 15).pvalue)
    assert comparison.judgements[0].shown
    both = (GAIN, "token_accuracy: finetuned_vanilla > baseline")
    comparison = compared(tmp_path, *stages, primary=both)
    assert not comparison.judgements[0].shown
    assert cell(comparison, "reasoning_accuracy", "finetuned_vanilla").verdict == "inconclusive"


def test_leaving_a_stage_out_makes_no_claim_easier(tmp_path: Path) -> None:
    stages = results("baseline"), results("finetuned_vanilla", solved=12, spoiled=3)
    comparison = compared(tmp_path, *stages, primary=(GAIN, "perplexity: finetuned_recursive < baseline"))
    assert not comparison.judgements[0].shown
    assert comparison.judgements[1].why == "finetuned_recursive was not measured"
    told = sentence(comparison, "Primary claims without a test, which still count in the correction")
    assert "'perplexity: finetuned_recursive < baseline' (finetuned_recursive was not measured)" in told


def test_claims_are_judged_whichever_stages_have_a_column(tmp_path: Path) -> None:
    publish(tmp_path, *four_stages())
    every = compare(CompareSettings(), [], tmp_path)
    two = compare(CompareSettings(), ["baseline", "finetuned_recursive"], tmp_path)
    assert two.labels == ["baseline", "finetuned_recursive"]
    assert [each.to_dict() for each in two.judgements] == [each.to_dict() for each in every.judgements]


def test_alpha_is_the_users(tmp_path: Path) -> None:
    stages = results("baseline"), results("finetuned_vanilla", solved=12, spoiled=3)
    assert not compared(tmp_path, *stages, primary=(GAIN,), alpha=0.01).judgements[0].shown
    assert compared(tmp_path, *stages, primary=(GAIN,), alpha=0.05).judgements[0].shown


@pytest.mark.parametrize("n", [1, 2, 5])
def test_below_six_documents_there_is_a_value_and_no_verdict(tmp_path: Path, n: int) -> None:
    stages = [results("baseline"), results("finetuned_vanilla", gain=0.1, solved=30)]
    for stage in stages:
        stage["records"]["documents"] = stage["records"]["documents"][:n]
        stage["metrics"] |= metrics.from_records(stage["records"])
    comparison = compared(tmp_path, *stages, primary=("perplexity: finetuned_vanilla < baseline",))
    found = cell(comparison, "perplexity", "finetuned_vanilla")
    assert (found.verdict, found.p_value, found.difference_low, found.low) == ("too few", None, None, None)
    assert found.difference == pytest.approx(100 * math.expm1(-0.1))
    assert comparison.judgements[0].why == "below 6 units there is no test"
    assert "too few for a test" in sentence(comparison, "(exploratory)")


def test_one_seed_is_said_to_speak_for_its_checkpoints_alone(tmp_path: Path) -> None:
    told = sentence(compared(tmp_path, *four_stages()), "one seed")
    assert "p-values and intervals hold for these checkpoints, not for the method" in told


def test_without_vanilla_the_missing_control_is_told(tmp_path: Path) -> None:
    comparison = compared(
        tmp_path, results("baseline"), results("finetuned_recursive", gain=0.1, solved=30, wobble=0.02)
    )
    assert sentence(comparison, "Recursive fine-tuning, compared with the baseline (exploratory)")
    assert sentence(comparison, "measure stage finetuned_vanilla too")


def test_one_stage_alone_is_shown(tmp_path: Path) -> None:
    comparison = compared(tmp_path, results("baseline"))
    assert comparison.labels == ["baseline"]
    assert cell(comparison, "perplexity", "baseline").verdict == ""
    assert (comparison.sentences, comparison.warnings) == ([], [])


def test_a_skipped_part_leaves_a_gap_and_no_claim(tmp_path: Path) -> None:
    vanilla = results("finetuned_vanilla", gain=0.1, solved=30, wobble=0.02)
    del vanilla["records"]["problems"]
    vanilla["metrics"] = {k: v for k, v in vanilla["metrics"].items() if not k.startswith("reasoning")}
    comparison = compared(tmp_path, results("baseline"), vanilla, primary=(GAIN,))
    assert cell(comparison, "reasoning_accuracy", "finetuned_vanilla") == Cell()
    assert comparison.judgements[0].why == "reasoning_accuracy was not measured in both stages"


def test_a_perplexity_that_was_not_finite_is_a_gap(tmp_path: Path) -> None:
    broken = results("finetuned_vanilla", solved=30)
    broken["metrics"]["perplexity"] |= {"value": math.inf, "high": math.inf}
    comparison = compared(tmp_path, results("baseline"), broken, primary=("perplexity: finetuned_vanilla < baseline",))
    assert cell(comparison, "perplexity", "finetuned_vanilla").value is None
    assert not comparison.judgements[0].shown
    assert "Perplexity" in written.markdown(comparison)


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
    assert (found.p_value or 1) < 0.001
    assert found.difference == pytest.approx(-0.1 / 4 / math.log(2), rel=0.1)
    text = sentence(comparison, "(exploratory)")
    assert "bits per byte" in text
    assert "perplexity" not in text


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
    assert metric.replace("_", " ") not in sentence(comparison, "(exploratory)")


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
