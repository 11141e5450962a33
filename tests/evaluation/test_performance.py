"""What decoding costs: FLOPs that are counted by hand, for every way to decode, and the metrics made of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rrcli
from families import build, wake
from rrcli.evaluation import performance
from rrcli.evaluation.metrics import KNOWN, is_cost
from rrcli.evaluation.performance import Counts, Performance, Times, Way, Workload, measure_performance
from rrcli.recursion.exits import parse_exit
from rrcli.reporting import Silent

LENGTH, NEW = 16, 8


def words(text: str, **_: Any) -> dict[str, list[int]]:
    return {"input_ids": [3 + len(word) for word in text.split()]}


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(performance, "PROMPT_TOKENS", LENGTH)
    monkeypatch.setattr(performance, "DECODE_TOKENS", NEW)
    monkeypatch.setattr(performance, "TEXTS", 2)
    monkeypatch.setattr(performance, "ROUNDS", 2)


def workload(model: Any, depth: int = 0) -> Workload:
    return Workload(model, words, ["a bc def ghij"] * LENGTH, depth)


class ByHand:
    """Counts the products of linear layers by what goes into them, and attention by its arguments."""

    def __init__(self) -> None:
        self.total = 0


@contextmanager
def by_hand(model: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[ByHand]:
    found, attention = ByHand(), F.scaled_dot_product_attention

    def linear(layer: nn.Linear, inputs: Any, _: Any) -> None:
        found.total += 2 * inputs[0].numel() * layer.out_features

    def counted(query: Any, key: Any, value: Any, *args: Any, **options: Any) -> Any:
        found.total += 2 * math.prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])
        return attention(query, key, value, *args, **options)

    layers = [part for part in (model, model.recursion) for part in part.modules() if isinstance(part, nn.Linear)]
    hooks = [layer.register_forward_hook(linear) for layer in layers]
    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", counted)
        yield found
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def test_flops_are_those_of_the_method_that_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With rejected drafts, so that decoding in chunks takes more than a pass for each token and depth."""
    model = build("llama")
    wake(rrcli.attach(model, rrcli.RecursionConfig(max_steps=2, chunk_width=8)), 0.1)
    work = workload(model, 2)
    counts, notices = work.count()
    assert notices == []
    assert set(counts) == {Way(0, False), Way(1, True), Way(2, True), Way(2, False)}
    for way, found in counts.items():
        with by_hand(model, monkeypatch) as short:
            for ids in work.prompts:
                work._generate(ids, way, 1)
        with by_hand(model, monkeypatch) as long:
            for ids in work.prompts:
                work._generate(ids, way, 1 + NEW)
        assert found.prefill == short.total / (2 * LENGTH)
        assert found.decode == (long.total - short.total) / (2 * NEW)
    method, alone = counts[work.method], counts[Way(0, False)]
    assert method.chunks["commit_rate"] < 0.5
    assert method.decode > 1.2 * counts[Way(2, False)].decode > 3 * alone.decode
    assert method.prefill == pytest.approx(3 * alone.prefill, rel=0.1)


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt_oss"])
@torch.no_grad()
def test_decoding_a_stock_model_by_formula(family: str) -> None:
    """Of a mixture the chosen half of the experts; the head reads the last position alone."""
    model = build(family)
    before = model.config.to_dict()
    work = workload(model)
    [counts] = work.count()[0].values()
    sizes = {n: p.numel() * (0.5 if p.dim() == 3 else 1) for n, p in model.named_parameters() if p.dim() > 1}
    layers = sum(size for name, size in sizes.items() if ".layers." in name and not name.endswith("bias"))
    head = sizes["lm_head.weight"]
    width = 4 * 2 * 4 * 8  # layers, scores and values, heads, width of a head
    assert counts.prefill == 2 * (LENGTH * layers + head + width * LENGTH**2) / LENGTH
    lengths = sum(LENGTH + n for n in range(1, NEW + 1))
    if family == "llama":  # the others have layers with a window
        assert counts.decode == 2 * (NEW * (layers + head) + width * lengths) / NEW
    assert model.config.to_dict() == before


