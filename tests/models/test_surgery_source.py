"""What surgery and loading refuse by name: broken models, changed bases, sidecars that are not whole."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import rrcli
from operating import operate, sidecar, written
from rrcli.demo import defaults
from rrcli.errors import RRError
from rrcli.models.inspection import inspect_weights
from rrcli.models.manifest import read_manifest

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
    moved = [name for name, shard in index["weight_map"].items() if shard == shards[1]]
    assert len(moved) > 1
    index["weight_map"] |= dict.fromkeys(moved, shards[2])
    file.write_text(json.dumps(index))
    with pytest.raises(RRError, match=f"names the tensor '{moved[0]}' in {shards[2]}") as caught:
        operate(tmp_path)
    assert f"{len(moved) - 1} more problems" in caught.value.message
    assert written(tmp_path) == []


@pytest.mark.parametrize("weight_map", [None, [], {"a": 3}], ids=str)
def test_an_index_that_maps_nothing(model: Path, tmp_path: Path, weight_map: Any) -> None:
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(RRError, match=r"index\.json: weight_map.*: expected"):
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


def test_files_without_an_index_are_not_guessed_at(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_file({"same": torch.ones(3)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(RRError, match=r"no model\.safetensors .* only one\.safetensors, two\.safetensors"):
        inspect_weights(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GGUF", "not a GGUF file"),
        (b"GGML" + struct.pack("<IQQ", 3, 1, 1), "not a GGUF file"),
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


# -- hashes ------------------------------------------------------------------------------------------------------------


def test_hashes_are_recorded_and_compared_when_asked(model: Path, tmp_path: Path) -> None:
    import hashlib

    operate(tmp_path, hash_weights=True, verify=False)
    recorded = read_manifest(sidecar(tmp_path))["base"]["sha256"]
    assert recorded == {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in model.glob("*.safetensors")}
    rrcli.load(sidecar(tmp_path), check_hashes=True)


@pytest.mark.parametrize("hashed", [True, False])
def test_a_byte_between_the_samples_is_seen_by_times_and_hashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hashed: bool
) -> None:
    # So small a file would be hashed whole.
    monkeypatch.setattr("rrcli.models.weights.WHOLE_BYTES", 1024)
    monkeypatch.setattr("rrcli.models.weights.BLOCK_BYTES", 1024)
    folder = tmp_path / "model"
    shutil.copytree(defaults.MODEL_DIR, folder)
    operate(tmp_path, hash_weights=hashed, verify=False)
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    place = next(i for i in range(len(content) // 2, len(content)) if not sampled(i, len(content)))
    content[place] ^= 1
    before = file.stat()
    file.write_bytes(content)
    found = r"changed: its SHA-256 was \w{64}, found \w{64}" if hashed else "was written again after"
    with pytest.raises(RRError, match=found):
        rrcli.load(sidecar(tmp_path))
    # With its old time it looks like the old file, except to whoever reads all of it.
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    rrcli.load(sidecar(tmp_path))
    with pytest.raises(RRError, match=found if hashed else "records no hashes"):
        rrcli.load(sidecar(tmp_path), check_hashes=True)


def sampled(place: int, size: int) -> bool:
    from rrcli.models.weights import BLOCK_BYTES, SAMPLED_BLOCKS

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
        (lambda m: m.pop("weights"), "missing required field `weights`"),
        (lambda m: m.pop("base"), "missing required field `base`"),
        (lambda m: m["base"].pop("fingerprint"), "base: object missing required field `fingerprint`"),
        (lambda m: m["recursion"].pop("max_steps"), "recursion: object missing required field `max_steps`"),
        (lambda m: m.update(recursoin=None), "unknown key 'recursoin'"),
        (lambda m: m["base"].update(sha265={}), "under 'base', holds the unknown key 'sha265'"),
        (lambda m: m["recursion"].update(stpes=3), "under 'recursion', holds the unknown key 'stpes'"),
        (lambda m: m.update(base="default"), "base: expected `object`, got `str`"),
        (lambda m: m.update(weights="mine"), "weights: invalid enum value 'mine'"),
        (lambda m: m["recursion"].update(max_steps=99), "max_steps is 99"),
        (lambda m: m["recursion"].update(span=[3]), "span: "),
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
