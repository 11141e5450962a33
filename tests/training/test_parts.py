"""Models of which two processes hold a part each: the same logits, texts and gradients as the whole model's."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from families import NO_DRIVER, build, tokens, wake
from rrcli.demo.defaults import MODEL_DIR
from rrcli.models.loading import load
from rrcli.models.placement import Parallel, Placement
from rrcli.recursion.config import RecursionConfig
from rrcli.recursion.engine import attach
from rrcli.recursion.parts import in_parts
from rrcli.recursion.readout import Readout
from rrcli.training.launching import launch
from rrcli.training.processes import join

pytestmark = pytest.mark.skipif(NO_DRIVER, reason="a torch for CUDA does not shard on a CPU")

# What is to be equal bit for bit, and what up to the order of sums: under tp and ep, products are sums over processes.
EXACT, CLOSE = 0.0, 2e-6
CASES = [
    ("llama", Parallel(fsdp=2), EXACT),
    ("kimi_linear", Parallel(fsdp=2), EXACT),
    ("falcon_h1", Parallel(fsdp=2), EXACT),
    ("gpt2", Parallel(fsdp=2), EXACT),
    ("llama", Parallel(tp=2), CLOSE),
    ("qwen3_moe", Parallel(fsdp=2), EXACT),
    ("qwen3_moe", Parallel(fsdp=2, ep=2), CLOSE),
    ("qwen3_moe", Parallel(tp=2, ep=2), CLOSE),
]
NAMES = [f"{family}-{parallel}" for family, parallel, _ in CASES]


def losses_of(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, float, list[torch.Tensor]]:
    """Return the scores of all passes, and the loss and the sidecar's gradients of a training step."""
    readout, mask = Readout(model), torch.ones_like(ids)
    assert readout.choose_way(ids, mask) is None
    scores = readout.score(ids, mask, mask.bool(), targets=ids.flatten()).losses
    model.requires_grad_(False)
    passes = readout.passes(ids, None)
    loss = torch.stack([
        readout.token_losses(hidden.flatten(0, 1), ids.flatten(), predict=False)[0].mean() for hidden in passes.hidden
    ]).sum()  # fmt: skip
    loss.backward()
    gradients = [p.grad for p in model.recursion.parameters() if p.grad is not None]
    return scores, float(loss.detach()), gradients


def compare(folder: Path) -> dict[str, dict[str, float]]:
    """Return for each case how far a model in parts is from the whole one, and how much of it this process holds."""
    processes = join("cpu", Parallel(fsdp=2))
    ids, found = tokens(), {}
    for name, (family, parallel, _) in zip(NAMES, CASES, strict=True):
        whole, parts = (
            load(folder / family, device="cpu", placement=Placement(given))[0] for given in (None, parallel)
        )
        logits, texts, others = [], [], []
        for model in (whole, parts):
            wake(attach(model, RecursionConfig(max_steps=2)))
            with torch.no_grad():
                logits.append([])
                for depth in (0, 1, 2):
                    with model.recursion.at_depth(depth):
                        logits[-1].append(model(ids).logits)
                texts.append(model.generate(ids, max_new_tokens=5, do_sample=False))
            others.append(losses_of(model, ids))
        (scores, loss, gradients), (scores_2, loss_2, gradients_2) = others
        held = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in parts.parameters())
        found[name] = {
            "logits": max(float((a - b).abs().max()) for a, b in zip(*logits, strict=True)),
            "texts": float((texts[0] != texts[1]).sum()),
            "scores": float((scores - scores_2).abs().max()),
            "loss": abs(loss - loss_2),
            "gradients": max(
                float((a - b).abs().max() / a.abs().max().clamp_min(1e-9))
                for a, b in zip(gradients, gradients_2, strict=True)
            ),
            "held": held / sum(p.numel() for p in whole.parameters()),
            "marked": in_parts(parts) and not in_parts(whole),
        }
    processes.leave()
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    folder = tmp_path_factory.mktemp("parts")
    for family in {family for family, _, _ in CASES}:
        build(family).save_pretrained(folder / family)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(Path(MODEL_DIR) / name, folder / family)
    return launch(2, compare, folder)


@pytest.mark.parametrize(("name", "tolerance"), [(n, t) for n, (_, _, t) in zip(NAMES, CASES, strict=True)], ids=NAMES)
def test_a_model_in_parts_does_what_the_whole_one_does(
    name: str, tolerance: float, found: dict[str, dict[str, float]]
) -> None:
    here = found[name]
    assert here["texts"] == 0
    for what in ("logits", "scores", "loss", "gradients"):
        assert here[what] <= tolerance, (what, here)
    assert here["held"] < 0.7
    assert here["marked"]
