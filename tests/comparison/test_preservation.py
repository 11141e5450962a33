"""The founding invariant: what is found, what it costs to break it, and that scores of nothing are errors."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from commands import rr
from comparing import compared, four_stages, publish, results
from rrcli.comparison import preservation
from rrcli.demo import defaults
from rrcli.errors import CheckFailed
from rrcli.files import write_json

SMALL = {"RR_EVAL_PROBLEMS": "3", "RR_EVAL_MAX_SAMPLES": "6", "RR_EVAL_SKIP_PERFORMANCE": "true"}
SMALL |= {"RR_TRAIN_STEPS": "2", "RR_TRAIN_BATCH_SIZE": "4", "RR_TRAIN_EVAL_INTERVAL": "0"}


def by_depth(depths: int = 3, **change: Any) -> dict[str, Any]:
    """Return results after surgery whose records have `depths` entries, all as the baseline's."""
    found = results("after_surgery")
    for row in found["records"]["documents"]:
        row["nll"] = row["nll"] * depths
    for row in found["records"]["problems"]:
        row["outputs"] = row["outputs"] * depths
    return found


def test_every_depth_is_held_against_the_baseline():
    assert preservation.check_preserved(by_depth(), results("baseline")).exact
    for part, field, value in (("documents", "nll", 99.0), ("problems", "outputs", "other")):
        for depth in range(3):
            after = by_depth()
            after["records"][part][5][field][depth] = value
            found = preservation.check_preserved(after, results("baseline"))
            assert found.broken
            assert found.changed[0].startswith("1 of ")


@pytest.mark.parametrize(
    ("shift", "verdict"), [(0.0, "exact"), (1e-9, "rounded"), (0.9e-3, "rounded"), (1.1e-3, "broken")]
)
def test_rounding_has_a_size(shift: float, verdict: str) -> None:
    after = by_depth()
    row = after["records"]["documents"][3]
    row["nll"][1] += shift * row["tokens"]
    found = preservation.check_preserved(after, results("baseline"))
    assert found.to_dict()["verdict"] == verdict
    assert math.isclose(found.worst, shift, abs_tol=1e-12, rel_tol=1e-6)
    if verdict == "broken":
        with pytest.raises(CheckFailed, match="did NOT preserve the baseline"):
            preservation.require_preserved(found)
    else:
        preservation.require_preserved(found)


def test_an_answer_that_changed_is_never_rounding():
    after = by_depth()
    after["records"]["problems"][0]["outputs"][2] += " "
    assert preservation.check_preserved(after, results("baseline")).broken


def test_what_was_measured_otherwise_is_not_held_against_surgery():
    after, base = by_depth(), results("baseline")
    after["records"]["problems"][0]["outputs"][2] = "another"
    after["settings"]["max_new_tokens"] = 7
    found = preservation.check_preserved(after, base)
    assert not found.broken
    assert (
        "not known whether surgery preserved the baseline: the two stages were measured with different max_new_tokens"
        in found.sentence()
    )
    after["settings"] = base["settings"]
    after["provenance"]["dtype"] = "bfloat16"
    found = preservation.check_preserved(after, base)
    with pytest.raises(CheckFailed) as error:
        preservation.require_preserved(found)
    assert "measured with different dtype" in error.value.hint


def test_records_that_are_not_the_same_ones_prove_nothing():
    """Not even by the other kinds of records, which are identical."""
    after = by_depth()
    after["records"]["documents"][0]["tokens"] += 1
    found = preservation.check_preserved(after, results("baseline"))
    assert not found.exact
    assert not found.broken
    assert "measured with different documents" in found.sentence()


def test_samples_of_lm_eval_count_too():
    after, base = by_depth(), results("baseline")
    for stage, score in ((after, 0.0), (base, 1.0)):
        stage["records"]["harness"] = [{"key": "a", "task": "t", "metric": "acc", "score": score, "target": "x"}]
    found = preservation.check_preserved(after, base)
    assert found.broken
    assert "1 of 1 samples of lm-eval" in found.sentence()


def test_a_sample_of_lm_eval_has_a_record_for_each_metric_and_task():
    after, base = by_depth(), results("baseline")
    scores = {("arc", "acc"): 1.0, ("arc", "acc_norm"): 0.0, ("arc_easy", "acc"): 0.0}
    for stage in (after, base):
        stage["records"]["harness"] = [
            {"key": "a", "task": task, "metric": metric, "score": score, "target": "x"}
            for (task, metric), score in scores.items()
        ]
    assert preservation.check_preserved(after, base).exact
    after["records"]["harness"][0]["score"] = 0.0
    assert "1 of 3 samples of lm-eval" in preservation.check_preserved(after, base).sentence()


# -- rr compare --------------------------------------------------------------------------------------------------------


def broken_stages() -> list[dict[str, Any]]:
    stages = four_stages()
    for row in stages[1]["records"]["problems"]:
        row["outputs"] = [""]
    return stages


def test_compare_says_it_first_and_claims_nothing_about_recursion(tmp_path: Path) -> None:
    comparison = compared(tmp_path, *broken_stages())
    assert comparison.sentences[0].startswith("Surgery did NOT preserve the baseline: 200 of 200 problems' answers")
    assert {(each.verdict, each.shown) for each in comparison.judgements} == {("no claim", False)}
    assert not [text for text in comparison.sentences if "Recursion, beyond" in text or "Cost of recursion" in text]
    assert any("without recursion" in text for text in comparison.sentences), "what is known of vanilla stays"
    column = comparison.labels.index("finetuned_recursive")
    cells = [row.cells[column] for row in comparison.rows]
    assert not {cell.verdict for cell in cells} & {"better", "worse", "differs", "equivalent", "inconclusive"}
    assert {cell.p_value for cell in cells} == {None}


