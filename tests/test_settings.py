"""Where a value comes from, what is refused and how, and the file that `rr setup` writes."""

from __future__ import annotations

import dataclasses
import os
import tomllib
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rrcli import configuration, settings
from rrcli.configuration import SETTINGS_FILE
from rrcli.errors import UsageError
from rrcli.experiment.identity import eval_inputs, exit_inputs, surgery_inputs, train_inputs
from rrcli.settings import (
    CONTENT,
    EXIT,
    NOTHING,
    NUMBERS,
    SECTIONS,
    SIDECAR,
    WEIGHTS,
    BoardSettings,
    CommonSettings,
    CompareSettings,
    EvalSettings,
    Reach,
    SurgerySettings,
    TrainSettings,
)


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("RR_")]:
        monkeypatch.delenv(name)


def toml(directory: Path, text: str) -> None:
    (directory / SETTINGS_FILE).write_text(text, encoding="utf-8")


# -- precedence --------------------------------------------------------------------------------------------------------


def test_default_then_file_then_environment_then_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert configuration.load(TrainSettings, tmp_path).steps == 300
    toml(tmp_path, "[train]\nsteps = 11\n")
    assert configuration.load(TrainSettings, tmp_path).steps == 11
    monkeypatch.setenv("RR_TRAIN_STEPS", "22")
    assert configuration.load(TrainSettings, tmp_path).steps == 22
    assert configuration.load(TrainSettings, tmp_path, {"steps": 33}).steps == 33
    assert configuration.load(TrainSettings, tmp_path, {"steps": None}).steps == 22


def test_common_values_reach_every_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toml(tmp_path, '[common]\nseed = 7\ntask = ["a", "b"]\ntrust_remote_code = true\n')
    for cls in SECTIONS:
        loaded = configuration.load(cls, tmp_path)
        assert (loaded.seed, loaded.task, loaded.trust_remote_code) == (7, ("a", "b"), True)
    monkeypatch.setenv("RR_COMMON_SEED", "8")
    assert configuration.load(EvalSettings, tmp_path).seed == 8
    monkeypatch.setenv("RR_SEED", "9")
    assert configuration.load(EvalSettings, tmp_path).seed == 9


def test_a_section_belongs_to_its_command_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toml(tmp_path, "[surgery]\nmax_steps = 5\n[eval]\nmax_length = 77\n")
    monkeypatch.setenv("RR_SURGERY_CHUNK_WIDTH", "3")
    assert configuration.load(SurgerySettings, tmp_path).max_steps == 5
    assert configuration.load(TrainSettings, tmp_path).max_steps == 0
    assert configuration.load(TrainSettings, tmp_path).max_length == 256
    assert configuration.load(SurgerySettings, tmp_path).chunk_width == 3
    assert configuration.load(TrainSettings, tmp_path).chunk_width == 0


def test_no_file_and_no_folder_mean_the_defaults(tmp_path: Path) -> None:
    assert configuration.load(CommonSettings, tmp_path) == CommonSettings()
    (tmp_path / "file").touch()
    assert configuration.load(CommonSettings, tmp_path / "file") == CommonSettings()


@pytest.mark.parametrize(
    ("variable", "text", "name", "value"),
    [
        ("RR_TRUST_REMOTE_CODE", "yes", "trust_remote_code", True),
        ("RR_TRUST_REMOTE_CODE", "FALSE", "trust_remote_code", False),
        ("RR_EVAL_SKIP_GENERATION", "1", "skip_generation", True),
        ("RR_TASK", "gcd:a=1,b=2; chain_sum ;", "task", ("gcd:a=1,b=2", "chain_sum")),
        ("RR_TASK", "", "task", ()),
        ("RR_MODEL", "org/name", "model", "org/name"),
    ],
)
def test_the_environment_is_read_by_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, text: str, name: str, value: Any
) -> None:
    monkeypatch.setenv(variable, text)
    assert getattr(configuration.load(EvalSettings, tmp_path), name) == value


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("[trian]\nsteps = 3\n", r"unknown section \[trian\]", "Did you mean 'train'?"),
        ("[train]\nstesp = 3\n", r"unknown key 'stesp' .* section \[train\]", "Did you mean 'steps'?"),
        ("[common]\nmodle = 'x'\n", r"unknown key 'modle' .* section \[common\]", "Did you mean 'model'?"),
        ("[train]\nzzzzzz = 3\n", "unknown key 'zzzzzz'", "Known: phase, steps"),
        ("train = 3\n", "'train' in .* stands outside a section", "[train]"),
        ("[train\n", "is not valid TOML", "rr setup"),
        ("[train]\nsteps = 3\nsteps = 4\n", "is not valid TOML", "rr setup"),
    ],
)
def test_a_file_that_means_nothing_is_refused(tmp_path: Path, text: str, message: str, hint: str) -> None:
    toml(tmp_path, text)
    for cls in (TrainSettings, CompareSettings):
        with pytest.raises(UsageError, match=message) as caught:
            configuration.load(cls, tmp_path)
        assert caught.value.exit_code == 2
        assert hint in caught.value.hint
        assert str(tmp_path / SETTINGS_FILE) in caught.value.message


