"""Ways to generate and to place a model: sampling, padding, caches, assistants, compilation, offloaded layers."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from families import FAMILIES, NO_DRIVER, build, cache_name, cached, far, generate, tokens, uncached, wake
from rrcli.recursion import caches
from rrcli.recursion.config import RecursionConfig
from rrcli.recursion.engine import attach, self_check
from rrcli.recursion.lora import add_lora

MAX_STEPS = 2
ROUNDING = 1e-5
RECURRENT = ("falcon_h1", "granitemoehybrid", "jamba", "kimi_linear", "mamba2", "qwen3_5_text", "qwen3_next")
# Stock mpt takes no cache from `generate` with an assistant.
UNASSISTED = (*RECURRENT, "mpt")
SOME = ["llama", "gemma2", "gpt2", "mixtral", "deepseek_v3", "lfm2", "mamba2", "qwen3_next"]

some_families = pytest.mark.parametrize("family", SOME)
every_depth = pytest.mark.parametrize("depth", [1, 2])


def awake(family, depth=MAX_STEPS, span=None, **changes):
    model = build(family, **changes)
    recursion = wake(attach(model, RecursionConfig(max_steps=MAX_STEPS, span=span)))
    recursion.depth = depth
    return model


@every_depth
@some_families
@torch.no_grad()
def test_sampling_draws_the_same_with_and_without_a_cache(family, depth):
    model, texts = awake(family, depth), []
    for use_cache in (True, False):
        torch.manual_seed(5)
        texts.append(generate(model, tokens(length=6), do_sample=True, top_k=0, use_cache=use_cache))
    assert torch.equal(*texts)
    torch.manual_seed(6)
    assert not torch.equal(texts[0], generate(model, tokens(length=6), do_sample=True, top_k=0))


@every_depth
@some_families
@torch.no_grad()
def test_rows_of_a_left_padded_batch_go_on_as_if_alone(family, depth):
    model, ids = awake(family, depth), tokens(batch=3, length=7)
    mask = torch.ones_like(ids)
    mask[0, :3], mask[2, :1] = 0, 0
    padded = torch.where(mask.bool(), ids, 0)
    for options in ({}, {"num_beams": 2}):
        text = model.generate(padded, attention_mask=mask, max_new_tokens=6, do_sample=False, **options)
        for row, pad in enumerate((3, 0, 1)):
            alone = generate(model, ids[row : row + 1, pad:], **options)
            assert torch.equal(text[row, 7:], alone[0, 7 - pad :])


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="transformers offloads caches from CUDA only")
OFFLOADED = [pytest.param(name, marks=needs_cuda) for name in ("offloaded", "offloaded_static")]


@pytest.mark.parametrize("implementation", ["static", *OFFLOADED])
@every_depth
@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "gpt2"])
@torch.no_grad()
def test_every_kind_of_cache_generates_the_same(family, depth, implementation):
    model, ids = awake(family, depth), tokens(length=6)
    if implementation != "static":
        model, ids = model.cuda(), ids.cuda()
        model.recursion.cuda()
    assert torch.equal(generate(model, ids, cache_implementation=implementation), generate(model, ids))


@pytest.mark.skipif(NO_DRIVER, reason="transformers' cache that offloads wants a driver here")
def test_a_cache_that_offloads_is_copied_for_the_passes():
    cache = DynamicCache(config=build("llama").config, offloading=True)
    caches.prepare(cache, 2)
    assert all(twin.prefetch_stream is cache.prefetch_stream for twin in cache.rr_passes)
    assert all(twin.layers is not cache.layers for twin in cache.rr_passes)


@every_depth
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in UNASSISTED])
@torch.no_grad()
def test_assisted_decoding_gives_the_plain_text(family, depth):
    """Whether its drafts are good (a copy), bad (the stock model), or come from the prompt."""
    model, ids = awake(family, depth, span=(1, 3)), tokens(batch=1, length=5).repeat(1, 2)
    plain = generate(model, ids, max_new_tokens=10)
    for assistant in (copy.deepcopy(model), build(family)):
        assert torch.equal(generate(model, ids, max_new_tokens=10, assistant_model=assistant), plain)
    assert torch.equal(generate(model, ids, max_new_tokens=10, prompt_lookup_num_tokens=3), plain)


@pytest.mark.parametrize("family", RECURRENT)
def test_assisted_decoding_is_refused_by_transformers_where_states_cannot_go_back(family):
    model, ids = awake(family), tokens(batch=1)
    with pytest.raises(ValueError, match="not supported with stateful models"):
        generate(model, ids, assistant_model=build(family))
    with pytest.raises(ValueError, match="not supported with stateful models"):
        generate(model, ids, prompt_lookup_num_tokens=3)


@torch.no_grad()
def test_a_compiled_model_computes_the_same_at_every_depth():
    """Decoding is compiled whole: one graph for each depth, and nothing is compiled anew for the next token."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model, ids = awake("llama", num_hidden_layers=2), tokens(length=10)
    compiled = torch.compile(model, backend="eager")
    for depth in (2, 0, 2):
        model.recursion.depth = depth
        expected = uncached(model, ids)
        cache = StaticCache(config=model.config, max_cache_len=10)
        model(ids[:, :6], **{cache_name(model): cache})
        for t in range(6, 10):
            logits = compiled(ids[:, t : t + 1], **{cache_name(model): cache}).logits
            assert far(logits, expected[:, t : t + 1]) < ROUNDING
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] <= 3  # torch before 2.11 compiles once more where a depth comes back
    torch._dynamo.reset()


