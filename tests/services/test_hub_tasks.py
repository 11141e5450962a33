"""A data set of the hub from its cache of files, without a connection: setup, training, evaluation, and no leak."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pytest
from huggingface_hub import constants
from pyarrow import parquet

import rrcli
from commands import rr
from rrcli.data.hub import hub_name, hub_splits
from rrcli.data.novelty import novelty
from rrcli.data.splits import side_of
from rrcli.data.training_data import TrainingData
from rrcli.errors import RRError
from rrcli.settings import TrainSettings

COMMIT = "c0ffee" + "0" * 34
TRAIN = [f"Ann has {i} red apples and buys {i % 7 + 2} more. How many does she have?" for i in range(80)]
TEST = [f"Bob has {i} blue balls and loses {i % 3 + 1}. How many are left?" for i in range(30)]
TASK = "hf://openai/gsm8k:main"


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a hub cache that holds GSM8K's files, as `huggingface_hub` writes it; two rows of train are in test too."""
    repository = tmp_path / "hub" / "datasets--openai--gsm8k"
    folder = repository / "snapshots" / COMMIT
    for config in ("main", "socratic"):
        for split, questions in (("train", [*TRAIN, TEST[0], TEST[1].upper()]), ("test", TEST)):
            answers = [f"{config}: it is <<{n}={n}>>{n}.\n#### {n:,}" for n, _ in enumerate(questions)]
            (folder / config).mkdir(parents=True, exist_ok=True)
            table = pyarrow.table({"question": questions, "answer": answers})
            parquet.write_table(table, folder / config / f"{split}-00000-of-00001.parquet")
    configs = "".join(
        f"- config_name: {config}\n  data_files:\n"
        + "".join(f"  - split: {split}\n    path: {config}/{split}-*\n" for split in ("train", "test"))
        for config in ("main", "socratic")
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n# GSM8K\n")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    work = tmp_path / "work"
    work.mkdir()
    return work


def test_train_is_trained_on_and_test_is_evaluated_whole(cached: Path) -> None:
    done = rr("setup", "--task", TASK, folder=cached)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "hf://openai/gsm8k:main" in done.stdout

    done = rr(
        *(
            "train",
            "--mode",
            "vanilla",
            "--steps",
            "1",
            "--batch-size",
            "2",
            "--max-length",
            "128",
            "--warmup-steps",
            "0",
        ),
        *("--eval-interval", "0"),
        folder=cached,
    )
    assert done.returncode == 0, done.stderr
    validation = sum(side_of(question) == "validation" for question in TRAIN)
    assert f"{TASK}: {len(TRAIN) - validation} of its {len(TRAIN) + len(TEST)} problems are trained on" in done.stderr

    quick = (
        "--skip-perplexity",
        "--skip-generation",
        "--skip-performance",
        "--max-new-tokens",
        "2",
        "--problems",
        "99",
    )
    done = rr("eval", "--stage", "finetuned_vanilla", *quick, folder=cached)
    assert done.returncode == 0, done.stderr
    results = json.loads((cached / "eval_results" / "finetuned_vanilla_results.json").read_text())
    assert results["metrics"]["reasoning_accuracy/gsm8k"]["n"] == len(TEST)
    assert {record["question"] for record in results["records"]["problems"]} == set(TEST)
    assert {record["answer"] for record in results["records"]["problems"]} == {f"{n:,}" for n in range(30)}
    assert f"{TASK}: 1 repeated questions and 1 near-twins" in done.stderr

    data = TrainingData(
        TrainSettings(task=(TASK,), task_share=1.0, batch_size=64, max_length=128), cached, rrcli.load("default")[1]
    )
    tested = {novelty(question) for question in TEST}
    shown = {problem.question for task in data.tasks for problem in task.stream(0, 2000, side="train")}
    assert len(shown) == len(TRAIN) - validation
    assert not tested & {novelty(question) for question in shown}


def test_configurations_and_revisions_are_told_apart(cached: Path) -> None:
    assert hub_splits(hub_name("hf://openai/gsm8k:socratic"), cached) == ["train", "test"]
    assert hub_splits(hub_name(f"hf://openai/gsm8k@{COMMIT}:main"), cached) == ["train", "test"]
    for spec, message in (
        ("hf://openai/gsm8k", "main"),
        ("hf://openai/gsm8k@v2:main", "openai/gsm8k"),
        ("hf://openai/other", "openai/other"),
    ):
        with pytest.raises(RRError, match=f"cannot read {spec}: .*{message}"):
            hub_splits(hub_name(spec), cached)
