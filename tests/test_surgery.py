"""Surgery: what it refuses before it works, what it writes, what it says a token costs, and what an export is."""

from __future__ import annotations

import functools
import json
import os
import shutil
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

import rrcli
from families import CONFIGS, FAMILIES, SPANS, build, tokens, wake
from rrcli import costs, demo, verification
from rrcli.cli import app
from rrcli.errors import CheckFailed, RRError, UsageError
from rrcli.inspection import inspect_weights
from rrcli.manifest import read_manifest
from rrcli.models import ModelSource
from rrcli.recursion import caches
from rrcli.reporting import Silent
from rrcli.services.surgery import SurgeryResult, surgery
from rrcli.settings import SurgerySettings
from rrcli.skeleton import skeleton

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import synthetic_kimi_48b as synthetic

PROMPT = torch.tensor([[5, 9, 3, 17, 6, 30]])


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model in several shards with an index."""
    folder = tmp_path_factory.mktemp("sharded") / "model"
    model, tokenizer = rrcli.load("default")
    model.save_pretrained(folder, max_shard_size="1MB")
    tokenizer.save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture
def model(shards: Path, tmp_path: Path) -> Path:
    """A copy of the sharded model that a test may break."""
    return Path(shutil.copytree(shards, tmp_path / "model"))


def operate(directory: Path, model: Path | str = "model", **options: Any) -> SurgeryResult:
    return surgery(SurgerySettings(model=str(model)), directory, Silent(), **options)


def written(directory: Path) -> list[str]:
    """Everything under a directory other than the model itself."""
    found = (path.relative_to(directory) for path in directory.rglob("*"))
    return sorted(str(path) for path in found if path.parts[0] != "model")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(PROMPT).logits


def sidecar(directory: Path) -> Path:
    return directory / "checkpoints" / "after_surgery"


# -- the source is validated before anything ---------------------------------------------------------------------------


def rewrite(file: Path, change: Any, data: bytes | None = None) -> None:
    """Change the header of a safetensors file; the data stay as they are."""
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    change({name: entry for name, entry in header.items() if name != "__metadata__"})
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + (content[8 + length :] if data is None else data))


def first(header: dict[str, Any]) -> dict[str, Any]:
    return header[sorted(header)[0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header: first(header).update(dtype="F13"), "unknown number format 'F13'"),
        (lambda header: first(header).update(shape=[7]), r"needs 28 bytes \(F32, shape \[7\]\), its header gives"),
        (lambda header: first(header).update(shape=[-1]), r"has the shape \[-1\]"),
        (lambda header: first(header).update(shape="7"), "has the shape '7'"),
    ],
    ids=["dtype", "size", "negative", "no list"],
)
def test_a_header_that_cannot_be_is_refused_by_name(model: Path, tmp_path: Path, change: Any, message: str) -> None:
    shard = sorted(model.glob("*.safetensors"))[1]
    rewrite(shard, change)
    with pytest.raises(RRError, match=message) as caught:
        operate(tmp_path, verify=False)
    assert str(shard) in caught.value.message
    assert caught.value.hint
    assert written(tmp_path) == []


def test_data_with_a_gap_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(4), "b": torch.ones(4)}, file)

    def move(header: dict[str, Any]) -> None:
        header["b"]["data_offsets"] = [20, 36]

    rewrite(file, move, bytes(36))
    with pytest.raises(RRError, match="tensor 'b' begins at byte 20 of the data, byte 16 was expected"):
        inspect_weights(tmp_path)


def test_an_index_that_names_a_tensor_where_it_is_not(model: Path, tmp_path: Path) -> None:
    file = model / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    shards = sorted(set(index["weight_map"].values()))
    moved = [name for name, shard in index["weight_map"].items() if shard == shards[0]]
    index["weight_map"] |= dict.fromkeys(moved, shards[1])
    file.write_text(json.dumps(index))
    with pytest.raises(RRError, match=f"names the tensor '{moved[0]}' in {shards[1]}") as caught:
        operate(tmp_path)
    if len(moved) > 1:
        assert f"{len(moved) - 1} more problems" in caught.value.message
    assert written(tmp_path) == []


@pytest.mark.parametrize("weight_map", [None, [], {"a": 3}], ids=str)
def test_an_index_that_maps_nothing(model: Path, tmp_path: Path, weight_map: Any) -> None:
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(RRError, match="holds no map from tensors to files"):
        operate(tmp_path)


def test_missing_and_truncated_shards_are_named(model: Path, tmp_path: Path) -> None:
    shard = sorted(model.glob("*.safetensors"))[-1]
    size = shard.stat().st_size
    os.truncate(shard, size - 5)
    with pytest.raises(RRError, match=f"{shard.name} is truncated: .* {size} bytes, it has {size - 5}"):
        operate(tmp_path, verify=False)
    shard.unlink()
    with pytest.raises(RRError, match=f"lacks {shard.name}"):
        operate(tmp_path, verify=False)


def test_a_tensor_in_two_files_without_an_index(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_file({"same": torch.ones(3)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(RRError, match="tensor 'same' is in 2 files"):
        inspect_weights(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GGUF", "no GGUF file"),
        (b"GGML" + struct.pack("<IQQ", 3, 1, 1), "no GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 9, 1, 1), "version 9"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1), "no tensors"),
    ],
    ids=["short", "magic", "version", "empty"],
)
def test_a_gguf_file_that_cannot_be(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(RRError, match=message):
        inspect_weights(tmp_path / "model.gguf")


def test_weights_are_described_from_headers(shards: Path) -> None:
    found = inspect_weights(shards)
    assert found.dtype == "F32"
    assert found.tensors == sum(len(load_file(file)) for file in found.files)
    assert found.size == sum(file.stat().st_size for file in shards.glob("*.safetensors"))


# -- verification ------------------------------------------------------------------------------------------------------


def test_every_depth_is_compared_uncached_and_cached(tmp_path: Path) -> None:
    result = operate(tmp_path, "default")
    assert result.verified_depths == [0, 1, 2]
    assert result.added_parameters == sum(
        t.numel() for t in load_file(sidecar(tmp_path) / "recursion.safetensors").values()
    )
    assert result.bytes_written == sum(file.stat().st_size for file in sidecar(tmp_path).iterdir())


def test_a_change_is_found_and_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rrcli.recursion import cell

    def nudged(self: Any, hidden: torch.Tensor, step: int) -> torch.Tensor:
        return torch.full_like(hidden, 1e-3) if step == 2 else torch.zeros_like(hidden)

    monkeypatch.setattr(cell.FeedbackCell, "forward", nudged)
    failed = CliRunner().invoke(app, ["surgery", "--dir", str(tmp_path), "--export", "alone"])
    assert failed.exit_code == 3
    assert "at depth 2, uncached, logits differ" in failed.stderr
    assert "Nothing was written" in failed.stderr
    assert written(tmp_path) == ["checkpoints"] or written(tmp_path) == []


def test_a_change_that_only_the_cache_shows_is_found() -> None:
    loaded, tokenizer = rrcli.load("default")
    before = verification.reference(loaded, tokenizer)
    recursion = rrcli.attach(loaded)
    cell = recursion.cell.forward

    def wrong_when_decoding(hidden: torch.Tensor, step: int) -> torch.Tensor:
        return cell(hidden, step) + (1e-3 if hidden.shape[1] == 1 else 0)

    recursion.cell.forward = wrong_when_decoding
    with pytest.raises(CheckFailed, match="at depth 1, cached, logits differ"):
        verification.verify(loaded, tokenizer, before, Silent())


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
    assert max(peaks) < 700
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


# -- what a token costs ------------------------------------------------------------------------------------------------


def skeleton_of(family: str) -> Any:
    config = AutoConfig.for_model(family, **(CONFIGS[family] | {"pad_token_id": 0, "bos_token_id": 1}))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@functools.cache
def measured_at(family: str, span: tuple[int, int] | None, depth: int) -> tuple[int, int, int]:
    """Bytes per token, constant bytes and FLOPs of one decoded token, as they are when the passes really run."""
    model = build(family)
    recursion = wake(rrcli.attach(model, rrcli.RecursionConfig(max_steps=2, span=span)))
    name, ids = caches.argument_of(model), tokens(1, costs.PROMPT_TOKENS + 1)
    with recursion.at_depth(depth), torch.no_grad(), costs.countable(model):
        cache = getattr(model(input_ids=ids[:, :-1], use_cache=True), name)
        before = costs._bytes(cache, set())
        with FlopCounterMode(display=False) as counter:
            model(input_ids=ids[:, -1:], use_cache=True, **{name: cache})
        after = costs._bytes(cache, set())
    growth = after - before
    return growth, after - growth * ids.shape[1], counter.get_total_flops()


@pytest.mark.parametrize("span", SPANS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["model", "skeleton"])
def test_costs_are_those_of_really_running_the_passes(kind: str, family: str, span: tuple[int, int] | None) -> None:
    model = build(family) if kind == "model" else skeleton_of(family)
    rrcli.attach(model, rrcli.RecursionConfig(max_steps=2, span=span))
    found = costs.measure(model)
    for depth in range(3):
        real = measured_at(family, span, depth)
        assert (
            found.cache_bytes_per_token[depth],
            found.cache_bytes_constant[depth],
            found.flops_per_token[depth],
        ) == real
    assert found.dtype == "float32"


def test_costs_of_a_llama_by_hand() -> None:
    model = build("llama")
    rrcli.attach(model, rrcli.RecursionConfig(max_steps=1))
    found = costs.measure(model)
    keys_and_values = 2 * 2 * 8 * 4  # two of them, 2 heads of width 8, 4 bytes
    assert found.cache_bytes_per_token == [4 * keys_and_values, 2 * 4 * keys_and_values]
    assert found.cache_bytes_constant == [0, 0]
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2) - model.get_input_embeddings().weight.numel()
    attention = 4 * 2 * 4 * 8 * (costs.PROMPT_TOKENS + 1)  # scores and values: layers, 2, heads, width, positions
    assert found.flops_per_token[0] == 2 * (matrices + attention)


def test_recurrent_states_do_not_grow() -> None:
    for family in ("mamba2", "kimi_linear", "qwen3_next"):
        model = skeleton_of(family)
        rrcli.attach(model, rrcli.RecursionConfig(max_steps=1))
        found = costs.measure(model)
        assert found.cache_bytes_constant[0] > 0
        assert found.cache_bytes_constant[1] == 2 * found.cache_bytes_constant[0]
        assert (found.cache_bytes_per_token[0] == 0) is (family == "mamba2")


def test_measuring_leaves_no_trace() -> None:
    model = build("kimi_linear")
    rrcli.attach(model)
    before = logits(model)
    hooks = [len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in model.recursion.layers]
    implementation = model.config._experts_implementation
    costs.measure(model)
    assert torch.equal(logits(model), before)
    assert model.recursion.depth == 2
    assert model.config._experts_implementation == implementation
    assert [len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in model.recursion.layers] == hooks


def test_costs_that_cannot_be_measured_are_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Any) -> None:
        raise NotImplementedError("no kernel for meta")

    monkeypatch.setattr(costs, "measure", fail)
    reporter = Silent()
    result = surgery(SurgerySettings(), tmp_path, reporter)
    assert result.costs is None
    assert "no kernel for meta" in reporter.warnings[0]
    assert sidecar(tmp_path).is_dir()


# -- hashes ------------------------------------------------------------------------------------------------------------


def test_hashes_are_recorded_and_compared_when_asked(model: Path, tmp_path: Path) -> None:
    import hashlib

    operate(tmp_path, hash_weights=True, verify=False)
    recorded = read_manifest(sidecar(tmp_path))["base"]["sha256"]
    assert recorded == {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in model.glob("*.safetensors")}
    rrcli.load(sidecar(tmp_path), check_hashes=True)


def test_a_byte_between_the_samples_is_seen_by_hashes_only(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(demo.MODEL_DIR, folder)
    operate(tmp_path, hash_weights=True, verify=False)
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    place = next(i for i in (100_000, 300_000, 500_000) if not sampled(i, len(content)))
    content[place] ^= 1
    file.write_bytes(content)
    rrcli.load(sidecar(tmp_path))
    with pytest.raises(RRError, match=r"changed: its SHA-256 was \w{64}, found \w{64}"):
        rrcli.load(sidecar(tmp_path), check_hashes=True)


def sampled(place: int, size: int) -> bool:
    from rrcli.store import BLOCK_BYTES, SAMPLED_BLOCKS

    starts = [max(0, size - BLOCK_BYTES) * block // (SAMPLED_BLOCKS - 1) for block in range(SAMPLED_BLOCKS)]
    return any(start <= place < start + BLOCK_BYTES for start in starts)


def test_hashes_that_were_not_recorded_cannot_be_compared(tmp_path: Path) -> None:
    operate(tmp_path, "default")
    assert "sha256" not in read_manifest(sidecar(tmp_path))["base"]
    with pytest.raises(RRError, match="records no hashes") as caught:
        rrcli.load(sidecar(tmp_path), check_hashes=True)
    assert "--hash" in caught.value.hint


# -- loading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("weights"), "lacks the key 'weights'"),
        (lambda m: m.pop("base"), "lacks the key 'base'"),
        (lambda m: m["base"].pop("fingerprint"), "under 'base', lacks the key 'fingerprint'"),
        (lambda m: m["recursion"].pop("max_steps"), "under 'recursion', lacks the key 'max_steps'"),
        (lambda m: m.update(recursoin=None), "unknown key 'recursoin'"),
        (lambda m: m["base"].update(sha265={}), "under 'base', holds the unknown key 'sha265'"),
        (lambda m: m["recursion"].update(stpes=3), "under 'recursion', holds the unknown key 'stpes'"),
        (lambda m: m.update(base="default"), "under 'base', holds no JSON object"),
        (lambda m: m.update(weights="mine"), "its weights are 'mine'"),
        (lambda m: m["recursion"].update(max_steps=99), "max_steps is 99"),
        (lambda m: m["recursion"].update(span=[3]), "holds no recursion"),
        (lambda m: m.update(schema=99), "schema 99"),
    ],
)
def test_a_manifest_that_is_not_whole_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    operate(tmp_path, "default", verify=False)
    file = sidecar(tmp_path) / "recursion.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))
    with pytest.raises(RRError, match=message) as caught:
        rrcli.load(sidecar(tmp_path))
    assert str(file) in caught.value.message
    assert caught.value.exit_code == 1


def test_a_base_that_changed_is_shown_with_both_fingerprints(model: Path, tmp_path: Path) -> None:
    operate(tmp_path, verify=False)
    made_for = read_manifest(sidecar(tmp_path))["base"]["fingerprint"]
    (model / "config.json").write_text((model / "config.json").read_text() + "\n")
    with pytest.raises(RRError, match=f"was made for {made_for}, found "):
        rrcli.load(sidecar(tmp_path))


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_sidecar_tensors_that_do_not_fit_are_refused(tmp_path: Path, change: str) -> None:
    operate(tmp_path, "default")
    file = sidecar(tmp_path) / "recursion.safetensors"
    tensors = load_file(file)
    if change == "missing":
        del tensors["cell.step.weight"]
    elif change == "unexpected":
        tensors["cell.other"] = torch.ones(1)
    else:
        tensors["cell.w_in.weight"] = torch.ones(3, 3)
    save_file(tensors, file)
    with pytest.raises(RRError, match=r"recursion\.safetensors does not fit its recursion\.json"):
        rrcli.load(sidecar(tmp_path))


# -- export ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verify", [True, False])
def test_an_export_stands_alone_and_takes_no_space(model: Path, tmp_path: Path, verify: bool) -> None:
    result = operate(tmp_path, export=Path("alone"), verify=verify)
    alone = tmp_path / "alone"
    assert result.export == alone
    stock, _ = rrcli.load(model)
    expected = logits(stock)
    for file in model.glob("*.safetensors"):
        assert (alone / file.name).stat().st_ino == file.stat().st_ino
    shutil.rmtree(sidecar(tmp_path))
    shutil.rmtree(model)
    loaded, _ = rrcli.load(alone)
    assert loaded.recursion.depth == 2
    assert torch.equal(logits(loaded), expected)
    plain, found = AutoModelForCausalLM.from_pretrained(alone, output_loading_info=True)
    assert not any(found.values())
    assert torch.equal(logits(plain.eval()), expected)


def test_writing_into_an_export_leaves_the_base_alone(model: Path, tmp_path: Path) -> None:
    operate(tmp_path, export=Path("alone"), verify=False)
    before = {file.name: file.read_bytes() for file in model.iterdir()}
    loaded, tokenizer = rrcli.load(tmp_path / "alone")
    loaded.recursion.detach()
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.zero_()
    loaded.save_pretrained(tmp_path / "alone", max_shard_size="1MB")
    tokenizer.save_pretrained(tmp_path / "alone")
    for file in (tmp_path / "alone").glob("model-*.safetensors"):
        save_file({"x": torch.zeros(3)}, file)
    (tmp_path / "alone" / "config.json").write_text("{}")
    assert {file.name: file.read_bytes() for file in model.iterdir()} == before


def test_links_of_a_download_cache_are_resolved(model: Path, tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(model.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(Path("..") / "blobs" / str(number))
    operate(tmp_path, export=Path("deep/er/alone"), verify=False)
    alone = tmp_path / "deep" / "er" / "alone"
    assert not any(file.is_symlink() for file in alone.iterdir())
    assert {(alone / f.name).stat().st_ino for f in model.glob("*.safetensors")} <= {
        b.stat().st_ino for b in blobs.iterdir()
    }
    shutil.rmtree(model)
    rrcli.load(alone)


def test_weights_that_cannot_be_linked_are_copied_and_it_is_said(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other_device(*_: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", other_device)
    reporter = Silent()
    result = surgery(SurgerySettings(model="model"), tmp_path, reporter, verify=False, export=Path("alone"))
    count = len(list(model.glob("*.safetensors")))
    assert result.copied_files == count
    assert f"{count} weight files were copied" in reporter.warnings[0]
    for file in model.glob("*.safetensors"):
        assert (tmp_path / "alone" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("where", ["model/alone", "model", ".", "checkpoints", "checkpoints/after_surgery/alone"])
@pytest.mark.parametrize("overwrite", [True, False])
def test_an_export_that_would_harm_something_is_refused(
    model: Path, tmp_path: Path, where: str, overwrite: bool
) -> None:
    with pytest.raises(RRError, match=r"lie in each other|exists already"):
        operate(tmp_path, export=Path(where), overwrite=overwrite, verify=False)
    assert written(tmp_path) == []
    inspect_weights(model)


def test_an_export_replaces_only_an_export_and_only_when_asked(model: Path, tmp_path: Path) -> None:
    operate(tmp_path, export=Path("alone"), verify=False)
    (tmp_path / "alone" / "stale").touch()
    with pytest.raises(RRError, match="exists already") as caught:
        operate(tmp_path, export=Path("alone"), verify=False)
    assert "--overwrite" in caught.value.hint
    operate(tmp_path, export=Path("alone"), overwrite=True, verify=False)
    assert not (tmp_path / "alone" / "stale").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(RRError, match="is no export"):
        operate(tmp_path, export=Path("mine"), overwrite=True, verify=False)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"
    inspect_weights(model)


def test_a_gguf_base_is_not_exported(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 1))
    with pytest.raises(UsageError, match="needs a model folder"):
        operate(tmp_path, "model.gguf", export=Path("alone"))


# -- the command -------------------------------------------------------------------------------------------------------


def rr(*arguments: str, directory: Path) -> Any:
    return CliRunner().invoke(app, ["surgery", *arguments, "--dir", str(directory)])


def test_the_table_says_what_was_added_and_what_it_costs(tmp_path: Path) -> None:
    shown = rr("--export", "alone", directory=tmp_path)
    assert shown.exit_code == 0, shown.stderr
    for words in ("llama", "0:4 run again", "bit-identical", "KiB/token", "MFLOPs", "FlopCounterMode", "do not grow"):
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
