"""Weight files that are recognised when they are broken, and fingerprints that see every change."""

from __future__ import annotations

import json
import os
import re
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from rrcli import files
from rrcli.errors import RRError
from rrcli.models import weights

# -- weights -----------------------------------------------------------------------------------------------------------


def save(file: Path, **tensors: np.ndarray) -> Path:
    save_file(tensors or {"weight": np.arange(24, dtype=np.float32).reshape(4, 6)}, file)
    return file


def model_folder(path: Path, **tensors: np.ndarray) -> Path:
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "llama"}')
    save(path / "model.safetensors", **tensors)
    return path


def test_header_of_a_whole_file(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": np.zeros((2, 3), np.float32), "b": np.zeros(5, np.float16)}, file, metadata={"format": "np"})
    header = files.safetensors_header(file)
    assert {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()} == {
        "a": ("F32", [2, 3]),
        "b": ("F16", [5]),
    }


@pytest.mark.parametrize("missing", [1, 40, 96])
def test_truncated_data_is_told_in_bytes(tmp_path: Path, missing: int) -> None:
    file = save(tmp_path / "model.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:-missing])
    with pytest.raises(RRError, match="truncated") as caught:
        files.safetensors_header(file)
    assert str(file) in caught.value.message
    assert str(len(whole)) in caught.value.message
    assert str(len(whole) - missing) in caught.value.message


@pytest.mark.parametrize("kept", [0, 3, 7, 8, 20])
def test_a_file_cut_inside_its_header_is_truncated(tmp_path: Path, kept: int) -> None:
    file = save(tmp_path / "model.safetensors")
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(RRError, match=f"truncated.*it has {kept}$"):
        files.safetensors_header(file)


def test_bytes_too_many_are_told(tmp_path: Path) -> None:
    file = save(tmp_path / "model.safetensors")
    file.write_bytes(file.read_bytes() + b"more")
    with pytest.raises(RRError, match=f"too long.*it has {file.stat().st_size}$"):
        files.safetensors_header(file)


@pytest.mark.parametrize("header", [b"not json", b"[1, 2]", b'{"a": 1}', b'{"a": {}}', b"\xff\xfe", b"3"])
def test_a_header_that_is_garbage_is_no_safetensors(tmp_path: Path, header: bytes) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(RRError, match="is not a safetensors file"):
        files.safetensors_header(file)


@given(st.binary(max_size=80))
def test_any_bytes_give_a_header_or_one_of_our_errors(data: bytes) -> None:
    file = Path(tempfile.gettempdir()) / f"rr-test-{os.getpid()}.safetensors"
    file.write_bytes(data)
    try:
        with pytest.raises(RRError):
            files.safetensors_header(file)
    finally:
        file.unlink()


def test_weight_files_of_a_plain_folder(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    save(folder / files.SIDECAR)
    assert weights.weight_files(folder) == [folder / "model.safetensors"]


def sharded(path: Path) -> Path:
    path.mkdir()
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    for tensor, name in shards.items():
        save(path / name, **{tensor: np.ones(3, np.float32)})
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    return path


def test_weight_files_of_shards(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model")
    assert [file.name for file in weights.weight_files(folder)] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    save(folder / "stray.safetensors")
    assert len(weights.weight_files(folder)) == 2


def test_a_missing_or_cut_shard_is_named(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model")
    last = folder / "model-00002-of-00002.safetensors"
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.raises(RRError, match=r"model-00002-of-00002\.safetensors is truncated"):
        weights.weight_files(folder)
    last.unlink()
    with pytest.raises(RRError, match=r"lacks model-00002-of-00002\.safetensors"):
        weights.weight_files(folder)


def test_an_index_cannot_point_outside_its_folder(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model")
    save(tmp_path / "outside.safetensors")
    index = {"weight_map": {"a": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(RRError, match="is not a plain name"):
        weights.weight_files(folder)


@pytest.mark.parametrize("pickled", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_never_read(tmp_path: Path, pickled: str) -> None:
    (tmp_path / pickled).write_bytes(b"\x80\x04.")
    with pytest.raises(RRError, match=f"only pickled weights \\({pickled}\\)") as caught:
        weights.weight_files(tmp_path)
    assert "safetensors" in caught.value.hint


def test_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(RRError, match="no weights"):
        weights.weight_files(tmp_path)


def test_a_single_file_is_its_own_weights(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    assert weights.weight_files(file) == [file]


# -- fingerprints ------------------------------------------------------------------------------------------------------


def test_a_fingerprint_is_the_same_for_a_copy_and_after_touching(tmp_path: Path) -> None:
    first, copy = model_folder(tmp_path / "first"), model_folder(tmp_path / "copy")
    known = weights.fingerprint(first)
    assert weights.fingerprint(copy) == known
    (first / "README.md").write_text("not part of the model")
    os.utime(first / "model.safetensors", (1, 1))
    assert weights.fingerprint(first) == known


@pytest.mark.parametrize("size", [24, 16 * 1024, 200 * 1024])
def test_a_fingerprint_sees_every_single_byte_of_a_small_file(tmp_path: Path, size: int) -> None:
    folder = model_folder(tmp_path / "model", weight=np.zeros(size, np.float32))
    known = {weights.fingerprint(folder)}
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    places = [0, 8, 20, len(whole) // 3, len(whole) // 2, len(whole) - 2, len(whole) - 1]
    for place in places:
        changed = bytearray(whole)
        changed[place] ^= 1
        file.write_bytes(changed)
        known.add(weights.fingerprint(folder))
    assert len(known) == 1 + len(places)


def test_a_fingerprint_of_a_large_file_sees_a_training_step(tmp_path: Path) -> None:
    values = np.zeros(2_000_000, np.float32)
    first = model_folder(tmp_path / "first", weight=values)
    second = model_folder(tmp_path / "second", weight=values + np.float32(1e-8))
    assert weights.fingerprint(first) != weights.fingerprint(second)


@pytest.mark.parametrize("name", ["config.json", files.MANIFEST])
def test_a_fingerprint_changes_with_the_configuration(tmp_path: Path, name: str) -> None:
    folder = model_folder(tmp_path / "model")
    before = weights.fingerprint(folder)
    (folder / name).write_text('{"model_type": "other"}')
    assert weights.fingerprint(folder) != before


def test_a_fingerprint_changes_with_the_files_that_are_read_and_with_no_others(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    known = weights.fingerprint(folder)
    save(folder / "model.fp16.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"weight": "gone.safetensors"}}))
    assert weights.fingerprint(folder) == known
    (folder / "model.safetensors").rename(folder / "gone.safetensors")
    assert weights.fingerprint(folder) != known


def test_a_fingerprint_of_version_0_1_is_known_again(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    (folder / "vocab.json").write_text("{}")
    assert weights.fingerprint_0_1(folder) == "248ce06400239607"  # as that version computed it


def test_a_fingerprint_of_a_gguf_file_is_its_content(tmp_path: Path) -> None:
    for name, content in (("a.gguf", b"GGUF one"), ("b.gguf", b"GGUF one"), ("c.gguf", b"GGUF two")):
        (tmp_path / name).write_bytes(content)
    a, b, c = (weights.fingerprint(tmp_path / f"{name}.gguf") for name in "abc")
    assert a == b != c


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="nothing counts what was read")
def test_a_fingerprint_does_not_read_a_huge_file_whole(tmp_path: Path) -> None:
    file = tmp_path / "huge.gguf"
    with file.open("wb") as sparse:
        sparse.write(b"GGUF")
        sparse.truncate(8 * 2**30)
    before = _read()
    weights.fingerprint(file)
    assert _read() - before < 2**28


def _read() -> int:
    """How many bytes this process has read from files."""
    return int(re.findall(r"rchar: (\d+)", Path("/proc/self/io").read_text())[0])
