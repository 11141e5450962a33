"""The grammar of claims and margins: what is read, in its one canonical form, and what is refused, and where."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rrcli.comparison.claims import read_claim, read_declaration
from rrcli.errors import UsageError
from rrcli.settings import CompareSettings

MARGINS = {"perplexity": 1.0, "reasoning_accuracy": 2.0}


@pytest.mark.parametrize(
    ("text", "metric", "parts", "canonical"),
    [
        (
            "reasoning_accuracy: finetuned_recursive > finetuned_vanilla",
            "reasoning_accuracy",
            ("finetuned_recursive", ">", "finetuned_vanilla", 0),
            "reasoning_accuracy: finetuned_recursive > finetuned_vanilla",
        ),
        (
            "  perplexity :finetuned_vanilla<baseline+1%",
            "perplexity",
            ("finetuned_vanilla", "<", "baseline", 1),
            "perplexity: finetuned_vanilla < baseline + 1 %",
        ),
        (
            "reasoning_accuracy/row_steps:min_steps=2: finetuned_vanilla > baseline - 1.5 points",
            "reasoning_accuracy/row_steps:min_steps=2",
            ("finetuned_vanilla", ">", "baseline", -1.5),
            "reasoning_accuracy/row_steps:min_steps=2: finetuned_vanilla > baseline - 1.5 points",
        ),
        (
            "reasoning_accuracy: baseline ~ after_surgery within 1",
            "reasoning_accuracy",
            ("baseline", "~", "after_surgery", 1),
            "reasoning_accuracy: baseline ~ after_surgery within 1 point",
        ),
        (
            "perplexity: baseline ~ after_surgery",
            "perplexity",
            ("baseline", "~", "after_surgery", 1),
            "perplexity: baseline ~ after_surgery within 1 %",
        ),
        (
            "harness/gsm8k/exact_match: finetuned_vanilla > baseline - 0.02",
            "harness/gsm8k/exact_match",
            ("finetuned_vanilla", ">", "baseline", -0.02),
            "harness/gsm8k/exact_match: finetuned_vanilla > baseline - 0.02",
        ),
        (
            "bits_per_byte: finetuned_vanilla < baseline + 0.01 bits",
            "bits_per_byte",
            ("finetuned_vanilla", "<", "baseline", 0.01),
            "bits_per_byte: finetuned_vanilla < baseline + 0.01",
        ),
    ],
)
def test_a_claim_is_read_once(text: str, metric: str, parts: tuple[str, str, str, float], canonical: str) -> None:
    claim = read_claim(text, MARGINS, what="the claim")
    assert claim.metric.name == metric
    assert (claim.stage, claim.relation, claim.reference, claim.shift) == parts
    assert claim.text == canonical
    again = read_claim(claim.text, {}, what="the claim")
    assert again == claim


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("reasoning_accuracy", "cannot be read", "METRIC: STAGE > STAGE"),
        ("reasoning_accuracy: baseline", "cannot be read", "METRIC: STAGE > STAGE"),
        ("reasoning_accuracy: baseline >= after_surgery", "cannot be read", "METRIC: STAGE > STAGE"),
        ("perplexity: baseline ~ after_surgery + 1 %", "cannot be read", "within MARGIN"),
        ("perplexity: baseline < after_surgery within 1 %", "cannot be read", "within MARGIN"),
        ("perplexty: baseline < after_surgery", "metric 'perplexty', which is not one that is tested", "'perplexity'"),
        ("memory_mb: baseline < after_surgery", "metric 'memory_mb', which is not one that is tested", "Known"),
        ("relevance: baseline < after_surgery", "metric 'relevance', which is not one that is tested", "Known"),
        ("perplexity: basline < after_surgery", "names stage 'basline'", "'baseline'"),
        ("perplexity: baseline < baseline", "compares a stage with itself", "METRIC"),
        ("perplexity: baseline < after_surgery + 1", "differences in perplexity are in %", "Write it as 1 %."),
        ("reasoning_accuracy: baseline > after_surgery - 1 %", "are in points", "Write it as 1 point."),
        ("reasoning_accuracy: baseline > after_surgery - 0", "margin of '0 '", "above 0"),
        ("perplexity: baseline > after_surgery - 100 %", "margin of '100 %'", "below 100 %"),
        ("token_accuracy: baseline ~ after_surgery", "has no margin", "within MARGIN"),
    ],
)
def test_what_cannot_be_read_names_the_place(text: str, message: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_declaration(replace(CompareSettings(), primary=(text,)))
    assert f"the primary claim '{text}'" in caught.value.message
    assert message in caught.value.message
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("perplexity", "the margin 'perplexity' ([compare] margin) cannot be read"),
        ("perplexity: 1", "differences in perplexity are in %"),
        ("speed: 1 %", "names metric 'speed'"),
    ],
)
def test_a_margin_that_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_declaration(replace(CompareSettings(), margin=(text,)))
    assert message in caught.value.message


@pytest.mark.parametrize(
    "twin",
    [
        "bits_per_byte: finetuned_recursive < finetuned_vanilla",
        "perplexity: finetuned_vanilla > finetuned_recursive",
        "perplexity: finetuned_recursive < finetuned_vanilla",
    ],
)
def test_one_test_is_declared_once(twin: str) -> None:
    """Perplexity and bits per byte are the same nats."""
    first = "perplexity: finetuned_recursive < finetuned_vanilla"
    with pytest.raises(UsageError, match="are one and the same test"):
        read_declaration(replace(CompareSettings(), primary=(first, twin)))


def test_the_defaults_fit_the_experiment() -> None:
    declared = read_declaration(CompareSettings())
    assert [claim.text for claim in declared.primary] == list(CompareSettings().primary)
    accuracy, perplexity = (claim.metric for claim in declared.primary)
    assert (declared.margin(accuracy), declared.margin(perplexity)) == (1, 1)
    task = read_claim("reasoning_accuracy/chain_sum: baseline > after_surgery", {}, what="it").metric
    assert declared.margin(task) == 1
    assert declared.texts == {
        "primary": list(CompareSettings().primary),
        "margin": ["perplexity: 1 %", "reasoning_accuracy: 1 point"],
        "alpha": 0.05,
    }
