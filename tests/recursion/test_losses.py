"""The losses against their definitions, written out with full logits of every pass."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from families import build, far, tokens, uncached, wake
from rrcli.recursion import readout as readout_module
from rrcli.recursion.batch import IGNORED, Batch
from rrcli.recursion.boundary_head import BoundaryHead
from rrcli.recursion.chunk_metrics import teacher_forced_chunks
from rrcli.recursion.config import LossWeights, RecursionConfig
from rrcli.recursion.engine import attach
from rrcli.recursion.losses import StepPlan, compute_losses, sample_windows
from rrcli.recursion.readout import Readout
from rrcli.recursion.signals import top_of

MAX_STEPS = 2
WIDTH = 4
# Every term heavy, so that a wrong one shows in the total's gradient; all positions, so that nothing is drawn.
ALL = LossWeights(final=1.0, masked=0.7, halt=0.9, ponder=0.4, stability=0.6, margin=0.02, share=1.0)
SAMPLED = ("final_ce", "masked_ce", "halt", "stability", "ponder")


def awake(family="llama", span=(1, 3)):
    model = build(family)
    return model, wake(attach(model, RecursionConfig(max_steps=MAX_STEPS, span=span)))


def batch(rows=4):
    """Return ids, a left-padding mask and labels; the first row bears 2 losses, the others 12, 9 and about half."""
    ids = tokens(rows, 12)
    mask = torch.ones_like(ids)
    mask[2, :3] = 0
    labels = tokens(rows, 12, seed=1).masked_fill(mask == 0, IGNORED)
    labels[0, :10] = IGNORED
    labels[3, ::2] = IGNORED
    return ids, mask, labels


def losses(model, data, weights=ALL, tokens_in_step=None, seed=0, depth=MAX_STEPS):
    part = Batch(*data)
    count = part.tokens if tokens_in_step is None else tokens_in_step
    sampled = sample_windows(part, width=WIDTH, share=weights.share, generator=torch.Generator().manual_seed(seed))
    # Where all positions are sampled, the step's count of them is that of its tokens.
    total = count if weights.share == 1 else int(sampled.sum())
    plan = StepPlan(depth=depth, weights=weights, chunk_width=WIDTH, tokens=count, sampled=total)
    return compute_losses(Readout(model), replace(part, sampled=sampled), plan=plan)


def naive(model, recursion, data, weights=ALL):
    """Return the losses by their definitions: every pass is a forward of its own at that depth."""
    ids, mask, labels = data
    bearing = labels.ne(IGNORED)
    targets, n = labels[bearing], int(bearing.sum())
    ce, commit, states = [], [], []
    span_end = recursion.layers[recursion.end]
    handle = span_end.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    for k in range(MAX_STEPS + 1):
        with recursion.at_depth(k):
            logits = model(ids, attention_mask=mask, use_cache=False).logits[bearing]
        ce.append(-logits.log_softmax(-1)[torch.arange(n), targets])
        commit.append(torch.sigmoid(recursion.head(states[-1].detach()[bearing], top_of(logits.detach()))))
    handle.remove()
    terms = {name: torch.zeros(()) for name in ("final_ce", "masked_ce", "halt", "ponder", "stability")}
    row = bearing.nonzero()[:, 0].tolist()
    judged, importance = [torch.zeros(()) for _ in ids], [0.0] * len(ids)
    terms["final_ce"] = ce[MAX_STEPS].sum() / n
    for k in range(MAX_STEPS):
        terms["masked_ce"] = terms["masked_ce"] + ce[k].sum() / n / MAX_STEPS
        change = ce[k + 1] - ce[k].detach()
        terms["stability"] = terms["stability"] + (change * torch.sigmoid(change)).sum() / n / MAX_STEPS
        not_yet = torch.ones(n)
        for j in range(k + 1):
            not_yet = not_yet * (1 - commit[j])
        terms["ponder"] = terms["ponder"] + not_yet.sum() / n
        for i in range(n):
            gain = float((ce[k][i] - ce[k + 1][i]).detach())
            p = commit[k][i] if gain <= weights.margin else 1 - commit[k][i]
            weight = min(abs(gain - weights.margin), 1.0)
            judged[row[i]] = judged[row[i]] - weight * p.log()
            importance[row[i]] += weight
    for r in set(row):
        terms["halt"] = terms["halt"] + judged[r] / importance[r] * row.count(r) / n
    total = sum(
        weight * terms[name]
        for name, weight in {
            "final_ce": weights.final,
            "masked_ce": weights.masked,
            "halt": weights.halt,
            "ponder": weights.ponder,
            "stability": weights.stability,
        }.items()
    )
    return total, terms, ce


def gradients(total, model, recursion):
    model.zero_grad()
    recursion.zero_grad()
    total.backward()
    named = [*model.named_parameters(), *recursion.named_parameters()]
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4 * scale + 1e-8, msg=name)


@pytest.mark.parametrize("attach_one", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_at_depth_0_the_loss_is_plain_cross_entropy(family, attach_one):
    model, recursion = awake(family)
    recursion.depth = 0
    if not attach_one:
        recursion.detach()
    ids, mask, labels = batch()
    terms = losses(model, (ids, mask, labels), tokens_in_step=50, depth=0)
    logits = model(ids, attention_mask=mask, use_cache=False).logits
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum") / 50
    torch.testing.assert_close(terms.total, expected, rtol=1e-5, atol=1e-6)
    assert set(terms.parts) == {"total", "final_ce"}
    assert terms.chunks.metrics() == {}
    torch.testing.assert_close(terms.depth_ce[0], expected.detach(), rtol=1e-5, atol=1e-6)
    assert_same(gradients(terms.total, model, recursion), gradients(expected, model, recursion))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mixtral", "qwen3_next"])
def test_at_depth_2_every_loss_is_its_definition(family):
    model, recursion = awake(family)
    data = batch()
    terms = losses(model, data)
    total, parts, ce = naive(model, recursion, data)
    assert set(terms.parts) == {"total", *parts}
    for name, value in parts.items():
        torch.testing.assert_close(terms.parts[name], value.detach(), rtol=1e-4, atol=1e-5, msg=name)
        assert not terms.parts[name].requires_grad
    torch.testing.assert_close(terms.total, total, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(terms.parts["total"], total.detach(), rtol=1e-4, atol=1e-5)
    for mean, per_token in zip(terms.depth_ce, ce, strict=True):
        torch.testing.assert_close(mean, per_token.detach().mean(), rtol=1e-4, atol=1e-5)
    assert float(terms.feedback_norm) > 0
    assert_same(gradients(terms.total, model, recursion), gradients(total, model, recursion))


@pytest.mark.parametrize("name", ["final", "masked", "halt", "ponder", "stability"])
def test_each_weight_weighs_its_own_term(name):
    model, _ = awake()
    none = dict.fromkeys(("final", "masked", "halt", "ponder", "stability"), 0.0)
    terms = losses(model, batch(), LossWeights(**(none | {name: 3.0}), share=1.0))
    part = terms.parts[{"final": "final_ce", "masked": "masked_ce"}.get(name, name)]
    torch.testing.assert_close(terms.total.detach(), 3 * part)
    assert float(part) != 0


def test_few_logits_at_a_time_change_nothing(monkeypatch):
    model, recursion = awake()
    expected = losses(model, batch())
    expected_gradients = gradients(expected.total, model, recursion)
    monkeypatch.setattr(readout_module, "LOGITS_AT_A_TIME", 97 * 5)
    found = losses(model, batch())
    for name, value in expected.parts.items():
        torch.testing.assert_close(found.parts[name], value, rtol=1e-5, atol=1e-6, msg=name)
    assert_same(gradients(found.total, model, recursion), expected_gradients)


def test_parts_of_a_batch_sum_to_the_whole():
    """Also where the parts bear very different numbers of tokens: 2 against the rest."""
    model, recursion = awake()
    ids, mask, labels = batch()
    weights = LossWeights(share=1.0)
    count = int(labels.ne(IGNORED).sum())
    whole = losses(model, (ids, mask, labels), weights)
    expected = gradients(whole.total, model, recursion)
    parts = []
    model.zero_grad()
    recursion.zero_grad()
    for rows in (slice(0, 1), slice(1, 4)):
        parts.append(losses(model, (ids[rows], mask[rows], labels[rows]), weights, tokens_in_step=count))
        parts[-1].total.backward()
    found = [*model.named_parameters(), *recursion.named_parameters()]
    for name in (*SAMPLED, "total"):
        together = sum(part.parts[name] for part in parts)
        torch.testing.assert_close(together, whole.parts[name], rtol=1e-4, atol=1e-6, msg=name)
    assert_same({name: p.grad for name, p in found if p.grad is not None}, expected)
    metrics = parts[0].chunks
    metrics.add(parts[1].chunks)
    assert metrics == whole.chunks


def test_a_part_of_a_batch_is_cut_from_all_of_its_tensors():
    ids, mask, labels = batch()
    whole = Batch(ids, mask, labels, sampled=labels.ne(IGNORED))
    part = whole.part(slice(1, 3)).to("cpu")
    assert torch.equal(part.input_ids, ids[1:3])
    assert torch.equal(part.attention_mask, mask[1:3])
    assert torch.equal(part.labels, labels[1:3])
    assert part.sampled is not None
    assert torch.equal(part.sampled, part.loss_bearing)
    assert (part.position_ids, part.examples) == (None, None)
    assert (whole.tokens, whole.positions, part.tokens) == (29, 48, 21)


@torch.no_grad()
def test_all_positions_are_sampled_unless_a_batch_says_which():
    model, _ = awake()
    part = Batch(*batch())
    plan = StepPlan(depth=MAX_STEPS, weights=ALL, chunk_width=WIDTH, tokens=part.tokens, sampled=part.tokens)
    found, expected = compute_losses(Readout(model), part, plan=plan), losses(model, batch())
    assert torch.equal(found.total, expected.total)
    assert found.chunks == expected.chunks


@torch.no_grad()
def test_neither_the_order_of_rows_nor_more_padding_changes_a_loss():
    model, _ = awake()
    ids, mask, labels = batch()
    expected = losses(model, (ids, mask, labels))
    order = torch.tensor([2, 0, 3, 1])
    padded = [F.pad(t, (0, 5), value=value) for t, value in ((ids, 7), (mask, 0), (labels, IGNORED))]
    for data in ((ids[order], mask[order], labels[order]), tuple(padded)):
        found = losses(model, data)
        for name, value in expected.parts.items():
            torch.testing.assert_close(found.parts[name], value, rtol=1e-4, atol=1e-6, msg=name)
        assert found.chunks == expected.chunks


@torch.no_grad()
def test_sampled_windows_estimate_the_whole_without_bias():
    model, _ = awake()
    data = batch()
    whole = losses(model, data)
    drawn = [losses(model, data, LossWeights(share=0.5), seed=seed) for seed in range(60)]
    assert len({float(d.parts["masked_ce"]) for d in drawn}) > 5
    for name in ("masked_ce", "ponder"):
        values = torch.stack([d.parts[name] for d in drawn])
        assert float(values.mean()) == pytest.approx(float(whole.parts[name]), rel=0.05), name
    assert all(torch.equal(d.parts["final_ce"], whole.parts["final_ce"]) for d in drawn)
    again = losses(model, data, LossWeights(share=0.5), seed=7)
    assert all(torch.equal(value, again.parts[name]) for name, value in drawn[7].parts.items())


@torch.no_grad()
def test_a_share_of_nothing_still_takes_one_window():
    model, _ = awake()
    terms = losses(model, batch(), LossWeights(share=0.0))
    assert terms.chunks.chunks == 1
    assert all(torch.isfinite(value) for value in terms.parts.values())


@torch.no_grad()
def test_the_chunk_metrics_are_those_of_every_passes_predictions():
    model, recursion = awake()
    ids, mask, labels = batch()
    terms = losses(model, (ids, mask, labels))
    bearing = labels.ne(IGNORED)
    tops, windows, number = [], [], 0
    for k in range(MAX_STEPS + 1):
        with recursion.at_depth(k):
            tops.append(top_of(model(ids, attention_mask=mask, use_cache=False).logits[bearing]))
    for row in bearing.sum(1).tolist():
        windows += [number + place // WIDTH for place in range(row)]
        number = windows[-1] + 1
    states = recursion.passes(ids, mask).states[:-1]
    commit = torch.stack(
        [recursion.head(state[bearing], top).sigmoid() for state, top in zip(states, tops, strict=False)]
    )
    predictions = torch.stack([top.prediction for top in tops])
    expected = teacher_forced_chunks(predictions, commit, labels[bearing], torch.tensor(windows))
    assert terms.chunks == expected
    assert terms.chunks.positions == int(bearing.sum())


@pytest.mark.parametrize("hidden", [32, 768])
@torch.no_grad()
def test_the_boundary_head_starts_by_going_on(hidden):
    head = BoundaryHead(hidden, torch.Generator().manual_seed(0))
    probability = torch.sigmoid(head(torch.randn(4, 50, hidden) * 10, top_of(torch.randn(4, 50, 97) * 5)))
    assert probability.shape == (4, 50)
    assert float(probability.min()) > 0.04
    assert float(probability.max()) < 0.06
    # Written as the bias is: P = 0.05.
    assert float(probability.mean()) == pytest.approx(0.05, abs=0.002)


def test_the_heads_losses_reach_only_the_head():
    model, recursion = awake()
    terms = losses(model, batch(), LossWeights(final=0.0, masked=0.0, stability=0.0, halt=1.0, ponder=1.0, share=1.0))
    terms.total.backward()
    reached = {name for name, p in recursion.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {"head.norm.weight", "head.score.weight", "head.score.bias", "head.sure.weight"}
    assert not any(p.grad is not None and p.grad.any() for p in model.parameters())


def test_the_other_losses_leave_the_head_alone():
    model, recursion = awake()
    losses(model, batch(), LossWeights(halt=0.0, ponder=0.0, share=1.0)).total.backward()
    assert not any(p.grad is not None and p.grad.any() for p in recursion.head.parameters())
    assert all(p.grad is not None and p.grad.any() for p in recursion.cell.parameters())


def test_ponder_teaches_the_head_to_commit_and_halt_follows_its_labels():
    model, recursion = awake()
    before = losses(model, batch())
    none = dict.fromkeys(("final", "masked", "halt", "ponder", "stability"), 0.0)
    for name in ("ponder", "halt"):
        recursion.zero_grad()
        losses(model, batch(), LossWeights(**(none | {name: 1.0}), share=1.0)).total.backward()
        with torch.no_grad():
            for p in recursion.head.parameters():
                p -= 0.1 * p.grad
        assert float(losses(model, batch()).parts[name]) < float(before.parts[name])


def test_a_frozen_base_still_teaches_the_sidecar():
    model, recursion = awake()
    model.requires_grad_(False)
    stock = uncached(build("llama"), tokens())
    terms = losses(model, batch())
    terms.total.backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None and p.grad.any() for p in recursion.parameters())
    torch.optim.SGD(recursion.parameters(), lr=1.0).step()
    recursion.depth = 0
    assert torch.equal(uncached(model, tokens()), stock)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_next"])
def test_a_frozen_base_and_gradient_checkpointing_give_the_same_gradients(family):
    found = []
    for on in (False, True):
        model, recursion = awake(family)
        model.requires_grad_(False)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if on:
            model.activation_checkpointing_enable()
        model.train()
        found.append(gradients(losses(model, batch()).total, model, recursion))
    assert_same(found[1], found[0])


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mixtral", "mamba2"])
def test_losses_in_bfloat16_are_finite_and_near_those_in_fp32(family):
    model, recursion = awake(family)
    exact = losses(model, batch())
    model.bfloat16()
    recursion.bfloat16()
    terms = losses(model, batch())
    terms.total.backward()
    assert terms.total.dtype == torch.float32
    assert float(terms.parts["final_ce"]) == pytest.approx(float(exact.parts["final_ce"]), rel=0.05)
    assert torch.isfinite(recursion.cell.w_out.weight.grad).all()


def test_a_zero_recursion_gains_nothing_and_is_labelled_so():
    """At zero-init every pass is pass 0, so no position gains and the head's label is 1 everywhere."""
    model = build("llama")
    recursion = attach(model, RecursionConfig(max_steps=MAX_STEPS))
    terms = losses(model, batch())
    assert far(terms.parts["masked_ce"], terms.parts["final_ce"]) < 1e-6
    assert float(terms.parts["stability"]) == pytest.approx(0, abs=1e-6)
    assert float(terms.parts["halt"]) == pytest.approx(3.0, abs=0.05)  # -ln 0.05 = 2.996
    assert float(terms.parts["ponder"]) == pytest.approx(0.95 + 0.95**2, abs=0.01)
    assert float(terms.feedback_norm) == 0
    metrics = terms.chunks.metrics()
    assert metrics["stability@1"] == metrics["stability@2"] == metrics["commit_rate"] == 1
    terms.total.backward()
    assert recursion.cell.w_out.weight.grad.any()
