"""Why `rr compare` pairs: two separate measurements cannot tell a model from its own rounding to 4 bits."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import rrcli
from rrcli.comparison.pairing import pair
from rrcli.comparison.results import Stage
from rrcli.evaluation import stats
from rrcli.evaluation.evaluate import evaluate_model
from rrcli.evaluation.held_out import held_out_data
from rrcli.evaluation.metrics import PERPLEXITY, REASONING_ACCURACY
from rrcli.settings import EvalSettings

GROUP = 64
DOCUMENTS, PROBLEMS = 120, 20
SETTINGS = EvalSettings(
    max_samples=DOCUMENTS, problems=PROBLEMS, max_new_tokens=12, skip_generation=True, skip_performance=True
)


@torch.no_grad()
def rounded_to_4_bits(model: Any) -> Any:
    """Return a copy whose matrices have 16 levels in every group of `GROUP` weights."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            groups = parameter.view(-1, GROUP)
            step = groups.abs().amax(1, keepdim=True) / 7
            parameter.copy_(((groups / step).round().clamp(-8, 7) * step).view_as(parameter))
    return model


@pytest.fixture(scope="module")
def measured() -> tuple[dict[str, Any], dict[str, Any]]:
    """What the model and its rounding give, as `rr compare` reads it."""
    model, tokenizer = rrcli.load("default")
    data = held_out_data(SETTINGS, Path.cwd(), PROBLEMS, DOCUMENTS)
    assert len(data.documents) == DOCUMENTS
    a, b = (evaluate_model(m, tokenizer, data, settings=SETTINGS) for m in (model, rounded_to_4_bits(model)))
    return a | {"model": {"tokenizer": "same"}}, b | {"model": {"tokenizer": "same"}}


def test_apart_they_look_the_same(measured):
    (full, error, _), (rounded, other, _) = (
        stats.ratio_error(*zip(*PERPLEXITY.totals(result["records"]).values(), strict=True)) for result in measured
    )
    assert abs(rounded - full) / math.hypot(error, other) < 1
    a, b = (result["metrics"]["perplexity"] for result in measured)
    assert a["low"] < b["value"] < a["high"]
    assert b["low"] < a["value"] < b["high"]


def test_paired_the_rounding_is_seen(measured):
    full, rounded = (Stage(label, (result,)) for label, result in zip("ab", measured, strict=True))
    found = pair(PERPLEXITY, rounded, full)
    assert not found.same
    assert found.evidence.n == DOCUMENTS
    assert found.evidence.p_value() < 1e-3
    assert 0 < found.evidence.interval(0.05)[0] < found.evidence.value < 0.05


def test_answers_to_a_few_problems_do_not_show_it(measured):
    full, rounded = (Stage(label, (result,)) for label, result in zip("ab", measured, strict=True))
    found = pair(REASONING_ACCURACY, rounded, full)
    assert not found.same, "no answer changed"
    assert found.evidence.n == 3 * PROBLEMS
    assert found.evidence.p_value() > 0.05
    low, high = found.evidence.interval(0.05)
    assert low < 0 < high
