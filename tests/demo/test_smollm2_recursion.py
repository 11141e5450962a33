"""The benchmark on SmolLM2-135M: its problems, its measurement on validation, its tables, and a small run of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from comparing import results as results_of
from rrcli.comparison.flips import flips_of
from rrcli.comparison.results import Stage
from rrcli.data.splits import side_of
from rrcli.reporting import Silent
from rrcli.services.surgery import surgery
from rrcli.services.train import train
from rrcli.settings import SurgerySettings, TrainSettings

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import smollm2_recursion as benchmark
import smollm2_report as report
from smollm2_validation import validated


def problems(right: list[list[bool]], task: str = "chain_sum:max_terms=3") -> dict:
    found = results_of(report.RECURSIVE)
    found["records"]["problems"] = [
        {
            "key": str(number),
            "task": task,
            "prompt": f"1 + {number} =",
            "question": f"1 + {number} =",
            "answer": str(1 + number),
            "correct": answers,
            "strict": answers,
            "outputs": [str(1 + number) if one else "no\nidea" for one in answers],
        }
        for number, answers in enumerate(right)
    ]
    return found


@pytest.mark.parametrize("hops", benchmark.HOPS)
def test_a_problem_is_answered_by_following_the_facts_and_has_no_shortcut(hops):
    random = Random(0)
    for _ in range(200):
        problem = benchmark.problem(hops, random)
        *facts, question = problem["question"].split(". ")
        boss = dict(fact.split("'s boss is ") for fact in facts)
        assert len(boss) == benchmark.PEOPLE
        assert set(boss) == set(boss.values())
        name, *steps = question.removeprefix("Who is ").removesuffix("?").split("'s ")
        assert steps == ["boss"] * hops
        path = [name]
        for _ in steps:
            path.append(boss[path[-1]])
        assert path[-1] == problem["answer"]
        assert len(set(path)) == hops + 1


def test_the_files_are_the_same_everywhere_and_have_problems_on_every_side(tmp_path):
    benchmark.write_problems(tmp_path)
    for hops in benchmark.HOPS:
        text = (tmp_path / f"boss_{hops}.jsonl").read_text()
        asked = [json.loads(line)["question"] for line in text.splitlines()]
        assert len(set(asked)) > 0.99 * len(asked)
        assert {side_of(question) for question in asked} == {"train", "validation", "test"}
        (tmp_path / f"boss_{hops}.jsonl").unlink()
        benchmark.write_problems(tmp_path)
        assert (tmp_path / f"boss_{hops}.jsonl").read_text() == text


def test_fixes_and_breaks_are_shares_of_the_errors_and_hits_of_pass_0():
    runs = (problems([[False, True]] * 3 + [[False, False]]), problems([[True, False], [True, True]], "boss_2.jsonl"))
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in _lines(runs)]
    assert rows[2:] == [
        ["chain_sum", "75.0 (3 of 4)", "-"],
        ["boss_2", "-", "50.0 (1 of 2)"],
        ["all", "75.0 (3 of 4)", "50.0 (1 of 2)"],
    ]


def _lines(runs: tuple[dict, ...]) -> list[str]:
    return report.repairs_table(runs).splitlines()


def test_flipped_problems_have_both_answers_in_one_line_and_five_of_a_kind():
    vanilla, recursive = problems([[False]] * 8 + [[True]] * 2), problems([[True]] * 8 + [[False], [True]])
    flips = flips_of([Stage(report.VANILLA, (vanilla,)), Stage(report.RECURSIVE, (recursive,))])
    lines = report.flipped_table(flips).splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == ["| fixed"] * 5 + ["| broken"]
    assert lines[0].endswith("| 1 + 0 = | 1 | no idea | 1 |")
    assert lines[-1].endswith("| 1 + 8 = | 9 | 9 | no idea |")


def test_curves_are_means_over_the_seeds_that_were_measured():
    curves = {report.VANILLA: {"a": [(100, 20.0), (200, 40.0)], "b": [(100, 30.0)]}}
    assert report.curves_table(curves).splitlines()[2:] == [
        "| finetuned_vanilla | 100 | 25.0 |",
        "| finetuned_vanilla | 200 | 40.0 |",
    ]
    at_equal_flops = {report.MATCHED: {"a": [(100, 20.0), (328, 40.0)], "b": [(100, 30.0), (332, 70.0)]}}
    assert report.curves_table(at_equal_flops).splitlines()[3] == "| vanilla_equal_flops | 330 | 55.0 |"


def test_recipes_are_shown_by_task_and_depth():
    one = {
        "right": {"chain_sum:max_terms=3": [[False, True], [True, True]], "boss_2.jsonl": [[False, False]] * 4},
        "nats": {"chain_sum:max_terms=3": [[2.0, 1.0], [2.0, 0.0]], "boss_2.jsonl": [[1.0, 1.0]] * 4},
        "text_nats": [0.5, 0.25],
        "training": {"flops": 2.5e14, "seconds": 61.2},
        "scalars": {"train/feedback_norm": {"value": 0.125, "step": 2}},
    }
    lines = report.recipes_table({"all": one}).splitlines()
    assert lines[0].startswith("| recipe | chain_sum, % | boss_2, % | all, % |")
    shown = "| all | 50 / 100 | 0 / 0 | 25 / 50 | 1.500 / 0.750 | 0.500 / 0.250 | 0.250 | 61 | 0.125 |"
    assert lines[2] == shown


def test_validation_counts_answers_that_greedy_decoding_gives(tmp_path):
    settings = TrainSettings(steps=1, batch_size=2, eval_interval=0, device="cpu", chat_template=False)
    surgery(SurgerySettings(max_steps=1), tmp_path, Silent())
    train(settings, "recursive", tmp_path, Silent())
    found = validated(tmp_path, report.RECURSIVE, problems=4, name="all", dtype="float32")
    assert all(len(right) == 4 and len(right[0]) == 2 for right in found["right"].values())
    easy = next(right for task, right in found["right"].items() if task.startswith("row_steps"))
    assert any(answers[0] for answers in easy)  # the embedded model knows steps
    assert all(nats > 0 for each in found["nats"].values() for answers in each for nats in answers)
    assert len(found["text_nats"]) == 2
    assert found["training"]["steps"] == 1


@pytest.mark.slow
def test_the_shrunken_benchmark_goes_through_and_a_second_one_has_nothing_to_do(tmp_path):
    pytest.importorskip("matplotlib")
    small = ["--shrunken", "--model", "default", "--output", str(tmp_path)]
    command = [sys.executable, benchmark.__file__, *small]
    first = subprocess.run([*command, "--span", "all"], check=True, capture_output=True, text=True, timeout=900)
    for row in ("as it is, seed 1", "random feedback", "oracle", "all"):
        assert f"| {row} |" in first.stdout
    assert (tmp_path / "smollm2_curves.png").is_file()
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("model.safetensors")}
    again = subprocess.run(command, check=True, capture_output=True, text=True, timeout=900)
    assert again.stdout == first.stdout
    assert before == {file: file.stat().st_mtime_ns for file in before}
    recipes = [*command, "--recipes", "--only", "vanilla", "--only", "all"]
    table = subprocess.run(recipes, check=True, capture_output=True, text=True, timeout=900).stdout
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == ["| vanilla", "| all"]
