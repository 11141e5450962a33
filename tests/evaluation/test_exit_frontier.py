"""The frontier of exit rules: its answers are those of decoding, its FLOPs those that are counted."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import rrcli
from families import attach_random
from rrcli.data.tokens import end_tokens, text_ids
from rrcli.evaluation.answers import solve_problems
from rrcli.evaluation.decoding import GREEDY
from rrcli.evaluation.evaluate import evaluate_model
from rrcli.evaluation.exit_answers import Answers
from rrcli.evaluation.exit_costs import count_costs, saves
from rrcli.evaluation.exits import Frontier
from rrcli.evaluation.held_out import held_out_data
from rrcli.evaluation.perplexity import score_documents
from rrcli.experiment.identity import model_fingerprint
from rrcli.models.manifest import read_manifest, write_exit
from rrcli.models.source import resolve
from rrcli.recursion.exits import NEVER, ExitRule
from rrcli.recursion.flops import FlopCounter
from rrcli.reporting import Silent
from rrcli.settings import EvalSettings
from test_cli_surface import rr

TEXTS = ("Tom has a red ball. He likes the ball.", "The sun is warm today, and the birds sing in the trees.", "One.")
RULES = (
    *(ExitRule("probability", 0.6), ExitRule("margin", 0.3), ExitRule("unchanged"), ExitRule("depth", 1)),
    *(ExitRule("contraction", 0.3), ExitRule("random", shares=(0.5, 0.2, 0.3)), NEVER),
)


@pytest.fixture(scope="module")
def default() -> tuple[Any, Any]:
    """Return the embedded model with a recursion that changes some tokens."""
    model, tokenizer = rrcli.load("default")
    attach_random(model, 0.03)
    return model, tokenizer


def settings(**changes: Any) -> EvalSettings:
    return EvalSettings(**({"problems": 4, "max_new_tokens": 10, "max_samples": 4} | changes))


def prompts_of(tokenizer: Any) -> list[list[int]]:
    return [text_ids(tokenizer, text)[:length] for text, length in zip(TEXTS, (7, 4, 3), strict=True)]


@torch.no_grad()
def test_answers_under_every_rule_are_those_of_decoding(default: tuple[Any, Any]) -> None:
    model, tokenizer = default
    prompts, seen = prompts_of(tokenizer), set()
    answers = Answers(model, tokenizer, prompts, settings(), (".",), Silent())
    ends = end_tokens(model, tokenizer)
    for rule, found in zip(RULES, answers.under(RULES), strict=True):
        for number, (prompt, answer) in enumerate(zip(prompts, found, strict=True)):
            if rule.kind == "random" and number:
                continue  # a row's draws depend on its number, and here each is alone
            decoding = rrcli.ChunkedDecoding(4, rule)
            ids = torch.tensor([prompt])
            text = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, eos_token_id=sorted(ends), pad_token_id=0,
                custom_generate=decoding, **GREEDY,
                stopping_criteria=[rrcli.StopStrings(tokenizer, (".",), len(prompt), ends=ends)],
            )  # fmt: skip
            new = [token for token in text[0, len(prompt) :].tolist() if token not in ends]
            assert (list(answer.tokens), list(answer.passes)) == (new, decoding.traces[0].passes), rule
            assert "." not in answers.cut(number, answer.tokens)
            seen |= {(rule, left) for left in answer.passes}
    assert len(seen) > len(RULES) + 3  # the rules do leave at different passes


@torch.no_grad()
def test_the_flops_of_a_rule_are_those_that_are_counted(default: tuple[Any, Any]) -> None:
    model, tokenizer = default
    assert saves(model)
    costs = count_costs(model)
    for prompt, rule in ((17, RULES[0]), (30, RULES[2]), (5, RULES[5]), (12, ExitRule("probability", 1))):
        decoding = rrcli.ChunkedDecoding(8, rule)
        ids = torch.tensor([text_ids(tokenizer, " ".join(TEXTS * 2))[:prompt]])
        with FlopCounter() as counter:
            model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, eos_token_id=None, pad_token_id=0,
                custom_generate=decoding, **GREEDY,
            )  # fmt: skip
        assert costs.of(ids.shape[1], decoding.traces[0].passes) == pytest.approx(counter.total, rel=0.005), rule
    # Prefill and the tokens that catch up: one token of the last ones pays for all before it.
    assert costs.of(10, [0, 0, 0, 1]) == pytest.approx(costs.of(10, [1, 1, 1, 1]), rel=0.2)
    assert costs.of(10, [0, 0, 0, 1]) > 1.5 * costs.of(10, [0, 0, 0, 0])


@torch.no_grad()
def test_known_text_is_scored_by_the_pass_that_each_token_leaves_with(default: tuple[Any, Any]) -> None:
    model, tokenizer = default
    options: dict[str, Any] = {"depth": 2, "settings": EvalSettings(), "reporter": Silent()}
    plain, _ = score_documents(model, tokenizer, TEXTS, **options)
    for depth in range(3):
        found, _ = score_documents(model, tokenizer, TEXTS, exit=ExitRule("depth", depth), **options)
        for record, known in zip(found, plain, strict=True):
            assert record["nll"] == pytest.approx([*known["nll"], known["nll"][depth]])
            assert record["correct"] == [*known["correct"], known["correct"][depth]]
            assert record["passes"] == depth * record["tokens"]
    ids = torch.tensor([[tokenizer.bos_token_id, *text_ids(tokenizer, TEXTS[0])]])
    hidden = model.recursion.passes(ids[:, :-1]).hidden
    logp = [model.lm_head(h)[0].double().log_softmax(-1) for h in hidden]
    nats, left = 0.0, 0
    for place, token in enumerate(ids[0, 1:].tolist()):
        k = next((k for k in range(2) if float(logp[k][place].exp().max()) >= 0.6), 2)
        nats, left = nats - float(logp[k][place, token]), left + k
    found, _ = score_documents(model, tokenizer, TEXTS, exit=RULES[0], **options)
    assert found[0]["nll"][-1] == pytest.approx(nats, rel=1e-5)
    assert found[0]["passes"] == left
    oracle, _ = score_documents(model, tokenizer, TEXTS, exit=ExitRule("oracle"), **options)
    for record in oracle:
        assert record["correct"][-1] >= max(record["correct"][:-1])


def test_an_evaluation_with_an_exit_has_one_entry_more_than_depths(default: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = default
    data = held_out_data(settings(problems=2), tmp_path, 2, 2)
    model.recursion.exit = RULES[0]
    try:
        chosen = settings(problems=2, skip_performance=True)
        found = evaluate_model(model, tokenizer, data, settings=chosen)
    finally:
        model.recursion.exit = None
    assert found["exit"] == {"rule": "probability", "threshold": 0.6}
    assert len(found["by_depth"]["perplexity"]) == len(found["by_depth"]["reasoning_accuracy"]) == 3
    assert {len(r["nll"]) for r in found["records"]["documents"]} == {4}
    for record in found["records"]["problems"]:
        assert len(record["correct"]) == len(record["outputs"]) == 4
        assert "".join(text for text, _ in record["pieces"]) == record["outputs"][-1]
        assert {passes for _, passes in record["pieces"]} <= set(record["passes"])
    left = [k for record in found["records"]["problems"] for k in record["passes"]]
    assert found["metrics"]["passes_per_answer_token"]["value"] == pytest.approx(sum(left) / len(left))
    nats = math.fsum(r["nll"][-1] for r in found["records"]["documents"])
    tokens = sum(r["tokens"] for r in found["records"]["documents"])
    assert found["metrics"]["perplexity"]["value"] == pytest.approx(math.exp(nats / tokens))


@torch.no_grad()
def test_the_frontier_holds_fixed_depths_controls_and_the_oracle(default: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = default
    data, costs = held_out_data(settings(), tmp_path, 4, 4), count_costs(model)
    frontier = Frontier(model, tokenizer, data, settings=settings(), reporter=Silent(), costs=costs)
    rules = frontier.rules()
    points = frontier.measure(rules)
    by_name = {str(point.rule): point for point in points}
    answered = solve_problems(model, tokenizer, data, depth=2, settings=settings(), reporter=Silent())
    texts = data.texts(tokenizer, settings())
    scored, _ = score_documents(model, tokenizer, texts, depth=2, settings=settings(), reporter=Silent())
    for depth in range(3):
        point = by_name[f"depth:{depth}"]
        assert point.passes == point.text_passes == depth
        assert point.accuracy is not None
        assert point.accuracy.value == pytest.approx(sum(r["correct"][depth] for r in answered) / len(answered))
        nats = sum(r["nll"][depth] for r in scored) / sum(r["tokens"] for r in scored)
        assert point.nats == pytest.approx(nats, rel=1e-5)
    assert by_name["depth:0"].cost < by_name["depth:1"].cost < by_name["depth:2"].cost
    full = by_name["depth:2"]
    assert full.nats is not None
    assert by_name["oracle"].nats is not None
    assert by_name["oracle"].nats < full.nats
    for point in points:
        if point.like is not None:  # as often at each pass as the rule that it is like, pass 0 included
            like = by_name[str(point.like)]
            assert point.rule.shares[0] > 0 or like.passes == pytest.approx(2, abs=1)
            assert point.passes == pytest.approx(like.passes, abs=0.5)
            assert point.text_passes == pytest.approx(like.text_passes, abs=0.25)
    json.dumps([point.to_dict() for point in points], allow_nan=False)


def test_rr_eval_exits_writes_the_choice_into_the_checkpoint(operated: Path) -> None:
    few = ("--skip-reasoning", "--max-samples", 8)
    folder = operated / "checkpoints" / "after_surgery"
    before = model_fingerprint(resolve(str(folder), operated), operated)
    result = rr("eval", "--stage", "after_surgery", "--exits", *few, directory=operated)
    assert result.exit_code == 0, result.output
    # A recursion that was not trained changes nothing: pass 0 is as good as all of them.
    assert "the exit is depth:0" in result.output
    assert max(len(line) for line in result.output.splitlines() if line.startswith(" ")) <= 100  # the table
    assert read_manifest(folder)["exit"] == {"rule": "depth", "threshold": 0.0}
    assert model_fingerprint(resolve(str(folder), operated), operated) != before  # results without it are stale
    frontier = json.loads((operated / "eval_results" / "after_surgery_exits.json").read_text())
    assert frontier["n"]["test"]["documents"] == frontier["n"]["validation"]["documents"] == 8
    assert rrcli.load(folder)[0].recursion.exit == ExitRule("depth", 0)
    found = json.loads(rr("generate", "Tom has", "--max-new-tokens", 4, "--json", directory=operated).stdout)
    assert {piece["passes"] for piece in found["pieces"]} == {0}
    arguments = ("generate", "Tom has", "--max-new-tokens", 4, "--json", "--exit", "none")
    every = json.loads(rr(*arguments, directory=operated).stdout)
    assert {piece["passes"] for piece in every["pieces"]} == {2}
    assert every["text"] == found["text"]
    for arguments, said in (
        (("eval", "--stage", "baseline", "--exits"), "has no recursion"),
        (("eval", "--stage", "after_surgery", "--exits", "--depth", 1), "but --depth 1 names one"),
        (("eval", "--stage", "after_surgery", "--choose-exit", "--exit", "head:1"), "but --exit head:1 names one"),
        (("generate", "Tom", "--stage", "baseline", "--exit", "depth:1"), "no recursion"),
    ):
        assert said in rr(*arguments, directory=operated).output
    write_exit(folder, None)
    assert "exit" not in read_manifest(folder)


@torch.no_grad()
def test_depths_beyond_those_trained_use_the_last_step(default: tuple[Any, Any]) -> None:
    model, _ = default
    recursion, ids = model.recursion, torch.tensor([[5, 9, 30, 4]])
    assert "step embedding of pass 2" in recursion.allow(4)
    states = recursion.passes(ids, depth=4).states
    assert len(states) == 5
    same = recursion.cell(states[2], 3)
    assert torch.equal(same, recursion.cell(states[2], 2))
    with recursion.at_depth(4):
        options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        chunked = model.generate(ids, custom_generate=rrcli.ChunkedDecoding(3), **options)
        assert torch.equal(chunked, model.generate(ids, **options))
    with pytest.raises(rrcli.errors.UsageError, match="depth is 9"):
        recursion.allow(9)
    recursion.deepest = 2
