"""What attaching a recursion must and must not change, on every family, with a full and a partial span."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from families import (
    FAMILIES,
    MAX_STEPS,
    ROUNDING,
    SPANS,
    attached,
    build,
    cached,
    far,
    generate,
    limit,
    tokens,
    uncached,
    wake,
)
from rrcli.recursion.config import RecursionConfig
from rrcli.recursion.engine import attach, self_check

every_family = pytest.mark.parametrize("family", FAMILIES)
every_span = pytest.mark.parametrize("span", SPANS, ids=["full", "partial"])


@every_span
@every_family
@torch.no_grad()
def test_a_fresh_recursion_changes_no_bit(family, span):
    stock, ids = build(family), tokens()
    plain, stepwise, text = uncached(stock, ids), cached(stock, ids)[0], generate(stock, ids)
    model, recursion = attached(family, span, awake=False)
    assert recursion.depth == MAX_STEPS
    for depth in range(MAX_STEPS + 1):
        recursion.depth = depth
        assert torch.equal(uncached(model, ids), plain)
        assert torch.equal(cached(model, ids)[0], stepwise)
        assert torch.equal(generate(model, ids), text)
    self_check(recursion)


@every_span
@every_family
@torch.no_grad()
def test_depth_0_is_the_stock_model_whatever_the_sidecar_holds(family, span):
    stock, ids = build(family), tokens()
    model, recursion = attached(family, span)
    assert far(uncached(model, ids), uncached(stock, ids)) > 0.01
    recursion.depth = 0
    assert torch.equal(uncached(model, ids), uncached(stock, ids))
    assert torch.equal(cached(model, ids)[0], cached(stock, ids)[0])
    assert torch.equal(generate(model, ids), generate(stock, ids))
    assert torch.equal(recursion.passes(ids).hidden[0], recursion.backbone(ids, use_cache=False).last_hidden_state)


@every_span
@every_family
@torch.no_grad()
def test_cached_and_uncached_logits_agree(family, span):
    model, recursion = attached(family, span)
    ids = tokens()
    for depth in range(MAX_STEPS + 1):
        recursion.depth = depth
        assert far(cached(model, ids)[0], uncached(model, ids)) < limit(model, ids)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "gemma4_text", "olmo2", "gpt2", "bloom", "lfm2"])
@torch.no_grad()
def test_what_differs_between_cached_and_uncached_is_rounding(family):
    # Families that compute in double precision when their weights are: there nothing is left of the difference.
    model, recursion = attached(family)
    model, ids = model.double(), tokens()
    recursion.double()
    assert far(cached(model, ids)[0], uncached(model, ids)) < 1e-12


@every_family
@torch.no_grad()
def test_left_padding_leaves_the_real_positions_alone(family):
    model, recursion = attached(family, span=(1, 3))
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    real = mask.bool()
    for depth in (0, MAX_STEPS):
        recursion.depth = depth
        padded = uncached(model, ids, mask)
        assert far(cached(model, ids, mask=mask)[0][real], padded[real]) < ROUNDING
        assert far(padded[0], uncached(model, ids[:1])[0]) < ROUNDING
        assert far(padded[1, 3:], uncached(model, ids[1:, 3:])[0]) < ROUNDING


@every_family
@torch.no_grad()
def test_nothing_leaks_from_the_future(family):
    model, _ = attached(family)
    ids, place = tokens(), 6
    other = ids.clone()
    other[:, place] = (other[:, place] + 7) % 90 + 3
    a, b = uncached(model, ids), uncached(model, other)
    assert far(a[:, :place], b[:, :place]) < ROUNDING
    assert far(a[:, place:], b[:, place:]) > 1e-3


@every_span
@every_family
def test_one_backward_reaches_the_output_projection_and_one_step_changes_depth_1(family, span):
    model, recursion = attached(family, span, awake=False)
    ids = tokens()
    model.requires_grad_(False)
    stock = uncached(model, ids)
    logits = uncached(model, ids)
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    gradient = recursion.cell.w_out.weight.grad
    assert gradient is not None
    assert float(gradient.norm()) > 0
    torch.optim.SGD(recursion.parameters(), lr=1.0).step()
    with torch.no_grad():
        recursion.depth = 0
        assert torch.equal(uncached(model, ids), stock)
        recursion.depth = 1
        assert not torch.equal(uncached(model, ids), stock)


@pytest.mark.parametrize("recorded_before", [False, True])
@every_span
@every_family
@torch.no_grad()
def test_hidden_states_are_as_many_as_stock_and_of_the_models_own_forward(family, span, recorded_before):
    stock, ids = build(family), tokens()
    model = build(family)
    if recorded_before:  # then the recorder's hooks stand before ours
        model(ids, output_hidden_states=True)
    recursion = wake(attach(model, RecursionConfig(max_steps=MAX_STEPS, span=span)))
    plain, output = (m(ids, output_hidden_states=True, use_cache=False) for m in (stock, model))
    assert torch.equal(output.logits, uncached(model, ids))
    ours, theirs = output.hidden_states, plain.hidden_states
    assert len(ours) == len(theirs) == 5
    inside = recursion.end if family != "mamba2" else recursion.end - 1  # whose list has no input of layer 0
    assert all(torch.equal(a, b) for a, b in zip(ours[:inside], theirs[:inside], strict=True))
    assert all(far(a, b) > 1e-3 for a, b in zip(ours[recursion.end :], theirs[recursion.end :], strict=True))
    passes = recursion.passes(ids)
    assert torch.equal(ours[-1], passes.hidden[-1])
    if recursion.end < 4 and family != "mamba2":
        assert torch.equal(ours[recursion.end], passes.states[-1])


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2", "bloom", "qwen3_next", "gpt_oss", "opt"])
@torch.no_grad()
def test_attentions_and_router_logits_are_as_many_as_stock(family):
    stock, (model, _), ids = build(family), attached(family), tokens()
    for m in (stock, model):
        m.set_attn_implementation("eager")
    mixture = {"output_router_logits": True} if family in ("mixtral", "qwen3_next", "gpt_oss") else {}
    plain, output = (m(ids, output_attentions=True, use_cache=False, **mixture) for m in (stock, model))
    for name in ("attentions", "router_logits") if mixture else ("attentions",):
        assert len(output[name]) == len(plain[name])
        assert all(torch.equal(a, b) for a, b in zip(output[name], plain[name], strict=True))


@every_family
@torch.no_grad()
def test_bfloat16(family):
    stock, ids = build(family).bfloat16(), tokens()
    plain, text = uncached(stock, ids), generate(stock, ids)
    recursion = attach(stock, RecursionConfig(max_steps=MAX_STEPS))
    assert {p.dtype for p in recursion.parameters()} == {torch.bfloat16}
    for depth in range(1, MAX_STEPS + 1):
        recursion.depth = depth
        assert torch.equal(uncached(stock, ids), plain)
    assert torch.equal(generate(stock, ids), text)
    wake(recursion)
    awake = uncached(stock, ids)
    assert awake.dtype == plain.dtype
    assert torch.isfinite(awake).all()
    assert not torch.equal(awake, plain)
    recursion.depth = 0
    assert torch.equal(uncached(stock, ids), plain)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "bloom", "gpt_neox", "mixtral", "lfm2", "mamba2"])
def test_gradient_checkpointing_gives_the_same_gradients(family):
    gradients = []
    for on in (False, True):
        model, recursion = attached(family, span=(1, 3))
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if on:
            model.activation_checkpointing_enable()
        model.train()
        ids = tokens()
        model(ids, labels=ids).loss.backward()
        named = [*model.named_parameters(), *recursion.cell.named_parameters()]
        gradients.append({name: p.grad for name, p in named if p.grad is not None})
    plain, checkpointed = gradients
    assert plain.keys() == checkpointed.keys()
    assert "w_out.weight" in plain
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_forwards_then_one_backward_give_the_sum_of_their_gradients(checkpointing):
    def gradients(depths_at_once):
        model, recursion = attached("llama")
        if checkpointing:
            model.activation_checkpointing_enable()
            model.train()
        for group in depths_at_once:
            losses = []
            for depth in group:
                with recursion.at_depth(depth):
                    losses.append(model(tokens(seed=depth), labels=tokens(seed=depth), use_cache=False).loss)
            sum(losses).backward()
        return [p.grad for p in (*recursion.cell.parameters(), *model.parameters())]

    for together, apart in zip(gradients([[2, 1, 0]]), gradients([[2], [1], [0]]), strict=True):
        torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-7)


def test_a_failing_forward_leaves_no_trace():
    model, recursion = attached("llama")
    ids = tokens()
    plain = uncached(model, ids)

    def fail(*_):
        raise RuntimeError("on purpose")

    for module in (model.model.norm, model.model.layers[0], model.model.layers[2].mlp):
        handle = module.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            uncached(model, ids)
        with pytest.raises(RuntimeError, match="on purpose"):
            recursion.passes(ids)
        handle.remove()
        assert torch.equal(uncached(model, ids), plain)


@every_family
@torch.no_grad()
def test_passes_end_in_the_backbones_own_output(family):
    _, recursion = attached(family, span=(1, 3))
    ids = tokens()
    for depth in range(MAX_STEPS + 1):
        recursion.depth = depth
        passes = recursion.passes(ids, torch.ones_like(ids))
        assert len(passes.states) == len(passes.hidden) == depth + 1
        assert all(state.shape == (*ids.shape, 32) for state in (*passes.states, *passes.hidden))
        final = recursion.backbone(ids, attention_mask=torch.ones_like(ids), use_cache=False).last_hidden_state
        assert torch.equal(passes.hidden[-1], final)
        assert (float(passes.feedback_norm) > 0) == (depth > 0)


@torch.no_grad()
def test_a_zero_feedback_shows_in_its_norm():
    _, recursion = attached("llama", awake=False)
    assert float(recursion.passes(tokens()).feedback_norm) == 0


@torch.no_grad()
def test_pass_k_is_the_span_run_on_its_input_plus_the_feedback():
    """The definition, written out by hand for one family."""
    model, recursion = attached("llama", span=(1, 3))
    ids = tokens()
    seen = {}

    def note(_, args, kwargs):
        seen.setdefault("call", (args[0], kwargs))

    handle = model.model.layers[1].register_forward_pre_hook(note, with_kwargs=True)
    passes = recursion.passes(ids)
    handle.remove()
    entry, kwargs = seen["call"]
    cell = recursion.cell
    with recursion.at_depth(0):
        hidden = entry
        for layer in model.model.layers[1:3]:
            hidden = layer(hidden, **kwargs)
        assert torch.equal(hidden, passes.states[0])
        for step in (1, 2):
            normed = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-6) * cell.norm.weight
            inner = F.silu(normed @ cell.w_in.weight.T + cell.step.weight[step - 1])
            hidden = entry + inner @ cell.w_out.weight.T
            for layer in model.model.layers[1:3]:
                hidden = layer(hidden, **kwargs)
            assert far(passes.states[step], hidden) < 1e-5
        assert far(passes.hidden[-1], model.model.norm(model.model.layers[3](hidden, **kwargs))) < 1e-5


def test_only_the_output_projection_starts_at_zero():
    _, recursion = attached("llama", awake=False)
    zero = [name for name, p in recursion.named_parameters() if not p.any()]
    assert zero == ["cell.w_out.weight"]
    twin = attached("llama", awake=False)[1]
    for (name, a), (_, b) in zip(recursion.named_parameters(), twin.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_the_sidecar_holds_none_of_the_models_parameters_and_the_reverse():
    model, recursion = attached("llama")
    own = {id(p) for p in recursion.parameters()}
    assert not own & {id(p) for p in model.parameters()}
    assert set(recursion.state_dict()) == {
        "cell.norm.weight",
        "cell.w_in.weight",
        "cell.step.weight",
        "cell.w_out.weight",
        "head.norm.weight",
        "head.score.weight",
        "head.score.bias",
        "head.sure.weight",
    }
