"""Bases in 4 and 8 bits: exact surgery, evaluation, phases a and b, and what is refused, on a CPU."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from families import build, tokens, wake
from rrcli.demo.defaults import MODEL_DIR
from rrcli.errors import RRError, UsageError
from rrcli.files import checkpoints
from rrcli.models import quantisation
from rrcli.models.few_bits import hold
from rrcli.models.fitting import weight_bytes
from rrcli.models.footprint import operate, scored_batch, training_step, weights_of
from rrcli.models.loading import load
from rrcli.models.placement import Placement, read_placement
from rrcli.models.quantisation import check_gradients, is_quantised, stored_format
from rrcli.models.skeleton import skeleton as skeleton_of_source
from rrcli.models.source import ModelSource
from rrcli.recursion.config import RecursionConfig
from rrcli.recursion.engine import attach
from rrcli.recursion.flops import counted_flops
from rrcli.recursion.lora import add_lora
from rrcli.reporting import Silent
from rrcli.services import train as service
from rrcli.services.eval import evaluate
from rrcli.services.export import export
from rrcli.services.plan import plan
from rrcli.services.surgery import surgery
from rrcli.settings import (
    CommonSettings,
    EvalSettings,
    PlanSettings,
    SurgerySettings,
    TrainSettings,
    with_changes,
)

installed = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
BITS = ["4bit", "8bit"]
TRAIN = TrainSettings(
    model="base", device="cpu", steps=1, batch_size=1, warmup_steps=0, save_interval=1, eval_interval=1,
    eval_samples=1, max_length=64, task_share=1.0, lora_rank=2, lr=1e-3, quantize="4bit",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an experiment whose base has matrices of whole blocks of 64 weights."""
    folder = tmp_path_factory.mktemp("quantised")
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "head_dim": 32}
    build("llama", vocab_size=1024, max_position_embeddings=128, **sizes).save_pretrained(folder / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(MODEL_DIR) / name, folder / "base")
    return folder


def read(folder: Path, bits: str) -> Any:
    return load(folder / "base", device="cpu", placement=Placement(quantize=bits))[0]


def skeleton(folder: Path, bits: str) -> Any:
    source = ModelSource("base", folder / "base")
    return hold(skeleton_of_source(CommonSettings(dtype="float32"), source, "F32"), source, bits)


def held(model: Any) -> int:
    """Return the bytes of a model that bitsandbytes has quantised, with the scales that are no parameters."""
    scales = [getattr(module.weight, "SCB", None) for module in model.modules() if hasattr(module, "in_features")]
    states = [getattr(module.weight, "quant_state", None) for module in model.modules() if hasattr(module, "weight")]
    scales += [tensor for state in states if state is not None for tensor in (state.absmax, state.code)]
    return int(model.get_memory_footprint() + sum(t.numel() * t.element_size() for t in scales if t is not None))


def with_plain_weights(model: Any) -> Any:
    """Return a copy in which every quantised layer is an ordinary one that computes the same."""
    twin = copy.deepcopy(model)
    for name, module in list(twin.named_modules()):
        if type(module).__name__ in ("Linear4bit", "Linear8bitLt"):
            plain = nn.Linear(module.in_features, module.out_features, bias=False)
            with torch.no_grad():
                plain.weight.copy_(module(torch.eye(module.in_features)).T)
            parent, _, child = name.rpartition(".")
            setattr(twin.get_submodule(parent), child, plain.requires_grad_(False))
    return twin


@installed
@pytest.mark.parametrize("bits", BITS)
def test_a_quantised_base_is_small_and_what_it_takes_is_known_before(bits: str, folder: Path) -> None:
    model = read(folder, bits)
    assert is_quantised(model)
    whole = load(folder / "base", device="cpu")[0]
    assert held(model) < 0.75 * whole.get_memory_footprint()
    assert not is_quantised(whole)
    source = ModelSource("base", folder / "base")
    predicted = weight_bytes(source, torch.float32, bits, skeleton=lambda: skeleton(folder, bits))
    assert predicted == pytest.approx(held(model), rel=1e-3)


