"""Which families are accepted, which are refused, and that an unknown one has to prove itself."""

from __future__ import annotations

import functools
import re

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from families import ROUNDING, build, cache_name, cached, decoding_faults, examine, far, tokens, uncached, wake
from rrcli.errors import RRError
from rrcli.recursion import families as table
from rrcli.recursion.config import RecursionConfig
from rrcli.recursion.engine import attach
from tiny_configs import CONFIGS, MORE, REFUSED

DECODED = (
    *("bamba", "bloom", "falcon", "gemma2", "gpt2", "gpt_neo", "jamba", "kimi_linear", "lfm2", "llama4_text"),
    *("longcat_flash", "mamba", "mamba2", "minimax", "mpt", "opt", "qwen3_next", "zamba2"),
)


def unlisted(family, **changes):
    """Return a model of `family` under a name that no table knows."""
    model = build(family, **changes)
    model.config.get_text_config().model_type = "never_heard_of"
    return model


def refused(model, match, config=None):
    """Check that attaching is refused with a message of ours, and leaves no hook."""
    before = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    training = model.training
    with pytest.raises(RRError, match=match):
        attach(model, config)
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == before
    assert not hasattr(model, "recursion")
    assert model.training == training


@pytest.mark.slow
@pytest.mark.timeout(1200)  # zamba2 takes minutes on a busy machine
@pytest.mark.parametrize("family", sorted(MORE))
def test_every_property_holds(family):
    findings = examine(family)
    assert findings.hold, findings


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_every_way_to_decode_gives_the_tokens_of_each_prompt_alone(family):
    assert not decoding_faults(family)


# One family of each kind of mask, position, cache and state. The slow tests decode all families in every way.
@pytest.mark.parametrize("family", DECODED)
def test_ways_to_decode_give_the_tokens_of_each_prompt_alone(family):
    assert not decoding_faults(family, [(1, 3)], [2], lengths=(7, 3), new=6)


def test_every_listed_family_is_tested_and_none_is_in_both_tables():
    assert set(table.LAYOUTS) == set(CONFIGS) | set(MORE)
    assert not set(CONFIGS) & set(MORE)
    assert not set(table.LAYOUTS) & set(table.REFUSED)
    assert set(REFUSED) <= set(table.REFUSED)


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_a_family_that_is_known_not_to_work_is_refused(family):
    refused(build(family), f"'{family}' models cannot be supported: {re.escape(table.REFUSED[family])}")


@pytest.mark.parametrize("family", sorted(REFUSED))
@pytest.mark.parametrize("span", [None, (1, 3)], ids=["full", "partial"])
def test_it_would_be_refused_even_if_it_were_not_known(family, span, monkeypatch):
    monkeypatch.setattr(table, "REFUSED", {})
    refused(build(family), family, RecursionConfig(span=span))


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2", "mpt", "mamba2", "qwen3_next", "falcon_h1", "bamba"])
@pytest.mark.parametrize("span", [None, (1, 3)], ids=["full", "partial"])
@torch.no_grad()
def test_an_unlisted_family_is_accepted_once_it_proved_itself(family, span):
    model, ids = unlisted(family), tokens()
    plain = uncached(model, ids)
    model.train()
    recursion = attach(model, RecursionConfig(span=span))
    assert model.training
    model.eval()
    assert recursion.depth == 2
    assert not recursion.cell.w_out.weight.any()
    assert torch.equal(uncached(model, ids), plain)
    if family != "bamba":  # it counts positions from 0 unless told, and is told by its name in these tests
        wake(recursion)
        assert far(cached(model, ids)[0], uncached(model, ids)) < ROUNDING


def test_an_encoder_decoder_model_is_refused():
    model = build("llama")
    model.config.is_encoder_decoder = True
    refused(model, "encoder-decoder")


def test_layers_that_read_the_keys_of_earlier_layers_are_refused():
    refused(build("gemma4_text", num_kv_shared_layers=2), "last 2 layers")


def test_layers_that_are_looped_over_are_refused():
    model = unlisted("llama")
    layer = model.model.layers[0]
    model.model.layers = nn.ModuleList([layer] * 4)
    refused(model, r"once each in order, but as \[0, 1, 2, 3, 0")


def test_a_model_that_sees_the_future_is_refused():
    model = unlisted("llama")
    for layer in model.model.layers:
        attention = layer.self_attn.forward
        layer.self_attn.forward = lambda *args, f=attention, **kwargs: f(*args, **(kwargs | {"attention_mask": None}))
        layer.self_attn.is_causal = False
    refused(model, "not causal")


def test_a_state_that_lies_in_the_modules_is_refused():
    """A running sum over the passes: exact at zero-init, wrong as soon as the cell learns."""
    model = unlisted("llama")
    block = model.model.layers[2]
    seen = []

    def remember(_, args, output):
        seen.append(output)
        return output if len(seen) % 2 else output + (seen[-1] - seen[-2])

    block.mlp.register_forward_hook(remember)
    refused(model, "never_heard_of")


def test_a_cache_that_is_no_cache_is_refused():
    class Store(DynamicCache):
        """Known as a cache; the subclass below hides it."""

    class Hidden:
        def __init__(self):
            self.inner = Store()

        def __getattr__(self, name):
            return getattr(self.__dict__["inner"], name)

    model = unlisted("llama")
    forward = model.forward

    name = cache_name(model)

    @functools.wraps(forward)
    def hiding(*args, use_cache=None, **kwargs):
        if use_cache and kwargs.get(name) is None:
            kwargs[name] = Hidden()
        return forward(*args, use_cache=use_cache, **kwargs)

    model.forward = hiding
    refused(model, "its cache is a Hidden, which is not known as a cache")