@torch.no_grad()
def test_a_compiled_model_may_have_adapters_and_makes_its_own_caches():
    torch._dynamo.reset()
    model, ids = awake("llama", num_hidden_layers=2), tokens(length=8)
    bare = uncached(model, ids)
    for parameter in add_lora(model, 2, 2).parameters():
        parameter.add_(0.05)
    assert far(uncached(model, ids), bare) > 1e-3
    compiled = torch.compile(model, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output = compiled(ids[:, :6], use_cache=True, output_hidden_states=True)
    assert len(output.hidden_states) == 3
    after = compiled(ids[:, 6:7], **{cache_name(model): output[cache_name(model)]}).logits
    assert far(after, uncached(model, ids)[:, 6:7]) < ROUNDING
    torch._dynamo.reset()


# -- where layers lie --------------------------------------------------------------------------------------------------

SPLIT = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.layers.2": "disk",
    "model.layers.3": "cpu",
    "model.norm": "disk",
    "lm_head": "cpu",
}


def _cpu_offloaded(folder):
    model = build("llama")
    cpu_offload(model, execution_device=torch.device("cpu"))
    return model


def _disk_offloaded(folder):
    model = build("llama")
    disk_offload(model, folder / "offloaded", execution_device=torch.device("cpu"))
    return model


def _dispatched(folder):
    return dispatch_model(build("llama"), SPLIT, main_device="cpu", offload_dir=folder / "offloaded")


def _mapped(folder):
    build("llama").save_pretrained(folder / "model")
    options = {"device_map": SPLIT, "offload_folder": folder / "offloaded"}
    return AutoModelForCausalLM.from_pretrained(folder / "model", **options).eval()


def _on_one_device(folder):
    build("llama").save_pretrained(folder / "model")
    return AutoModelForCausalLM.from_pretrained(folder / "model", device_map={"": "cpu"}).eval()


@pytest.mark.parametrize("place", [_cpu_offloaded, _disk_offloaded, _dispatched, _mapped, _on_one_device])
@pytest.mark.parametrize("span", [None, (1, 3)], ids=["full", "partial"])
@torch.no_grad()
def test_offloaded_layers_are_run_again_like_others(place, span, tmp_path):
    reference, ids = awake("llama", span=span), tokens()
    model = place(tmp_path)
    recursion = attach(model, RecursionConfig(max_steps=MAX_STEPS, span=span))
    assert {p.device.type for p in recursion.parameters()} == {"cpu"}
    self_check(recursion)
    recursion.load_state_dict(reference.recursion.state_dict())
    for depth in range(MAX_STEPS + 1):
        recursion.depth = reference.recursion.depth = depth
        assert torch.equal(uncached(model, ids), uncached(reference, ids))
        assert torch.equal(cached(model, ids)[0], cached(reference, ids)[0])
        ours, theirs = (r.passes(ids).hidden for r in (recursion, reference.recursion))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