@torch.no_grad()
def test_with_an_exit_the_method_leaves_early_and_the_curve_by_depth_does_not() -> None:
    model = build("llama")
    recursion = wake(rrcli.attach(model, rrcli.RecursionConfig(max_steps=2, chunk_width=8)), 0.1)
    without = workload(model, 2).count()[0]
    recursion.exit = parse_exit("probability:0.0001")  # nearly every token is as sure as that
    work = workload(model, 2)
    counts, _ = work.count()
    assert work.method == Way(2, True, exits=True)
    assert {way: found for way, found in counts.items() if way != work.method} == {
        way: replace(found, chunks={}) for way, found in without.items()
    }
    assert counts[work.method].decode < without[Way(1, True)].decode
    assert counts[work.method].prefill < without[Way(1, True)].prefill


@torch.no_grad()
def test_metrics_and_their_curve_by_depth() -> None:
    model = build("llama")
    recursion = wake(rrcli.attach(model, rrcli.RecursionConfig(max_steps=3, span=(1, 3))), 0.01)
    reporter = Silent()
    found = measure_performance(model, words, ["a bc def ghij"] * LENGTH, depth=2, reporter=reporter)
    assert reporter.warnings == []
    assert recursion.depth == 3
    for name in ("time_per_output_token", "prefill_flops_per_token", "decode_flops_per_token"):
        assert {end for n in found for base, end in [(n[: len(name)], n[len(name) :])] if base == name} == {
            "", "/sequential", "/pass_0",
        }  # fmt: skip
    assert found["time_per_output_token"]["n"] == 2
    assert found["time_per_output_token"]["low"] <= found["time_per_output_token"]["high"]
    assert found["decode/avg_refine_steps"]["value"] == 2
    assert {"decode/commit_rate", "decode/stability@1", "decode/stability@2"} <= found.keys()
    assert "memory_mb" not in found
    assert all(is_cost(name) for name in found)
    assert {name for name in found if not name.startswith("decode/")} <= KNOWN.keys()
    alone = measure_performance(model, words, ["a bc def ghij"] * LENGTH, depth=0, reporter=reporter)
    assert not any("/" in name for name in alone)
    # Two of four layers run twice more: 1 + depth x span share.
    assert found["cache_bytes_per_token"]["value"] == (1 + 2 * 2 / 4) * alone["cache_bytes_per_token"]["value"]


def test_medians_and_ranges_of_the_rounds() -> None:
    ways = [Way(0, False), Way(1, True), Way(1, False)]
    rounds = [{way: Times(0.001 * n, 0.01 * n * (1 + place)) for place, way in enumerate(ways)} for n in (1, 3, 2)]
    counts = {way: Counts(1e6, 2e6 * (1 + place)) for place, way in enumerate(ways)}
    found = Performance(ways[1], rounds, counts, memory_mb=7.0)
    assert found.metrics()["time_per_output_token"] == {"value": 40, "low": 20, "high": 60, "n": 3}
    assert found.metrics()["time_per_output_token/pass_0"]["value"] == 20
    assert found.metrics()["prefill_tokens_per_sec"]["value"] == pytest.approx(500)
    assert found.metrics()["memory_mb"] == {"value": 7.0}
    assert [entry["value"] for entry in found.by_depth()["decode_flops_per_token"]] == [2, 4]
    assert [entry["value"] for entry in found.by_depth()["time_per_output_token"]] == [20, 40]
    assert Performance(ways[0], rounds, counts).by_depth() == {}


@torch.no_grad()
def test_flops_that_cannot_be_counted_are_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from rrcli.recursion import flops

    monkeypatch.delitem(flops.OWN_FORMULAS, "aten::_scaled_dot_product_flash_attention_for_cpu")
    reporter = Silent()
    found = measure_performance(build("llama"), words, ["a bc def"] * LENGTH, depth=0, reporter=reporter)
    assert not any("flops" in name for name in found)
    assert [message.partition(": ")[0] for message in reporter.warnings] == ["the FLOPs leave out what rr cannot count"]


@torch.no_grad()
def test_every_text_begins_with_a_document() -> None:
    model = build("llama")
    texts = ["one", "", *["two three four"] * 5, "seven " * 40, "eleven"]
    work = Workload(model, words, texts, 0)
    assert [ids.shape[1] for ids in work.prompts] == [LENGTH, LENGTH]
    assert [ids[0, :4].tolist() for ids in work.prompts] == [[6, 6, 8, 7], [8, 8, 8, 8]]
    assert Workload(model, words, ["one"], 0).prompts[0].tolist() == [[6]]
    assert Workload(model, words, ["one"], 0).cache_growth() == 512
