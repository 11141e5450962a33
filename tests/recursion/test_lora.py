"""Adapters of phase b: where they are on, that gradients reach them, and that they are saved as peft saves them."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch.nn import functional as F

import rrcli
from families import FAMILIES, SPANS, build, cached, far, generate, tokens, uncached, wake
from rrcli.errors import RRError
from rrcli.experiment.planning import plan
from rrcli.files import checkpoints
from rrcli.recursion.config import RecursionConfig
from rrcli.recursion.engine import attach
from rrcli.recursion.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS, add_lora, load_lora
from rrcli.reporting import Silent
from rrcli.services import train as service
from rrcli.services.eval import evaluate
from rrcli.services.surgery import surgery
from rrcli.settings import EvalSettings, SurgerySettings, TrainSettings

RANK, ALPHA = 4, 8
ROUNDING = 1e-5
SOME = ["llama", "qwen3", "mixtral", "gpt2", "mamba2", "deepseek_v3", "falcon_h1"]

every_family = pytest.mark.parametrize("family", FAMILIES)
some_families = pytest.mark.parametrize("family", SOME)
every_span = pytest.mark.parametrize("span", SPANS, ids=["full", "partial"])


def adapted(family, span=None, recursive=True, awake=True, **changes):
    """Return a model with adapters, with or without a recursion, as if they had been trained."""
    model = build(family, **changes)
    recursion = attach(model, RecursionConfig(max_steps=2, span=span)) if recursive else None
    lora = add_lora(model, RANK, ALPHA, span=span)
    if awake:
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in lora.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        if recursion is not None:
            wake(recursion)
    return model


def without(model):
    """Return a copy of the model whose adapters are gone."""
    twin = copy.deepcopy(model)
    twin.lora.remove()
    return twin


@every_family
@torch.no_grad()
def test_fresh_adapters_change_no_bit_and_trained_ones_only_the_later_passes(family):
    ids = tokens()
    # Frozen like the model below: torch picks another convolution kernel for weights that want no gradient.
    stock, model = build(family).requires_grad_(False), adapted(family, (1, 3), awake=False)
    for depth in range(3):
        model.recursion.depth = depth
        assert torch.equal(uncached(model, ids), uncached(stock, ids))
    model = adapted(family, (1, 3))
    bare = without(model)
    states, bare_states = model.recursion.passes(ids).states, bare.recursion.passes(ids).states
    assert torch.equal(states[0], bare_states[0])
    assert far(states[1], bare_states[1]) > 1e-3
    model.recursion.depth = 0
    assert torch.equal(uncached(model, ids), uncached(stock, ids))
    assert torch.equal(cached(model, ids)[0], cached(stock, ids)[0])
    assert torch.equal(generate(model, ids), generate(stock, ids))


@every_span
@some_families
@torch.no_grad()
def test_cached_and_uncached_logits_agree(family, span):
    model = adapted(family, span)
    assert far(cached(model, tokens())[0], uncached(model, tokens())) < ROUNDING


@every_family
def test_every_adapter_of_the_span_learns_and_nothing_else_does(family):
    model = adapted(family, (1, 3))
    ids = tokens()
    F.cross_entropy(uncached(model, ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            assert parameter.grad is not None, name
            assert parameter.grad.norm() > 0, name
            assert ".1." in name or ".2." in name
        else:
            assert parameter.grad is None, name


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2", "mamba2"])
@every_span
def test_gradient_checkpointing_gives_the_same_gradients(family, span, reentrant):
    """The backward pass runs layers again: those of passes >= 1 with their adapters, those of pass 0 without."""
    no_dropout = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
    gradients = []
    for on in (False, True):
        model = adapted(family, span, **(no_dropout if family == "gpt2" else {}))
        model.requires_grad_(True)
        if on:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.train()
        ids = tokens()
        model(ids, labels=ids, use_cache=False).loss.backward()
        named = [*model.named_parameters(), *model.recursion.cell.named_parameters()]
        gradients.append({name: p.grad for name, p in named if p.grad is not None})
    plain, checkpointed = gradients
    assert plain.keys() == checkpointed.keys()
    assert any(".lora_B" in name for name in plain)
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_vanilla_has_the_same_adapters_in_pass_0():
    vanilla, recursive = adapted("llama", (1, 3), recursive=False), adapted("llama", (1, 3))
    names = [[n for n, _ in m.named_parameters() if ".lora_" in n] for m in (vanilla, recursive)]
    assert names[0] == names[1]
    assert len(names[0]) == 2 * 7 * 2
    with torch.no_grad():
        assert far(uncached(vanilla, tokens()), uncached(without(vanilla), tokens())) > 1e-3


@torch.no_grad()
def test_a_failing_layer_leaves_the_adapters_as_they_were():
    model, ids = adapted("llama"), tokens()
    before = uncached(model, ids)
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: 1 / 0)
    for depth in (0, 2):
        model.recursion.depth = depth
        with pytest.raises(ZeroDivisionError):
            uncached(model, ids)
    handle.remove()
    assert torch.equal(uncached(model, ids), before)
    model.recursion.depth = 0
    assert torch.equal(uncached(model, ids), uncached(build("llama"), ids))


def test_detaching_takes_the_adapters_of_experts_off():
    model = build("qwen3_moe")
    recursion = attach(model)
    before = model.state_dict().keys()
    add_lora(model, rank=2, alpha=4, experts=True)
    assert model.state_dict().keys() != before
    recursion.detach()
    assert model.state_dict().keys() == before


@some_families
@torch.no_grad()
def test_detaching_takes_the_adapters_off(family):
    model, stock = adapted(family), build(family)
    model.recursion.detach()
    assert [n for n, _ in model.named_modules()] == [n for n, _ in stock.named_modules()]
    assert not hasattr(model, "lora")
    assert not hasattr(model, "peft_config")
    assert torch.equal(uncached(model, tokens()), uncached(stock, tokens()))
    attach(model)
    add_lora(model, RANK, ALPHA)


@torch.no_grad()
def test_adapters_that_were_there_before_the_recursion_stay_on_and_stay():
    model, ids = adapted("llama", recursive=False), tokens()
    before = uncached(model, ids)
    recursion = attach(model)
    for depth in range(3):
        recursion.depth = depth
        assert torch.equal(uncached(model, ids), before)
    recursion.detach()
    assert torch.equal(uncached(model, ids), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("span", SPANS, ids=["full", "partial"])
@pytest.mark.parametrize("family", SOME)
@torch.no_grad()
def test_peft_alone_loads_what_was_saved(family, span, dtype, tmp_path):
    ids = tokens()
    vanilla = build(family).to(dtype)
    lora = add_lora(vanilla, RANK, ALPHA, span=span)
    for parameter in lora.parameters():
        parameter.add_(torch.randn(parameter.shape) * 0.2)
    lora.save(tmp_path, "somewhere/base")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # missing and unexpected keys are warnings
        warnings.simplefilter("ignore", FutureWarning)
        theirs = PeftModel.from_pretrained(build(family).to(dtype), tmp_path).eval()
    ours = build(family).to(dtype)
    load_lora(ours, tmp_path)
    assert torch.equal(theirs(ids, use_cache=False).logits, uncached(vanilla, ids))
    assert torch.equal(uncached(ours, ids), uncached(vanilla, ids))
    config = json.loads((tmp_path / ADAPTER_CONFIG).read_text())
    assert config["base_model_name_or_path"] == "somewhere/base"
    assert config["target_modules"] == sorted(config["target_modules"])


def test_an_adapter_that_does_not_fit_is_refused(tmp_path):
    adapted("llama", recursive=False).lora.save(tmp_path, "base")
    with pytest.raises(RRError, match="does not fit"):
        load_lora(build("llama", num_hidden_layers=3), tmp_path)
    with pytest.raises(RRError, match="does not fit"):
        load_lora(build("llama", hidden_size=16), tmp_path)
    (tmp_path / ADAPTER_WEIGHTS).write_bytes(b"torn")
    with pytest.raises(RRError, match="cannot read the adapter"):
        load_lora(build("llama"), tmp_path)


def test_what_cannot_be_adapted_is_refused():
    model = adapted("llama")
    with pytest.raises(RRError, match="adapters already"):
        add_lora(model, RANK, ALPHA)
    model = build("mamba2")
    for layer in model.backbone.layers:
        layer.mixer.in_proj = torch.nn.Identity()
    with pytest.raises(RRError, match=r"mamba2.*none of their linear layers"):
        add_lora(model, RANK, ALPHA)


# -- in training -------------------------------------------------------------------------------------------------------

SETTINGS = TrainSettings(
    phase="b", lora_rank=RANK, lora_alpha=ALPHA, steps=4, batch_size=4, lr=1e-3, sidecar_lr=1e-3, warmup_steps=2,
    save_interval=2, eval_interval=0, max_length=64, keep=9,
)  # fmt: skip


def changed(**values) -> TrainSettings:
    return TrainSettings(**(vars(SETTINGS) | values))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("phase_b")
    surgery(SurgerySettings(), folder, Silent())
    for mode in ("vanilla", "recursive"):
        service.train(SETTINGS, mode, folder, Silent())
    return folder


def last(folder: Path, run: str) -> Path:
    return checkpoints(folder / "checkpoints" / run)[-1]


def sentence(tokenizer):
    return torch.tensor([tokenizer("Tom has a red ball.")["input_ids"]])


@torch.no_grad()
def test_phase_b_leaves_depth_0_the_base_and_moves_the_rest(trained):
    model, tokenizer = rrcli.load(last(trained, "finetuned_recursive"))
    base, ids = rrcli.load("default")[0], sentence(tokenizer)
    assert all(p.any() for p in (*model.lora.parameters(), model.recursion.cell.w_out.weight))
    one, two = (uncached(model, ids) for model.recursion.depth in (1, 2))
    model.recursion.depth = 0
    assert torch.equal(uncached(model, ids), uncached(base, ids))
    assert not torch.equal(one, uncached(base, ids))
    assert not torch.equal(one, two)
    events = json.loads((last(trained, "finetuned_recursive") / "metrics.json").read_text())
    assert events["scalars"]["train/feedback_norm"]["value"] > 0
    assert events["training"]["phase"] == "b"


@torch.no_grad()
def test_vanilla_of_phase_b_is_a_peft_model(trained):
    folder = last(trained, "finetuned_vanilla")
    model, tokenizer = rrcli.load(folder)
    base, ids = rrcli.load("default")[0], sentence(tokenizer)
    assert not hasattr(model, "recursion")
    assert not torch.equal(uncached(model, ids), uncached(base, ids))
    theirs = PeftModel.from_pretrained(base, folder).eval()
    assert torch.equal(theirs(ids, use_cache=False).logits, uncached(model, ids))


def test_the_base_is_referenced_and_both_modes_have_the_same_adapters(trained):
    shapes = []
    for run in ("finetuned_vanilla", "finetuned_recursive"):
        folder = last(trained, run)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # missing and unexpected keys are warnings
            warnings.simplefilter("ignore", FutureWarning)
            PeftModel.from_pretrained(rrcli.load("default")[0], folder)
        assert json.loads((folder / "recursion.json").read_text())["weights"] == "base"
        assert not list(folder.glob("model*.safetensors"))
        model, _ = rrcli.load(folder)
        shapes.append([(n, p.shape) for n, p in model.named_parameters() if ".lora_" in n])
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("mode", ["vanilla", "recursive"])
def test_a_resumed_run_ends_at_the_same_weights(trained, mode, tmp_path):
    surgery(SurgerySettings(), tmp_path, Silent())
    run = tmp_path / "checkpoints" / f"finetuned_{mode}"
    whole = trained / "checkpoints" / f"finetuned_{mode}"
    run.mkdir()
    shutil.copytree(whole / "step-000002", run / "step-000002")
    assert service.train(SETTINGS, mode, tmp_path, Silent()).first_step == 2
    files = [ADAPTER_WEIGHTS, "trainer_state/optimizer.safetensors"]
    for name in [*files, "recursion.safetensors"] if mode == "recursive" else files:
        assert (run / "step-000004" / name).read_bytes() == (whole / "step-000004" / name).read_bytes(), name


def test_eval_restores_the_adapters(trained, tmp_path):
    settings = EvalSettings(
        max_samples=4, skip_reasoning=True, skip_generation=True, skip_performance=True, tensorboard=False,
        output_dir=str(tmp_path),
    )  # fmt: skip
    nll = {}
    for stage in ("baseline", "finetuned_vanilla", "finetuned_recursive"):
        documents = evaluate(settings, stage, trained, Silent()).results["records"]["documents"]
        nll[stage] = [document["nll"] for document in documents]
    for base, vanilla, recursive in zip(*nll.values(), strict=True):
        assert vanilla[0] != base[0] == recursive[0]
        assert len({*recursive}) == 3


def test_a_plan_knows_that_vanilla_adapts_what_surgery_chose(trained, tmp_path):
    def statuses(folder, **changes):
        def load(cls):
            return SETTINGS if cls is TrainSettings else cls(**(changes if cls is SurgerySettings else {}))

        return {step.command: step.status for step in plan(folder, load)}

    vanilla, recursive = (f"rr train --mode {mode}" for mode in ("vanilla", "recursive"))
    assert statuses(trained)[vanilla] == statuses(trained)[recursive] == "done"
    assert statuses(trained, span="0:1")[vanilla] == "stale"
    assert statuses(tmp_path)[vanilla] == "missing"


def test_an_adapters_settings_belong_to_the_run(trained, tmp_path):
    with pytest.raises(RRError, match="other settings"):
        service.train(changed(lora_rank=RANK + 1), "vanilla", trained, Silent())
    with pytest.raises(RRError, match="no model yet") as error:
        service.train(SETTINGS, "vanilla", tmp_path, Silent())
    assert "rr surgery" in error.value.hint


def test_an_adapter_is_no_base_model(trained, tmp_path):
    adapter = str(last(trained, "finetuned_vanilla"))
    with pytest.raises(RRError, match="LoRA adapter on another model"):
        surgery(SurgerySettings(model=adapter), tmp_path, Silent())
