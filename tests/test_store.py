"""Files and folders that are whole or not there, names that stay inside, and values as JSON."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rrcli import files
from rrcli.errors import RRError, UsageError

needs_permissions = pytest.mark.skipif(
    os.name != "posix" or os.geteuid() == 0, reason="the superuser may write everywhere"
)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# -- JSON --------------------------------------------------------------------------------------------------------------


def test_write_json_publishes_and_replaces(tmp_path: Path) -> None:
    file = tmp_path / "new" / "folder" / "results.json"
    files.write_json(file, {"a": [1, 2.5, None, "é"]})
    assert files.read_json(file, "rr eval", dict[str, Any]) == {"a": [1, 2.5, None, "é"]}
    files.write_json(file, {"b": 1})
    assert files.read_json(file, "rr eval", dict[str, Any]) == {"b": 1}
    assert names(file.parent) == {"results.json"}


def test_a_reader_that_has_the_old_file_open_keeps_it(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    files.write_json(file, {"old": True})
    with file.open() as reader:
        files.write_json(file, {"new": True})
        assert json.load(reader) == {"old": True}
    assert json.loads(file.read_text()) == {"new": True}


@pytest.mark.parametrize("value", [math.nan, math.inf, [1, {"deep": -math.inf}], object()])
def test_write_json_refuses_what_json_cannot_say_and_keeps_the_old_file(tmp_path: Path, value: Any) -> None:
    file = tmp_path / "results.json"
    files.write_json(file, {"good": True})
    with pytest.raises((ValueError, TypeError)):
        files.write_json(file, {"bad": value})
    assert json.loads(file.read_text()) == {"good": True}
    assert names(tmp_path) == {"results.json"}


def test_a_failing_disk_keeps_the_old_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "results.json"
    files.write_json(file, {"good": True})

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(RRError, match="No space left"):
        files.write_json(file, {"bad": True})
    assert json.loads(file.read_text()) == {"good": True}
    assert names(tmp_path) == {"results.json"}


def test_what_a_killed_process_left_of_a_file_goes_with_the_next_writing(tmp_path: Path) -> None:
    gone, lives = tmp_path / f".x.json.{2**22 + 1}.0a1b2c3d.tmp", tmp_path / f".x.json.{os.getpid()}.0a1b2c3d.tmp"
    other = tmp_path / f".y.json.{2**22 + 1}.0a1b2c3d.tmp"
    for leftover in (gone, lives, other):
        leftover.touch()
    files.write_json(tmp_path / "x.json", {})
    assert not gone.exists()
    assert lives.exists()  # its process may be writing now
    assert other.exists()


def test_sweeping_by_name_leaves_what_others_write(tmp_path: Path) -> None:
    names = [".a.0a1b2c3d.tmp", ".a.b.0a1b2c3d.tmp", ".b.0a1b2c3d.tmp", ".a.lock"]
    for name in names:
        (tmp_path / name).mkdir()
    files.sweep(tmp_path, "a")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names[1:])
    files.sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".a.lock"]


@pytest.mark.parametrize("moment", ["before the new folder", "after it"])
def test_stopped_by_the_user_between_two_renames_one_folder_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    with files.publish_folder(tmp_path / "x") as target:
        (target / "old").touch()
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        done = rename(self, target) if moment == "after it" or self.suffix != ".tmp" else target
        if self.suffix == ".tmp":
            raise KeyboardInterrupt
        return done

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), files.publish_folder(tmp_path / "x", overwrite=True) as target:
        (target / "new").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["new" if moment == "after it" else "old"]


def test_write_json_over_a_folder_or_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "taken.json").mkdir()
    with pytest.raises(RRError, match=r"taken\.json"):
        files.write_json(tmp_path / "taken.json", {})
    (tmp_path / "file").write_text("here")
    with pytest.raises(RRError, match="is a file, a folder was expected"):
        files.write_json(tmp_path / "file" / "results.json", {})
    assert names(tmp_path) == {"taken.json", "file"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"schema": 1, "metr', "cut off or not JSON"),
        ("", "cut off or not JSON"),
        ("[1, 2]", "holds no JSON object"),
        ('{"schema": 99}', "has schema 99"),
    ],
)
def test_read_json_refuses(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "results.json"
    file.write_text(text)
    with pytest.raises(RRError, match=message) as caught:
        files.read_json(file, "rr eval --stage baseline", dict[str, Any])
    assert str(file) in caught.value.message
    assert caught.value.hint


def test_read_json_of_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_bytes(b"\xff\xfe\x00{}")
    with pytest.raises(RRError, match=r"results\.json"):
        files.read_json(tmp_path / "results.json", "rr eval", dict[str, Any])


def test_read_json_names_the_command_that_makes_the_file(tmp_path: Path) -> None:
    with pytest.raises(RRError, match="does not exist") as caught:
        files.read_json(tmp_path / "absent.json", "rr eval --stage baseline", dict[str, Any])
    assert "rr eval --stage baseline" in caught.value.hint


# -- folders -----------------------------------------------------------------------------------------------------------


def test_publish_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "runs" / "step-1"
    with files.publish_folder(target) as folder:
        assert not target.exists()
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text("content")
    assert (target / "inner" / "file").read_text() == "content"
    assert names(target.parent) == {"step-1"}


def test_publish_folder_replaces_only_when_asked(tmp_path: Path) -> None:
    target = tmp_path / "surgery"
    with files.publish_folder(target) as folder:
        (folder / "old").touch()
    with pytest.raises(RRError, match="exists already") as caught, files.publish_folder(target):
        pytest.fail("the body must not run")
    assert "--overwrite" in caught.value.hint
    with files.publish_folder(target, overwrite=True) as folder:
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
    with pytest.raises(expected), files.publish_folder(target, overwrite=overwrite) as folder:  # noqa: PT012
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
    with pytest.raises(RRError, match="Input/output error"), files.publish_folder(target, overwrite=True):
        pass
    assert (target / "old").read_text() == "kept"


def test_publish_folder_over_a_file_or_below_one(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("kept")
    for target in (file, file / "step-1"):
        with pytest.raises(RRError, match="is a file, a folder was expected"):  # noqa: SIM117
            with files.publish_folder(target, overwrite=True):
                pytest.fail("the body must not run")
    assert file.read_text() == "kept"


@needs_permissions
def test_a_read_only_parent_is_named(tmp_path: Path) -> None:
    parent = tmp_path / "locked"
    parent.mkdir(mode=0o555)
    with pytest.raises(RRError, match="locked is not writable"), files.publish_folder(parent / "step-1"):
        pytest.fail("the body must not run")
    with pytest.raises(RRError, match="locked is not writable"):
        files.write_json(parent / "results.json", {})


def test_a_dangling_link_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "logs").symlink_to(tmp_path / "unmounted" / "disk")
    with pytest.raises(RRError, match="logs"):
        files.make_folder(tmp_path / "logs")


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "../a", "a\\b", "/a", "a\0b", " a", "a ", "a\n"])
def test_safe_name_refuses(name: str) -> None:
    with pytest.raises(UsageError, match="is not a plain name"):
        files.safe_name(name, "run name")


@pytest.mark.parametrize("name", ["finetuned_recursive", "run-1", "a..b", "a.b", "Läufe", "two words"])
def test_safe_name_accepts(name: str) -> None:
    assert files.safe_name(name, "run name") == name


@given(st.text(alphabet=st.characters() | st.sampled_from("./\\ \0"), max_size=12))
def test_a_safe_name_never_leaves_its_folder(name: str) -> None:
    try:
        accepted = files.safe_name(name, "run name")
    except UsageError:
        return
    path = Path("/experiment/checkpoints") / accepted
    assert path.parent == Path("/experiment/checkpoints")
    assert ".." not in path.parts
    assert os.path.normpath(path) == str(path)
    assert not accepted.startswith(".")


# -- values and checkpoints --------------------------------------------------------------------------------------------


def test_finite_replaces_what_json_cannot_say() -> None:
    value = {"a": math.nan, "b": [math.inf, -math.inf, 1.5], "c": ({"d": math.nan}, "nan"), "e": 0, "f": None}
    clean = files.finite(value)
    assert clean == {"a": None, "b": [None, None, 1.5], "c": [{"d": None}, "nan"], "e": 0, "f": None}
    assert files.finite({"x": np.float64("nan")}) == {"x": None}
    json.dumps(clean, allow_nan=False)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(values)
def test_finite_always_gives_json(value: Any) -> None:
    clean = files.finite(value)
    assert json.loads(json.dumps(clean, allow_nan=False)) == clean


def test_combine_depends_on_values_and_not_on_key_order() -> None:
    assert files.combine("x", {"a": 1, "b": 2}) == files.combine("x", {"b": 2, "a": 1})
    assert len({files.combine("ab"), files.combine("a", "b"), files.combine(["a", "b"]), files.combine("a", "c")}) == 4


def test_checkpoints_counts_complete_folders_in_the_order_of_steps(tmp_path: Path) -> None:
    for name in ("step-1000", "step-50", "step-200", "best", "step-last", ".step-7.1234.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / files.MANIFEST).write_text("{}")
    (tmp_path / "step-3000").mkdir()
    (tmp_path / "step-4000").mkdir()
    (tmp_path / "step-4000" / files.MANIFEST).mkdir()
    found = files.checkpoints(tmp_path)
    assert [path.name for path in found] == ["step-50", "step-200", "step-1000"]
    assert [files.step_of(path) for path in found] == [50, 200, 1000]
    assert files.checkpoints(tmp_path / "absent") == []
