"""Bases that a checkpoint brings quantised, each made by its own library: what works with them on a CPU."""

from __future__ import annotations

import copy
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from families import build, tokens, wake
from rrcli.demo.defaults import MODEL_DIR
from rrcli.errors import RRError
from rrcli.models.few_bits import hold
from rrcli.models.footprint import weights_of
from rrcli.models.inspection import inspect_weights
from rrcli.models.loading import load
from rrcli.models.quantisation import check_gradients, is_quantised, stored_format
from rrcli.models.skeleton import skeleton
from rrcli.models.source import ModelSource
from rrcli.recursion.config import RecursionConfig
from rrcli.recursion.engine import attach
from rrcli.recursion.lora import add_lora
from rrcli.reporting import Silent
from rrcli.services.eval import evaluate
from rrcli.services.generate import generate
from rrcli.services.surgery import surgery
from rrcli.services.train import train
from rrcli.settings import CommonSettings, EvalSettings, GenerateSettings, SurgerySettings, TrainSettings
from training_runs import assert_same_weights

SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "head_dim": 32}
ROWS = 128  # of a block of fp8


def torchao(kind: str) -> Callable[[Path, Path], None]:
    def make(base: Path, folder: Path) -> None:
        quantization = pytest.importorskip(
            "torchao.quantization", reason="torchao is not installed, or not for this torch", exc_type=ImportError
        )
        from transformers import TorchAoConfig

        model = AutoModelForCausalLM.from_pretrained(
            base, quantization_config=TorchAoConfig(getattr(quantization, kind)()), device_map="cpu"
        )
        model.save_pretrained(folder)

    return make


def compressed(scheme: str, file_format: str) -> Callable[[Path, Path], None]:
    def make(base: Path, folder: Path) -> None:
        library = pytest.importorskip(
            "compressed_tensors.quantization", reason="compressed-tensors is not installed", exc_type=ImportError
        )
        from compressed_tensors.compressors import ModelCompressor
        from compressed_tensors.quantization.utils import calculate_qparams

        found = library.preset_name_to_scheme(scheme, ["Linear"])
        if found.weights.group_size:
            found.weights.group_size = min(found.weights.group_size, 64)
        model = AutoModelForCausalLM.from_pretrained(base)
        config = library.QuantizationConfig(
            config_groups={"all": found}, ignore=["lm_head"], format=file_format, quantization_status="compressed"
        )
        library.apply_quantization_config(model, config)
        for layer in (m for m in model.modules() if getattr(m, "quantization_scheme", None) is not None):
            groups = layer.weight.data.unflatten(1, (-1, found.weights.group_size or layer.in_features))
            whole = getattr(layer, "weight_global_scale", None)  # of NVFP4, whose scales are fp8
            if whole is not None:
                whole.data.fill_(448 * 6 / float(layer.weight.data.abs().max()))
            scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), found.weights, global_scale=whole)
            layer.weight_scale.data.copy_(scale)
            if hasattr(layer, "weight_zero_point"):
                layer.weight_zero_point.data.copy_(zero)
        compressor = ModelCompressor.from_pretrained_model(model, quantization_format=file_format)
        compressor.compress_model(model)
        model.save_pretrained(folder)
        compressor.update_config(folder)

    return make


def fp8(base: Path, folder: Path) -> None:
    """Write fp8 with a scale for each block, as DeepSeek-V3 does; no library makes it on a CPU."""
    shutil.copytree(base, folder)
    found = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        found[name] = weight
        if weight.dim() == 2 and ".layers." in name:
            blocks = [block.split(ROWS, 1) for block in weight.split(ROWS)]
            scale = torch.tensor([[float(part.abs().max()) / 448 for part in row] for row in blocks])
            whole = scale.repeat_interleave(ROWS, 0).repeat_interleave(ROWS, 1)
            found[name] = (weight / whole[: weight.shape[0], : weight.shape[1]]).to(torch.float8_e4m3fn)
            found[name.replace(".weight", ".weight_scale_inv")] = scale
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "weight_block_size": [ROWS, ROWS],
        "activation_scheme": "dynamic",
    }
    (folder / "config.json").write_text(json.dumps(config))


