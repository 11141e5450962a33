"""The benchmark of the gain: what its tables say, and the whole of it at a small size."""

from __future__ import annotations

import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from comparing import results as results_of
from rrcli.comparison.claims import read_declaration
from rrcli.comparison.compare import compare_stages
from rrcli.comparison.comparison import Comparison
from rrcli.evaluation import metrics
from rrcli.files import finite, write_json
from rrcli.recursion.feedback_cell import FeedbackCell
from rrcli.services.compare import compare
from rrcli.settings import CompareSettings

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import recursion_gain as gain
import recursion_gain_report as report

SEEDS = (0, 1, 2)


def answers(stage: str, correct: list[list[bool]], *, seed: int = 0) -> dict[str, Any]:
    """Return results with problems of the seed's own, answered as `correct[problem][depth]` says."""
    found = results_of(stage)
    found["records"]["problems"] = [
        {
            "key": f"{seed}/{number}",
            "task": "row_steps:max_steps=3" if number % 2 else "rotate_matrix",
            "difficulty": f"steps {1 + number % 2}",
            "correct": right,
            "strict": right,
            "outputs": list(map(str, right)),
            "lookup": number == 0,
        }
        for number, right in enumerate(correct)
    ]
    found["records"]["documents"] = found["records"]["documents"][:8]
    for record in found["records"]["documents"]:
        record["nll"], record["correct"] = record["nll"] * len(correct[0]), record["correct"] * len(correct[0])
    found["metrics"] = metrics.from_records(found["records"])
    found["by_depth"] = metrics.by_depth(found["records"])
    return found | {"seed": seed, "test_seeds": [seed]}


