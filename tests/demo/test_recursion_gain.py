"""The benchmark of the gain: what its tables say, and the whole of it at a small size."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rrcli.files import write_json
from rrcli.recursion.feedback_cell import FeedbackCell

FILE = Path(__file__).parents[2] / "benchmarks" / "recursion_gain.py"


@pytest.fixture(scope="module")
def gain() -> Any:
    spec = importlib.util.spec_from_file_location("recursion_gain", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["recursion_gain"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def results(correct: list[list[bool]]) -> dict[str, Any]:
    records = [
        {"key": str(i), "task": "row_steps:max_steps=3", "difficulty": f"row_steps, steps {1 + i % 2}", "correct": c}
        for i, c in enumerate(correct)
    ]
    return {"records": {"problems": records}}


def test_a_row_is_paired_with_vanilla_on_the_problems_that_both_answered(gain):
    vanilla = gain.at_depth(results([[False]] * 10), 0)
    recursive = gain.at_depth(results([[False, True]] * 8 + [[True, False]] * 2), 1)
    some = gain.Answers(dict.fromkeys("01234", True), 0.5)
    reference = [vanilla]
    rows = {"vanilla": reference, "depth 0": [vanilla], "recursive": [recursive], "some": [some]}
    lines = gain.table("run", rows, reference)
    assert lines[2:] == [
        "| vanilla | 0.0 | 0.00 | | |",
        "| depth 0 | 0.0 | 0.00 | +0.0 | 1 |",
        "| recursive | 80.0 | 1.00 | +80.0 | 0.008 |",  # 2 / 2**8
        "| some | 100.0 | 0.50 | +100.0 | - |",  # five problems are too few for a test
    ]


def test_a_random_exit_has_the_histogram_of_another_one_and_takes_depth_0_too(gain):
    found = results([[False, True, False]] * 600)  # right at depth 1 alone
    for record, left in zip(found["records"]["problems"], [[0, 0], [1], [0, 2]] * 200, strict=True):
        record["passes"] = left
    like = gain.with_exit(found)
    assert like.shares == (0.6, 0.2, 0.2)
    assert like.passes == pytest.approx(0.6)
    drawn = gain.at_random(found, like)
    assert drawn.correct.keys() == like.correct.keys()
    assert drawn.accuracy == pytest.approx(20, abs=5)
    assert drawn.passes == pytest.approx(0.6, abs=0.1)
    assert drawn == gain.at_random(found, like)
    assert gain.at_random(found, gain.Answers(like.correct, 0.0, (1.0,))).passes == 0


def test_random_feedback_is_as_large_as_the_trained_one_and_knows_nothing_of_it(gain):
    cell = FeedbackCell(32, 32, 2, torch.Generator().manual_seed(0))
    torch.nn.init.normal_(cell.w_out.weight)
    hidden = torch.randn(2, 5, 32)
    with torch.no_grad():
        trained, fed = cell(hidden, 1), gain.random_feedback(cell, hidden, 1)
    torch.testing.assert_close(fed.norm(dim=-1), trained.norm(dim=-1))
    assert torch.cosine_similarity(fed, trained, dim=-1).abs().mean() < 0.4


def test_difficulty_counts_all_seeds_and_takes_the_deepest_pass(gain, tmp_path):
    for seed in ("a", "b"):
        write_json(tmp_path / seed / "eval_results" / "baseline_results.json", results([[False]] * 8))
        write_json(tmp_path / seed / "eval_results" / "finetuned_vanilla_results.json", results([[True], [False]] * 4))
        write_json(tmp_path / seed / gain.MATCHED / "finetuned_vanilla_results.json", results([[True]] * 8))
        deepest = results([[False, True]] * 8)
        write_json(tmp_path / seed / "eval_results" / "finetuned_recursive_results.json", deepest)
    lines, groups = gain.by_difficulty([tmp_path / "a", tmp_path / "b"])
    assert lines[2:] == [
        "| row_steps, steps 1 | 8 | 0.0 | 100.0 | 100.0 | 100.0 | 1 |",
        "| row_steps, steps 2 | 8 | 0.0 | 0.0 | 100.0 | 100.0 | 0.008 |",
    ]
    pytest.importorskip("matplotlib")
    # All of 255 right: the interval's end is below the share by a rounding error.
    groups["easy"] = {column: [True] * 255 for column in groups["row_steps, steps 1"]}
    gain.plot(groups, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_each_generator_is_paired_on_its_own_problems(gain, tmp_path):
    kinds = ["row_steps:max_steps=3"] * 8 + ["rotate_matrix:max_n=2"] * 4
    found = results([[False]] * 12)
    for record, task in zip(found["records"]["problems"], kinds, strict=True):
        record["task"] = task
    write_json(tmp_path / "eval_results" / "baseline_results.json", found)
    write_json(tmp_path / "eval_results" / "finetuned_recursive_results.json", {"model": {"depth": 2}})
    right = [gain.Answers({str(i): value for i in range(12)}) for value in (False, True)]
    recursive = gain.Answers({str(i): i < 8 for i in range(12)}, 2.0)
    rows = {"vanilla, equal tokens": right[:1], "vanilla, equal FLOPs": right[1:], "recursive, depth 2": [recursive]}
    text = "\n".join(gain.by_generator([tmp_path], rows))
    rows_alone, control = text.split("rotate_matrix, 4 problems")
    assert "row_steps, 8 problems" in rows_alone
    assert "| recursive, depth 2 | 100.0 | 2.00 | +100.0 | 0.008 |" in rows_alone
    assert "| recursive, depth 2 | 0.0 | 2.00 | +0.0 | - |" in control
    assert "| vanilla, equal FLOPs | 100.0 | 0.00 | +100.0 | - |" in control


@pytest.mark.slow
def test_the_shrunken_benchmark_goes_through_and_a_second_one_has_nothing_to_do(tmp_path):
    pytest.importorskip("matplotlib")
    command = [sys.executable, str(FILE), "--shrunken", "--output", str(tmp_path)]
    first = subprocess.run(command, check=True, capture_output=True, text=True, timeout=900)
    rows = ("vanilla, equal FLOPs", "recursive, random feedback, depth 2", "recursive, exit head", "span: middle")
    for row in rows:
        assert f"| {row} |" in first.stdout
    assert (tmp_path / "recursion_gain.png").is_file()
    weights = sorted(tmp_path.rglob("model.safetensors"))
    before = [file.stat().st_mtime_ns for file in weights]
    again = subprocess.run(command, check=True, capture_output=True, text=True, timeout=900)
    assert again.stdout == first.stdout
    assert weights
    assert [file.stat().st_mtime_ns for file in weights] == before
