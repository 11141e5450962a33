"""A model of the hub at a revision: its commit is recorded, kept to, and a branch that moves is noticed. Offline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import rrcli
from commands import rr
from comparing import stage_results
from exports import base_model
from rrcli.comparison.results import Stage
from rrcli.comparison.sentences import warnings
from rrcli.errors import RRError, UsageError
from rrcli.experiment.revisions import moved
from rrcli.experiment.workspace import Workspace
from rrcli.models.source import base_of, resolve
from rrcli.settings import CommonSettings

OLD, NEW = "a" * 40, "b" * 40
NAME = "org/tiny"


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub with two commits of one model, whose main branch is at the older one."""
    cache = tmp_path / "hub"
    repository = cache / "models--org--tiny"
    base_model(repository / "snapshots" / OLD, "llama")
    new = Path(shutil.copytree(repository / "snapshots" / OLD, repository / "snapshots" / NEW))
    config = json.loads((new / "config.json").read_text())
    (new / "config.json").write_text(
        json.dumps(config | {"rope_parameters": {"rope_theta": 5e4, "rope_type": "default"}})
    )
    move(repository, "main", OLD)
    move(repository, "dev", NEW)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return repository


def move(repository: Path, branch: str, commit: str) -> None:
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / branch).write_text(commit)


def workspace(directory: Path, name: str = NAME) -> Workspace:
    return Workspace(directory, CommonSettings(model=name))


@pytest.mark.parametrize(("name", "commit"), [(NAME, OLD), (f"{NAME}@dev", NEW), (f"{NAME}@{NEW}", NEW)])
def test_a_revision_is_a_branch_or_a_commit(repository: Path, tmp_path: Path, name: str, commit: str) -> None:
    source = resolve(name, tmp_path)
    assert (source.commit, source.hub_id, source.recorded(tmp_path)) == (commit, NAME, name)
    assert source.path == repository / "snapshots" / commit


def test_a_revision_that_is_not_there_is_an_error(repository: Path, tmp_path: Path) -> None:
    with pytest.raises(RRError, match=f"{NAME}"):
        resolve(f"{NAME}@nowhere", tmp_path)
    with pytest.raises(UsageError, match="names no revision"):
        resolve(f"{NAME}@", tmp_path)
    folder = base_model(tmp_path / "my@model", "llama")
    assert resolve("my@model", tmp_path).path == folder, "a folder with this name comes first"


def test_what_was_made_stays_with_its_commit_when_the_branch_moves(repository: Path, tmp_path: Path) -> None:
    done = rr("surgery", "--model", NAME, "--no-verify", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "checkpoints" / "after_surgery"
    recorded = json.loads((folder / "recursion.json").read_text())["base"]
    assert (recorded["source"], recorded["commit"]) == (NAME, OLD)
    assert moved(workspace(tmp_path)) == ""
    before = rrcli.load(folder)[0].config.rope_parameters
    move(repository, "main", NEW)
    source = base_of(resolve(str(folder), tmp_path), tmp_path)
    assert (source.commit, source.name) == (OLD, NAME)
    assert rrcli.load(folder)[0].config.rope_parameters == before
    said = moved(workspace(tmp_path))
    assert said.startswith("the main branch of org/tiny has moved from aaaaaaa to bbbbbbb since this experiment began")
    assert f"--model {NAME}@{OLD}" in said
    assert moved(workspace(tmp_path, f"{NAME}@{OLD}")) == ""
    plan = json.loads(rr("run", "--dry-run", "--json", "--model", NAME, folder=tmp_path).stdout)["steps"]
    [surgery] = [step for step in plan if step["kind"] == "surgery"]
    assert (surgery["status"], surgery["detail"]) == ("stale", said)


def test_a_record_that_cannot_be_read_is_an_error_and_not_no_record(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "eval_results").mkdir()
    broken = tmp_path / "eval_results" / "baseline_results.json"
    broken.write_text("{")
    with pytest.raises(
        RRError, match="the commit of org/tiny with which this experiment began cannot be read"
    ) as error:
        moved(workspace(tmp_path))
    assert error.value.hint == f"Remove {broken} to take today's, or name the commit: --model {NAME}@COMMIT."
    assert moved(workspace(tmp_path, f"{NAME}@{OLD}")) == "", "a commit does not move"
    broken.unlink()
    assert moved(workspace(tmp_path)) == ""


def test_results_hold_the_commit_and_a_comparison_of_two_is_warned_about(repository: Path, tmp_path: Path) -> None:
    quick = ("--skip-reasoning", "--skip-generation", "--skip-performance", "--max-samples", "1", "--no-tensorboard")
    for name in (NAME, f"{NAME}@dev"):
        done = rr("eval", *quick, folder=tmp_path, RR_MODEL=name)
        assert done.returncode == 0, done.stderr
        results = json.loads((tmp_path / "eval_results" / "baseline_results.json").read_text())
        assert results["model"]["commit"] == (OLD if name == NAME else NEW)
    assert "has moved" not in done.stderr, "another branch was asked for"
    move(repository, "dev", OLD)
    done = rr("eval", *quick, folder=tmp_path, RR_MODEL=f"{NAME}@dev")
    assert "dev of org/tiny has moved from bbbbbbb to aaaaaaa" in done.stderr


def test_two_commits_are_not_one_model(tmp_path: Path) -> None:
    def stage(name: str, commit: str) -> Any:
        results = stage_results(name)
        results["model"]["commit"] = commit
        return Stage(name, (results,))

    told = warnings({"baseline": stage("baseline", OLD), "after_surgery": stage("after_surgery", NEW)}, [])
    assert any(f"commit ({OLD} and {NEW})" in text for text in told)
