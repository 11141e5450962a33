"""What a notebook reads of an experiment: the numbers of `rr compare` and of its files, as data frames."""

from __future__ import annotations

import json
import math
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas
import pytest

import rrcli
from comparing import four_stages, publish, results
from rrcli.errors import RRError, UsageError
from rrcli.evaluation import metrics
from rrcli.tracker import MetricsTracker

EXAMPLE = Path(__file__).parents[1] / "docs" / "plot_results.py"


def stages() -> list[dict[str, Any]]:
    """Four stages; the last has two depths and an exit, and problems with words and difficulties."""
    made = four_stages()
    last = made[3]
    for row in last["records"]["documents"]:
        row["nll"] = [row["nll"][0] + 5, row["nll"][0], row["nll"][0] + 1]
        row["correct"] = row["correct"] * 3
        row["passes"] = row["tokens"] // 2
    for i, row in enumerate(last["records"]["problems"]):
        row |= {"correct": [False, *row["correct"], True], "strict": [False, *row["strict"], True], "passes": [0, 1, 1]}
        row |= {"outputs": ["no", "maybe", "yes"], "question": f"what is {i}?", "difficulty": float(i % 3)}
    last["model"] |= {"depth": 1, "exit": {"rule": "margin", "threshold": 0.95}}
    last["by_depth"] = metrics.by_depth(last["records"], 2)
    last["metrics"] |= metrics.from_records(last["records"])
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    publish(tmp_path, *stages())
    return tmp_path


def test_results_have_a_row_for_each_metric_of_each_stage_at_each_depth(folder: Path) -> None:
    frame = rrcli.results(folder)
    files = [json.loads(file.read_text()) for file in sorted((folder / "eval_results").glob("*.json"))]
    own = frame[frame.final]
    assert len(own) == sum(len(file["metrics"]) for file in files)
    for file in files:
        rows = own[own.stage == file["stage"]].set_index("metric")
        for name, entry in file["metrics"].items():
            assert rows.value[name] == entry["value"]
            assert entry.get("low") is None or (rows.low[name], rows.high[name]) == (entry["low"], entry["high"])
    perplexity = frame[(frame.stage == "finetuned_recursive") & (frame.metric == "perplexity")]
    assert perplexity.depth.tolist() == [0, 1, 1]
    assert perplexity.final.tolist() == [False, False, True]
    assert perplexity.exit.fillna("").tolist() == ["", "", "margin:0.95"]
    assert perplexity.n.tolist() == [80, 80, 80]
    by_depth = files[2]["by_depth"]["perplexity"]
    assert files[2]["stage"] == "finetuned_recursive"
    assert perplexity.value.tolist()[:2] == [entry["value"] for entry in by_depth]


def test_results_of_chosen_stages_and_of_files(folder: Path) -> None:
    assert set(rrcli.results(str(folder), "baseline").stage) == {"baseline"}
    both = ["eval_results/baseline_results.json", "finetuned_vanilla"]
    assert list(rrcli.results(folder, both).stage.unique()) == both
    with pytest.raises(UsageError, match="basline"):
        rrcli.results(folder, ["basline"])
    with pytest.raises(UsageError, match="does not exist"):
        rrcli.results(folder / "nowhere")


def test_results_of_nothing_name_the_command(tmp_path: Path) -> None:
    with pytest.raises(RRError) as caught:
        rrcli.results(tmp_path)
    assert "rr run" in caught.value.hint


def test_samples_are_the_records_at_the_stage_s_own_depth(folder: Path) -> None:
    frame = rrcli.samples(folder, "finetuned_recursive")
    assert frame.part.value_counts().to_dict() == {"problems": 200, "documents": 80, "generations": 4}
    problems = frame[frame.part == "problems"]
    assert set(problems.output) == {"yes"}
    assert problems.correct.all()
    assert set(problems.passes) == {2}
    assert set(problems.exit) == {"margin:0.95"}
    documents = frame[frame.part == "documents"]
    found = math.exp(documents.nll.sum() / documents.tokens.sum())
    named = rrcli.results(folder, "finetuned_recursive").set_index(["metric", "final"]).sort_index()
    assert found == pytest.approx(named.value["perplexity", True].item(), rel=1e-12)
    assert documents.correct.isna().all()


