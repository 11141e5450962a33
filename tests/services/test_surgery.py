"""Surgery: that it proves itself, with the weights and without, and what its command shows and writes."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

import rrcli
from operating import logits, operate, sidecar, skeleton_of, written
from rrcli.cli.commands import app
from rrcli.demo import defaults
from rrcli.errors import CheckFailed, RRError
from rrcli.models import verification
from rrcli.models.inspection import inspect_weights
from rrcli.models.skeleton import skeleton
from rrcli.models.source import ModelSource
from rrcli.reporting import Silent
from rrcli.settings import SurgerySettings

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import synthetic_kimi_48b as synthetic

# -- verification ------------------------------------------------------------------------------------------------------


def test_every_depth_is_compared_uncached_and_cached(tmp_path: Path) -> None:
    result = operate(tmp_path, "default")
    assert result.verified_depths == [0, 1, 2]
    assert result.added_parameters == sum(
        t.numel() for t in load_file(sidecar(tmp_path) / "recursion.safetensors").values()
    )
    assert result.bytes_written == sum(file.stat().st_size for file in sidecar(tmp_path).iterdir())


def test_a_change_is_found_and_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rrcli.recursion.feedback_cell import FeedbackCell

    def nudged(self: Any, hidden: torch.Tensor, step: int) -> torch.Tensor:
        return torch.full_like(hidden, 1e-3) if step == 2 else torch.zeros_like(hidden)

    monkeypatch.setattr(FeedbackCell, "forward", nudged)
    failed = CliRunner().invoke(app, ["surgery", "--dir", str(tmp_path), "--export", "alone"])
    assert failed.exit_code == 3
    assert "at depth 2, uncached, logits differ" in failed.stderr
    assert "Nothing was written" in failed.stderr
    assert written(tmp_path) == []


def test_a_change_that_only_the_cache_shows_is_found() -> None:
    loaded, tokenizer = rrcli.load("default")
    before = verification.reference(loaded, tokenizer)
    recursion = rrcli.attach(loaded)
    cell = recursion.cell.forward

    def wrong_when_decoding(hidden: torch.Tensor, step: int) -> torch.Tensor:
        return cell(hidden, step) + (1e-3 if hidden.shape[1] == 1 else 0)

    recursion.cell.forward = wrong_when_decoding
    with pytest.raises(CheckFailed, match="at depth 1, cached, logits differ"):
        verification.verify(loaded, tokenizer, before, reporter=Silent())


def test_a_base_that_gives_no_finite_logits_is_refused(model: Path, tmp_path: Path) -> None:
    for file in model.glob("*.safetensors"):
        tensors = load_file(file)
        if "model.norm.weight" in tensors:
            save_file(
                tensors | {"model.norm.weight": tensors["model.norm.weight"] * float("nan")}, file, {"format": "pt"}
            )
    with pytest.raises(CheckFailed, match="not finite"):
        operate(tmp_path)
    assert not sidecar(tmp_path).exists()


# -- without loading ---------------------------------------------------------------------------------------------------


def test_without_verification_the_weights_are_never_loaded(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verified = operate(tmp_path)
    real = load_file(sidecar(tmp_path) / "recursion.safetensors")

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    for file in model.glob("*.safetensors"):  # only headers may be read
        with file.open("r+b") as shard:
            length = struct.unpack("<Q", shard.read(8))[0]
            shard.seek(8 + length)
            shard.write(b"\xff" * (file.stat().st_size - 8 - length))
    result = operate(tmp_path, verify=False, overwrite=True)
    assert result.verified_depths == []
    made = load_file(sidecar(tmp_path) / "recursion.safetensors")
    assert made.keys() == real.keys()
    assert all(torch.equal(made[name], real[name]) for name in real)
    assert not made["cell.w_out.weight"].any()
    same = ("family", "layers", "span", "base_parameters", "base_bytes", "added_parameters", "sidecar_bytes", "costs")
    assert {key: getattr(result, key) for key in same} == {key: getattr(verified, key) for key in same}


def test_a_sidecar_made_without_loading_works(shards: Path, tmp_path: Path) -> None:
    operate(tmp_path, shards, verify=False)
    stock, _ = rrcli.load(shards)
    loaded, _ = rrcli.load(sidecar(tmp_path))
    assert loaded.recursion.depth == 2
    assert torch.equal(logits(loaded), logits(stock))


@pytest.mark.parametrize(
    ("setting", "in_config", "stored", "expected"),
    [
        ("auto", "bfloat16", "F32", torch.bfloat16),
        ("auto", None, "BF16", torch.bfloat16),
        ("auto", None, "F8_E4M3", torch.bfloat16),
        ("auto", None, "F16", torch.float16),
        ("auto", None, "F32", torch.float32),
        ("auto", None, "", torch.float32),
        ("float16", "bfloat16", "F32", torch.float16),
    ],
)
def test_the_dtype_of_a_skeleton(
    model: Path, setting: str, in_config: str | None, stored: str, expected: torch.dtype
) -> None:
    config = json.loads((model / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
    (model / "config.json").write_text(json.dumps(config | ({"dtype": in_config} if in_config else {})))
    made = skeleton(SurgerySettings(dtype=setting), ModelSource("model", model), stored)
    assert {parameter.device.type for parameter in made.parameters()} == {"meta"}
    recursion = rrcli.attach(made)
    assert {(p.dtype, p.device.type) for p in recursion.parameters()} == {(expected, "cpu")}


def test_a_family_that_must_prove_itself_is_refused_without_weights() -> None:
    from rrcli.recursion import families

    made = skeleton_of("llama")
    known = families.LAYOUTS.pop("llama")
    try:
        with pytest.raises(RRError, match="need a self-check") as caught:
            rrcli.attach(made)
    finally:
        families.LAYOUTS["llama"] = known
    assert "--no-verify" in caught.value.hint
    assert not hasattr(made, "recursion")


def test_surgery_on_surgery_is_refused(tmp_path: Path) -> None:
    operate(tmp_path, "default")
    for verify in (True, False):
        with pytest.raises(RRError, match=r"no weights|has a recursion already"):
            operate(tmp_path, sidecar(tmp_path), verify=verify, overwrite=True)


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """92 GiB of weights and 12: the same megabytes. Seconds are the benchmark's business."""
    peaks = []
    for layers in (27, 4):
        size = synthetic.write_checkpoint(tmp_path / f"kimi-{layers}", synthetic.configuration(layers))
        assert size > 90 * 2**30 or layers < 27
        (tmp_path / f"work-{layers}").mkdir()
        peaks.append(synthetic.operate(tmp_path / f"kimi-{layers}", tmp_path / f"work-{layers}")[2])
    assert max(peaks) < (700 if torch.version.cuda is None else 1400)  # importing torch for CUDA alone takes 1 GB
    assert abs(peaks[0] - peaks[1]) < 64


