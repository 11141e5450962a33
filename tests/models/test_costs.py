"""What a token costs at every depth, against really running the passes."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

import rrcli
from families import FAMILIES, SPANS, build, cache_name, tokens, wake
from operating import logits, sidecar, skeleton_of
from rrcli.models import costs
from rrcli.recursion.flops import FlopCounter
from rrcli.reporting import Silent
from rrcli.services.surgery import surgery
from rrcli.settings import SurgerySettings


@functools.cache
def measured_at(family: str, span: tuple[int, int] | None, depth: int) -> tuple[int, int, int]:
    """Bytes per token, constant bytes and FLOPs of one decoded token, as they are when the passes really run."""
    model = build(family)
    recursion = wake(rrcli.attach(model, rrcli.RecursionConfig(max_steps=2, span=span)))
    name, ids = cache_name(model), tokens(1, costs.PROMPT_TOKENS + 1)
    with recursion.at_depth(depth), torch.no_grad():
        cache = getattr(model(input_ids=ids[:, :-1], use_cache=True), name)
        before = costs.held_bytes(cache, set())
        with FlopCounter() as counter:
            model(input_ids=ids[:, -1:], use_cache=True, **{name: cache})
        after = costs.held_bytes(cache, set())
    growth = after - before
    return growth, after - growth * ids.shape[1], counter.checked()


@pytest.mark.parametrize("span", SPANS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["model", "skeleton"])
def test_costs_are_those_of_really_running_the_passes(kind: str, family: str, span: tuple[int, int] | None) -> None:
    model = build(family) if kind == "model" else skeleton_of(family)
    rrcli.attach(model, rrcli.RecursionConfig(max_steps=2, span=span))
    found = costs.measure(model)
    for depth in range(3):
        real = measured_at(family, span, depth)
        assert (
            found.cache_bytes_per_token[depth],
            found.cache_bytes_constant[depth],
            found.flops_per_token[depth],
        ) == real
    assert found.dtype == "float32"


def test_costs_of_a_llama_by_hand() -> None:
    model = build("llama")
    rrcli.attach(model, rrcli.RecursionConfig(max_steps=1))
    found = costs.measure(model)
    keys_and_values = 2 * 2 * 8 * 4  # two of them, 2 heads of width 8, 4 bytes
    assert found.cache_bytes_per_token == [4 * keys_and_values, 2 * 4 * keys_and_values]
    assert found.cache_bytes_constant == [0, 0]
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2) - model.get_input_embeddings().weight.numel()
    attention = 4 * 2 * 4 * 8 * (costs.PROMPT_TOKENS + 1)  # scores and values: layers, 2, heads, width, positions
    assert found.flops_per_token[0] == 2 * (matrices + attention)


def test_recurrent_states_do_not_grow() -> None:
    for family in ("mamba2", "kimi_linear", "qwen3_next"):
        model = skeleton_of(family)
        rrcli.attach(model, rrcli.RecursionConfig(max_steps=1))
        found = costs.measure(model)
        assert found.cache_bytes_constant[0] > 0
        assert found.cache_bytes_constant[1] == 2 * found.cache_bytes_constant[0]
        assert (found.cache_bytes_per_token[0] == 0) is (family == "mamba2")


def test_measuring_leaves_no_trace() -> None:
    model = build("kimi_linear")
    rrcli.attach(model)
    before = logits(model)
    hooks = [len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in model.recursion.layers]
    implementation = model.config._experts_implementation
    costs.measure(model)
    assert torch.equal(logits(model), before)
    assert model.recursion.depth == 2
    assert model.config._experts_implementation == implementation
    assert [len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in model.recursion.layers] == hooks


def test_costs_that_cannot_be_measured_are_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Any) -> None:
        raise NotImplementedError("no kernel for meta")

    monkeypatch.setattr(costs, "measure", fail)
    reporter = Silent()
    result = surgery(SurgerySettings(), tmp_path, reporter)
    assert result.costs is None
    assert "no kernel for meta" in reporter.warnings[0]
    assert sidecar(tmp_path).is_dir()