def test_samples_of_one_part_have_its_columns_and_a_depth(folder: Path) -> None:
    first, second = (rrcli.samples(folder, "finetuned_recursive", "problems", depth=k) for k in (0, 1))
    assert "nll" not in first
    assert set(first.output) == {"no"}
    assert not first.correct.any()
    own = rrcli.results(folder, "finetuned_recursive")
    row = own[(own.metric == "reasoning_accuracy") & (own.depth == 1) & ~own.final]
    assert 100 * second.correct.mean() == pytest.approx(row.value.item())
    assert second.groupby("difficulty").size().tolist() == [67, 67, 66]
    with pytest.raises(UsageError, match="not measured at depth 2") as caught:
        rrcli.samples(folder, "finetuned_recursive", depth=2)
    assert "0 to 1" in caught.value.hint
    with pytest.raises(UsageError, match="unknown part 'problem'"):
        rrcli.samples(folder, "baseline", "problem")
    with pytest.raises(RRError, match="baseline hold no samples"):
        rrcli.samples(folder, "baseline", "harness")


def test_difficulties_that_are_words_stay_words(tmp_path: Path) -> None:
    made = results("baseline")
    for i, row in enumerate(made["records"]["problems"]):
        row["difficulty"] = "hard" if i % 2 else 2.0
    publish(tmp_path, made)
    assert set(rrcli.samples(tmp_path, "baseline", "problems").difficulty) == {"hard", "2"}


def test_curves_hold_every_point_of_every_run(folder: Path) -> None:
    for run, steps in (("finetuned_vanilla", 3000), ("finetuned_recursive", 2)):
        with MetricsTracker(folder / "logs" / run) as tracker:
            for step in range(steps):
                tracker.log_scalar("train/loss/total", 1 / (step + 1), step)
        with MetricsTracker(folder / "logs" / run) as tracker:
            tracker.log_scalar("final/perplexity", 3.0, 0)
    frame = rrcli.curves(folder)
    assert list(frame.columns) == ["run", "tag", "step", "value"]
    assert len(frame) == 3000 + 2 + 2
    loss = rrcli.curves(folder, "finetuned_vanilla", "train/loss/total")
    assert loss.step.tolist() == list(range(3000))
    assert loss.value.tolist() == pytest.approx([1 / (step + 1) for step in range(3000)])
    with pytest.raises(UsageError, match="no run 'finetuned'"):
        rrcli.curves(folder, "finetuned")
    with pytest.raises(UsageError, match="no run logged 'train/loss'"):
        rrcli.curves(folder, tags=["train/loss"])


def test_curves_of_nothing_say_so(folder: Path) -> None:
    with pytest.raises(RRError, match="holds no logs"):
        rrcli.curves(folder)


def test_compare_is_that_of_the_command(folder: Path) -> None:
    comparison = rrcli.compare(folder, ["baseline", "finetuned_vanilla"], alpha=0.01, gate=["baseline.perplexity > 1"])
    assert comparison.alpha == 0.01
    assert comparison.gates[0].holds
    frame = comparison.to_frame()
    assert list(frame.stage.unique()) == ["baseline", "finetuned_vanilla"]
    row = frame[(frame.metric == "perplexity") & (frame.stage == "finetuned_vanilla")].iloc[0]
    assert row.difference == comparison.rows[0].cells[1].difference
    assert any("Fine-tuning" in text for text in comparison.sentences)
    with pytest.raises(UsageError, match="unknown option 'alfa'") as caught:
        rrcli.compare(folder, alfa=0.01)
    assert "alpha" in caught.value.hint


def test_settings_of_the_experiment_say_where_its_files_are(folder: Path) -> None:
    (folder / "eval_results").rename(folder / "elsewhere")
    (folder / "rr.toml").write_text('[common]\noutput_dir = "elsewhere"\n[compare]\nalpha = 0.02\n')
    assert len(rrcli.results(folder).stage.unique()) == 4
    assert rrcli.compare(folder).alpha == 0.02


def test_the_example_draws_a_picture_in_ten_lines(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = [line for line in EXAMPLE.read_text().splitlines() if line and not line.startswith(("#", '"""'))]
    assert len(code) <= 10
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MPLBACKEND", "agg")
    named = runpy.run_path(str(EXAMPLE))
    assert (folder / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert isinstance(named["frame"], pandas.DataFrame)
    assert len(named["axes"].lines) >= 1


def test_reading_an_experiment_loads_no_torch(folder: Path) -> None:
    code = (
        "import sys, rrcli; rrcli.results(); rrcli.samples('.', 'baseline'); rrcli.compare().to_frame(); "
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=180)
    assert done.stdout.strip() == "set()", done.stderr