def test_the_synthetic_checkpoint_is_what_transformers_expects(tmp_path: Path) -> None:
    small = {"hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16, "num_experts": 4}
    small |= {"num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 16, "num_experts_per_token": 2}
    small |= {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    config = synthetic.configuration(8, linear_head_dim=8, linear_num_heads=2, **small)
    folder = tmp_path / "model"
    synthetic.write_checkpoint(folder, config, shards=3)
    assert inspect_weights(folder).tensors == len(synthetic.tensors(config))
    synthetic.check(folder)
    result = operate(tmp_path, verify=False)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert result.base_parameters == sum(p.numel() for p in loaded.parameters())
    assert result.layers == 8


# -- the command -------------------------------------------------------------------------------------------------------


def rr(*arguments: str, directory: Path) -> Any:
    return CliRunner().invoke(app, ["surgery", *arguments, "--dir", str(directory)])


def test_the_table_says_what_was_added_and_what_it_costs(tmp_path: Path) -> None:
    shown = rr("--export", "alone", directory=tmp_path)
    assert shown.exit_code == 0, shown.stderr
    layers = AutoConfig.from_pretrained(defaults.MODEL_DIR).num_hidden_layers
    again = f"0:{layers} run again"
    for words in ("llama", again, "bit-identical", "KiB/token", "MFLOPs", "one decoded token", "do not grow"):
        assert words in shown.stdout
    assert str(tmp_path / "alone") in shown.stdout.replace("\n", "")
    assert "rr eval --stage after_surgery" in shown.stdout


def test_json_is_one_object_with_a_schema(tmp_path: Path) -> None:
    shown = rr("--json", "--no-verify", "--hash", "--max-steps", "3", directory=tmp_path)
    value = json.loads(shown.stdout)
    assert value["schema"] == "rr.surgery/1"
    assert value["hashed"] is True
    assert value["verified_depths"] == []
    assert value["folder"] == str(sidecar(tmp_path))
    assert len(value["costs"]["cache_bytes_per_token"]) == len(value["costs"]["flops_per_token"]) == 4
    assert value["costs"]["flops_formula"]


@pytest.mark.parametrize("options", [[], ["--no-verify"], ["--hash"], ["--export", "alone"]], ids=str)
def test_a_dry_run_writes_nothing(tmp_path: Path, options: list[str]) -> None:
    shown = rr("--dry-run", *options, directory=tmp_path)
    assert shown.exit_code == 0
    assert "nothing (--dry-run)" in shown.stdout
    assert list(tmp_path.iterdir()) == []


def test_an_existing_sidecar_is_replaced_only_when_asked(tmp_path: Path) -> None:
    assert rr("--no-verify", directory=tmp_path).exit_code == 0
    again = rr("--no-verify", directory=tmp_path)
    assert again.exit_code == 1
    assert "exists already" in again.stderr
    assert "--overwrite" in again.stderr
    assert rr("--no-verify", "--overwrite", directory=tmp_path).exit_code == 0
