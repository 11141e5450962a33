"""`kill -9` at any moment: the last checkpoint is whole, and the end is that of a run that was never stopped."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path
from random import Random

import pytest

import rrcli
from commands import RR, rr, rr_process
from rrcli.files import checkpoints
from rrcli.reporting import Silent
from rrcli.services.surgery import surgery
from rrcli.settings import SurgerySettings
from training_runs import assert_same_weights, events


def options(run: str, steps: int) -> list[str]:
    values = {"run-name": run, "steps": steps, "batch-size": 2, "max-length": 64, "save-interval": 1, "ema": 0.9}
    values |= {"eval-interval": 2, "eval-samples": 1, "keep": 2, "device": "cpu"}
    return [text for name, value in values.items() for text in (f"--{name}", str(value))]


def kill_once(folder: Path, arguments: list[str], run: Path, delay: float) -> bool:
    """Start a training, kill it `delay` seconds after its first sign of writing; return whether it was alive."""
    before = {path.name for path in run.glob("*")} if run.exists() else set()
    with subprocess.Popen(
        [RR, "train", *arguments], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        limit = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < limit:
            if run.exists() and {path.name for path in run.glob("*")} - before:
                break
            time.sleep(0.002)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        return process.wait() == -signal.SIGKILL


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_again_and_again_a_run_ends_as_if_never_stopped(tmp_path, kills):
    steps, random = 4 * kills, Random(kills)
    surgery(SurgerySettings(), tmp_path, Silent())
    whole = rr("train", *options("whole", steps), folder=tmp_path)
    assert whole.returncode == 0, whole.stderr
    run = tmp_path / "checkpoints" / "killed"
    killed = 0
    for _ in range(kills):
        killed += kill_once(tmp_path, options("killed", steps), run, random.uniform(0, 0.25))
        for checkpoint in checkpoints(run):
            rrcli.load(checkpoint)
    assert killed == kills
    last = rr_process("train", *options("killed", steps), folder=tmp_path)
    assert last.returncode == 0, last.stderr

    found = [path.name for path in checkpoints(run)]
    assert found == [path.name for path in checkpoints(tmp_path / "checkpoints" / "whole")]
    assert not list(run.glob(".*"))
    assert_same_weights(tmp_path / "checkpoints" / "whole" / found[-1], run / found[-1])
    curves = [events(tmp_path, name) for name in ("whole", "killed")]
    logged = [[(e.step, e.value) for e in curve.Scalars("train/loss/total")] for curve in curves]
    assert [step for step, _ in logged[1]] == list(range(1, steps + 1))
    assert logged[0] == logged[1]
