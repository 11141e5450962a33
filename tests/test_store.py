"""Files that are whole or not there, and models that are recognised when they are broken."""

from __future__ import annotations

import json
import math
import os
import struct
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from rrcli import store
from rrcli.errors import RRError, UsageError

# A busy machine must not fail a property: no limit of time for an example.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

needs_permissions = pytest.mark.skipif(
    os.name != "posix" or os.geteuid() == 0, reason="the superuser may write everywhere"
)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# -- JSON --------------------------------------------------------------------------------------------------------------


def test_write_json_publishes_and_replaces(tmp_path: Path) -> None:
    file = tmp_path / "new" / "folder" / "results.json"
    store.write_json(file, {"a": [1, 2.5, None, "é"]})
    assert store.read_json(file, "rr eval") == {"a": [1, 2.5, None, "é"]}
    store.write_json(file, {"b": 1})
    assert store.read_json(file, "rr eval") == {"b": 1}
    assert names(file.parent) == {"results.json"}


def test_a_reader_that_has_the_old_file_open_keeps_it(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    store.write_json(file, {"old": True})
    with file.open() as reader:
        store.write_json(file, {"new": True})
        assert json.load(reader) == {"old": True}
    assert json.loads(file.read_text()) == {"new": True}


@pytest.mark.parametrize("value", [math.nan, math.inf, [1, {"deep": -math.inf}], object()])
def test_write_json_refuses_what_json_cannot_say_and_keeps_the_old_file(tmp_path: Path, value: Any) -> None:
    file = tmp_path / "results.json"
    store.write_json(file, {"good": True})
    with pytest.raises((ValueError, TypeError)):
        store.write_json(file, {"bad": value})
    assert json.loads(file.read_text()) == {"good": True}
    assert names(tmp_path) == {"results.json"}


def test_a_failing_disk_keeps_the_old_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "results.json"
    store.write_json(file, {"good": True})

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.os, "fsync", full)
    with pytest.raises(RRError, match="No space left"):
        store.write_json(file, {"bad": True})
    assert json.loads(file.read_text()) == {"good": True}
    assert names(tmp_path) == {"results.json"}


def test_write_json_over_a_folder_or_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "taken.json").mkdir()
    with pytest.raises(RRError, match=r"taken\.json"):
        store.write_json(tmp_path / "taken.json", {})
    (tmp_path / "file").write_text("here")
    with pytest.raises(RRError, match="is a file, a folder was expected"):
        store.write_json(tmp_path / "file" / "results.json", {})
    assert names(tmp_path) == {"taken.json", "file"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"schema": 1, "metr', "cut off or no JSON"),
        ("", "cut off or no JSON"),
        ("[1, 2]", "holds no JSON object"),
        ('{"schema": 99}', "has schema 99"),
    ],
)
def test_read_json_refuses(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "results.json"
    file.write_text(text)
    with pytest.raises(RRError, match=message) as caught:
        store.read_json(file, "rr eval --stage baseline")
    assert str(file) in caught.value.message
    assert caught.value.hint


def test_read_json_of_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_bytes(b"\xff\xfe\x00{}")
    with pytest.raises(RRError, match=r"results\.json"):
        store.read_json(tmp_path / "results.json", "rr eval")


def test_read_json_names_the_command_that_makes_the_file(tmp_path: Path) -> None:
    with pytest.raises(RRError, match="does not exist") as caught:
        store.read_json(tmp_path / "absent.json", "rr eval --stage baseline")
    assert "rr eval --stage baseline" in caught.value.hint


# -- folders -----------------------------------------------------------------------------------------------------------


def test_publish_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "runs" / "step-1"
    with store.publish_folder(target) as folder:
        assert not target.exists()
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text("content")
    assert (target / "inner" / "file").read_text() == "content"
    assert names(target.parent) == {"step-1"}


def test_publish_folder_replaces_only_when_asked(tmp_path: Path) -> None:
    target = tmp_path / "surgery"
    with store.publish_folder(target) as folder:
        (folder / "old").touch()
    with pytest.raises(RRError, match="exists already") as caught, store.publish_folder(target):
        pytest.fail("the body must not run")
    assert "--overwrite" in caught.value.hint
    with store.publish_folder(target, overwrite=True) as folder:
        (folder / "new").touch()
    assert names(target) == {"new"}
    assert names(tmp_path) == {"surgery"}


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyboardInterrupt(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("overwrite", [True, False])
def test_an_exception_inside_leaves_nothing_and_keeps_the_old(
    tmp_path: Path, error: BaseException, overwrite: bool
) -> None:
    target = tmp_path / "step-1"
    if overwrite:
        target.mkdir()
        (target / "old").write_text("kept")
    expected = RRError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected), store.publish_folder(target, overwrite=overwrite) as folder:  # noqa: PT012
        (folder / "half").touch()
        raise error
    if overwrite:
        assert (target / "old").read_text() == "kept"
    assert names(tmp_path) == ({"step-1"} if overwrite else set())


def test_a_failing_rename_keeps_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "step-1"
    target.mkdir()
    (target / "old").write_text("kept")
    rename = Path.rename

    def failing(self: Path, new: Path) -> Path:
        if Path(new) == target and self.suffix == ".tmp":
            raise OSError(5, "Input/output error")
        return rename(self, new)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(RRError, match="Input/output error"), store.publish_folder(target, overwrite=True):
        pass
    assert (target / "old").read_text() == "kept"


def test_publish_folder_over_a_file_or_below_one(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("kept")
    for target in (file, file / "step-1"):
        with pytest.raises(RRError, match="is a file, a folder was expected"):  # noqa: SIM117
            with store.publish_folder(target, overwrite=True):
                pytest.fail("the body must not run")
    assert file.read_text() == "kept"


@needs_permissions
def test_a_read_only_parent_is_named(tmp_path: Path) -> None:
    parent = tmp_path / "locked"
    parent.mkdir(mode=0o555)
    with pytest.raises(RRError, match="locked is not writable"), store.publish_folder(parent / "step-1"):
        pytest.fail("the body must not run")
    with pytest.raises(RRError, match="locked is not writable"):
        store.write_json(parent / "results.json", {})


def test_a_dangling_link_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "logs").symlink_to(tmp_path / "unmounted" / "disk")
    with pytest.raises(RRError, match="logs"):
        store.make_folder(tmp_path / "logs")


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "../a", "a\\b", "/a", "a\0b", " a", "a ", "a\n"])
def test_safe_name_refuses(name: str) -> None:
    with pytest.raises(UsageError, match="is no plain name"):
        store.safe_name(name, "run name")