@pytest.mark.parametrize(
    "names", [[], ["baseline", "finetuned_recursive"], ["finetuned_vanilla", "finetuned_recursive"]]
)
def test_compare_fails_with_3_even_where_the_stage_is_not_named(tmp_path: Path, names: list[str]) -> None:
    publish(tmp_path, *broken_stages())
    done = rr("compare", *names, folder=tmp_path)
    assert done.returncode == 3
    assert " ".join(done.stdout.split()).startswith("Surgery did NOT preserve the baseline")
    assert done.stdout.count("did NOT preserve") == 1
    assert "Recursion, beyond fine-tuning" not in done.stdout
    assert "nothing is said about recursion" in done.stderr
    value = json.loads(rr("compare", *names, "--json", folder=tmp_path).stdout)
    assert value["broken_surgery"].startswith("Surgery did NOT preserve")
    text = rr("compare", *names, "--format", "markdown", folder=tmp_path).stdout
    assert text.startswith("**Surgery did NOT preserve")


def test_compare_of_vanilla_alone_has_nothing_to_do_with_surgery(tmp_path: Path) -> None:
    publish(tmp_path, *broken_stages())
    assert rr("compare", "baseline", "finetuned_vanilla", folder=tmp_path).returncode == 0


# -- rr eval and rr run ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace up to its surgery, measured."""
    folder = tmp_path_factory.mktemp("measured")
    assert rr("setup", folder=folder, **SMALL).returncode == 0
    for command in (["eval"], ["surgery"], ["eval", "--stage", "after_surgery"]):
        done = rr(*command, folder=folder, **SMALL)
        assert done.returncode == 0, done.stderr
    return folder


def _tampered(measured: Path, folder: Path) -> Path:
    """A copy in which the baseline gave another answer than it gives now."""
    shutil.copytree(measured, folder)
    file = folder / "eval_results" / "baseline_results.json"
    value = json.loads(file.read_text())
    value["records"]["problems"][0]["outputs"] = ["another answer"]
    write_json(file, value)
    return folder


def test_eval_says_identical(measured: Path) -> None:
    done = rr("eval", "--stage", "after_surgery", folder=measured, **SMALL)
    assert done.returncode == 0
    assert "Surgery preserved the baseline exactly: 6 documents' log-probabilities, 9 problems' answers" in done.stdout
    found = json.loads((measured / "eval_results" / "after_surgery_results.json").read_text())["preservation"]
    assert found["verdict"] == "exact"


def test_eval_of_a_broken_surgery_exits_with_3_and_keeps_what_it_measured(measured: Path, tmp_path: Path) -> None:
    folder = _tampered(measured, tmp_path / "work")
    done = rr("eval", "--stage", "after_surgery", folder=folder, **SMALL)
    assert done.returncode == 3
    assert "error: Surgery did NOT preserve the baseline: 1 of 9 problems' answers differ" in done.stderr
    found = json.loads((folder / "eval_results" / "after_surgery_results.json").read_text())["preservation"]
    assert found["verdict"] == "broken"
    shown = rr("eval", "--stage", "after_surgery", "--json", folder=folder, **SMALL)
    assert shown.returncode == 3
    assert json.loads(shown.stdout)["preservation"]["verdict"] == "broken"


@pytest.mark.parametrize("fresh", [False, True], ids=["measured before", "measured now"])
def test_run_trains_nothing_on_a_broken_surgery(measured: Path, tmp_path: Path, fresh: bool) -> None:
    folder = _tampered(measured, tmp_path / "work")
    if fresh:
        (folder / "eval_results" / "after_surgery_results.json").unlink()
    done = rr("run", folder=folder, **SMALL)
    assert done.returncode == 3, done.stderr
    assert "Surgery did NOT preserve the baseline" in done.stderr
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["after_surgery"]


# -- scores of nothing -------------------------------------------------------------------------------------------------


def _altered(folder: Path, change: Any) -> Path:
    """Write the embedded model into a folder, with other weights."""
    shutil.copytree(defaults.MODEL_DIR, folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _flat(weights: dict[str, torch.Tensor]) -> None:
    for tensor in weights.values():
        tensor.zero_()


def test_equal_log_probabilities_are_an_error_not_a_score(tmp_path: Path) -> None:
    model = _altered(tmp_path / "model", _flat)
    done = rr("eval", "--model", str(model), "--skip-reasoning", "--skip-generation", folder=tmp_path, **SMALL)
    assert done.returncode == 3, done.stderr
    assert "every token has the same log-probability at depth 0, -6.93147 nats: this is no score" in done.stderr
    assert not (tmp_path / "eval_results" / "baseline_results.json").exists()


def test_empty_answers_are_an_error_not_a_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rrcli.evaluation import answers

    real = answers.decode

    def silent(*args: Any, **kwargs: Any) -> Any:
        for batch in real(*args, **kwargs):
            yield [replace(answer, tokens=[], text=" ", ended=True) for answer in batch]

    monkeypatch.setattr(answers, "decode", silent)
    done = rr("eval", "--skip-perplexity", "--skip-generation", folder=tmp_path, **SMALL)
    assert done.returncode == 3, done.stderr
    assert "answers are empty at depth 0: this is no score" in done.stderr
    assert not (tmp_path / "eval_results" / "baseline_results.json").exists()
