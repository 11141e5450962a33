"""`rr costs`: which stages it measures, what it publishes, and what it refuses before anything is loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from commands import rr
from comparing import compared, four_stages
from rrcli.comparison.costs import with_costs
from rrcli.comparison.pairing import Cells
from rrcli.comparison.report import render
from rrcli.comparison.results import Stage
from rrcli.errors import RRError
from rrcli.evaluation import interleaved
from rrcli.evaluation.interleaved import Loaded, Measured, Subject
from rrcli.evaluation.metrics import KNOWN
from rrcli.evaluation.performance import Counts, Performance, Times, Way
from rrcli.files import read_json, write_json
from rrcli.reporting import Silent
from rrcli.schemas import Costs
from rrcli.services.costs import costs
from rrcli.services.surgery import surgery
from rrcli.settings import CostsSettings, EvalSettings, SurgerySettings


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], int]]:
    """Put a measurement that takes no time in the place of the real one; return what it was asked."""
    asked: list[tuple[list[str], int]] = []

    def measure(subjects: Sequence[Subject], _: Any, *, rounds: int) -> dict[str, Measured]:
        asked.append(([subject.name for subject in subjects], rounds))
        found = {}
        for place, subject in enumerate(subjects, start=1):
            method = Way(0, in_chunks=False)
            times, counts = [{method: Times(0.001, 0.002 * place)}] * rounds, {method: Counts(1e6, 2e6)}
            performance = Performance(method, times, counts, memory_mb=50.0, notices=["a notice"] * (place == 1))
            found[subject.name] = Measured(Loaded("cpu", "float32", method, None, 1, 50.0, 100.0), performance)
        return found

    monkeypatch.setattr(interleaved, "measure_in_turns", measure)
    return asked


def test_every_stage_with_a_model_is_measured_and_published(tmp_path: Path, turns: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (100.0, 0.0, 0.0))
    surgery(SurgerySettings(), tmp_path, Silent())
    reporter = Silent()
    result = costs(CostsSettings(rounds=3), EvalSettings(), [], tmp_path, reporter)
    assert turns == [(["baseline", "after_surgery"], 3)]
    assert ["this machine is busy" in reporter.warnings[0], *reporter.warnings[1:]] == [True, "baseline: a notice"]
    found = read_json(result.file, "rr costs", Costs)
    assert found == result.costs
    assert found["rounds"] == 3
    assert found["provenance"]["load"] == 100
    assert found["stages"]["after_surgery"]["metrics"]["time_per_output_token"]["value"] == 4
    assert {path.name for path in (tmp_path / "eval_results").iterdir()} == {"costs.json"}
    assert (tmp_path / "logs" / "after_surgery").is_dir()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "unknown stage 'nothing'"),
        (["baseline", "baseline"], "'baseline' is named twice"),
        (["after_surgery"], "stage 'after_surgery' has no model yet"),
        (["--data", "-"], "standard input, which 'rr costs' cannot read"),
        (["--rounds", "0"], "rounds"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = rr("costs", *arguments, folder=tmp_path)
    assert done.returncode in (1, 2)
    assert message in " ".join(done.stderr.split())


MADE = {"versions": {}, "hardware": "Xeon", "threads": 2, "load": 0.5}


def published(folder: Path, *stages: dict[str, Any], **changes: Any) -> None:
    entries = {
        stage["stage"]: {
            "model": {"fingerprint": stage["stage"]},
            "depth": 0,
            "metrics": {"time_per_output_token": {"value": 7.0, "low": 6.0, "high": 9.0, "n": 3}},
            "by_depth": {"time_per_output_token": [{"value": 3.0}, {"value": 7.0}]},
        }
        | changes
        for stage in stages
    }
    write_json(folder / "eval_results" / "costs.json", {"schema": 1, "kind": "costs", "rounds": 3, "provenance": MADE,
                                                        "stages": entries})  # fmt: skip


def times(comparison: Any) -> list[float | None]:
    row = next(row for row in comparison.rows if row.metric.name == "time_per_output_token")
    return [cell.value for cell in row.cells]


def test_costs_measured_in_turns_take_the_place_of_those_measured_alone(tmp_path: Path) -> None:
    stages = four_stages()
    comparison = compared(tmp_path, *stages)
    assert times(comparison) == [20, 20, 20, 50]
    assert "one stage after the other: 'rr costs'" in comparison.sentences[-1]
    published(tmp_path, *stages)
    comparison = compared(tmp_path, *stages)
    assert times(comparison) == [7, 7, 7, 7]
    assert not any("rr costs" in text for text in (*comparison.sentences, *comparison.warnings))
    assert {row.metric.name: row.depths for row in comparison.rows}["time_per_output_token"][0] == [3, 7]
    # What was not measured in turns is not mixed in from the stages' own measurements.
    assert "memory_mb" not in {row.metric.name for row in comparison.rows}
    assert "1.00 x the time per output token" in comparison.sentences[-2]
    told = "Speed: medians of 3 rounds, the stages in turns on Xeon with 2 threads; the machine's load was 0.5 before."
    assert comparison.sentences[-1] == told


@pytest.mark.parametrize(
    "changes", [{"model": {"fingerprint": "other"}}, {"depth": 1}, {"exit": {"rule": "head", "threshold": 0.5}}]
)
def test_costs_of_another_model_depth_or_exit_are_not_shown(tmp_path: Path, changes: dict[str, Any]) -> None:
    stages = four_stages()
    stages[0] = stages[0] | {"metrics": {k: v for k, v in stages[0]["metrics"].items() if "time" not in k}}
    published(tmp_path, stages[0], **changes)
    comparison = compared(tmp_path, *stages)
    assert times(comparison)[0] is None
    told = " ".join(comparison.warnings)
    assert "costs of another model, depth or exit of baseline, which are not shown: 'rr costs'" in told
    assert "memory of baseline, after_surgery, finetuned_vanilla, finetuned_recursive were measured at another" in told


def test_the_seed_that_was_measured_stands_for_all_and_damage_is_an_error(tmp_path: Path) -> None:
    runs = tuple(four_stages()[2] | {"seed": seed} for seed in (4, 5))
    published(tmp_path, runs[0], seed=5)
    file = tmp_path / "eval_results" / "costs.json"
    found, said, warnings = with_costs({"finetuned_vanilla": Stage("finetuned_vanilla", runs)}, file)
    assert [run["metrics"]["time_per_output_token"]["value"] for run in found["finetuned_vanilla"].runs] == [7, 7]
    assert (len(said), warnings) == (1, [])
    cell = Cells(found).of(KNOWN["time_per_output_token"], "finetuned_vanilla", "finetuned_vanilla")
    assert (cell.value, cell.by_seed) == (7, [])  # one measurement is not shown as that of two seeds
    write_json(file, json.loads(file.read_text()) | {"stages": {"baseline": {"depth": 0}}})
    with pytest.raises(RRError, match=r"costs\.json: stages"):
        with_costs({}, file)


def test_quality_against_cost_is_a_curve_over_depth(tmp_path: Path) -> None:
    """Each depth with what it gives and what it takes; a stage with an exit has a point more."""
    stages = four_stages()
    deep = stages[3]
    deep["model"] |= {"depth": 1, "exit": {"rule": "probability", "threshold": 0.99}}
    deep["by_depth"] = {"reasoning_accuracy": [{"value": 40.0}, {"value": 60.0}], "perplexity": [{"value": 3.0}] * 2}
    published(tmp_path, stages[0], deep)
    file = tmp_path / "eval_results" / "costs.json"
    costs = json.loads(file.read_text())
    costs["stages"]["baseline"].pop("by_depth")
    costs["stages"]["finetuned_recursive"] |= {"depth": 1, "exit": deep["model"]["exit"]}
    write_json(file, costs)
    value = compared(tmp_path, stages[0], deep).to_dict()
    baseline, recursive = (value["curves"][name] for name in ("baseline", "finetuned_recursive"))
    assert [point["time_per_output_token"] for point in baseline] == [7]
    assert baseline[0]["perplexity"] == stages[0]["metrics"]["perplexity"]["value"]
    kept = ("depth", "exit", "reasoning_accuracy", "time_per_output_token")
    assert [{name: point[name] for name in kept if name in point} for point in recursive] == [
        {"depth": 0, "reasoning_accuracy": 40, "time_per_output_token": 3},
        {"depth": 1, "reasoning_accuracy": 60, "time_per_output_token": 7},
        {"depth": 1, "exit": deep["model"]["exit"], "time_per_output_token": 7}
        | {"reasoning_accuracy": deep["metrics"]["reasoning_accuracy"]["value"]},
    ]
    page = render(compared(tmp_path, stages[0], deep), tmp_path / "logs")
    assert "finetuned_recursive:exit" in page
    assert "Reasoning accuracy, % against ms per new token" in page
