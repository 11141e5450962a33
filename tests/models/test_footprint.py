"""What a skeleton says of memory and FLOPs, against the model itself: real steps, optimisers and caches."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import rrcli
from families import build, cache_name, tokens, wake
from operating import skeleton_of
from rrcli.models import footprint
from rrcli.models.costs import decode_one, held_bytes
from rrcli.models.ledger import ACTIVATIONS, GRADIENTS, LOGITS, Ledger
from rrcli.recursion.batch import Batch
from rrcli.recursion.config import LossWeights
from rrcli.recursion.flops import counted_flops
from rrcli.recursion.lora import add_lora
from rrcli.recursion.losses import StepPlan, compute_losses
from rrcli.recursion.readout import Readout
from rrcli.settings import TrainSettings
from rrcli.training.optimizer import Optimizer, prepare_parameters
from tiny_configs import VOCABULARY

ROWS, LENGTH = 3, 24
FAMILIES = ("llama", "gemma2", "qwen3_moe", "mamba2", "falcon_h1", "deepseek_v3")
CONFIG = rrcli.RecursionConfig(max_steps=2)
RANK, ALPHA = 4, 8


@dataclass(frozen=True)
class Real:
    """What a real step on a CPU took: FLOPs, bytes, and the parameters that train."""

    flops: int
    peak: int
    gradients: int
    optimiser: int
    trained: int
    parameters: int
    weights: int


def really(
    family: str, phase: str, depth: int, dtype: torch.dtype = torch.float32, *, checkpoint: bool = False
) -> Real:
    """Take two steps as `rr train` does, and keep account of the tensors of the second one."""
    model = build(family).to(dtype)
    if depth:
        wake(rrcli.attach(model, CONFIG))
    if phase == "b":
        add_lora(model, RANK, ALPHA)
    settings = TrainSettings(phase=phase)
    optimizer = Optimizer(model, settings, prepare_parameters(model, settings))
    if checkpoint:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    ids = tokens(ROWS, LENGTH)
    batch = Batch(ids, torch.ones_like(ids), ids.roll(-1, 1), sampled=torch.ones_like(ids).bool())
    plan = StepPlan(depth=depth, weights=LossWeights(), chunk_width=4, tokens=ids.numel(), sampled=ids.numel())
    given = [ids, batch.attention_mask, batch.labels, batch.sampled]
    parts = [model, *([model.recursion] if depth else [])]
    known = [tensor for part in parts for tensor in (*part.parameters(), *part.buffers())]
    for step in range(2):
        ledger = Ledger([*known, *given], VOCABULARY)
        hooks = [p.register_post_accumulate_grad_hook(ledger.mark_gradient) for p in optimizer.trained.values()]
        low = torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False)
        with ledger:
            with low if dtype != torch.float32 else nullcontext():
                loss = compute_losses(Readout(model), batch, plan=plan).total
            loss.backward()
        for hook in hooks:
            hook.remove()
        gradients = sum(p.grad.numel() * p.grad.element_size() for p in optimizer.parameters())
        optimizer.step(step)
    return Real(
        flops=ledger.checked(),
        peak=sum(ledger.peak.values()),
        gradients=gradients,
        optimiser=sum(t.numel() * t.element_size() for t in optimizer.state().values()),
        trained=sum(p.numel() for p in optimizer.trained.values()),
        parameters=sum(p.numel() for part in parts for p in part.parameters()),
        weights=sum(t.numel() * t.element_size() for t in known),
    )


def predicted(
    family: str, phase: str, depth: int, dtype: torch.dtype = torch.float32, *, checkpoint: bool = False
) -> tuple[footprint.Weights, footprint.Use]:
    model = skeleton_of(family).to(dtype)
    trained = footprint.operate(model, recursion=CONFIG if depth else None, phase=phase, lora=(RANK, ALPHA))
    if checkpoint:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    use = footprint.training_step(
        model, trained, rows=ROWS, length=LENGTH, depth=depth, share=1.0, device="cpu", autocast=dtype != torch.float32
    )
    return footprint.weights_of(model, trained), use


def compare(found: tuple[footprint.Weights, footprint.Use], real: Real) -> None:
    weights, use = found
    assert use.uncounted == ()
    assert use.flops == real.flops
    assert weights.gradients == real.gradients
    assert weights.optimiser == real.optimiser
    assert (weights.trained, weights.parameters) == (real.trained, real.parameters)
    assert weights.base + weights.sidecar + weights.adapters == real.weights
    assert weights.gradients + use.activations + use.logits == pytest.approx(real.peak, rel=0.02)


@pytest.mark.parametrize(("phase", "depth"), [("a", 2), ("b", 0), ("b", 1), ("c", 0), ("c", 2)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_step_takes_what_its_skeleton_says(family: str, phase: str, depth: int) -> None:
    compare(predicted(family, phase, depth), really(family, phase, depth))


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("phase", ["b", "c"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_bfloat16_and_recomputed_activations(family: str, phase: str, checkpoint: bool) -> None:
    """Weights that train are in fp32, the others in bfloat16; products are computed in bfloat16."""
    found = predicted(family, phase, 2, torch.bfloat16, checkpoint=checkpoint)
    compare(found, really(family, phase, 2, torch.bfloat16, checkpoint=checkpoint))


def test_recomputing_activations_saves_memory_and_costs_flops() -> None:
    (_, kept), (_, again) = (predicted("llama", "c", 2, checkpoint=checkpoint) for checkpoint in (False, True))
    assert again.activations < kept.activations / 2
    assert again.flops > 1.2 * kept.flops


def test_gradients_of_an_earlier_part_are_there() -> None:
    model = skeleton_of("llama")
    trained = footprint.operate(model, recursion=None, phase="c")
    options: dict[str, Any] = {"rows": 8, "length": 24, "depth": 0, "share": 1.0, "device": "cpu", "autocast": False}
    first = footprint.training_step(model, trained, **options)
    later = footprint.training_step(model, trained, **options, accumulates=True)
    gradients = footprint.weights_of(model, trained).gradients
    # The first part holds most when its forward ends, before there is a gradient; `activations` leave gradients out.
    assert later.activations + later.logits == pytest.approx(first.activations + first.logits + gradients, rel=0.05)


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_caches_and_flops_of_a_token_after_a_long_prompt(family: str, depth: int) -> None:
    """With full sliding windows, latent caches, recurrent states, and two rows."""
    model = build(family)
    recursion = wake(rrcli.attach(model, CONFIG))
    name, ids = cache_name(model), tokens(2, 20)
    with recursion.at_depth(depth):
        cache = getattr(model(input_ids=ids[:, :-1], use_cache=True), name)
        before = held_bytes(cache, set())
        with counted_flops() as counter:
            model(input_ids=ids[:, -1:], use_cache=True, **{name: cache})
    skeleton = skeleton_of(family)
    footprint.operate(skeleton, recursion=CONFIG)
    found = decode_one(skeleton, 2, 19)
    held = held_bytes(cache, set())
    assert (found.held[depth], found.growth[depth], found.flops[depth]) == (held, held - before, counter.checked())


@pytest.mark.parametrize("family", FAMILIES)
def test_scoring_takes_the_flops_that_its_skeleton_says(family: str) -> None:
    model, ids = build(family), tokens(ROWS, LENGTH)
    wake(rrcli.attach(model, CONFIG))
    scored = torch.ones_like(ids).bool()
    with counted_flops() as counter:
        Readout(model).score(ids, torch.ones_like(ids), scored, targets=ids.flatten(), depth=2)
    skeleton = skeleton_of(family)
    footprint.operate(skeleton, recursion=CONFIG)
    found = footprint.scored_batch(skeleton, rows=ROWS, length=LENGTH, depth=2, device="cpu")
    assert found.flops == pytest.approx(counter.checked(), rel=0.02)


def test_a_prompt_holds_its_cache_and_its_activations() -> None:
    found = {}
    for length in (16, 32):
        model = skeleton_of("llama")
        footprint.operate(model, recursion=CONFIG)
        found[length] = footprint.prompted(model, rows=2, length=length, depth=2, device="cpu")
    assert found[32].activations == pytest.approx(2 * found[16].activations, rel=0.1)
    assert found[32].logits == found[16].logits  # those of the last position alone


# -- the ledger --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_ledger_enters_what_is_made_and_strikes_out_what_is_gone(device: str) -> None:
    rows = torch.zeros(10, 4, device=device)
    layer = nn.Linear(4, 8, bias=False, device=device)
    ledger = Ledger([rows, layer.weight], vocabulary=8)
    layer.weight.register_post_accumulate_grad_hook(ledger.mark_gradient)
    with ledger:
        twice = rows * 2
        assert ledger.held == {ACTIVATIONS: 160}
        logits = layer(twice)
        assert ledger.held == {ACTIVATIONS: 160, LOGITS: 320}
        view = logits[:3]
        del logits
        assert ledger.held[LOGITS] == 320  # the view holds all of it
        view.sum().backward()
        del view
        assert ledger.held[LOGITS] == 0
        assert ledger.held[GRADIENTS] == 4 * 32
        del twice
    assert sum(ledger.held.values()) == 4 * 32
    assert sum(ledger.peak.values()) > 160 + 320


def test_a_family_that_asks_for_values_is_refused_rather_than_guessed() -> None:
    with pytest.raises(RuntimeError, match="item"), Ledger([], vocabulary=8):
        torch.zeros(3, device="meta").sum().item()