@installed
@pytest.mark.parametrize("bits", BITS)
def test_gradients_go_through_it_as_through_the_weights_that_it_stands_for(bits: str, folder: Path) -> None:
    """Also after an evaluation, in which bitsandbytes would choose a kernel that has none."""
    ids = tokens(2, 16)
    found = []
    for make in (lambda: read(folder, bits), lambda: with_plain_weights(read(folder, bits))):
        model = make()
        recursion = wake(attach(model, RecursionConfig(max_steps=1)))
        model.lora_used = add_lora(model, 2, 4)
        with torch.no_grad():
            for parameter in model.lora_used.parameters():
                parameter.add_(0.05)
            model.eval()(ids)
        model.train()(ids, labels=ids, use_cache=False).loss.backward()
        check_gradients(model) if is_quantised(model) else None
        found.append([p.grad for p in (*recursion.cell.parameters(), *model.lora_used.parameters())])
    for own, right in zip(*found, strict=True):
        assert own is not None
        assert float((own - right).norm() / right.norm().clamp_min(1e-6)) < (0.01 if bits == "4bit" else 0.2)


@installed
def test_a_kernel_without_gradients_is_found_before_training(folder: Path) -> None:
    model = read(folder, "4bit")
    layer = model.model.layers[0].self_attn.q_proj
    layer.forward = lambda rows: rows.detach() @ torch.ones(layer.in_features, layer.out_features)
    with pytest.raises(RRError, match="no gradients go through the kernels of this quantised model"):
        check_gradients(model)


@installed
@pytest.mark.parametrize("bits", BITS)
def test_flops_are_those_of_weights_that_are_not_quantised(bits: str, folder: Path) -> None:
    found = []
    for model in (read(folder, bits), load(folder / "base", device="cpu")[0]):
        model.requires_grad_(False)
        attach(model, RecursionConfig(max_steps=1))
        with counted_flops() as counter:
            model(tokens(2, 16), use_cache=False).logits.sum().backward()
        found.append(counter.checked())
    assert found[0] == found[1]


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    """The checkpoint of phase b on a base of four bits, and beside it that of phase a."""
    made = surgery(SurgerySettings(model="base", device="cpu", quantize="4bit"), folder, Silent())
    assert made.verified_depths == [0, 1, 2]
    for phase in "ab":
        run = with_changes(TRAIN, phase=phase, run_name=phase, eval_interval=0)
        assert service.train(run, "recursive", folder, Silent()).steps == 1
    return folder / "checkpoints" / "b"


@installed
def test_an_experiment_runs_on_four_bits(folder: Path, trained: Path) -> None:
    measuring = EvalSettings(
        model="base", device="cpu", quantize="4bit", problems=1, max_samples=1, max_new_tokens=2, skip_performance=True,
        skip_generation=True,
    )  # fmt: skip
    results = evaluate(measuring, "finetuned_recursive", folder, Silent(), model=str(trained)).results
    assert results["settings"]["quantize"] == "4bit"
    assert results["training"]["quantize"] == "4bit"
    assert len(results["by_depth"]["perplexity"]) == 3
    with pytest.raises(UsageError, match=r"--quantize 4bit holds few bits: such weights cannot be trained") as error:
        service.train(with_changes(TRAIN, phase="c"), "vanilla", folder, Silent())
    assert error.value.hint == "Take --phase b or --phase a."


@installed
def test_an_export_says_how_it_is_quantised_and_then_writes_the_same_tokens(folder: Path, trained: Path) -> None:
    done = export(CommonSettings(), str(trained), Path("export"), folder, Silent())
    page = (done.folder / "README.md").read_text()
    given = re.search(r"quantization_config=(BitsAndBytesConfig\(.*?\))\)", page)
    assert given is not None
    own = load(checkpoints(trained)[-1], device="cpu", directory=folder, placement=Placement(quantize="4bit"))[0]
    stock = AutoModelForCausalLM.from_pretrained(
        done.folder, trust_remote_code=True, dtype=torch.float32,
        quantization_config=eval(given[1].replace("bfloat16", "float32"), {"BitsAndBytesConfig": BitsAndBytesConfig}),
    )  # fmt: skip
    for model in (own, stock):
        wake(model.recursion)
    ids = tokens(1, 6)
    written = [model.generate(ids, max_new_tokens=12, do_sample=False).tolist() for model in (own, stock)]
    assert written[0] == written[1]
    with torch.no_grad():
        assert torch.equal(own(ids).logits, stock(ids).logits)


@installed
def test_adapters_of_a_quantised_base_are_not_added_to_whole_weights(folder: Path, trained: Path) -> None:
    run = with_changes(TRAIN, phase="b", run_name="vanilla", eval_interval=0)
    service.train(run, "vanilla", folder, Silent())
    with pytest.raises(UsageError, match=r"were trained on weights in 4bit, and would be added to whole ones"):
        export(CommonSettings(), "vanilla", Path("merged"), folder, Silent(), merge=True)