def test_a_key_outside_every_section_is_told_where_it_belongs(tmp_path: Path) -> None:
    toml(tmp_path, 'model = "x"\n')
    with pytest.raises(UsageError, match="outside a section") as caught:
        configuration.load(CommonSettings, tmp_path)
    assert "[common]" in caught.value.hint


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / SETTINGS_FILE).write_bytes(b"[train]\n# \xff\n")
    with pytest.raises(UsageError, match="is not valid TOML"):
        configuration.load(TrainSettings, tmp_path)


def test_a_folder_in_the_place_of_the_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / SETTINGS_FILE).mkdir()
    with pytest.raises(UsageError, match="cannot be read"):
        configuration.load(TrainSettings, tmp_path)


@pytest.mark.parametrize(
    ("cls", "key", "value"),
    [
        (TrainSettings, "steps", "'many'"),
        (TrainSettings, "steps", "1.5"),
        (TrainSettings, "steps", "true"),
        (TrainSettings, "lr", "'fast'"),
        (TrainSettings, "lr", "false"),
        (TrainSettings, "run_name", "3"),
        (EvalSettings, "chat_template", "1"),
        (EvalSettings, "chat_template", "'perhaps'"),
        (EvalSettings, "stride", "[1]"),
    ],
)
def test_a_wrong_type_is_refused_and_its_place_named(
    tmp_path: Path, cls: type[CommonSettings], key: str, value: str
) -> None:
    toml(tmp_path, f"[{cls.SECTION}]\n{key} = {value}\n")
    with pytest.raises(UsageError, match="which is not") as caught:
        configuration.load(cls, tmp_path)
    assert f"{SETTINGS_FILE} [{cls.SECTION}] {key}" in caught.value.message


@pytest.mark.parametrize("value", ["3", "[1, 2]", "['a', 2]", "true"])
def test_tasks_are_strings(tmp_path: Path, value: str) -> None:
    toml(tmp_path, f"[common]\ntask = {value}\n")
    with pytest.raises(UsageError, match=r"\[common\] task"):
        configuration.load(CommonSettings, tmp_path)


@pytest.mark.parametrize(
    ("cls", "key", "value"),
    [
        (CommonSettings, "seed", -1),
        (SurgerySettings, "max_steps", 0),
        (TrainSettings, "steps", 0),
        (TrainSettings, "lr", -1e-5),
        (TrainSettings, "max_length", 7),
        (EvalSettings, "depth", -2),
        (EvalSettings, "problems", 0),
        (BoardSettings, "port", -1),
    ],
)
def test_a_value_below_its_least_is_refused(tmp_path: Path, cls: type[CommonSettings], key: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"--{key.replace('_', '-')} is") as caught:
        configuration.load(cls, tmp_path, {key: value})
    assert "at least" in caught.value.hint


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_number_that_is_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("RR_TRAIN_LR", value)
    with pytest.raises(UsageError, match="RR_TRAIN_LR"):
        configuration.load(TrainSettings, tmp_path)


@pytest.mark.parametrize(
    ("cls", "key", "value"),
    [
        (TrainSettings, "task_share", 1.5),
        (TrainSettings, "supervised_share", -0.5),
        (CompareSettings, "alpha", 5),
        (EvalSettings, "max_length", -3),
        (SurgerySettings, "max_steps", 9),
        (BoardSettings, "port", 70_000),
    ],
)
def test_a_value_beyond_its_range_is_refused(tmp_path: Path, cls: type[CommonSettings], key: str, value: float) -> None:
    with pytest.raises(UsageError):
        configuration.load(cls, tmp_path, {key: value})


