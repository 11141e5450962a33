"""Several seeds: what is paired with what, what a mean over seeds is worth, and how it is shown."""

from __future__ import annotations

import csv
import io
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

from comparing import cell, judged, results, sentence
from rrcli.comparison import written
from rrcli.comparison.claims import read_declaration
from rrcli.comparison.comparison import Comparison
from rrcli.comparison.report import render
from rrcli.evaluation import metrics
from rrcli.evaluation.seeds import across_seeds
from rrcli.experiment.declarations import record
from rrcli.experiment.workspace import Workspace
from rrcli.files import finite, write_json
from rrcli.services.compare import compare
from rrcli.settings import CompareSettings

SEEDS = (0, 1, 2)
# Problems that each seed's recursion newly solves, of 200.
SOLVED = (10, 60, 35)


def with_own_problems(result: dict[str, Any], seed: int, first: int = 0) -> dict[str, Any]:
    """Give a seed's results problems of their own from `first` on, and its own numbers: documents stay the same."""
    result = result | {"seed": seed, "test_seeds": [seed]}
    for row in result["records"]["problems"][first:]:
        row["key"] = f"{seed}/{row['key']}"
    result["data"] = result["data"] | {"fingerprint": f"f{seed}"}
    result["provenance"] = result["provenance"] | {"seed": seed}
    return result


def experiment(directory: Path, gains: tuple[float, ...] = (0.02, 0.03, 0.025)) -> None:
    """Publish a baseline that was measured once on the problems of all seeds, and three trainings of two stages."""
    vanilla = [with_own_problems(results("finetuned_vanilla", solved=5, wobble=0.01), seed) for seed in SEEDS]
    recursive = [
        with_own_problems(results("finetuned_recursive", solved=solved, gain=gain, wobble=0.02), seed)
        for seed, solved, gain in zip(SEEDS, SOLVED, gains, strict=True)
    ]
    baseline = results("baseline") | {"seed": 0, "test_seeds": list(SEEDS)}
    baseline["records"]["problems"] = [
        row for seed in SEEDS for row in with_own_problems(results("baseline"), seed)["records"]["problems"]
    ]
    baseline["metrics"] |= metrics.from_records(baseline["records"])
    settings = CompareSettings(seeds=SEEDS)
    record(Workspace(directory, settings), read_declaration(settings).texts)
    for result in (baseline, *vanilla, *recursive):
        name = result["stage"] + (f"-seed{result['seed']}" if result["seed"] else "")
        write_json(directory / "eval_results" / f"{name}_results.json", finite(result))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("experiment")
    experiment(directory)
    return directory


@pytest.fixture(scope="module")
def comparison(folder: Path) -> Comparison:
    return compare(CompareSettings(seeds=SEEDS), [], folder)


def test_a_stage_is_taken_with_all_its_seeds(comparison: Comparison) -> None:
    assert comparison.labels == ["baseline", "finetuned_vanilla", "finetuned_recursive"]
    assert comparison.to_dict()["seeds"] == {
        "baseline": [0],
        "finetuned_vanilla": [0, 1, 2],
        "finetuned_recursive": [0, 1, 2],
    }
    assert comparison.warnings == [], "each seed has its own problems, all of which the baseline was measured on"


def test_seeds_with_own_problems_are_three_observations(comparison: Comparison) -> None:
    found = judged(comparison, "reasoning_accuracy")
    gains = np.array([solved - 5 for solved in SOLVED]) / 2
    expected = scipy.stats.ttest_1samp(gains, 0)
    assert found.cell.difference == pytest.approx(gains.mean())
    assert found.p_value == pytest.approx(expected.pvalue, rel=1e-6)
    interval = expected.confidence_interval(found.confidence)
    assert (found.low, found.high) == pytest.approx((interval.low, min(100, interval.high)), rel=1e-6)
    assert found.verdict == "inconclusive", "600 problems were p < 1e-20 if pooled"
    assert found.needed is not None
    assert found.needed.what == "seeds"
    text = sentence(comparison, "Primary claim 'reasoning_accuracy")
    assert "n = 3 seeds (+2.5, +27.5, +15.0) with 600 problems in all, 2.0 degrees of freedom" in text
    assert f"About {found.needed.count:,} seeds would show it with 80 % power if this is the true difference" in text


def test_problems_of_files_and_of_generators_count_together(tmp_path: Path) -> None:
    """What is tested is the difference of the means that the table shows, whichever problems the seeds share."""
    for name, numbers in (("finetuned_vanilla", (5, 5, 5)), ("finetuned_recursive", SOLVED)):
        for seed, solved in zip(SEEDS, numbers, strict=True):
            result = with_own_problems(results(name, solved=solved), seed, first=120)
            file = tmp_path / "eval_results" / f"{name}{f'-seed{seed}' * bool(seed)}_results.json"
            write_json(file, finite(result))
    found = compare(CompareSettings(seeds=SEEDS), ["finetuned_vanilla", "finetuned_recursive"], tmp_path)
    before, after = (cell(found, "reasoning_accuracy", name) for name in ("finetuned_vanilla", "finetuned_recursive"))
    assert after.difference == pytest.approx((after.value or 0) - (before.value or 0))
    assert "with 360 problems in all, 120 of them the same for every seed" in sentence(
        found, "Primary claim 'reasoning_accuracy"
    )


def test_seeds_with_the_same_documents_are_crossed(folder: Path, comparison: Comparison) -> None:
    found = judged(comparison, "perplexity")
    assert found.shown
    assert found.verdict == "better"
    evidence = found.cell.pair.evidence  # type: ignore[union-attr]
    assert (evidence.crossed, evidence.n) == (True, 80)  # type: ignore[union-attr]
    assert "n = 3 seeds" in sentence(comparison, "Primary claim 'perplexity")
    assert "with the same 80 documents" in sentence(comparison, "Primary claim 'perplexity")


