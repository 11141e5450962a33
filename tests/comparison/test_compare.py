"""`rr compare` on results made by hand: what it reads, and the form it returns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from comparing import cell, compared, four_stages, publish, results, sentence
from rrcli.errors import RRError, UsageError
from rrcli.evaluation import metrics
from rrcli.files import write_json
from rrcli.services.compare import compare
from rrcli.settings import CompareSettings

# -- files -------------------------------------------------------------------------------------------------------------


def test_a_missing_stage_names_the_command_that_measures_it(tmp_path: Path) -> None:
    publish(tmp_path, results("baseline"))
    with pytest.raises(RRError, match="stage 'after_surgery' was not measured") as caught:
        compare(CompareSettings(), ["baseline", "after_surgery"], tmp_path)
    assert "rr eval --stage after_surgery" in caught.value.hint
    assert str(tmp_path / "eval_results" / "after_surgery_results.json") in caught.value.message
    assert caught.value.exit_code == 1


def test_no_results_at_all(tmp_path: Path) -> None:
    with pytest.raises(RRError, match="holds no results") as caught:
        compare(CompareSettings(), [], tmp_path)
    assert "rr run" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "hint"),
    [("basline", "'baseline'"), ("finetuned-vanilla", "'finetuned_vanilla'"), ("x", "Known: baseline")],
)
def test_a_typo_in_a_stage_is_a_usage_error(tmp_path: Path, name: str, hint: str) -> None:
    publish(tmp_path, results("baseline"))
    with pytest.raises(UsageError, match=f"unknown stage '{name}'") as caught:
        compare(CompareSettings(), ["baseline", name], tmp_path)
    assert hint in caught.value.hint


def test_results_that_were_cut_off_are_refused(tmp_path: Path) -> None:
    publish(tmp_path, results("baseline"))
    file = tmp_path / "eval_results" / "baseline_results.json"
    file.write_text(file.read_text()[:-500])
    with pytest.raises(RRError, match="is cut off") as caught:
        compare(CompareSettings(), [], tmp_path)
    assert "rr eval --stage baseline" in caught.value.hint


@pytest.mark.parametrize("key", ["stage", "metrics", "records", "model", "data", "provenance"])
def test_a_file_that_is_no_evaluation_is_refused(tmp_path: Path, key: str) -> None:
    value = results("baseline")
    del value[key]
    write_json(tmp_path / "eval_results" / "baseline_results.json", value)
    with pytest.raises(RRError, match=f"baseline_results.json: object missing required field `{key}`"):
        compare(CompareSettings(), ["baseline"], tmp_path)


def test_results_of_a_newer_version_are_refused(tmp_path: Path) -> None:
    publish(tmp_path, results("baseline") | {"schema": 2})
    with pytest.raises(RRError, match="has schema 2") as caught:
        compare(CompareSettings(), [], tmp_path)
    assert "Update" in caught.value.hint


def test_a_file_may_be_named_by_its_path(tmp_path: Path) -> None:
    publish(tmp_path, results("baseline"))
    write_json(tmp_path / "other.json", results("finetuned_vanilla", gain=0.1, solved=30, wobble=0.02))
    comparison = compare(CompareSettings(), ["baseline", "other.json"], tmp_path)
    assert comparison.labels == ["baseline", "other.json"]
    assert (cell(comparison, "perplexity", "other.json").p_value or 1) < 0.001
    with pytest.raises(UsageError, match="does not exist"):
        compare(CompareSettings(), ["baseline", "absent.json"], tmp_path)


def test_files_named_by_path_are_judged_in_words_too(tmp_path: Path) -> None:
    publish(tmp_path, results("baseline"), results("after_surgery"))
    names = [f"eval_results/{stage}_results.json" for stage in ("baseline", "after_surgery")]
    assert compare(CompareSettings(), names, tmp_path).sentences


# -- JSON --------------------------------------------------------------------------------------------------------------


def test_the_json_form_holds_no_nan(tmp_path: Path) -> None:
    """One document and one problem make infinite intervals; the JSON form must still be JSON."""
    stages = [results("baseline"), results("finetuned_vanilla", gain=0.1, solved=1)]
    for stage in stages:
        stage["records"] = {kind: rows[:1] for kind, rows in stage["records"].items()}
        stage["metrics"] = metrics.from_records(stage["records"])
    value = compared(tmp_path, *stages).to_dict()
    text = json.dumps(value, allow_nan=False)
    assert json.loads(text)["stages"] == ["baseline", "finetuned_vanilla"]


def test_the_json_form_is_what_is_shown(tmp_path: Path) -> None:
    comparison = compared(tmp_path, *four_stages())
    value = comparison.to_dict()
    assert (value["schema"], value["alpha"]) == (2, 0.05)
    assert [claim["claim"] for claim in value["claims"]] == list(CompareSettings().primary)
    assert value["claims"][0]["shown"] is True
    assert value["sentences"] == comparison.sentences
    (row,) = [row for row in value["rows"] if row["name"] == "reasoning_accuracy"]
    assert row["better"] == "higher"
    assert row["cells"][3] == cell(comparison, "reasoning_accuracy", "finetuned_recursive").to_dict()


def test_numbers_with_an_exit_say_so_and_what_every_pass_gives(tmp_path: Path) -> None:
    *others, recursive = four_stages()
    assert not [text for text in compared(tmp_path, *others, recursive).sentences if "its exit" in text]
    recursive["model"]["exit"] = {"rule": "margin", "threshold": 0.9}
    recursive["by_depth"] = {"reasoning_accuracy": [{"value": 40.0}, {"value": 51.5}]}
    expected = "measured with its exit (margin:0.9), chosen on the validation side; with every pass for every token: "
    assert expected + "reasoning accuracy 51.5 %." in sentence(compared(tmp_path, *others, recursive), "its exit")
    recursive["settings"]["exit"] = "margin:0.9"
    assert "its exit (margin:0.9); with" in sentence(compared(tmp_path, *others, recursive), "its exit")
