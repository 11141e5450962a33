"""Bases in 4 and 8 bits: exact surgery, evaluation, phases a and b, and what is refused, on a CPU."""

from __future__ import annotations

import copy
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from families import build, tokens, wake
from rrcli.demo.defaults import MODEL_DIR
from rrcli.errors import RRError, UsageError
from rrcli.models import quantisation
from rrcli.models.fitting import weight_bytes
from rrcli.models.loading import load
from rrcli.models.placement import Placement, read_placement
from rrcli.models.quantisation import check_gradients, is_quantised, stored_format
from rrcli.models.source import ModelSource
from rrcli.recursion.config import RecursionConfig
from rrcli.recursion.engine import attach
from rrcli.recursion.lora import add_lora
from rrcli.reporting import Silent
from rrcli.services import train as service
from rrcli.services.eval import evaluate
from rrcli.services.surgery import surgery
from rrcli.settings import EvalSettings, SurgerySettings, TrainSettings, with_changes

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
    there = model.get_memory_footprint()
    whole = load(folder / "base", device="cpu")[0]
    assert there < 0.75 * whole.get_memory_footprint()
    assert not is_quantised(whole)
    assert weight_bytes(ModelSource("base", folder / "base"), torch.float32, bits) == pytest.approx(there, rel=0.05)


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
def test_an_experiment_runs_on_four_bits(folder: Path) -> None:
    made = surgery(SurgerySettings(model="base", device="cpu", quantize="4bit"), folder, Silent())
    assert made.verified_depths == [0, 1, 2]
    for phase in "ab":
        run = with_changes(TRAIN, phase=phase, run_name=phase)
        assert service.train(run, "recursive", folder, Silent()).steps == 1
    measuring = EvalSettings(
        model="base", device="cpu", quantize="4bit", problems=1, max_samples=1, max_new_tokens=2, skip_performance=True,
        skip_generation=True,
    )  # fmt: skip
    trained = str(folder / "checkpoints" / "b")
    results = evaluate(measuring, "finetuned_recursive", folder, Silent(), model=trained).results
    assert results["settings"]["quantize"] == "4bit"
    assert len(results["by_depth"]["perplexity"]) == 3
    with pytest.raises(UsageError, match=r"--quantize 4bit holds few bits: such weights cannot be trained") as error:
        service.train(with_changes(TRAIN, phase="c"), "vanilla", folder, Silent())
    assert error.value.hint == "Take --phase b or --phase a."


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
    with pytest.raises(RRError, match=r"(?i)cannot read the weights of .*gptq"):
        load(tmp_path / "gptq", device="cpu")
    with pytest.raises(UsageError, match=r"is quantised already \(gptq\)"):
        load(tmp_path / "gptq", device="cpu", placement=Placement(quantize="4bit"))
    with pytest.raises(UsageError, match=r"is quantised \(gptq\): such weights cannot be trained"):
        load(tmp_path / "gptq", device="cpu", trains=True)


def test_parts_of_quantised_weights_are_a_wrong_usage(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--parallel fsdp=2 and --quantize 4bit contradict each other"):
        read_placement(EvalSettings(parallel="fsdp=2", quantize="4bit"), tmp_path)
    assert read_placement(EvalSettings(parallel="replicas=2", quantize="4bit"), tmp_path).quantize == "4bit"
