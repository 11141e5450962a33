"""`rr plan`: what it reads, what it says, and its exit code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import rr
from rrcli.data.training_data import TrainingData
from rrcli.demo import defaults
from rrcli.models import loading
from rrcli.models.source import ModelSource
from rrcli.settings import TrainSettings, with_changes

# Short: the embedded model with few examples of few tokens.
SMALL = (
    "--batch-size",
    "4",
    "--train-max-length",
    "64",
    "--context",
    "64",
    "--batch-tokens",
    "512",
    "--max-steps",
    "1",
)


def planned(folder: Path, *arguments: str, code: int = 0) -> dict[str, Any]:
    done = rr("plan", "--json", *SMALL, *arguments, folder=folder)
    assert done.returncode == code, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["schema"] == "rr.footprint/1"
    return found


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(loading, "_read_weights", fail)


@pytest.mark.usefixtures("no_weights")
def test_a_plan_before_setup(tmp_path: Path) -> None:
    found = planned(tmp_path, "--device", "h100", "--seeds", "2")
    assert found["fits"]
    assert found["chosen"] == dict.fromkeys(("train recursive", "train vanilla", "eval", "generate"), "one device")
    assert [stage["command"] for stage in found["stages"]] == [
        "eval baseline",
        "eval after_surgery",
        "train finetuned_vanilla",
        "eval finetuned_vanilla",
        "train finetuned_recursive",
        "eval --choose-exit",
        "eval finetuned_recursive",
        "train vanilla_equal_flops",
        "eval vanilla_equal_flops",
        "costs",
    ]
    assert [stage["times"] for stage in found["stages"]] == [1, 1, 2, 2, 2, 2, 2, 2, 2, 1]
    flops = {stage["command"]: stage["flops"] for stage in found["stages"]}
    assert flops["train finetuned_recursive"] > 2 * flops["train finetuned_vanilla"]
    assert found["seconds"] == pytest.approx(sum(stage["seconds"] for stage in found["stages"]))
    # What `rr setup` would write counts: steps, problems and lengths of the embedded model.
    steps = defaults.SETTINGS["train"]["steps"]
    [vanilla] = [pace for pace in found["paces"] if pace["what"] == "train vanilla"]
    least = 2 * steps * vanilla["flops"] * found["workload"]["tokens"]
    assert flops["train finetuned_vanilla"] == pytest.approx(least, rel=0.5)
    assert found["cache_bytes"][1] == 2 * found["cache_bytes"][0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_weights")
def test_what_does_not_fit_ends_with_1_and_says_what_would(tmp_path: Path) -> None:
    args = ("--batch-size", "64", "--gpus", "1x0.03")
    found = planned(tmp_path, *args, code=1)
    assert not found["fits"]
    assert "train recursive" not in found["chosen"]
    assert found["stages"] == []
    assert found["would_fit"]
    assert planned(tmp_path, *args, *found["would_fit"][0].split())["fits"]
    failed = rr("plan", *SMALL, *args, folder=tmp_path)
    assert failed.returncode == 1
    assert "does not fit on 1 x" in failed.stderr
    assert f"What would fit: {found['would_fit'][0]}" in failed.stderr
    assert "memory of a device" in failed.stdout


@pytest.mark.usefixtures("no_weights")
def test_inside_an_experiment_its_settings_count(tmp_path: Path) -> None:
    (tmp_path / "rr.toml").write_text(
        '[common]\nseeds = "0,5,7"\n[surgery]\nmax_steps = 2\n[train]\nphase = "b"\n[plan]\ngpus = "2x80"\n'
    )
    found = planned(tmp_path)
    assert (found["model"]["phase"], found["device"]["name"], found["device"]["count"]) == ("b", "h100", 2)
    assert {stage["times"] for stage in found["stages"]} == {1, 3}
    # Each device holds what the first one alone would hold, but for the shards.
    totals = {(one["command"], one["arrangement"]): one for one in found["memory"]}
    assert totals["eval", "--parallel replicas=2"]["base"] == totals["eval", "one device"]["base"]
    assert totals["eval", "--parallel fsdp=2"]["base"] < totals["eval", "one device"]["base"]
    assert ("train recursive", "--device-map auto") not in totals


def test_phase_a_has_no_vanilla_training(tmp_path: Path) -> None:
    found = planned(tmp_path, "--device", "h100", "--phase", "a")
    assert {one["command"] for one in found["memory"]} == {"train recursive", "eval", "generate"}
    assert found["stages"] == []
    assert found["model"]["trained"] == {"train recursive": found["model"]["sidecar"]}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has GPUs, which count then")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpus", "8 by 80"), "--gpus is '8 by 80'"),
        (("--gpus", "0x80"), "--gpus is '0x80'"),
        (("--gpus", "8"), "--gpus 8 does not say what they are"),
        (("--device", "h10"), "'h10' are not known"),
        (("--train-max-steps", "3", "--device", "h100"), "at most 1"),
    ],
)
def test_values_that_cannot_be(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    failed = rr("plan", *SMALL, *arguments, folder=tmp_path)
    assert (failed.returncode, failed.stdout) == (2, "")
    assert message in failed.stderr


@pytest.mark.parametrize("width", [80, 160])
def test_a_page_can_be_read_at_any_width(tmp_path: Path, width: int) -> None:
    done = rr("plan", *SMALL, "--gpus", "8x80", folder=tmp_path, COLUMNS=str(width), NO_COLOR="1")
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= width
    assert "…" not in done.stdout
    for text in (
        "memory of a device",
        "--parallel fsdp=8",
        "Bound by",
        "Device hours",
        "Caches of a text of 64 tokens",
    ):
        assert text in done.stdout


def test_the_work_is_that_of_the_data(tmp_path: Path) -> None:
    found = planned(tmp_path, "--device", "h100")["workload"]
    settings = with_changes(TrainSettings(batch_size=4), **defaults.SETTINGS["train"])
    settings = with_changes(settings, batch_size=4, max_length=64)
    data = TrainingData(settings, tmp_path, loading.load_tokenizer(ModelSource("default", defaults.MODEL_DIR)))
    batches = [data.batch(step) for step in range(8)]
    assert found["tokens"] == pytest.approx(sum(batch.tokens for batch in batches) / 8)
    assert found["problems"] == len(defaults.TASKS) * defaults.SETTINGS["eval"]["problems"]
    assert found["notices"] == []
    hub = planned(tmp_path, "--device", "h100", "--data", "hf://nobody/nothing")["workload"]
    assert (hub["rows"], hub["width"], hub["tokens"]) == (4, 64, 256)
    assert "the data is not read" in hub["notices"][0]
