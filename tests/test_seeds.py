"""An experiment with seeds: what it makes, that it goes on after every stop, and that a seed more only adds to it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from commands import rr
from rrcli.cli import performing
from rrcli.files import checkpoints

TRAINED = ("finetuned_vanilla", "finetuned_recursive", "vanilla_equal_flops")
SMALL = {
    "RR_TRAIN_STEPS": "3",
    "RR_TRAIN_BATCH_SIZE": "2",
    "RR_TRAIN_MAX_LENGTH": "48",
    "RR_TRAIN_WARMUP_STEPS": "1",
    "RR_TRAIN_EVAL_INTERVAL": "0",
    "RR_EVAL_PROBLEMS": "2",
    "RR_EVAL_MAX_SAMPLES": "2",
    "RR_EVAL_MAX_NEW_TOKENS": "4",
    "RR_EVAL_SKIP_PERFORMANCE": "true",
    "RR_EVAL_SKIP_GENERATION": "true",
    "RR_EVAL_TENSORBOARD": "false",
    "RR_TASK": "row_steps:min_steps=2,max_steps=3",
}


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment with two seeds that was made in one go."""
    folder = tmp_path_factory.mktemp("seeds")
    done = rr("run", "--seeds", "2", folder=folder, **SMALL)
    assert done.returncode == 0, done.stderr
    return folder


def results(folder: Path, name: str) -> dict[str, Any]:
    return dict(json.loads((folder / "eval_results" / f"{name}_results.json").read_text()))


def keys(folder: Path, name: str, part: str = "problems") -> set[str]:
    return {record["key"] for record in results(folder, name)["records"][part]}


def statuses(folder: Path, *arguments: str, **changes: str) -> dict[str, str]:
    done = rr("run", "--dry-run", "--json", *arguments, folder=folder, **(SMALL | changes))
    return {step["command"]: step["status"] for step in json.loads(done.stdout)["steps"]}


def test_each_seed_is_trained_and_measured_with_its_own_problems(experiment: Path) -> None:
    for stage in TRAINED:
        for seed, name in ((0, stage), (1, f"{stage}-seed1")):
            found = results(experiment, name)
            assert (found["stage"], found["seed"], found["test_seeds"]) == (stage, seed, [seed])
            assert found["training"]["run"] == name
    weights = [
        (checkpoints(experiment / "checkpoints" / name)[-1] / "model.safetensors").read_bytes()
        for name in ("finetuned_recursive", "finetuned_recursive-seed1")
    ]
    assert weights[0] != weights[1]


def test_what_is_measured_once_has_the_problems_and_documents_of_every_seed(experiment: Path) -> None:
    for stage in ("baseline", "after_surgery"):
        assert results(experiment, stage)["test_seeds"] == [0, 1]
        assert keys(experiment, stage) == keys(experiment, TRAINED[0]) | keys(experiment, f"{TRAINED[0]}-seed1")
    assert keys(experiment, TRAINED[0]).isdisjoint(keys(experiment, f"{TRAINED[0]}-seed1"))
    documents = {name: keys(experiment, name, "documents") for name in ("baseline", TRAINED[1], f"{TRAINED[1]}-seed1")}
    assert len({frozenset(found) for found in documents.values()}) == 1
    assert keys(experiment, TRAINED[0]) == keys(experiment, TRAINED[1]) == keys(experiment, TRAINED[2])


def test_the_control_spends_the_flops_of_its_own_seed(experiment: Path) -> None:
    for end in ("", "-seed1"):
        recursive, control = (results(experiment, f"{stage}{end}")["training"] for stage in TRAINED[1:])
        assert control["mode"] == "vanilla"
        # It trains whole steps, and batches differ in length: here a step is a fifth of all.
        assert control["flops"] == pytest.approx(recursive["flops"], rel=0.25)
        assert control["steps"] > recursive["steps"]


def test_a_seed_more_adds_to_the_experiment(experiment: Path) -> None:
    assert set(statuses(experiment).values()) == {"done"}
    plan = statuses(experiment, "--seeds", "3")
    new = [command for command in plan if command.endswith("--seed 2")]
    assert len(new) == 7
    assert {plan[command] for command in new} == {"missing"}
    measured_once = {"rr eval --stage baseline", "rr eval --stage after_surgery"}
    assert {c for c, status in plan.items() if status == "stale"} == {"rr setup", *measured_once}


def test_what_is_stale_is_stale_with_the_seed_that_it_belongs_to(experiment: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(experiment, tmp_path / "copy"))
    shutil.rmtree(folder / "checkpoints" / "finetuned_recursive-seed1")
    plan = statuses(folder)
    assert plan.pop("rr train --mode recursive --seed 1") == "missing"
    stale = {command for command, status in plan.items() if status != "done"}
    assert stale == {
        "rr eval --stage finetuned_recursive --choose-exit --seed 1",
        "rr eval --stage finetuned_recursive --seed 1",
        "rr train --mode vanilla --match-flops finetuned_recursive --seed 1",
        "rr eval --stage vanilla_equal_flops --seed 1",
    }
    shown = json.loads(rr("status", "--json", folder=folder, **SMALL).stdout)
    assert shown["seeds"] == [0, 1]
    assert shown["next"] == "rr train --mode recursive --seed 1"