def test_the_baseline_is_paired_with_every_seed(comparison: Comparison) -> None:
    found = cell(comparison, "reasoning_accuracy", "finetuned_recursive")
    assert found.difference == pytest.approx(np.mean(SOLVED) / 2)
    assert found.p_value == pytest.approx(scipy.stats.ttest_1samp(np.array(SOLVED) / 200, 0).pvalue, rel=1e-6)
    assert found.pair is not None
    assert (found.pair.seeds, found.pair.common, found.pair.conflicts) == (3, 600, 0)
    assert cell(comparison, "reasoning_accuracy", "baseline").n == 600


def test_a_stages_own_value_is_the_mean_over_seeds_with_its_interval(comparison: Comparison) -> None:
    found = cell(comparison, "reasoning_accuracy", "finetuned_recursive")
    accuracies = [40 + solved / 2 for solved in SOLVED]
    assert found.by_seed == pytest.approx(accuracies)
    assert found.value == pytest.approx(np.mean(accuracies))
    interval = scipy.stats.ttest_1samp(accuracies, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, min(100, interval.high)), rel=1e-6)
    text = cell(comparison, "perplexity", "finetuned_recursive")
    assert text.value == pytest.approx(math.exp(np.mean(np.log(text.by_seed))))
    assert text.low is not None
    assert text.low < text.value < (text.high or 0)


def test_seeds_are_shown_in_every_form(comparison: Comparison) -> None:
    words = re.sub(" +", " ", written.markdown(comparison))
    assert "| &nbsp;&nbsp;by seed | | 42.5 / 42.5 / 42.5 | 45.0 / 70.0 / 57.5 |" in words
    lines = list(csv.DictReader(io.StringIO(written.csv_text(comparison))))
    own = [line for line in lines if (line["metric"], line["stage"]) == ("reasoning_accuracy", "finetuned_recursive")]
    assert [line["seed"] for line in own] == ["", "0", "1", "2"]
    assert [float(line["value"]) for line in own[1:]] == pytest.approx([45.0, 70.0, 57.5])
    value = comparison.to_dict()
    (row,) = [row for row in value["rows"] if row["name"] == "reasoning_accuracy"]
    assert row["cells"][2]["by_seed"] == pytest.approx([45.0, 70.0, 57.5])
    assert "Stages with several seeds show their mean over seeds" in comparison.note
    assert not any("one seed" in text for text in comparison.sentences)


def test_the_report_draws_the_mean_and_names_the_seeds(folder: Path, comparison: Comparison) -> None:
    page = render(comparison, folder / "logs")
    assert "by seed 45.0 / 70.0 / 57.5" in page
    assert page.count("<td>finetuned_recursive</td>") >= 3, "the origin of each seed's results"
    assert "Primary claim" in page


def test_two_stages_alone_are_judged_alike(folder: Path, comparison: Comparison) -> None:
    two = compare(CompareSettings(seeds=SEEDS), ["baseline", "finetuned_recursive"], folder)
    assert [each.to_dict() for each in two.judgements] == [each.to_dict() for each in comparison.judgements]


def test_one_seed_is_units_alone(folder: Path) -> None:
    comparison = compare(CompareSettings(seeds=(0,)), [], folder)
    assert cell(comparison, "reasoning_accuracy", "finetuned_recursive").by_seed == []
    assert "hold for these checkpoints, not for the method" in sentence(comparison, "one seed")


def test_a_seed_that_one_stage_lacks_is_told(tmp_path: Path) -> None:
    experiment(tmp_path)
    (tmp_path / "eval_results" / "finetuned_vanilla-seed2_results.json").unlink()
    names = ["finetuned_vanilla", "finetuned_recursive"]
    comparison = compare(CompareSettings(seeds=SEEDS), names, tmp_path)
    (warning,) = comparison.warnings
    assert warning.startswith("finetuned_vanilla has the seeds 0, 1 and finetuned_recursive 0, 1, 2")
    found = cell(comparison, "reasoning_accuracy", "finetuned_recursive")
    assert found.pair is not None
    assert found.pair.seeds == 2


def test_what_differs_between_two_seeds_of_a_stage_is_told(tmp_path: Path) -> None:
    experiment(tmp_path)
    file = tmp_path / "eval_results" / "finetuned_recursive-seed1_results.json"
    other = with_own_problems(results("finetuned_recursive", solved=SOLVED[1], gain=0.03, wobble=0.02), 1)
    other["provenance"]["dtype"] = "bfloat16"
    write_json(file, finite(other))
    (warning,) = compare(CompareSettings(seeds=SEEDS), [], tmp_path).warnings
    told = "finetuned_recursive and finetuned_recursive of seed 1 were measured with different dtype"
    assert warning == f"{told} (float32 and bfloat16)"


def test_each_cell_is_what_the_statistics_say(comparison: Comparison) -> None:
    """Token accuracy of recursion and baseline, recomputed from the records."""
    stages = {stage.name: stage for stage in comparison.stages}
    (base,) = stages["baseline"].runs
    seeds = [
        {
            mine["key"]: (float(mine["correct"][-1]), float(other["correct"][-1]), float(other["tokens"]))
            for mine, other in zip(run["records"]["documents"], base["records"]["documents"], strict=True)
        }
        for run in stages["finetuned_recursive"].runs
    ]
    expected = across_seeds(seeds)
    found = cell(comparison, "token_accuracy", "finetuned_recursive")
    assert found.difference == pytest.approx(100 * expected.value)
    assert found.p_value == expected.p_value()
