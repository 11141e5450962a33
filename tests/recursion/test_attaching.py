"""Attaching a recursion to a model, detaching it, and the models and settings that are refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from families import FAMILIES, MAX_STEPS, attached, build, cached, far, hooks, limit, tokens, uncached, wake
from rrcli.errors import RRError, UsageError
from rrcli.recursion import proof
from rrcli.recursion.config import RecursionConfig, parse_span
from rrcli.recursion.engine import attach
from rrcli.recursion.families import find_layout


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_detaching_restores_the_stock_model_and_it_can_be_attached_again(family):
    model, ids = build(family), tokens()
    model(ids, output_hidden_states=True)  # transformers installs hooks of its own on the first such call
    plain, names, before = uncached(model, ids), set(model.state_dict()), hooks(model)
    recursion = wake(attach(model, RecursionConfig(max_steps=MAX_STEPS)))
    awake, sidecar = uncached(model, ids), recursion.state_dict()
    assert set(model.state_dict()) == names
    assert not torch.equal(awake, plain)
    recursion.detach()
    assert hooks(model) == before
    assert not hasattr(model, "recursion")
    assert torch.equal(uncached(model, ids), plain)
    again = attach(model, RecursionConfig(max_steps=MAX_STEPS))
    assert torch.equal(uncached(model, ids), plain)
    again.load_state_dict(sidecar)
    assert torch.equal(uncached(model, ids), awake)


def test_attaching_twice_is_refused():
    model, recursion = attached("llama")
    with pytest.raises(RRError, match="already"):
        attach(model)
    assert model.recursion is recursion


def test_detaching_an_old_recursion_leaves_the_next_one_alone():
    model, old = attached("llama")
    old.detach()
    new = attach(model)
    old.detach()
    assert model.recursion is new


@torch.no_grad()
def test_a_copied_model_has_a_recursion_of_its_own():
    model, recursion = attached("llama")
    ids = tokens()
    awake = uncached(model, ids)
    twin = copy.deepcopy(model)
    assert torch.equal(uncached(twin, ids), awake)
    twin.recursion.depth = 0
    assert torch.equal(uncached(twin, ids), uncached(build("llama"), ids))
    twin.recursion.detach()
    recursion.cell.w_out.weight.mul_(2)
    assert not torch.equal(uncached(model, ids), awake)


def test_a_span_after_the_last_layer_is_refused_and_leaves_the_model_alone():
    model = build("llama")
    before = hooks(model)
    with pytest.raises(UsageError, match="1:5"):
        attach(model, RecursionConfig(span=(1, 5)))
    assert hooks(model) == before
    attach(model, RecursionConfig(span=(1, 4)))


def test_a_depth_out_of_range_is_refused():
    _, recursion = attached("llama")
    for depth in (-1, MAX_STEPS + 1):
        with pytest.raises(UsageError, match=str(depth)):
            recursion.depth = depth
    assert recursion.depth == MAX_STEPS
    with pytest.raises(ZeroDivisionError), recursion.at_depth(0):
        raise ZeroDivisionError
    assert recursion.depth == MAX_STEPS


def test_a_model_whose_layers_cannot_be_found_is_refused():
    model = build("llama")
    model.config.model_type = "never_heard_of"
    model.model.blocks = nn.ModuleList(nn.Identity() for _ in range(4))
    with pytest.raises(RRError) as error:
        attach(model)
    assert "never_heard_of" in str(error.value)
    assert "model.layers (4)" in str(error.value)
    assert "model.blocks (4)" in str(error.value)
    assert not hasattr(model, "recursion")


@torch.no_grad()
def test_an_unlisted_family_is_found_by_structure_and_has_to_prove_itself():
    model, ids = build("llama"), tokens()
    plain = uncached(model, ids)
    model.config.model_type = "never_heard_of"
    layout, known = find_layout(model)
    assert not known
    assert layout.layers == "model.layers"
    # `rotary_emb` also stands after the layers, and is no part of the tail.
    assert layout.tail == ("model.norm",)
    recursion = attach(model)
    assert torch.equal(uncached(model, ids), plain)
    recursion.detach()

    class Twice(nn.Module):
        """A norm that the structure cannot tell from what it wraps: its own name does not say norm."""

        def forward(self, hidden):
            return hidden * 2

    before = hooks(model)
    norm = model.model.norm
    del model.model.norm
    model.model.final = norm
    model.model.forward = _forward_with_final(model.model, Twice())
    with pytest.raises(RRError, match="never_heard_of"):
        attach(model)
    assert not hasattr(model, "recursion")
    model.model.norm = norm
    del model.model.final, model.model.forward
    assert hooks(model) == before


def test_an_unlisted_family_that_breaks_when_its_layers_run_again_is_refused():
    model = build("llama")
    model.config.model_type = "never_heard_of"
    runs = []

    def once(module, args):
        runs.append(module)
        if len(runs) % 2 == 0 and model.recursion.depth:
            raise TypeError("a layer of this family cannot run twice")

    model.model.layers[1].register_forward_pre_hook(once)
    with pytest.raises(RRError, match="never_heard_of"):
        attach(model)
    assert not hasattr(model, "recursion")


def test_an_unlisted_family_whose_caches_are_not_recognised_is_refused(monkeypatch):
    model = build("llama")
    model.config.model_type = "never_heard_of"
    monkeypatch.setattr(proof, "is_cache", lambda value: False)
    with pytest.raises(RRError, match="which is not known as a cache"):
        attach(model)
    assert not hasattr(model, "recursion")
    monkeypatch.undo()
    attach(model)


def _forward_with_final(backbone, extra):
    """Return the forward of a backbone whose tail cannot be found by its names."""
    forward = type(backbone).forward

    def run(*args, **kwargs):
        backbone._modules["norm"] = nn.Sequential(backbone.final, extra)
        try:
            return forward(backbone, *args, **kwargs)
        finally:
            del backbone._modules["norm"]

    return run


def test_the_configuration_reads_back_what_it_wrote():
    for config in (
        RecursionConfig(),
        RecursionConfig(max_steps=4, span=(2, 6), cell_width=8, chunk_width=4, seed=3),
        RecursionConfig(relative_feedback=True),
    ):
        assert RecursionConfig.from_dict(config.to_dict()) == config
    with pytest.raises(UsageError, match="max_step'"):
        RecursionConfig.from_dict({"max_step": 2})


@pytest.mark.parametrize(
    "values",
    [{"max_steps": 0}, {"max_steps": 9}, {"span": (2, 2)}, {"span": (-1, 2)}, {"cell_width": 0}, {"chunk_width": 0}],
)
def test_a_configuration_out_of_range_is_refused(values):
    with pytest.raises(UsageError, match=next(iter(values))):
        RecursionConfig(**values)


def test_spans_are_read_as_written():
    assert parse_span("all") is None
    assert parse_span("2:6") == (2, 6)
    for text in ("", "2", "2:", ":6", "a:b", "-1:3"):
        with pytest.raises(UsageError, match="span"):
            parse_span(text)


@pytest.mark.parametrize("family", ["llama", "mamba2", "qwen3_moe"])
@torch.no_grad()
def test_relative_feedback_is_the_feedback_times_the_inputs_root_mean_square(family):
    model = build(family)
    plain = uncached(model, tokens())
    recursion = attach(model, RecursionConfig(max_steps=1, relative_feedback=True))
    assert torch.equal(uncached(model, tokens()), plain)
    wake(recursion)
    inputs: list[torch.Tensor] = []
    hook = recursion.layers[0].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    state = recursion.passes(tokens()).states[0]
    hook.remove()
    entry, second = inputs
    scale = entry.pow(2).mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(second, entry + scale * recursion.cell(state, 1))
    assert far(cached(model, tokens())[0], uncached(model, tokens())) < limit(model, tokens())
