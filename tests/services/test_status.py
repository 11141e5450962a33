"""`rr status`: what it finds in a workspace, and that it fits a narrow terminal."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from comparing import publish, results
from rrcli import configuration, settings
from rrcli.errors import RRError
from rrcli.files import MANIFEST, METRICS_FILE, write_json
from rrcli.services.status import Status, status
from rrcli.ui import results as shown


def looked(folder: Path, **flags: Any) -> Status:
    return status(folder, lambda cls: configuration.load(cls, folder, flags))


def checkpoint(run: Path, step: int, steps: int, **scalars: float) -> Path:
    """Make what `rr train` leaves at a step, as far as `rr status` reads it."""
    folder = run / f"step-{step:06d}"
    logged = {f"evaluation/during_training/{name}": {"value": value, "step": step} for name, value in scalars.items()}
    write_json(folder / METRICS_FILE, {"schema": 1, "inputs": "x", "step": step, "steps": steps, "scalars": logged})
    recursion = {"max_steps": 2, "span": None, "cell_width": None, "chunk_width": 16, "seed": 0}
    base = {"source": "default", "fingerprint": "f"}
    write_json(folder / MANIFEST, {"schema": 1, "base": base, "weights": "own", "recursion": recursion})
    (folder / "model.safetensors").write_bytes(b"0" * 1000)
    return folder


def test_an_empty_workspace_begins_with_setup(tmp_path: Path) -> None:
    found = looked(tmp_path)
    assert [stage.name for stage in found.stages] == list(settings.STAGES[:4])
    assert {stage.results for stage in found.stages} == {"missing"}
    assert found.next == "rr setup"
    assert list(tmp_path.iterdir()) == []


def test_runs_checkpoints_and_metrics_are_found(tmp_path: Path) -> None:
    publish(tmp_path, results("baseline") | {"inputs": "x"})
    (tmp_path / "rr.toml").write_text("")
    for step in (10, 20):
        checkpoint(tmp_path / "checkpoints" / "finetuned_vanilla", step, 40, perplexity=3.5)
    checkpoint(tmp_path / "checkpoints" / "long_run", 40, 40, perplexity=2.5)
    (tmp_path / "checkpoints" / "long_run" / ".step-000050.tmp").mkdir()
    found = {stage.name: stage for stage in looked(tmp_path).stages}
    assert list(found) == [*settings.STAGES[:4], "long_run"]
    baseline, vanilla, other = found["baseline"], found["finetuned_vanilla"], found["long_run"]
    assert baseline.results == "stale"  # made by hand, so from other inputs
    assert baseline.metrics["perplexity"] == results("baseline")["metrics"]["perplexity"]["value"]
    assert not baseline.during_training
    assert (vanilla.step, vanilla.steps, vanilla.checkpoints) == (20, 40, [10, 20])
    assert vanilla.bytes > 2000
    assert vanilla.model == "stale"
    assert vanilla.metrics == {"perplexity": 3.5}
    assert vanilla.during_training
    assert (other.model, other.step) == ("done", 40)


def test_seeds_share_a_line_that_says_which_of_them_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rr.toml").write_text("[common]\nseeds = 5\n")
    publish(tmp_path, results("baseline") | {"inputs": "x", "test_seeds": [0, 1]})
    for name in ("finetuned_vanilla", "finetuned_vanilla-seed3", "finetuned_recursive-seed1"):
        checkpoint(tmp_path / "checkpoints" / name, 10_000, 20_000, perplexity=2.0 + (name[-1] == "3"))
    found = looked(tmp_path)
    assert found.seeds == [0, 1, 2, 3, 4]
    assert len(found.stages) == 2 + 3 * 5
    replicate = next(stage for stage in found.stages if stage.name == "finetuned_vanilla-seed3")
    assert (replicate.stage, replicate.seed, replicate.step) == ("finetuned_vanilla", 3, 10_000)
    lines = {line.name: line for line in found.lines()}
    assert list(lines) == list(settings.STAGES)
    assert lines["baseline"].details() == ["not measured on the problems of seed 2, 3, 4"]
    assert lines["finetuned_vanilla"].metric("perplexity") == (2.5, True)
    assert lines["finetuned_vanilla"].details() == [
        "seeds 0, 3 stale: its inputs changed",
        "seeds 1, 2, 4 missing",
    ]
    assert lines["finetuned_recursive"].details() == [
        "seeds 0, 2, 3, 4 missing: after surgery",
        "seed 1 stale: after surgery",
    ]
    file = io.StringIO()
    monkeypatch.setattr(shown, "out", lambda: Console(file=file, width=80))
    shown.show_status(found)
    table = [line for line in file.getvalue().splitlines() if line.strip().startswith(settings.STAGES)]
    assert [line.split()[0].rstrip(":") for line in table[:5]] == list(settings.STAGES)
    assert "…" not in file.getvalue()


def test_torn_results_are_no_results(tmp_path: Path) -> None:
    file = tmp_path / "eval_results" / "baseline_results.json"
    file.parent.mkdir()
    file.write_text('{"metrics": {"perpl')
    (baseline, *_) = looked(tmp_path).stages
    assert (baseline.results, baseline.metrics) == ("missing", {})


def test_a_base_model_that_is_not_there_is_said_in_words(tmp_path: Path) -> None:
    with pytest.raises(RRError, match="absent"):
        looked(tmp_path, model="./absent")


def test_the_table_fits_80_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(tmp_path, *(results(stage) for stage in settings.STAGES))
    for run in ("finetuned_vanilla", "finetuned_recursive"):
        checkpoint(tmp_path / "checkpoints" / run, 10_000, 20_000)
    file = io.StringIO()
    monkeypatch.setattr(shown, "out", lambda: Console(file=file, width=80))
    shown.show_status(looked(tmp_path))
    lines = file.getvalue().splitlines()
    table = [line for line in lines if line.startswith(" ") and line.strip().startswith(settings.STAGES)]
    assert len(table) == len(settings.STAGES)
    assert any("10000/20000" in line and "stale" in line for line in table)
    assert not any("…" in line for line in lines)
    assert lines[-1] == "Next: rr setup"
