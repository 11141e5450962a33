"""Evaluation against an independent implementation, and its exactness over batches, windows and depths."""

from __future__ import annotations

import math

import pytest
import torch

import rrcli
from families import attach_random
from rrcli.errors import RRError
from rrcli.evaluation.evaluate import evaluate_model
from rrcli.evaluation.held_out import EvalData, held_out_data
from rrcli.evaluation.perplexity import score_documents
from rrcli.evaluation.windows import rolling_windows
from rrcli.reporting import Silent
from rrcli.settings import EvalSettings

TEXTS = [
    "Tom has a red ball. He gives the ball to Ann.",
    "Once upon a time there was a small cat that lived in a very old house near the river.",
    "Ann walks to the market. She buys a loaf of bread, two apples and a cup of tea. Then she goes home again. " * 6,
]
TEXT_ONLY = EvalSettings(skip_reasoning=True, skip_generation=True, skip_performance=True)


@pytest.fixture(scope="module")
def default():
    return rrcli.load("default")


def test_windows_score_every_token_once_and_match_the_reference():
    lm_eval_utils = pytest.importorskip("lm_eval.utils")
    for count in (1, 5, 16, 17, 31, 32, 33, 100):
        tokens = list(range(1, count + 1))
        for length, stride in ((16, 16), (16, 8), (16, 1), (200, 200)):
            ours = rolling_windows(tokens, 0, length=length, stride=stride)
            theirs = lm_eval_utils.get_rolling_token_windows(tokens, 0, length, length - stride + 1)
            for (window, scored), (context, target) in zip(ours, theirs, strict=True):
                assert window == context
                assert scored == len(target)


@pytest.mark.parametrize("length", [32, 512])
def test_perplexity_agrees_with_lm_eval(default, length):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = default
    harness = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=2, max_length=length,
                   add_bos_token=False, softmax_dtype="float32")  # fmt: skip
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in TEXTS]
    theirs = harness.loglikelihood_rolling(requests, disable_tqdm=True)
    settings = EvalSettings(max_length=length, **dict.fromkeys(("skip_reasoning", "skip_generation", "skip_performance"), True))  # fmt: skip  # noqa: E501
    found = evaluate_model(model, tokenizer, TEXTS, settings=settings)
    for record, total in zip(found["records"]["documents"], theirs, strict=True):
        assert record["nll"][0] == pytest.approx(-total, rel=1e-6)
    nats, size = -sum(theirs), sum(len(text.encode()) for text in TEXTS)
    values = {name: entry["value"] for name, entry in found["metrics"].items()}
    assert values["bits_per_byte"] == pytest.approx(nats / size / math.log(2), rel=1e-6)
    assert values["byte_perplexity"] == pytest.approx(math.exp(nats / size), rel=1e-6)
    words = sum(len(text.split()) + text.endswith(" ") for text in TEXTS)
    # These texts cost the embedded model about 19 nats a word: what is 1e-7 of the nats is 19 times that of their exp.
    assert math.log(values["word_perplexity"]) == pytest.approx(nats / words, rel=1e-6)


def test_token_accuracy_and_loss_equal_plain_logits(default):
    model, tokenizer = default
    record = evaluate_model(model, tokenizer, TEXTS[:1], settings=TEXT_ONLY)["records"]["documents"][0]
    ids = torch.tensor([tokenizer(TEXTS[0])["input_ids"]])
    if ids[0, 0] != tokenizer.bos_token_id:
        ids = torch.cat([torch.tensor([[tokenizer.bos_token_id]]), ids], dim=1)
    with torch.no_grad():
        logits = model(ids).logits[0, :-1].double()
    target = ids[0, 1:]
    loss = -logits.log_softmax(-1).gather(1, target[:, None]).sum()
    assert record["nll"][0] == pytest.approx(float(loss), rel=1e-5)
    assert record["correct"][0] == int(logits.argmax(-1).eq(target).sum())
    assert record["tokens"] == len(target)


@pytest.mark.parametrize("budget", [64, 10_000])
def test_batching_changes_no_number_beyond_rounding(default, budget):
    model, tokenizer = default
    alone, _ = score_documents(
        model, tokenizer, TEXTS, depth=0, settings=EvalSettings(batch_tokens=1), reporter=Silent()
    )
    batched, _ = score_documents(
        model, tokenizer, TEXTS, depth=0, settings=EvalSettings(batch_tokens=budget), reporter=Silent()
    )
    for a, b in zip(alone, batched, strict=True):
        assert b["nll"][0] == pytest.approx(a["nll"][0], rel=1e-6)
        assert b["correct"] == a["correct"]


def test_every_depth_equals_a_run_at_that_depth():
    model, tokenizer = rrcli.load("default")
    recursion = attach_random(model, 0.05)
    together, chunks = score_documents(model, tokenizer, TEXTS, depth=2, settings=EvalSettings(), reporter=Silent())
    assert together[0]["nll"][0] != together[0]["nll"][1] != together[0]["nll"][2]
    for depth in range(3):
        alone, _ = score_documents(model, tokenizer, TEXTS, depth=depth, settings=EvalSettings(), reporter=Silent())
        for a, b in zip(alone, together, strict=True):
            assert a["nll"][-1] == pytest.approx(b["nll"][depth], rel=1e-6)
    assert recursion.depth == 2
    values = chunks.metrics()
    assert values["avg_refine_steps"] == 2
    assert 0 <= values["commit_rate"] <= 1
    assert 1 <= values["avg_chunk_length"] <= 16
    assert 0 <= values["commit_ece"] <= 1
    found = evaluate_model(model, tokenizer, TEXTS, settings=TEXT_ONLY)
    assert found["metrics"]["commit_ece"]["value"] == pytest.approx(values["commit_ece"])
    # Every token, once for each pass after which refining may end.
    assert sum(row["n"] for row in found["calibration"]) == 2 * sum(record["tokens"] for record in together)


def test_the_embedded_model_has_learned_something(default):
    """Far below the vocabulary's size on text; above chance and below 100 % on problems it never saw."""
    model, tokenizer = default
    settings = EvalSettings(problems=60, max_samples=60, max_new_tokens=24, skip_generation=True, skip_performance=True)
    data = held_out_data(settings, rrcli_folder(), settings.problems, settings.max_samples)
    values = evaluate_model(model, tokenizer, data, settings=settings)["metrics"]
    assert values["perplexity"]["value"] < len(tokenizer) / 50
    assert 15 < values["reasoning_accuracy"]["value"] < 85


def rrcli_folder():
    from pathlib import Path

    return Path(rrcli.__file__).parent


def test_a_broken_model_is_named_not_measured():
    model, tokenizer = rrcli.load("default")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(RRError, match="not finite"):
        evaluate_model(model, tokenizer, TEXTS, settings=TEXT_ONLY)


def test_nothing_to_evaluate_is_an_error(default):
    model, tokenizer = default
    with pytest.raises(RRError, match="nothing to evaluate"):
        evaluate_model(model, tokenizer, EvalData())