def rows(text: str) -> dict[str, list[str]]:
    """Return first cell -> other cells, of a table in Markdown."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    return {first: rest for first, *rest in cells}


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """Three seeds with ten problems each: recursion solves 9, 7 and 8 of them, vanilla 5, at equal FLOPs 8."""
    folder, made = tmp_path_factory.mktemp("experiment"), []
    for seed, right in zip(SEEDS, (9, 7, 8), strict=True):
        made.append(answers(report.VANILLA, [[n < 5] for n in range(10)], seed=seed))
        made.append(answers(report.MATCHED, [[n < 8] for n in range(10)], seed=seed))
        made.append(answers(report.RECURSIVE, [[n < 5, n < right] for n in range(10)], seed=seed))
    baseline = answers("baseline", [[False]] * 10)
    baseline["records"]["problems"] = [
        r for seed in SEEDS for r in answers("baseline", [[False]] * 10, seed=seed)["records"]["problems"]
    ]
    baseline["metrics"] |= metrics.from_records(baseline["records"])
    for found in (baseline, *made):
        name = found["stage"] + (f"-seed{found['seed']}" if found["seed"] else "")
        write_json(folder / "eval_results" / f"{name}_results.json", finite(found))
    return compare(CompareSettings(seeds=SEEDS), list(report.STAGES), folder)


def test_a_stage_has_its_mean_with_interval_and_its_seeds_by_task(comparison):
    lines = report.accuracies(comparison).splitlines()
    assert lines[0] == "| accuracy, % | Reasoning accuracy | rotate_matrix | row_steps |"
    recursive = next(number for number, line in enumerate(lines) if line.startswith("| finetuned_recursive"))
    assert lines[recursive].startswith("| finetuned_recursive | 80.0 [55.2, 100.0] |")  # t of 2 df: 4.30 * 10 / sqrt(3)
    assert [line.split(" | ")[1] for line in lines[recursive + 1 : recursive + 4]] == ["90.0", "70.0", "80.0"]
    assert rows(report.accuracies(comparison))["lookup of training answers"] == ["10.0", "20.0", "0.0"]


def test_differences_have_seeds_as_a_random_factor_and_the_control_at_equal_flops(comparison):
    text = report.differences(comparison, [(report.RECURSIVE, report.VANILLA), (report.RECURSIVE, report.MATCHED)])
    over_all = [line for line in text.splitlines() if "Reasoning accuracy" in line]
    assert over_all[0].split(" | ")[2:5] == [
        "+30.0",
        "+5.2 to +54.8",
        "0.0351",
    ]  # scipy.stats.ttest_1samp([20, 40, 30])
    assert over_all[0].endswith("+40.0 +20.0 +30.0 |")
    assert over_all[1].split(" | ")[2:5] == ["+0.0", "−24.8 to +24.8", "1.0000"]


def test_a_single_recursion_is_paired_with_vanilla_and_too_few_problems_have_no_p_value():
    vanilla, few = answers(report.VANILLA, [[False]] * 10), answers(report.VANILLA, [[False]] * 5)
    recursive = answers(report.RECURSIVE, [[False, True]] * 8 + [[False, False]] * 2)
    found = rows(
        report.by_depth(
            {
                "many": (recursive, vanilla),
                "more": (answers(report.RECURSIVE, [[True, True]] * 20), answers(report.VANILLA, [[False]] * 20)),
                "few": (answers(report.RECURSIVE, [[False, True]] * 5), few),
                "same": (answers(report.RECURSIVE, [[False, False]] * 10), vanilla),
            }
        )
    )
    assert found["many"][:2] == ["0.0, 80.0", "+80.0"]
    assert found["many"][3:] == ["0.0078", "2e+12"]  # 2 / 2**8
    assert found["more"][3] == "< 0.0001"
    assert found["few"][1:4] == ["+100.0", "-", "-"]
    assert found["same"][1] == "+0.0"
    assert found["same"][3] == "-"


def test_difficulty_counts_all_seeds_and_takes_the_deepest_pass(comparison, tmp_path):
    groups = report.by_difficulty(comparison.stages)
    assert rows(report.difficulty_table(groups))["steps 1"] == ["15", "0.0", "60.0", "80.0", "86.7"]
    assert rows(report.difficulty_table(groups))["steps 2"] == ["15", "0.0", "40.0", "80.0", "73.3"]
    pytest.importorskip("matplotlib")
    # All of 255 right: the interval's end is below the share by a rounding error.
    groups["easy"] = {stage: [True] * 255 for stage in report.STAGES}
    report.plot(groups, tmp_path / "plot.png")
    points = [{"rule": "depth", "mflop": 1.0, "accuracy": {"value": 50.0}}, {"rule": "oracle", "accuracy": None}]
    report.plot_exits({"test": points, "n": {"test": {"problems": 8}}}, tmp_path / "exits.png")
    for name in ("plot.png", "exits.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_quality_is_drawn_against_what_a_new_token_costs_with_every_depth_and_the_exit(comparison, tmp_path):
    stages = {stage.label: stage for stage in deepcopy(comparison.stages)}
    recursive = stages[report.RECURSIVE]
    for number, run in enumerate(recursive.runs):
        run["model"] |= {"depth": 1, "exit": {"rule": "margin", "threshold": 0.9}}
        run["metrics"]["decode_flops_per_token"] = {"value": 12.0}
        run["by_depth"]["decode_flops_per_token"] = [{"value": 8.0 + number}, {"value": 16.0 + number}]
        run["by_depth"]["reasoning_accuracy"] = [{"value": 50.0}, {"value": 85.0}]
    again = compare_stages(stages, read_declaration(CompareSettings()))
    points = report.cost_curves(again)["decode_flops_per_token"]["finetuned_recursive"]
    assert points == [(9.0, 50.0, "0"), (17.0, 85.0, "1"), (12.0, 80.0, "exit")]
    pytest.importorskip("matplotlib")
    report.plot_costs(again, tmp_path / "costs.png")
    assert (tmp_path / "costs.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_with_an_exit_is_compared_at_every_pass_with_runs_without():
    run = answers(report.RECURSIVE, [[False, True, False]] * 10)
    assert report.every_pass(run) is run
    run["model"]["exit"] = {"rule": "margin", "threshold": 0.9}
    assert [record["correct"] for record in report.every_pass(run)["records"]["problems"]] == [[False, True]] * 10


def test_the_frontier_is_cut_to_some_thresholds_and_shows_the_chosen_one_with_its_control():
    def point(rule: str, threshold: float, name: str, **more: Any) -> dict[str, Any]:
        costs = {"passes": 0.5, "mflop": 12.0, "nats": 0.8, "text_passes": None, "text_mflop": None}
        share = {"value": 90.0, "low": 88.0, "high": 92.0, "n": 600}
        return {"name": name, "rule": rule, "threshold": threshold, "accuracy": share, **costs, **more}

    thresholds = (0.7, 0.8, 0.9)
    points = [point("probability", value, f"probability:{value}") for value in thresholds]
    points += [point("random", 0.0, "random", like=f"probability:{value}") for value in thresholds]
    points += [point("depth", 1, "depth:1"), point("oracle", 0.0, "oracle", accuracy=None)]
    found = rows(report.exits_table({"test": points, "chosen": {"rule": "probability", "threshold": 0.8}}))
    assert list(found)[2:] == [
        *("**probability:0.8** (chosen)", "probability:0.9"),
        *("random, as often as probability:0.8", "random, as often as probability:0.9", "depth:1", "oracle"),
    ]
    assert found["depth:1"] == ["90.0 [88.0, 92.0]", "0.500", "12.00", "0.800", "-"]
    assert found["oracle"][0] == "-"


def test_random_feedback_is_as_large_as_the_trained_one_and_knows_nothing_of_it():
    cell = FeedbackCell(32, 32, 2, torch.Generator().manual_seed(0))
    torch.nn.init.normal_(cell.w_out.weight)
    hidden = torch.randn(2, 5, 32)
    with torch.no_grad():
        trained, fed = cell(hidden, 1), gain.random_feedback(cell, hidden, 1)
    torch.testing.assert_close(fed.norm(dim=-1), trained.norm(dim=-1))
    assert torch.cosine_similarity(fed, trained, dim=-1).abs().mean() < 0.4


@pytest.mark.slow
def test_the_shrunken_benchmark_goes_through_and_a_second_one_has_nothing_to_do(tmp_path):
    pytest.importorskip("matplotlib")
    command = [sys.executable, gain.__file__, "--shrunken", "--output", str(tmp_path)]
    first = subprocess.run(command, check=True, capture_output=True, text=True, timeout=900)
    for row in ("as it is, seed 1", "random feedback", "max_steps 2", "oracle", "FLOPs per new token, MFLOP ↓"):
        assert f"| {row} |" in first.stdout
    assert (tmp_path / "recursion_gain.png").is_file()
    assert (tmp_path / "recursion_gain_cost.png").is_file()
    weights = sorted(tmp_path.rglob("model.safetensors"))
    before = [file.stat().st_mtime_ns for file in weights]
    again = subprocess.run(command, check=True, capture_output=True, text=True, timeout=900)
    assert again.stdout == first.stdout
    assert weights
    assert [file.stat().st_mtime_ns for file in weights] == before