@pytest.mark.parametrize("name", ["finetuned_recursive", "run-1", "a..b", "a.b", "Läufe", "two words"])
def test_safe_name_accepts(name: str) -> None:
    assert store.safe_name(name, "run name") == name


@given(st.text(alphabet=st.characters() | st.sampled_from("./\\ \0"), max_size=12))
def test_a_safe_name_never_leaves_its_folder(name: str) -> None:
    try:
        accepted = store.safe_name(name, "run name")
    except UsageError:
        return
    path = Path("/experiment/checkpoints") / accepted
    assert path.parent == Path("/experiment/checkpoints")
    assert ".." not in path.parts
    assert os.path.normpath(path) == str(path)
    assert not accepted.startswith(".")


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
    header = store.safetensors_header(file)
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
        store.safetensors_header(file)
    assert str(file) in caught.value.message
    assert str(len(whole)) in caught.value.message
    assert str(len(whole) - missing) in caught.value.message


@pytest.mark.parametrize("kept", [0, 3, 7, 8, 20])
def test_a_file_cut_inside_its_header_is_truncated(tmp_path: Path, kept: int) -> None:
    file = save(tmp_path / "model.safetensors")
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(RRError, match=f"truncated.*it has {kept}$"):
        store.safetensors_header(file)


def test_bytes_too_many_are_told(tmp_path: Path) -> None:
    file = save(tmp_path / "model.safetensors")
    file.write_bytes(file.read_bytes() + b"more")
    with pytest.raises(RRError, match=f"too long.*it has {file.stat().st_size}$"):
        store.safetensors_header(file)


@pytest.mark.parametrize("header", [b"not json", b"[1, 2]", b'{"a": 1}', b'{"a": {}}', b"\xff\xfe", b"3"])
def test_a_header_that_is_garbage_is_no_safetensors(tmp_path: Path, header: bytes) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(RRError, match="is no safetensors file"):
        store.safetensors_header(file)


@given(st.binary(max_size=80))
def test_any_bytes_give_a_header_or_one_of_our_errors(data: bytes) -> None:
    file = Path(tempfile.gettempdir()) / f"rr-test-{os.getpid()}.safetensors"
    file.write_bytes(data)
    try:
        with pytest.raises(RRError):
            store.safetensors_header(file)
    finally:
        file.unlink()


