"""Every pass has its own cache, and what is done to the caller's cache is done to those of the passes."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

from families import FAMILIES, ROUNDING, build, cache_name, cached, far, generate, limit, tokens, uncached, wake
from rrcli.errors import RRError
from rrcli.recursion import caches
from rrcli.recursion.config import RecursionConfig
from rrcli.recursion.engine import attach
from rrcli.upstream import is_cache

MAX_STEPS = 2
SEEN = 9

# Recurrent states cannot be rolled back, so these families' caches cannot be cropped.
RECURRENT = (*("falcon_h1", "granitemoehybrid", "jamba", "kimi_linear", "mamba2", "qwen3_5_text", "qwen3_next"),)
# Layers of these caches have no batch_select_indices.
NO_SELECT = (*RECURRENT, "lfm2")
CROPPABLE = [family for family in FAMILIES if family not in RECURRENT]
CROPS = [(family, span) for family in CROPPABLE for span in (None, (1, 3))]
SELECTABLE = [family for family in FAMILIES if family not in NO_SELECT]

every_family = pytest.mark.parametrize("family", FAMILIES)


def awake(family, span=(1, 3), depth=MAX_STEPS):
    model = build(family)
    recursion = wake(attach(model, RecursionConfig(max_steps=MAX_STEPS, span=span)))
    recursion.depth = depth
    return model, recursion


def go_on(model, ids, cache):
    """Return the logits of one forward over `ids` after what `cache` holds, with a copy of the cache."""
    return model(ids, use_cache=True, **{cache_name(model): copy.deepcopy(cache)}).logits


def one_by_one(model, ids, cache):
    return torch.cat(
        [model(ids[:, t : t + 1], use_cache=True, **{cache_name(model): cache}).logits for t in range(ids.shape[1])], 1
    )


def filled(model, ids):
    """Return the cache after one forward over `ids`; it can be cropped whatever the family's windows are."""
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    model(ids, use_cache=True, **{cache_name(model): cache})
    return cache


@every_family
@torch.no_grad()
def test_the_callers_cache_carries_one_cache_for_each_pass(family):
    model, _ = awake(family)
    _, cache = cached(model, tokens())
    assert [type(c).__name__ for c in cache.rr_passes] == [type(cache).__name__] * MAX_STEPS
    assert all(is_cache(c) for c in (cache, *cache.rr_passes))
    assert isinstance(cache, DynamicCache)
    assert not any(hasattr(c, "rr_passes") for c in cache.rr_passes)
    assert not caches.is_empty(cache)


@pytest.mark.parametrize(("family", "span"), CROPS)
@torch.no_grad()
def test_a_cropped_cache_goes_on_as_if_the_tokens_had_not_been(family, span):
    model, recursion = awake(family, span)
    ids, other = tokens(length=14), tokens(length=14, seed=1)
    path = torch.cat([ids[:, : SEEN - 4], other[:, SEEN - 4 :]], 1)
    for depth in range(MAX_STEPS + 1):
        recursion.depth = depth
        cache = filled(model, ids[:, :SEEN])
        assert cache.is_croppable
        cache.crop(-4)
        after = one_by_one(model, path[:, SEEN - 4 :], cache)
        assert far(after, uncached(model, path)[:, SEEN - 4 :]) < limit(model, path)


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral", "gpt2", "bloom", "deepseek_v3", "lfm2"])
@torch.no_grad()
def test_several_positions_at_once_after_a_cache(family):
    model, _ = awake(family)
    ids = tokens(length=14)
    full = uncached(model, ids)
    cache = filled(model, ids[:, :SEEN])
    assert far(go_on(model, ids[:, SEEN:], cache), full[:, SEEN:]) < ROUNDING


@pytest.mark.parametrize("family", SELECTABLE)
@torch.no_grad()
def test_rows_of_a_cache_can_be_chosen_and_repeated(family):
    model, _ = awake(family)
    ids = tokens(batch=3)
    chosen = torch.tensor([2, 0])
    cache = filled(model, ids[:, :SEEN])
    cache.batch_select_indices(chosen)
    full = uncached(model, ids[chosen])
    assert far(go_on(model, ids[chosen, SEEN : SEEN + 1], cache), full[:, SEEN : SEEN + 1]) < ROUNDING
    cache.batch_repeat_interleave(2)
    repeated = ids[chosen].repeat_interleave(2, 0)
    full = uncached(model, repeated)
    assert far(go_on(model, repeated[:, SEEN : SEEN + 1], cache), full[:, SEEN : SEEN + 1]) < ROUNDING


@every_family
@torch.no_grad()
def test_reordered_rows_go_on_as_their_own_past(family):
    model, _ = awake(family)
    ids = tokens(batch=3)
    order = torch.tensor([1, 1, 0])
    _, cache = cached(model, ids[:, :SEEN])
    cache.reorder_cache(order)
    after = one_by_one(model, ids[order, SEEN:], cache)
    assert far(after, uncached(model, ids[order])[:, SEEN:]) < ROUNDING


@every_family
@torch.no_grad()
def test_beam_search_finds_the_same_with_and_without_a_cache(family):
    model, _ = awake(family)
    options = {"num_beams": 3, "num_return_sequences": 3, "output_scores": True, "return_dict_in_generate": True}
    with_cache = generate(model, tokens(length=6), **options)
    without = generate(model, tokens(length=6), use_cache=False, **options)
    assert torch.equal(with_cache.sequences, without.sequences)
    torch.testing.assert_close(with_cache.sequences_scores, without.sequences_scores, rtol=1e-4, atol=1e-5)


