"""Sampled answers: drawn from the model's distribution, the same however they are decoded, and what is made of them."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
import torch

import rrcli
from comparing import compared, judged, results
from families import Letters, attach_random, build, tokens, wake
from rrcli.comparison.claims import read_claim
from rrcli.errors import RRError
from rrcli.evaluation import decoding, metrics, sampled_answers
from rrcli.evaluation.decoding import decode
from rrcli.evaluation.evaluate import evaluate_model
from rrcli.evaluation.held_out import held_out_data
from rrcli.evaluation.sampled_answers import sample_answers
from rrcli.evaluation.samples import SampleLog
from rrcli.evaluation.sampling import Sampling, gumbel, row_key
from rrcli.evaluation.stats import pass_at_k
from rrcli.experiment.identity import eval_inputs
from rrcli.recursion.abilities import takes_padding
from rrcli.recursion.config import RecursionConfig
from rrcli.recursion.engine import attach
from rrcli.recursion.exits import ExitRule
from rrcli.reporting import Silent
from rrcli.services import eval as service
from rrcli.settings import EvalSettings
from test_cli_surface import rr

NEW = 9


def keys_of(count: int) -> list[int]:
    return [row_key(0, "problem", sample) for sample in range(count)]


def as_rows(keys: list[int]) -> torch.Tensor:
    return torch.tensor([[key & 0x7FFFFFFF, key >> 31] for key in keys], dtype=torch.int32)


# -- the draws ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.3, 0.7, 2.0])
def test_tokens_are_drawn_from_the_softmax_at_the_temperature(temperature: float) -> None:
    logits, count = 2 * torch.randn(12), 20_000
    expected = count * (logits.double() / temperature).softmax(-1)
    noise = Sampling(temperature, keys_of(count)).processor(range(count), start=5)
    for number in (0, 3):
        ids = torch.zeros(count, 5 + number, dtype=torch.long)
        drawn = noise(ids, logits.expand(count, -1)).argmax(-1)
        found = torch.bincount(drawn, minlength=12).double()
        common = expected >= 5
        cells = [torch.cat([x[common], x[~common].sum()[None]]).numpy() for x in (found, expected)]
        cells = [cell[cells[1] > 0] for cell in cells]
        assert scipy.stats.chisquare(*cells).pvalue > 1e-4


def test_the_noise_of_rows_tokens_and_words_has_nothing_in_common() -> None:
    keys = as_rows(keys_of(100))
    first, later = (gumbel(keys, torch.full((100,), number), 3000) for number in (0, 1))
    assert first.isfinite().all()
    assert float(first.mean()) == pytest.approx(0.5772, abs=0.01)
    assert float(first.var()) == pytest.approx(math.pi**2 / 6, rel=0.02)
    for a, b in ((first, later), (first[1:], first[:-1]), (first[:, 1:], first[:, :-1])):
        assert abs(float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])) < 0.01
    assert torch.equal(gumbel(keys[7:9], torch.tensor([0, 1]), 3000), torch.stack([first[7], later[8]]))


# -- decoding ----------------------------------------------------------------------------------------------------------


def sampled(model: Any, prompts: list[list[int]], keys: list[int], **options: Any) -> list[list[int]]:
    recursion = getattr(model, "recursion", None)
    depth = 0 if recursion is None else recursion.depth
    options = {"depth": depth, "new_tokens": NEW, "batch_tokens": 10_000, "sampling": Sampling(1.0, keys)} | options
    found = {d.number: d.tokens for batch in decode(model, Letters(), prompts, **options) for d in batch}
    return [found[number] for number in range(len(prompts))]


@pytest.mark.parametrize(
    ("family", "way"),
    [
        *itertools.product(("llama", "gemma3_text"), ("stock", "every pass", "in chunks", "with an exit")),
        *(
            ("qwen3_next", "in chunks"),
            ("gpt2", "stock"),
            ("gpt2", "in chunks"),
            ("mamba2", "stock"),
            ("lfm2", "stock"),
        ),
    ],
)
@torch.no_grad()
def test_answers_that_share_a_prefill_are_those_of_each_alone(
    family: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, samples = build(family), 3
    if way != "stock":
        wake(attach(model, RecursionConfig(max_steps=2)))
    exit = ExitRule("probability", 0.2) if way == "with an exit" else None
    if exit is not None and not decoding._in_chunks(model, 2):
        pytest.skip("this family is decoded with every pass")
    prompts = [tokens(1, length, seed=length)[0].tolist() for length in (4, 7, 5) for _ in range(samples)]
    keys = keys_of(len(prompts))
    if way == "in chunks":
        monkeypatch.setattr(decoding, "_chunks_pay", lambda *_: True)
    together = sampled(model, prompts, keys, exit=exit)
    monkeypatch.undo()
    alone = [sampled(model, [p], [key], exit=exit)[0] for p, key in zip(prompts, keys, strict=True)]
    assert together == alone
    assert len({tuple(row) for row in together[:samples]}) > 1


@torch.no_grad()
def test_a_prompt_is_run_once_for_all_its_answers() -> None:
    model = build("llama")
    takes_padding(model)  # is tried on the model first
    prompt, other = tokens(1, 30)[0].tolist(), tokens(1, 20, seed=1)[0].tolist()
    seen: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    sampled(model, [prompt] * 5 + [other] * 5, keys_of(10))
    assert seen[0] == (2, 29)
    assert {shape[1] for shape in seen[1:]} == {1}
    seen.clear()
    sampled(model, [prompt, other], keys_of(2))
    assert seen[0] == (2, 30)
    assert sampled(model, [[5]] * 3, keys_of(3)) == [sampled(model, [[5]], [key])[0] for key in keys_of(3)]


@torch.no_grad()
def test_a_fresh_recursion_draws_what_the_model_draws() -> None:
    prompts = [tokens(1, 6)[0].tolist()] * 4
    plain = sampled(build("llama"), prompts, keys_of(4))
    model = build("llama")
    attach(model, RecursionConfig(max_steps=2))
    assert sampled(model, prompts, keys_of(4)) == plain


# -- an evaluation -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def default() -> tuple[Any, Any]:
    """Return the embedded model with a recursion that changes some tokens."""
    model, tokenizer = rrcli.load("default")
    attach_random(model, 0.03)
    return model, tokenizer


def options(**changes: Any) -> EvalSettings:
    return EvalSettings(**({"problems": 2, "max_new_tokens": 6, "samples": 3, "temperature": 1.5} | changes))


@torch.no_grad()
def test_what_is_drawn_depends_neither_on_batches_nor_on_an_interruption(
    default: tuple[Any, Any], tmp_path: Path
) -> None:
    model, tokenizer = default
    data = held_out_data(options(), tmp_path, 2, 1)
    call: dict[str, Any] = {"depth": 2, "settings": options(), "reporter": Silent()}
    whole = sample_answers(model, tokenizer, data, **call)
    assert [len(answers) for answers in whole] == [3] * len(data.problems)
    assert len({answer["output"] for answers in whole for answer in answers}) > len(data.problems)
    one_by_one = sample_answers(model, tokenizer, data, **call | {"settings": options(batch_tokens=1)})
    assert one_by_one == whole
    assert sample_answers(model, tokenizer, data, **call | {"settings": options(seed=1)}) != whole

    file = tmp_path / "samples.jsonl"
    with SampleLog(file, "k") as log:
        sample_answers(model, tokenizer, data, **call, log=log)
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    assert len(lines) == 1 + 3 * len(data.problems)
    for kept in (1, 4, len(lines) - 2):
        file.write_text("".join(lines[: 1 + kept]), encoding="utf-8")
        with SampleLog(file, "k") as log:
            assert sample_answers(model, tokenizer, data, **call, log=log) == whole
        assert sorted(file.read_text(encoding="utf-8").splitlines()) == sorted("".join(lines).splitlines())
    file.write_text("".join([*lines[:2], lines[1]]), encoding="utf-8")
    with SampleLog(file, "k") as log, pytest.raises(RRError, match="entry 2 of its sampled does not belong"):
        sample_answers(model, tokenizer, data, **call, log=log)


@torch.no_grad()
@pytest.mark.parametrize("exit", [None, ExitRule("probability", 0.6)])
def test_an_evaluation_records_answers_and_their_metrics(
    default: tuple[Any, Any], tmp_path: Path, exit: ExitRule | None
) -> None:
    model, tokenizer = default
    data = held_out_data(options(), tmp_path, 2, 1)
    model.recursion.exit = exit
    try:
        chosen = options(skip_perplexity=True, skip_performance=True, skip_generation=True)
        found = evaluate_model(model, tokenizer, data, settings=chosen)
    finally:
        model.recursion.exit = None
    records = found["records"]["problems"]
    assert all(len(record["sampled"]) == 3 for record in records)
    shares = [sum(answer["correct"] for answer in record["sampled"]) / 3 for record in records]
    assert found["metrics"]["avg@3"]["value"] == pytest.approx(100 * sum(shares) / len(shares))
    assert {"pass@2", "pass@3", "avg@3/row_add"} <= found["metrics"].keys()
    plain = evaluate_model(model, tokenizer, data, settings=replace(chosen, samples=0))
    assert not any("@" in name for name in plain["metrics"])


def test_sampling_counts_among_what_results_are_made_from_only_where_there_is_any() -> None:
    plain = eval_inputs(EvalSettings(), "baseline", "m", "d")
    assert eval_inputs(EvalSettings(temperature=1.0), "baseline", "m", "d") == plain
    found = {
        eval_inputs(EvalSettings(samples=n, temperature=t), "baseline", "m", "d") for n in (4, 8) for t in (0.7, 1.0)
    }
    assert len(found | {plain}) == 5


def test_samples_are_added_to_an_evaluation_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = {"problems": 2, "max_new_tokens": 6, "skip_perplexity": True, "skip_generation": True}
    quick |= {"skip_performance": True, "tensorboard": False}
    plain = service.evaluate(EvalSettings(**quick), "baseline", tmp_path, Silent()).results
    monkeypatch.setattr("rrcli.evaluation.answers.judge", lambda *_: pytest.fail("an answer was computed again"))
    found = service.evaluate(EvalSettings(**quick, samples=2), "baseline", tmp_path, Silent()).results
    greedy = [{k: v for k, v in record.items() if k != "sampled"} for record in found["records"]["problems"]]
    assert greedy == plain["records"]["problems"]
    assert found["metrics"]["pass@2"]["n"] == len(greedy)
    frame = rrcli.samples(tmp_path, "baseline", "problems")
    assert frame.samples.tolist() == [2] * len(greedy)
    assert 50 * frame.samples_right.mean() == pytest.approx(found["metrics"]["avg@2"]["value"])


def test_rr_eval_draws_samples(tmp_path: Path) -> None:
    skipped = [f"--skip-{part}" for part in ("perplexity", "generation", "performance")]
    arguments = ("eval", "--problems", 2, "--max-new-tokens", 4, "--samples", 2, "--temperature", 0.7, *skipped)
    shown = rr(*arguments, directory=tmp_path)
    assert shown.exit_code == 0, shown.stderr
    assert "Sampled answers, avg@2" in shown.stdout
    failed = rr("eval", "--samples", 2, "--temperature", 0, directory=tmp_path)
    assert failed.exit_code == 2
    assert "--temperature is 0" in failed.stderr


# -- the numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answers", [1, 2, 5, 6])
def test_pass_at_k_is_the_share_of_all_choices_of_k_answers_with_a_right_one(answers: int) -> None:
    for right in range(answers + 1):
        hits = [True] * right + [False] * (answers - right)
        for k in range(1, answers + 1):
            chosen = [any(some) for some in itertools.combinations(hits, k)]
            assert pass_at_k(answers, right, k) == pytest.approx(sum(chosen) / len(chosen))
    for wrong in ((answers, 0, answers + 1), (answers, answers + 1, 1), (answers, 0, 0)):
        with pytest.raises(ValueError, match="pass@"):
            pass_at_k(*wrong)


def with_samples(made: dict[str, Any], rights: Any, count: int = 8) -> dict[str, Any]:
    """Give problem i of a stage `rights(i)` right answers among `count` sampled ones."""
    for i, record in enumerate(made["records"]["problems"]):
        record["sampled"] = [
            {"output": f"{made['stage']} {n}", "extracted": "", "correct": n < rights(i), "strict": False}
            | {"length": 1, "ended": True}
            for n in range(count)
        ]
    made["metrics"] |= metrics.from_records(made["records"])
    return made


def test_metrics_of_samples_have_intervals_over_problems() -> None:
    made = with_samples(results("baseline"), lambda i: i % 9)
    found = made["metrics"]
    shares = [(i % 9) / 8 for i in range(200)]
    assert found["avg@8"]["value"] == pytest.approx(100 * sum(shares) / 200)
    interval = scipy.stats.ttest_1samp(shares, 0).confidence_interval(0.95)
    assert (found["avg@8"]["low"], found["avg@8"]["high"]) == pytest.approx((100 * interval.low, 100 * interval.high))
    assert found["pass@4"]["value"] == pytest.approx(100 * sum(pass_at_k(8, i % 9, 4) for i in range(200)) / 200)
    assert found["pass@8"]["value"] == pytest.approx(100 * sum(i % 9 > 0 for i in range(200)) / 200)
    names = [metric.name for metric in metrics.metrics_of(found) if "@" in metric.name]
    assert names == ["avg@8", "avg@8/leg_counting", "avg@8/chain_sum", "pass@2", "pass@4", "pass@8"]
    assert "pass@1" not in found


def test_stages_are_compared_by_the_shares_of_each_problem(tmp_path: Path) -> None:
    before = with_samples(results("finetuned_vanilla"), lambda i: i % 7)
    after = with_samples(results("finetuned_recursive"), lambda i: i % 7 + (i % 3 == 0))
    comparison = compared(tmp_path, before, after, primary=("avg@8: finetuned_recursive > finetuned_vanilla",))
    found = judged(comparison, "avg@8")
    assert found.verdict == "better"
    gains = [(i % 3 == 0) / 8 for i in range(200)]
    assert found.cell.difference == pytest.approx(100 * sum(gains) / 200)
    assert found.cell.n == 200
    rows = {row.metric.name: row.cells[1] for row in comparison.rows}
    assert rows["pass@8"].difference == pytest.approx(100 * sum(i % 7 == 0 and i % 3 == 0 for i in range(200)) / 200)
    assert rows["pass@8"].role == "exploratory"
    assert rows["reasoning_accuracy"].verdict == "same"
    assert not any("temperature" in text for text in comparison.warnings)


def test_equal_samples_are_the_same_and_another_temperature_is_named(tmp_path: Path) -> None:
    made = [with_samples(results(stage), lambda i: i % 5) for stage in ("baseline", "after_surgery")]
    for record in made[1]["records"]["problems"]:
        for n, answer in enumerate(record["sampled"]):
            answer["output"] = f"baseline {n}"
    made[0]["settings"] |= {"samples": 8, "temperature": 0.7}
    made[1]["settings"] |= {"samples": 8, "temperature": 1.0}
    comparison = compared(tmp_path, *made)
    rows = {row.metric.name: row.cells[1] for row in comparison.rows}
    assert rows["avg@8"].verdict == "same"
    assert any("temperature (0.7 and 1.0)" in text for text in comparison.warnings)


def test_claims_and_gates_name_metrics_of_samples(tmp_path: Path) -> None:
    claim = read_claim("pass@4: baseline > after_surgery - 2 points", {}, what="the claim")
    assert (claim.metric.samples, claim.metric.draws, claim.shift) == (4, 4, -2.0)
    assert metrics.tested_metric("pass@0") is None
    made = [with_samples(results(stage), lambda i: i % 5) for stage in ("baseline", "after_surgery")]
    comparison = compared(tmp_path, *made, gate=("after_surgery.avg@8 >= baseline.avg@8",))
    assert comparison.gates[0].holds
    value = json.loads(rr("compare", "--json", directory=tmp_path).stdout)
    assert next(row["name"] for row in value["rows"] if "@" in row["name"]) == "avg@8"


def test_answers_of_different_numbers_meet_where_both_are_known(tmp_path: Path) -> None:
    few = with_samples(results("finetuned_vanilla"), lambda i: i % 4, 4)
    many = with_samples(results("finetuned_recursive"), lambda i: i % 9, 8)
    comparison = compared(tmp_path, few, many)
    rows = {row.metric.name: row.cells[1] for row in comparison.rows}
    assert rows["pass@4"].difference is not None
    assert rows["avg@8"].difference is None
    assert rows["avg@8"].value is not None


def test_the_part_of_the_log_has_its_schema() -> None:
    from rrcli.schemas import ENTRIES

    assert set(sampled_answers.FIELDS) < set(ENTRIES[sampled_answers.PART].__annotations__)
