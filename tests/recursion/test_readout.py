"""A readout taken apart is the model: for every family and every pass."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from families import FAMILIES, build, far, tokens, uncached, wake
from rrcli.errors import RRError
from rrcli.recursion import readout as module
from rrcli.recursion import tiles
from rrcli.recursion.config import RecursionConfig
from rrcli.recursion.engine import attach
from rrcli.recursion.readout import Readout

MAX_STEPS = 2
VOCABULARY = 97

every_family = pytest.mark.parametrize("family", FAMILIES)


def awake(family, span=(1, 3), **changes):
    model = build(family, **changes)
    return model, wake(attach(model, RecursionConfig(max_steps=MAX_STEPS, span=span)))


@pytest.mark.parametrize("span", [None, (1, 3)], ids=["full", "partial"])
@every_family
@torch.no_grad()
def test_the_readout_of_pass_k_is_the_model_at_depth_k(family, span):
    model, recursion = awake(family, span)
    readout, ids = Readout(model), tokens()
    mask = torch.ones_like(ids)
    passes = readout.passes(ids, mask)
    for k, hidden in enumerate(passes.hidden):
        logits = readout.logits(hidden.flatten(0, 1)).unflatten(0, ids.shape)
        assert recursion.depth == MAX_STEPS
        with recursion.at_depth(k):
            assert far(logits, uncached(model, ids)) < 1e-5


@every_family
@torch.no_grad()
def test_a_model_without_a_recursion_has_pass_0_only(family):
    model, ids = build(family), tokens()
    readout = Readout(model)
    passes = readout.passes(ids, torch.ones_like(ids))
    assert (len(passes.hidden), passes.states) == (1, [])
    assert far(readout.logits(passes.hidden[0].flatten(0, 1)).unflatten(0, ids.shape), uncached(model, ids)) < 1e-5


@pytest.mark.parametrize("way", ["tiles", "rows", "plain"])
@every_family
@torch.no_grad()
def test_every_way_scores_every_pass_like_plain_logits(family, way, monkeypatch):
    monkeypatch.setattr(tiles, "ROWS", 5)
    monkeypatch.setattr(tiles, "COLUMNS", {"cpu": 16})
    model, recursion = awake(family)
    readout, ids = Readout(model), tokens()
    mask = torch.ones_like(ids)
    assert readout.choose_way(ids, mask) is None
    assert readout.way == "tiles"
    readout.way = way
    scored = torch.ones_like(ids, dtype=torch.bool)
    scored[:, -1] = scored[1, :4] = False
    scores = readout.score(ids, mask, scored, targets=ids.roll(-1, 1)[scored])
    assert len(scores.losses) == MAX_STEPS + 1
    for k, (losses, predictions) in enumerate(zip(scores.losses, scores.predictions, strict=True)):
        with recursion.at_depth(k):
            logits = uncached(model, ids)[scored]
        expected = F.cross_entropy(logits, ids.roll(-1, 1)[scored], reduction="none")
        torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(predictions, logits.argmax(-1))
    states = recursion.passes(ids, mask).states
    torch.testing.assert_close(torch.stack(scores.states), torch.stack([state[scored] for state in states]))


@every_family
def test_padding_on_the_right_changes_no_score(family):
    """No mask is passed on for it, as nothing looks there."""
    padding_changes_no_score(family, "right")


def test_padding_on_the_left_changes_no_score():
    """Here a mask has to be passed on; one family shows that it is."""
    padding_changes_no_score("llama", "left")


@torch.no_grad()
def padding_changes_no_score(family, side):
    model, _ = awake(family)
    readout, ids = Readout(model), tokens()
    short = ids[1, : ids.shape[1] - 4]
    padding = ids[0, :4]  # real tokens, which would be heard if anything listened
    mask = torch.ones_like(ids)
    mask[1, slice(-4, None) if side == "right" else slice(4)] = 0
    both = torch.stack([ids[0], torch.cat([short, padding] if side == "right" else [padding, short])])
    targets = both.roll(-1, 1)
    scored = mask.bool() & mask.bool().roll(-1, 1)
    scored[:, -1] = False
    found = readout.score(both, mask, scored, targets=targets[scored])
    alone = []
    for row in (ids[0], short):
        where = torch.arange(len(row))[None] < len(row) - 1
        alone.append(readout.score(row[None], torch.ones_like(row[None]), where, targets=row[1:]))
    expected = torch.cat([scores.losses for scores in alone], dim=1)
    torch.testing.assert_close(found.losses, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changes", [{"word_embed_proj_dim": 16}, {"do_layer_norm_before": False}])
@torch.no_grad()
def test_variants_of_opt_have_other_tails(changes):
    model, recursion = awake("opt", **changes)
    ids = tokens()
    for depth in range(MAX_STEPS + 1):
        with recursion.at_depth(depth):
            assert Readout(model).choose_way(ids, torch.ones_like(ids)) is None


@torch.no_grad()
def test_padding_is_passed_on():
    model, _ = awake("llama")
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    assert Readout(model).choose_way(ids, mask) is None
    passes = Readout(model).passes(ids, mask)
    expected = uncached(model, ids, mask)
    assert far(Readout(model).logits(passes.hidden[-1][1, 4:]), expected[1, 4:]) < 1e-5


def whole_row(logits):
    return logits / logits.amax(-1, keepdim=True)


@pytest.mark.parametrize("lies", ["tiles", "rows"])
@torch.no_grad()
def test_a_way_that_gives_other_numbers_is_given_up(lies, monkeypatch):
    model, recursion = awake("llama")
    monkeypatch.setattr(tiles, "COLUMNS", {"cpu": 16})
    readout, ids = Readout(model), tokens()
    mask = torch.ones_like(ids)
    if lies == "tiles":  # what only whole rows tell
        model.lm_head.register_forward_hook(lambda _, __, logits: whole_row(logits))
    else:
        logits = readout.logits
        monkeypatch.setattr(readout, "logits", lambda rows: logits(rows) * 1.01)
    warning = readout.choose_way(ids, mask)
    assert "'llama' model differ when they are taken apart" in warning
    assert readout.way == ("rows" if lies == "tiles" else "plain")
    scored = mask.bool()
    scores = readout.score(ids, mask, scored, targets=ids.flatten())
    for k in range(MAX_STEPS + 1):
        with recursion.at_depth(k):
            expected = F.cross_entropy(uncached(model, ids)[scored], ids.flatten(), reduction="none")
        torch.testing.assert_close(scores.losses[k], expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_family_that_cannot_be_taken_apart_is_scored_by_its_plain_forward(monkeypatch):
    model, _ = awake("llama")
    readout, ids = Readout(model), tokens()

    def refuse(rows):
        raise TypeError("this family's forward looks at its backbone's cache")

    monkeypatch.setattr(readout, "logits", refuse)
    assert "plain forward" in readout.choose_way(ids, torch.ones_like(ids))
    assert readout.way == "plain"


@torch.no_grad()
def test_logits_that_are_not_finite_are_refused():
    model, _ = awake("llama")
    model.lm_head.weight[3] = torch.nan
    ids = tokens()
    with pytest.raises(RRError, match="are not finite"):
        Readout(model).choose_way(ids, torch.ones_like(ids))


@torch.no_grad()
def test_only_a_bounded_piece_of_a_batch_is_compared(monkeypatch):
    monkeypatch.setattr(module, "CHECKED", (2, 6))
    model, _ = awake("llama")
    readout, ids, shapes = Readout(model), tokens(8, 9), []
    plain = readout._plain_logits
    monkeypatch.setattr(readout, "_plain_logits", lambda *a: shapes.append(a[0].shape) or plain(*a))
    readout.choose_way(ids, torch.ones_like(ids))
    readout.choose_way(ids[:1, :4], torch.ones(1, 4, dtype=torch.long))
    assert set(shapes) == {(2, 6), (1, 4)}


@torch.no_grad()
def test_the_backbone_is_put_back_whatever_happens():
    model, recursion = awake("llama")
    readout, rows = Readout(model), torch.randn(3, 32)
    readout.logits(rows)
    assert "forward" not in model.model.__dict__

    def own(*args, **kwargs):
        return type(model.model).forward(model.model, *args, **kwargs)

    model.model.forward = own
    with pytest.raises(RuntimeError):
        readout.logits(torch.randn(3, 31))
    assert model.model.forward is own
    assert recursion.depth == MAX_STEPS


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere2", "gpt2", "mixtral", "mamba2"])
@pytest.mark.parametrize("at_a_time", [1, 4, 7, 100])
def test_token_losses_in_chunks_are_plain_cross_entropy(family, at_a_time, monkeypatch):
    monkeypatch.setattr(module, "LOGITS_AT_A_TIME", at_a_time * VOCABULARY + 5)
    model, recursion = awake(family)
    readout, ids = Readout(model), tokens()
    sizes, logits = [], readout.logits
    monkeypatch.setattr(readout, "logits", lambda rows: sizes.append(len(rows)) or logits(rows))
    targets = ids.roll(-1, 1).flatten()
    upstream = torch.randn(len(targets))

    def gradients(loss):
        model.zero_grad()
        recursion.zero_grad()
        (loss * upstream).sum().backward()
        named = [*model.named_parameters(), *recursion.cell.named_parameters()]
        return {name: p.grad.clone() for name, p in named if p.grad is not None}

    whole = uncached(model, ids).flatten(0, 1).float()
    naive = F.cross_entropy(whole, targets, reduction="none")
    expected = gradients(naive)
    hidden = readout.passes(ids, torch.ones_like(ids)).hidden[-1].flatten(0, 1)
    losses, top = readout.token_losses(hidden, targets)
    found = gradients(losses)

    assert max(sizes) <= at_a_time
    torch.testing.assert_close(losses, naive, rtol=1e-5, atol=1e-5)
    assert torch.equal(top.prediction, whole.argmax(-1))
    best = whole.detach().softmax(-1).topk(2, dim=-1).values
    torch.testing.assert_close(top.probability, best[:, 0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(top.margin, best[:, 0] - best[:, 1], rtol=1e-3, atol=1e-6)
    assert not any(value.requires_grad for value in top)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()), msg=name)
    with torch.no_grad():
        again, _ = readout.token_losses(hidden, targets)
    torch.testing.assert_close(again, naive, rtol=1e-5, atol=1e-5)


def test_token_losses_are_fp32_whatever_the_model_is():
    model, _ = awake("llama")
    readout = Readout(model.bfloat16())
    losses, _ = readout.token_losses(torch.randn(5, 32, dtype=torch.bfloat16), torch.arange(5))
    assert losses.dtype == torch.float32


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "mamba2"])
def test_no_rows_have_no_losses(family):
    model, _ = awake(family)
    losses, top = Readout(model).token_losses(torch.zeros(0, 32), torch.zeros(0, dtype=torch.long))
    assert losses.shape == top.prediction.shape == top.margin.shape == (0,)