@every_family
@torch.no_grad()
def test_generating_is_the_argmax_of_the_uncached_logits(family):
    model, recursion = awake(family)
    ids = tokens(length=6)
    for depth in range(1, MAX_STEPS + 1):
        recursion.depth = depth
        text = generate(model, ids)
        assert torch.equal(text[:, 6:], uncached(model, text)[:, 5:-1].argmax(-1))


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gpt2"])
@torch.no_grad()
def test_prompt_lookup_crops_its_way_to_the_same_text(family):
    model, _ = awake(family)
    ids = tokens(batch=1, length=4).repeat(1, 3)
    assert torch.equal(
        generate(model, ids, max_new_tokens=12, prompt_lookup_num_tokens=3), generate(model, ids, max_new_tokens=12)
    )


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@torch.no_grad()
def test_a_static_cache_generates_the_same_text(family):
    model, recursion = awake(family)
    ids = tokens(length=6)
    for depth in (MAX_STEPS, 1, 0, MAX_STEPS):
        recursion.depth = depth
        assert torch.equal(generate(model, ids, cache_implementation="static"), generate(model, ids))


@torch.no_grad()
def test_a_static_cache_is_reused_after_a_reset():
    model, recursion = awake("llama")
    cache = StaticCache(config=model.config, max_cache_len=20)
    for depth, seed in ((2, 0), (1, 1), (2, 2), (0, 3), (1, 4)):
        recursion.depth = depth
        ids = tokens(seed=seed)
        assert far(cached(model, ids, cache=cache)[0], uncached(model, ids)) < ROUNDING
        cache.reset()
        assert caches.is_empty(cache)


@torch.no_grad()
def test_a_dynamic_cache_is_reused_after_a_reset():
    for family in ("llama", "mamba2", "qwen3_next"):
        model, recursion = awake(family)
        cache = DynamicCache(config=model.config)
        for depth, seed in ((1, 0), (2, 1), (0, 2), (2, 3)):
            recursion.depth = depth
            ids = tokens(seed=seed)
            assert far(cached(model, ids, cache=cache)[0], uncached(model, ids)) < ROUNDING
            cache.reset()
            assert caches.is_empty(cache)


@every_family
@torch.no_grad()
def test_a_deeper_pass_without_a_past_is_refused(family):
    model, recursion = awake(family, depth=0)
    ids = tokens()
    _, cache = cached(model, ids[:, :SEEN])
    name = cache_name(model)
    recursion.depth = 1
    with pytest.raises(RRError, match=r"depth 0.*depth 1"):
        model(ids[:, SEEN : SEEN + 1], use_cache=True, **{name: cache})
    recursion.depth = 0
    after = model(ids[:, SEEN : SEEN + 1], use_cache=True, **{name: cache}).logits
    assert far(after, uncached(model, ids)[:, SEEN : SEEN + 1]) < ROUNDING


@torch.no_grad()
def test_going_on_at_a_lower_depth_drops_the_deeper_passes_for_good():
    model, recursion = awake("llama", span=None)
    ids = tokens()
    _, cache = cached(model, ids[:, :SEEN])
    recursion.depth = 1
    logits = model(ids[:, SEEN : SEEN + 1], **{cache_name(model): cache}).logits
    assert far(logits, uncached(model, ids)[:, SEEN : SEEN + 1]) < ROUNDING
    assert len(cache.rr_passes) == 1
    recursion.depth = 2
    with pytest.raises(RRError, match=r"depth 1.*depth 2"):
        model(ids[:, SEEN + 1 :], **{cache_name(model): cache})


@pytest.mark.parametrize("depth", [0, 1])
@torch.no_grad()
def test_going_on_at_a_lower_depth_after_a_partial_span_is_refused(depth):
    """The layers after the span have seen another depth's states."""
    model, recursion = awake("llama", span=(1, 3))
    ids = tokens()
    _, cache = cached(model, ids[:, :SEEN])
    recursion.depth = depth
    with pytest.raises(RRError, match=f"filled at recursion depth 2; it cannot go on at depth {depth}"):
        model(ids[:, SEEN : SEEN + 1], **{cache_name(model): cache})


@every_family
@torch.no_grad()
def test_a_copy_of_a_cache_is_whole_and_independent(family):
    model, _ = awake(family)
    ids, other = tokens(), tokens(seed=1)
    _, cache = cached(model, ids[:, :SEEN])
    twin = copy.deepcopy(cache)
    assert len(twin.rr_passes) == MAX_STEPS
    assert not {id(c) for c in twin.rr_passes} & {id(c) for c in cache.rr_passes}
    branch = torch.cat([ids[:, :SEEN], other[:, SEEN:]], 1)
    assert far(one_by_one(model, branch[:, SEEN:], twin), uncached(model, branch)[:, SEEN:]) < ROUNDING
    assert far(one_by_one(model, ids[:, SEEN:], cache), uncached(model, ids)[:, SEEN:]) < ROUNDING


@torch.no_grad()
def test_a_cache_outlives_the_recursion():
    model, recursion = awake("llama")
    ids = tokens()
    _, cache = cached(model, ids[:, :SEEN])
    recursion.detach()
    cache.crop(-SEEN)
    assert caches.is_empty(cache)
    assert far(cached(model, ids, cache=cache)[0], uncached(model, ids)) < ROUNDING


def test_a_cache_is_known_by_its_type():
    class FalconCacheParams:
        pass

    assert is_cache(DynamicCache())
    assert is_cache(FalconCacheParams())
    assert not any(is_cache(value) for value in (None, True, "Cache", torch.zeros(1), {"layers": []}))
