"""FLOPs of a prefill, counted by hand: dense layers, routed experts, and every pass of a recursion."""

from __future__ import annotations

import pytest
import torch

import rrcli
from families import build, wake
from rrcli.evaluation import performance
from rrcli.evaluation.performance import measure_performance
from rrcli.reporting import Silent

LENGTH = 24


def words(text, **_):
    return {"input_ids": [3 + len(word) for word in text.split()]}


def measured(model, monkeypatch, depth=0):
    monkeypatch.setattr(performance, "PREFILL_TOKENS", LENGTH)
    monkeypatch.setattr(performance, "DECODE_TOKENS", 2)
    monkeypatch.setattr(performance, "REPEATS", 1)
    with torch.no_grad():
        return measure_performance(model, words, ["a bc def"] * LENGTH, depth=depth, reporter=Silent())


def products(model):
    """Return the multiply-adds of one token in a prefill of `LENGTH` tokens: (layers, head)."""
    config = model.config
    active = getattr(config, "num_experts_per_tok", 0) / (getattr(config, "num_local_experts", 0) or 1)
    matrices = {name: p for name, p in model.named_parameters() if p.dim() > 1 and not name.endswith("bias")}
    sizes = {name: p.numel() * (active if p.dim() == 3 else 1) for name, p in matrices.items()}
    layers = sum(size for name, size in sizes.items() if ".layers." in name)
    width = config.num_attention_heads * model.model.layers[0].self_attn.head_dim
    return layers + config.num_hidden_layers * 2 * LENGTH * width, sizes["lm_head.weight"]


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt_oss"])
def test_flops_are_counted_wherever_they_are_fused(family, monkeypatch):
    model = build(family)
    before = model.config.to_dict()
    found = measured(model, monkeypatch)["flops_per_token"]["value"]
    assert found == pytest.approx(2 * sum(products(model)) / 1e6)
    assert model.config.to_dict() == before


def test_a_pass_costs_its_layers_and_its_cell(monkeypatch):
    model = build("mixtral")
    recursion = rrcli.attach(model, rrcli.RecursionConfig(max_steps=2))
    layers, head = products(model)
    cell = sum(p.numel() for name, p in recursion.cell.named_parameters() if name.startswith("w_"))
    found = measured(model, monkeypatch, 2)["flops_per_token"]["value"]
    assert found == pytest.approx(2 * (3 * layers + 2 * cell + head) / 1e6)


def test_a_recursion_is_timed_in_chunks_and_against_both_ways_without(monkeypatch):
    model = build("llama")
    recursion = wake(rrcli.attach(model, rrcli.RecursionConfig(max_steps=3, span=(1, 3))), 0.01)
    found = {name: entry["value"] for name, entry in measured(model, monkeypatch, 2).items()}
    assert recursion.depth == 3
    times = {name for name in found if name.startswith("time_per_output_token")}
    assert times == {f"time_per_output_token{way}" for way in ("", "/sequential", "/pass_0")}
    assert found["decode/avg_refine_steps"] == 2
    assert 1 <= found["decode/avg_chunk_length"] <= 2
    assert {"decode/commit_rate", "decode/stability@1", "decode/stability@2"} <= found.keys()
    alone = measured(model, monkeypatch)
    assert not any("/" in name for name in alone)
    # Two of four layers run twice more: 1 + depth x span share.
    assert found["cache_bytes_per_token"] == (1 + 2 * 2 / 4) * alone["cache_bytes_per_token"]["value"]
