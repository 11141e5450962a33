"""Adapters on the experts of a mixture: exact at init and in pass 0, all of them learn, and peft reads them."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.nn import functional as F

from families import build, cached, far, generate, tokens, uncached, wake
from rrcli.errors import RRError, UsageError
from rrcli.models.placement import Parallel
from rrcli.recursion.config import RecursionConfig
from rrcli.recursion.engine import attach
from rrcli.recursion.lora import add_lora, load_lora
from rrcli.services import train as service
from rrcli.settings import TrainSettings
from rrcli.training.processes import Processes

RANK, ALPHA = 2, 4
# Experts as matrices of (out, in), and of (in, out) with biases.
MIXTURES = ["qwen3_moe", "kimi_linear", "gpt_oss"]
every_mixture = pytest.mark.parametrize("family", MIXTURES)


def adapted(family: str, *, recursive: bool = True, awake: bool = True) -> Any:
    """Return a model with adapters on the experts of its second and third layer, as if they had been trained."""
    model = build(family)
    recursion = attach(model, RecursionConfig(max_steps=2, span=(1, 3))) if recursive else None
    lora = add_lora(model, RANK, ALPHA, span=(1, 3), experts=True)
    if awake:
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in lora.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        if recursion is not None:
            wake(recursion)
    return model


def on_experts(model: Any) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if ".lora_" in name and ".experts." in name]


@every_mixture
@torch.no_grad()
def test_fresh_ones_change_no_bit_and_trained_ones_only_the_later_passes(family: str) -> None:
    ids, stock = tokens(), build(family).requires_grad_(False)
    fresh = adapted(family, awake=False)
    assert {name.partition(".experts.")[2].split(".lora_")[0] for name, _ in on_experts(fresh)}
    for depth in range(3):
        fresh.recursion.depth = depth
        assert torch.equal(uncached(fresh, ids), uncached(stock, ids))
    model = adapted(family)
    bare = copy.deepcopy(model)
    bare.lora.remove()
    assert [name for name, _ in bare.named_modules()] == [name for name, _ in stock.named_modules()]
    for name, parameter in model.named_parameters():  # those on experts alone
        if ".lora_B" in name and ".experts." not in name:
            parameter.zero_()
    states, bare_states = model.recursion.passes(ids).states, bare.recursion.passes(ids).states
    assert torch.equal(states[0], bare_states[0])
    assert far(states[1], bare_states[1]) > 1e-3
    assert far(cached(model, ids)[0], uncached(model, ids)) < 1e-5
    model.recursion.depth = 0
    assert torch.equal(generate(model, ids), generate(stock, ids))


@every_mixture
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_expert_that_was_used_learns_and_nothing_else_does(family: str, checkpointing: bool) -> None:
    model, ids = adapted(family), tokens(4, 24)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
    F.cross_entropy(uncached(model, ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    for name, parameter in model.named_parameters():
        assert bool(parameter.grad is not None and parameter.grad.norm() > 0) == (".lora_" in name), name


@every_mixture
@torch.no_grad()
def test_peft_alone_loads_what_was_saved(family: str, tmp_path: Path) -> None:
    ids, vanilla = tokens(), adapted(family, recursive=False)
    vanilla.lora.save(tmp_path, "somewhere/base")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # missing and unexpected keys are warnings
        warnings.simplefilter("ignore", FutureWarning)
        theirs = PeftModel.from_pretrained(build(family), tmp_path).eval()
    ours = build(family)
    load_lora(ours, tmp_path)
    assert torch.equal(theirs(ids, use_cache=False).logits, uncached(vanilla, ids))
    assert torch.equal(uncached(ours, ids), uncached(vanilla, ids))
    assert far(uncached(vanilla, ids), uncached(build(family), ids)) > 1e-3


def test_where_there_are_no_experts_or_parts_of_them_they_are_refused() -> None:
    with pytest.raises(RRError, match="'llama' models have no experts that peft can adapt"):
        add_lora(build("llama"), RANK, ALPHA, experts=True)
    settings = TrainSettings(phase="b", lora_experts=True)
    with pytest.raises(UsageError, match="--lora-experts needs whole experts"):
        service._check_shares(settings, Processes("cpu", 0, 2, Parallel(fsdp=2)))
    service._check_shares(settings, Processes("cpu", 0, 2, Parallel(replicas=2)))
