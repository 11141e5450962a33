"""Relevance: its definition written out, and which model it is measured with."""

from __future__ import annotations

import pytest
import torch

import rrcli
from rrcli import files, schemas
from rrcli.errors import RRError
from rrcli.evaluation.relevance import relevance
from rrcli.experiment import under_test
from rrcli.reporting import Silent
from rrcli.services import eval as service
from rrcli.settings import EvalSettings

RECORDS = [
    {"prompt": "Once upon a time", "text": " there was a small cat."},
    {"prompt": "Tom has a red ball and", "text": " there was a small cat."},
    {"prompt": "Tom", "text": ""},
]


def by_hand(model, tokenizer, prompt, text):
    """Token by token, in float64."""
    ids, start = tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.bos_token_id
    if start is None:
        start = tokenizer.eos_token_id
    gains = []
    for place, token in enumerate(ids):
        terms = []
        for context in (tokenizer(prompt)["input_ids"], [start]):
            with torch.no_grad():
                logits = model(torch.tensor([context + ids[:place]])).logits[0, -1].double()
            terms.append(float(logits.log_softmax(-1)[token]))
        gains.append(terms[0] - terms[1])
    return sum(gains) / len(gains) if gains else 0.0


def test_it_is_the_mean_gain_in_log_probability_by_the_prompt():
    model, tokenizer = rrcli.load("default")
    found = relevance(model, tokenizer, RECORDS, reporter=Silent())
    expected = [by_hand(model, tokenizer, record["prompt"], record["text"]) for record in RECORDS]
    assert found == pytest.approx(expected, abs=1e-5)
    assert found[2] == 0
    assert found[0] != found[1]


def test_a_recursion_on_the_baseline_is_left_out_and_left_as_it_was():
    model, tokenizer = rrcli.load("default")
    plain = relevance(model, tokenizer, RECORDS, reporter=Silent())
    recursion = rrcli.attach(model, rrcli.RecursionConfig(max_steps=2))
    torch.nn.init.normal_(recursion.cell.w_out.weight, std=0.1)
    assert relevance(model, tokenizer, RECORDS, reporter=Silent()) == plain
    assert recursion.depth == 2


def test_a_broken_baseline_is_named():
    model, tokenizer = rrcli.load("default")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(RRError, match="no finite probability"):
        relevance(model, tokenizer, RECORDS, reporter=Silent())


def test_a_stage_whose_weights_trained_is_measured_with_the_baseline(tmp_path):
    """The stage's model writes, the experiment's base model judges."""
    model, tokenizer = rrcli.load("default")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.01)
    model.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    settings = EvalSettings(
        max_samples=2, skip_perplexity=True, skip_reasoning=True, skip_performance=True, tensorboard=False
    )
    result = service.evaluate(settings, "baseline", tmp_path, Silent(), model="other")
    generations = result.results["records"]["generations"]
    expected = relevance(*rrcli.load("default"), generations, reporter=Silent())
    assert [record["relevance"] for record in generations] == expected
    assert expected != relevance(model, tokenizer, generations, reporter=Silent())
    assert result.results["metrics"]["relevance"]["value"] == pytest.approx(sum(expected) / len(expected))
    assert {"finished", "distinct_2"} <= result.results["metrics"].keys()

    entries = (tmp_path / "eval_results" / "baseline_samples.jsonl").read_text().splitlines()
    assert '"end"' in entries[-1]
    assert len(entries) == 2 + len(generations)


def test_the_stage_that_is_the_baseline_is_loaded_once(tmp_path, monkeypatch):
    loads, plain = [], service.load_for
    for module in (service, under_test):
        monkeypatch.setattr(module, "load_for", lambda *a: loads.append(1) or plain(*a))
    settings = EvalSettings(
        max_samples=2, skip_perplexity=True, skip_reasoning=True, skip_performance=True, tensorboard=False
    )
    result = service.evaluate(settings, "baseline", tmp_path, Silent())
    assert "relevance" in result.results["metrics"]
    assert loads == [1]
    assert files.read_json(result.file, "rr eval", schemas.Results)["metrics"]["relevance"]["n"] == 4