def test_the_server_quantises_as_a_training_does() -> None:
    from rrcli.upstream import _quantised_as_in_training

    stock = SimpleNamespace(load_in_4bit=True, bnb_4bit_use_double_quant=True)
    found = _quantised_as_in_training(lambda _: stock)(SimpleNamespace(dtype=torch.float32))
    assert (found.bnb_4bit_use_double_quant, found.bnb_4bit_compute_dtype) == (False, torch.float32)
    assert _quantised_as_in_training(lambda _: None)(SimpleNamespace(dtype="auto")) is None


# -- rr plan -----------------------------------------------------------------------------------------------------------


def planned(folder: Path, *, gpus: str = "2x80", **changes: Any) -> Any:
    shared = {"model": "base", "quantize": "4bit"} | changes

    def read_settings(cls: type[Any]) -> Any:
        small = {"batch_size": 2, "max_length": 32, "context": 32, "batch_tokens": 64, "problems": 1, "max_samples": 1}
        return with_changes(cls(), **{name: value for name, value in (small | shared).items() if hasattr(cls, name)})

    settings = with_changes(read_settings(PlanSettings), gpus=gpus)
    return plan(settings, read_settings, folder, Silent(), hardware="", given={})


def test_a_plan_counts_what_a_quantised_base_takes_and_never_cuts_it(folder: Path) -> None:
    found = {bits: planned(folder, phase="b", quantize=bits, dtype="float32") for bits in ("none", *BITS)}
    assert [one.model["quantised"] for one in found.values()] == ["none", *BITS]
    assert found["4bit"].model["weight_bytes"] == weights_of(skeleton(folder, "4bit")).base
    sizes = [one.model["weight_bytes"] for one in found.values()]
    assert sizes[1] < sizes[2] < 0.7 * sizes[0]
    ways = {bits: {str(memory.arrangement) for memory in one.memory} for bits, one in found.items()}
    assert ways["4bit"] == ways["8bit"] == {"one device", "--parallel replicas=2", "--device-map auto"}
    assert "--parallel fsdp=2" in ways["none"]


def test_a_plan_refuses_the_phase_that_training_refuses(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"--quantize 4bit holds few bits: such weights cannot be trained") as error:
        planned(folder, phase="c")
    assert error.value.hint == "Take --phase b or --phase a."


def test_what_is_unpacked_for_a_moment_is_in_a_plan(folder: Path) -> None:
    """One matrix at a time; the FLOPs stay the same."""
    steps, scored = {}, {}
    for bits in ("none", *BITS):
        model = skeleton(folder, bits)
        trained = operate(model, recursion=RecursionConfig(max_steps=1), phase="b")
        steps[bits] = training_step(model, trained, rows=1, length=4, depth=1, share=0.5, device="cpu", autocast=False)
        scored[bits] = scored_batch(model, rows=1, length=4, depth=1, device="cpu")
    assert len({step.flops for step in steps.values()}) == 1
    assert not any(step.uncounted for step in steps.values())
    largest = 4 * 128 * 192
    for bits in BITS:
        assert largest / 2 < scored[bits].activations - scored["none"].activations < 2 * largest


# -- refused -----------------------------------------------------------------------------------------------------------


def test_what_is_missing_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantisation.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UsageError, match="--quantize needs bitsandbytes") as error:
        read(folder, "4bit")
    assert error.value.hint == "pip install 'rrcli[quantize]'"


def test_a_stored_format_whose_kernels_are_missing_is_refused_with_the_reason(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "base", tmp_path / "gptq")
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 64}
    (tmp_path / "gptq" / "config.json").write_text(json.dumps(config))
    assert stored_format(ModelSource("gptq", tmp_path / "gptq")) == "gptq"
    with pytest.raises(RRError, match=r"(?i)cannot read the weights of .*gptq") as error:
        load(tmp_path / "gptq", device="cpu")
    assert error.value.hint.startswith("They are quantised (gptq): install what the message names")
    with pytest.raises(UsageError, match=r"is quantised already \(gptq\)"):
        load(tmp_path / "gptq", device="cpu", placement=Placement(quantize="4bit"))
    with pytest.raises(UsageError, match=r"is quantised \(gptq\): such weights cannot be trained"):
        load(tmp_path / "gptq", device="cpu", trains=True)


def test_parts_of_quantised_weights_are_a_wrong_usage(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--parallel fsdp=2 and --quantize 4bit contradict each other"):
        read_placement(EvalSettings(parallel="fsdp=2", quantize="4bit"), tmp_path)
    assert read_placement(EvalSettings(parallel="replicas=2", quantize="4bit"), tmp_path).quantize == "4bit"