FORMATS: dict[str, Callable[[Path, Path], None]] = {
    "torchao-int8": torchao("Int8WeightOnlyConfig"),
    "torchao-fp8": torchao("Float8WeightOnlyConfig"),
    "compressed-4bit": compressed("W4A16", "pack-quantized"),
    "compressed-fp4": compressed("NVFP4A16", "nvfp4-pack-quantized"),
    "fp8": fp8,
}
ROUNDED_INPUTS = compressed("W8A8", "int-quantized")
PACKED = ("torchao-int8", "torchao-fp8")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder with a model in a format, which is made when it is first asked for."""
    root = tmp_path_factory.mktemp("formats")
    base = root / "base"
    build("llama", vocab_size=1024, max_position_embeddings=128, **SIZES).save_pretrained(base)

    def find(name: str) -> Path:
        folder = root / name
        if not folder.exists():
            (FORMATS | {"rounded": ROUNDED_INPUTS})[name](base, folder)
            for file in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(Path(MODEL_DIR) / file, folder)
        return folder

    return find


def held(model: Any) -> int:
    """Return the bytes of all tensors of a model, those inside of tensors of torchao too."""

    def size(tensor: Any) -> int:
        inner = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else ()
        return sum(size(getattr(tensor, name)) for name in inner) or tensor.numel() * tensor.element_size()

    return sum(size(tensor.data) for tensor in (*model.parameters(), *model.buffers()))


def with_plain_weights(model: Any) -> Any:
    """Return a copy in which every matrix is one of floats that computes the same."""
    twin = copy.deepcopy(model)
    for name, module in list(twin.named_modules()):
        if type(module) is nn.Linear and type(module.weight.data) is not torch.Tensor:
            plain = nn.Linear(module.in_features, module.out_features, bias=False)
            plain.weight = nn.Parameter(module.weight.dequantize(), requires_grad=False)
            parent, _, child = name.rpartition(".")
            setattr(twin.get_submodule(parent), child, plain)
    return twin


@pytest.mark.parametrize("name", FORMATS)
def test_what_it_takes_is_known_before(name: str, made: Callable[[str], Path]) -> None:
    folder = made(name)
    source = ModelSource(name, folder)
    assert stored_format(source)
    model = load(folder, device="cpu")[0]
    shapes = skeleton(CommonSettings(dtype="float32"), source, inspect_weights(folder).dtype)
    whole = weights_of(shapes).base
    predicted = weights_of(hold(shapes, source)).base
    assert predicted == pytest.approx(held(model), rel=0.02)
    assert (predicted < 0.75 * whole) == (name in PACKED)
    assert is_quantised(model) == (name != "fp8"), "what is plain once it is read needs no check of its gradients"


@pytest.mark.parametrize("name", PACKED)
def test_gradients_go_through_it_as_through_the_weights_that_it_stands_for(
    name: str, made: Callable[[str], Path]
) -> None:
    ids = tokens(2, 16)
    found = []
    model = load(made(name), device="cpu")[0]
    check_gradients(model)
    for one in (with_plain_weights(model), model):
        recursion = wake(attach(one, RecursionConfig(max_steps=1)))
        one.lora_used = add_lora(one, 2, 4)
        with torch.no_grad():
            for parameter in one.lora_used.parameters():
                parameter.add_(0.05)
        one.train()(ids, labels=ids, use_cache=False).loss.backward()
        found.append([p.grad for p in (*recursion.cell.parameters(), *one.lora_used.parameters())])
    for right, own in zip(*found, strict=True):
        torch.testing.assert_close(own, right, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", FORMATS)
def test_an_experiment_runs_on_it(name: str, made: Callable[[str], Path], tmp_path: Path) -> None:
    base = {"model": str(made(name)), "device": "cpu"}
    assert surgery(SurgerySettings(**base, max_steps=1), tmp_path, Silent()).verified_depths == [0, 1]
    runs = tmp_path / "checkpoints"
    for phase in "ab":
        settings = TrainSettings(
            **base, phase=phase, run_name=phase, steps=2, batch_size=1, warmup_steps=0, save_interval=1,
            eval_interval=0, max_length=64, task_share=1.0, lora_rank=2, lr=1e-3,
        )  # fmt: skip
        assert train(settings, "recursive", tmp_path, Silent()).steps == 2
    # What was trained at once ends as what goes on from its first step.
    whole = shutil.move(runs / "b" / "step-000002", tmp_path / "whole")
    assert train(settings, "recursive", tmp_path, Silent()).first_step == 1
    assert_same_weights(runs / "b" / "step-000002", whole)
    measuring = EvalSettings(
        **base, problems=1, max_samples=1, max_new_tokens=1, max_length=64, skip_performance=True, skip_generation=True
    )
    results = evaluate(measuring, "finetuned_recursive", tmp_path, Silent(), model=str(runs / "b")).results
    assert len(results["by_depth"]["perplexity"]) == 2
    pieces: list[Any] = []
    generate(
        GenerateSettings(**base | {"model": str(runs / "b")}, max_new_tokens=3), "Tom has", tmp_path, pieces.append
    )
    assert pieces


# -- refused -----------------------------------------------------------------------------------------------------------


def test_a_training_through_inputs_that_are_rounded_is_refused(made: Callable[[str], Path], tmp_path: Path) -> None:
    """compressed-tensors rounds them without a gradient: adapters would learn nothing, and nobody would know."""
    base = {"model": str(made("rounded")), "device": "cpu"}
    assert surgery(SurgerySettings(**base, max_steps=1), tmp_path, Silent()).verified_depths == [0, 1]
    settings = TrainSettings(**base, phase="a", steps=1, batch_size=1, save_interval=1, max_length=32)
    with pytest.raises(RRError, match="no gradients go through the kernels of this quantised model") as error:
        train(settings, "recursive", tmp_path, Silent())
    assert error.value.hint == "Take another device, or train on the model as it was before it was quantised."


@pytest.mark.parametrize(
    ("method", "needs"),
    [("awq", "gptqmodel"), ("gptq", "optimum"), ("hqq", "HQQ"), ("compressed-tensors", "compressed.tensors")],
)
def test_what_a_format_needs_is_named(method: str, needs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    build("llama", vocab_size=1024, max_position_embeddings=128, **SIZES).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 64}
    (folder / "config.json").write_text(json.dumps(config))
    if method == "compressed-tensors" and importlib.util.find_spec("compressed_tensors"):
        pytest.skip("compressed-tensors is installed")
    with pytest.raises(RRError, match=rf"cannot read the weights of .*{needs}") as error:
        load(folder, device="cpu")
    assert error.value.hint.startswith(f"They are quantised ({method}): install what the message names")