@pytest.mark.slow
def test_a_seed_more_that_is_interrupted_at_every_step_ends_as_if_it_had_been_there_from_the_start(
    experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    perform, made, said = performing.perform, list[str](), ""

    def one_step(step: Any, *context: Any) -> None:
        perform(step, *context)
        if step.kind != "setup":
            made.append(step.command)
            raise KeyboardInterrupt

    def repeat(*command: str) -> None:
        """Type a command until it ends by itself."""
        nonlocal said
        while (done := rr(*command, folder=tmp_path, **SMALL)).returncode == 130:
            said += done.stderr
            assert len(made) < 20
        assert done.returncode == 0, done.stderr

    assert rr("run", folder=tmp_path, **SMALL).returncode == 0
    monkeypatch.setattr(performing, "perform", one_step)
    first = written(tmp_path, ("finetuned_vanilla", "finetuned_recursive"))
    repeat("run", "--seeds", "2")
    assert len(made) == 2 + 2 + 7  # what is measured once; the control of the first seed; the second seed
    assert said.count("going on with an earlier evaluation") == 2
    assert written(tmp_path, ("finetuned_vanilla", "finetuned_recursive")) == first
    for file in sorted((experiment / "eval_results").glob("*_results.json")):
        again = json.loads((tmp_path / "eval_results" / file.name).read_text())
        assert again["records"] == json.loads(file.read_text())["records"], file.name
        assert again["inputs"] == json.loads(file.read_text())["inputs"], file.name


def written(folder: Path, runs: tuple[str, ...]) -> dict[Path, int]:
    """Return when each file of the runs and of their results was written."""
    files = [file for run in runs for file in (folder / "checkpoints" / run).rglob("*") if file.is_file()]
    files += [folder / "eval_results" / f"{run}_results.json" for run in runs]
    return {file: file.stat().st_mtime_ns for file in files}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("run", "--seeds", "5,6"), "rr.toml [common] seed is 0, which is not among the seeds of the experiment: 5,6"),
        (("train", "--seed", "9"), "--seed is 9, which is not among the seeds of the experiment: 0,1"),
        (("run", "--seed", "1"), "seed is 1, but the experiment has the seeds 0, 1, and a plan is for all of them"),
        (("setup", "--seed", "1"), "seed is 1, but the experiment has the seeds 0, 1, and rr.toml is for all of them"),
        (("surgery", "--seed", "1"), "seed is 1, but the experiment has the seeds 0, 1, and surgery is made once"),
        (("eval", "--stage", "finetuned_recursive-seed1"), "Write --stage finetuned_recursive --seed 1."),
        (("train", "--run-name", "finetuned_recursive-seed1"), "is that of another stage or seed"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_a_seed_that_is_not_meant_so_is_refused(experiment: Path, arguments: tuple[str, ...], said: str) -> None:
    before = (experiment / "rr.toml").read_bytes()
    done = rr(*arguments, folder=experiment, **SMALL)
    assert done.returncode == 2
    assert said in " ".join(done.stderr.split())
    assert (experiment / "rr.toml").read_bytes() == before


def test_an_evaluation_with_a_seed_measures_its_replicate_again(experiment: Path) -> None:
    before = results(experiment, "finetuned_vanilla-seed1")
    done = rr("eval", "--stage", "finetuned_vanilla", "--seed", "1", "--json", folder=experiment, **SMALL)
    again = json.loads(done.stdout)
    assert (again["seed"], again["records"]) == (1, before["records"])
    assert set(statuses(experiment).values()) == {"done"}


def test_a_control_whose_flops_cannot_be_counted_is_left_out_and_all_else_is_done(
    experiment: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(experiment, tmp_path / "copy"))
    last = checkpoints(folder / "checkpoints" / "finetuned_recursive-seed1")[-1] / "metrics.json"
    saved = json.loads(last.read_text())
    saved["training"]["uncounted"] = ["my_kernel"]
    last.write_text(json.dumps(saved))
    plan = statuses(folder)
    control = "rr train --mode vanilla --match-flops finetuned_recursive --seed 1"
    assert plan[control] == plan["rr eval --stage vanilla_equal_flops --seed 1"] == "impossible"
    assert "impossible" in rr("status", folder=folder, **SMALL).stdout
    done = rr("run", folder=folder, **SMALL)
    assert done.returncode == 0, done.stderr
    assert f"{control} is left out" in done.stderr
    assert "my_kernel" in done.stderr
    assert done.stderr.count("done already") == 16