def test_a_choice_is_refused_with_the_closest(tmp_path: Path) -> None:
    toml(tmp_path, "[common]\ndtype = 'bfloat61'\n")
    with pytest.raises(UsageError, match=r"\[common\] dtype is 'bfloat61'") as caught:
        configuration.load(CommonSettings, tmp_path)
    assert caught.value.hint == "Did you mean 'bfloat16'?"


def test_a_choice_on_the_command_line_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--dtype is 'int4'") as caught:
        configuration.load(CommonSettings, tmp_path, {"dtype": "int4"})
    assert "float32" in caught.value.hint


def test_the_environment_is_named_when_it_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RR_SEED", "often")
    with pytest.raises(UsageError, match="RR_SEED is 'often', which is not a whole number"):
        configuration.load(CommonSettings, tmp_path)


# -- the declarations --------------------------------------------------------------------------------------------------

OPTIONS = [(cls, item) for cls in SECTIONS for item in settings.own_fields(cls)]


@pytest.mark.parametrize(
    ("cls", "item"), OPTIONS, ids=lambda value: getattr(value, "name", getattr(value, "SECTION", ""))
)
def test_every_option_has_help_and_a_default_that_it_would_accept(
    tmp_path: Path, cls: type[CommonSettings], item: dataclasses.Field[Any]
) -> None:
    assert item.metadata["help"]
    assert configuration.load(cls, tmp_path, {item.name: item.default}) == cls()


MODES = ("recursive", "vanilla")
INPUTS = {
    SurgerySettings: (SIDECAR, lambda chosen: [surgery_inputs(chosen, "base")]),
    TrainSettings: (
        WEIGHTS,
        lambda chosen: [train_inputs(chosen, m, "start", "data") for m in ("recursive", "vanilla")],
    ),
    EvalSettings: (NUMBERS, lambda chosen: [eval_inputs(chosen, "baseline", "model", "data")]),
}


# What an option may be limited to, and the settings with which each of these counts.
ONLY: dict[type[CommonSettings], tuple[str, ...]] = {
    CommonSettings: ("", "quantised"),
    TrainSettings: ("", "recursive", "lora"),
    EvalSettings: ("", "sampled"),
}
KINDS: dict[type[CommonSettings], tuple[dict[str, Any], ...]] = {
    TrainSettings: ({"phase": "b"}, {"phase": "c"}),
    EvalSettings: ({"samples": 2},),
}


@pytest.mark.parametrize(
    ("cls", "item"),
    [(cls, item) for cls in INPUTS for item in dataclasses.fields(cls)],
    ids=lambda value: getattr(value, "name", getattr(value, "SECTION", "")),
)
def test_an_option_changes_the_inputs_of_what_it_reaches_and_of_nothing_else(
    cls: type[CommonSettings], item: dataclasses.Field[Any]
) -> None:
    what, inputs = INPUTS[cls]
    value = other_value(cls, item)
    for fixed in KINDS.get(cls, ({},)):
        before, phase = cls(**fixed), fixed.get("phase")
        kinds = ("", "recursive", "sampled", "quantised", *(["lora"] if phase == "b" else []))
        recursive = item.metadata["only"] in kinds
        vanilla = recursive and item.metadata["only"] != "recursive" and (item.name, phase) != ("phase", "c")
        reached = [what in item.metadata["reaches"] and kind for kind in (recursive, vanilla)]
        changed = inputs(dataclasses.replace(before, **{item.name: value}))
        assert [a != b for a, b in zip(inputs(before), changed, strict=True)] == reached[: len(changed)]