def test_weight_files_of_a_plain_folder(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    save(folder / store.SIDECAR)
    assert store.weight_files(folder) == [folder / "model.safetensors"]


def sharded(path: Path) -> Path:
    path.mkdir()
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    for tensor, name in shards.items():
        save(path / name, **{tensor: np.ones(3, np.float32)})
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    return path


def test_weight_files_of_shards(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model")
    assert [file.name for file in store.weight_files(folder)] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    save(folder / "stray.safetensors")
    assert len(store.weight_files(folder)) == 2


def test_a_missing_or_cut_shard_is_named(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model")
    last = folder / "model-00002-of-00002.safetensors"
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.raises(RRError, match=r"model-00002-of-00002\.safetensors is truncated"):
        store.weight_files(folder)
    last.unlink()
    with pytest.raises(RRError, match=r"lacks model-00002-of-00002\.safetensors"):
        store.weight_files(folder)


def test_an_index_cannot_point_outside_its_folder(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model")
    save(tmp_path / "outside.safetensors")
    index = {"weight_map": {"a": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(RRError, match="is no plain name"):
        store.weight_files(folder)


@pytest.mark.parametrize("pickled", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_never_read(tmp_path: Path, pickled: str) -> None:
    (tmp_path / pickled).write_bytes(b"\x80\x04.")
    with pytest.raises(RRError, match=f"only pickled weights \\({pickled}\\)") as caught:
        store.weight_files(tmp_path)
    assert "safetensors" in caught.value.hint


def test_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(RRError, match="no weights"):
        store.weight_files(tmp_path)


def test_a_single_file_is_its_own_weights(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    assert store.weight_files(file) == [file]


# -- fingerprints ------------------------------------------------------------------------------------------------------


def test_a_fingerprint_is_the_same_for_a_copy_and_after_touching(tmp_path: Path) -> None:
    first, copy = model_folder(tmp_path / "first"), model_folder(tmp_path / "copy")
    known = store.fingerprint(first)
    assert store.fingerprint(copy) == known
    (first / "README.md").write_text("not part of the model")
    os.utime(first / "model.safetensors", (1, 1))
    assert store.fingerprint(first) == known


@pytest.mark.parametrize("size", [24, 16 * 1024, 200 * 1024])
def test_a_fingerprint_sees_every_single_byte_of_a_small_file(tmp_path: Path, size: int) -> None:
    folder = model_folder(tmp_path / "model", weight=np.zeros(size, np.float32))
    known = {store.fingerprint(folder)}
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    places = [0, 8, 20, len(whole) // 3, len(whole) // 2, len(whole) - 2, len(whole) - 1]
    for place in places:
        changed = bytearray(whole)
        changed[place] ^= 1
        file.write_bytes(changed)
        known.add(store.fingerprint(folder))
    assert len(known) == 1 + len(places)


def test_a_fingerprint_of_a_large_file_sees_a_training_step(tmp_path: Path) -> None:
    weights = np.zeros(2_000_000, np.float32)
    first = model_folder(tmp_path / "first", weight=weights)
    second = model_folder(tmp_path / "second", weight=weights + np.float32(1e-8))
    assert store.fingerprint(first) != store.fingerprint(second)


@pytest.mark.parametrize("name", ["config.json", store.MANIFEST])
def test_a_fingerprint_changes_with_the_configuration(tmp_path: Path, name: str) -> None:
    folder = model_folder(tmp_path / "model")
    before = store.fingerprint(folder)
    (folder / name).write_text('{"model_type": "other"}')
    assert store.fingerprint(folder) != before


def test_a_fingerprint_changes_with_names_and_further_files(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    seen = {store.fingerprint(folder)}
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    seen.add(store.fingerprint(folder))
    save(folder / "second.safetensors")
    seen.add(store.fingerprint(folder))
    assert len(seen) == 3


def test_a_fingerprint_of_a_gguf_file_is_its_content(tmp_path: Path) -> None:
    for name, content in (("a.gguf", b"GGUF one"), ("b.gguf", b"GGUF one"), ("c.gguf", b"GGUF two")):
        (tmp_path / name).write_bytes(content)
    a, b, c = (store.fingerprint(tmp_path / f"{name}.gguf") for name in "abc")
    assert a == b != c


def test_a_fingerprint_does_not_read_a_huge_file_whole(tmp_path: Path) -> None:
    file = tmp_path / "huge.gguf"
    with file.open("wb") as sparse:
        sparse.write(b"GGUF")
        sparse.truncate(8 * 2**30)
    began = time.monotonic()
    store.fingerprint(file)
    assert time.monotonic() - began < 2


# -- values and checkpoints --------------------------------------------------------------------------------------------


def test_finite_replaces_what_json_cannot_say() -> None:
    value = {"a": math.nan, "b": [math.inf, -math.inf, 1.5], "c": ({"d": math.nan}, "nan"), "e": 0, "f": None}
    clean = store.finite(value)
    assert clean == {"a": None, "b": [None, None, 1.5], "c": [{"d": None}, "nan"], "e": 0, "f": None}
    assert store.finite({"x": np.float64("nan")}) == {"x": None}
    json.dumps(clean, allow_nan=False)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(values)
def test_finite_always_gives_json(value: Any) -> None:
    clean = store.finite(value)
    assert json.loads(json.dumps(clean, allow_nan=False)) == clean


def test_combine_depends_on_values_and_not_on_key_order() -> None:
    assert store.combine("x", {"a": 1, "b": 2}) == store.combine("x", {"b": 2, "a": 1})
    assert len({store.combine("ab"), store.combine("a", "b"), store.combine(["a", "b"]), store.combine("a", "c")}) == 4


def test_checkpoints_counts_complete_folders_in_the_order_of_steps(tmp_path: Path) -> None:
    for name in ("step-1000", "step-50", "step-200", "best", "step-last", ".step-7.1234.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / store.MANIFEST).write_text("{}")
    (tmp_path / "step-3000").mkdir()
    (tmp_path / "step-4000").mkdir()
    (tmp_path / "step-4000" / store.MANIFEST).mkdir()
    found = store.checkpoints(tmp_path)
    assert [path.name for path in found] == ["step-50", "step-200", "step-1000"]
    assert [store.step_of(path) for path in found] == [50, 200, 1000]
    assert store.checkpoints(tmp_path / "absent") == []