@pytest.mark.parametrize(
    "item",
    [item for item in dataclasses.fields(EvalSettings) if item.metadata["reaches"] != CONTENT],
    ids=lambda i: i.name,
)
def test_an_option_changes_the_inputs_of_an_exit_if_it_reaches_it(item: dataclasses.Field[Any], tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    inputs = [
        exit_inputs(EvalSettings(**{item.name: v}), tmp_path) for v in (item.default, other_value(EvalSettings, item))
    ]
    assert (inputs[0] != inputs[1]) == (EXIT in item.metadata["reaches"])


def test_in_vanilla_training_a_phase_is_lora_or_everything() -> None:
    inputs = {phase: train_inputs(TrainSettings(phase=phase), "vanilla", "start", "data") for phase in ("a", "b", "c")}
    assert inputs["b"] != inputs["c"] == inputs["a"]


def test_only_what_a_stage_makes_is_reached_and_kinds_are_those_of_training() -> None:
    for cls, item in OPTIONS:
        assert isinstance(item.metadata["reaches"], Reach)
        assert item.metadata["only"] in ONLY.get(cls, ("",))
        reaches = item.metadata["reaches"]
        if cls is not CommonSettings:
            made = INPUTS[cls][0] if cls in INPUTS else NOTHING
            assert reaches in ((NOTHING, made, EXIT, made | EXIT) if cls is EvalSettings else (NOTHING, made))


def test_no_command_redefines_a_common_option() -> None:
    common = {item.name for item in dataclasses.fields(CommonSettings)}
    for cls in SECTIONS[1:]:
        assert common.isdisjoint(cls.__annotations__)
    assert len({cls.SECTION for cls in SECTIONS}) == len(SECTIONS)


def test_settings_are_frozen_and_copied_with_changes() -> None:
    first = TrainSettings()
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.steps = 3  # type: ignore[misc]
    second = settings.with_changes(first, steps=3)
    assert (first.steps, second.steps) == (300, 3)


# -- the file ----------------------------------------------------------------------------------------------------------


def other_value(cls: type[CommonSettings], item: dataclasses.Field[Any]) -> Any:
    """Return a legal value that is not the default."""
    if item.metadata["choices"]:
        return next(choice for choice in item.metadata["choices"] if choice != item.default)
    kind = get_type_hints(cls)[item.name]
    if kind is bool:
        return not item.default
    if kind is int:
        return item.default + 1
    if kind is float:
        return item.default / 2 + 1e-7
    if kind == tuple[int, ...]:
        return (7, 1)
    return ('q"uote', "back\\slash [x] = #") if kind == tuple[str, ...] else 'it\'s "näme"\\ # [x]'


def written(directory: Path, common: CommonSettings, changes: dict[str, dict[str, Any]]) -> None:
    toml(directory, configuration.write_file(common, changes))


def test_the_written_file_gives_the_defaults_back(tmp_path: Path) -> None:
    written(tmp_path, CommonSettings(), {})
    for cls in SECTIONS:
        assert configuration.load(cls, tmp_path) == cls()
    document = tomllib.loads((tmp_path / SETTINGS_FILE).read_text())
    assert {(name, key) for name, table in document.items() for key in table} == {
        (cls.SECTION, item.name) for cls, item in OPTIONS
    }


def test_every_changed_option_comes_back(tmp_path: Path) -> None:
    changes = {cls.SECTION: {i.name: other_value(cls, i) for i in settings.own_fields(cls)} for cls in SECTIONS}
    common = CommonSettings(**changes["common"])
    written(tmp_path, common, {name: values for name, values in changes.items() if name != "common"})
    for cls in SECTIONS:
        expected = cls(**(changes["common"] | changes[cls.SECTION]))
        assert expected != cls()
        assert configuration.load(cls, tmp_path) == expected


@given(st.text(st.characters(exclude_characters="\x7f", exclude_categories=["Cs"])), st.lists(st.text('ab"\\\n,;:= é')))
def test_any_text_comes_back_from_the_file(text: str, tasks: list[str]) -> None:
    document = tomllib.loads(configuration.write_file(CommonSettings(model=text, task=tuple(tasks)), {}))
    assert document["common"]["model"] == text
    assert document["common"]["task"] == tasks


def test_a_delete_character_comes_back_from_the_file() -> None:
    document = tomllib.loads(configuration.write_file(CommonSettings(model="a\x7fb"), {}))
    assert document["common"]["model"] == "a\x7fb"


@given(st.floats(0, allow_infinity=False))
def test_any_number_comes_back_from_the_file(value: float) -> None:
    document = tomllib.loads(configuration.write_file(CommonSettings(), {"train": {"lr": value}}))
    assert document["train"]["lr"] == value
