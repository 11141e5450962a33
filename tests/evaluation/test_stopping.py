"""A training that the user stops, or the kernel kills: the same command goes on to the same weights."""

from __future__ import annotations

import signal

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from commands import rr, rr_process
from rrcli.files import checkpoints

TRAIN = ("train", "--mode", "vanilla", "--steps", "6", "--batch-size", "4", "--save-interval", "2")
STOPPED = (*TRAIN, "--eval-interval", "0", "--callback", "stopping:stop")
# The user, who stops a training three times, as a callback: it knows at which step.
STOPPING = """
import os, signal
from pathlib import Path
SIGNALS = {1: signal.SIGINT, 3: signal.SIGTERM, 5: signal.SIGKILL}
def stop(context):
    sent = Path(f"sent-{context.step}")
    if context.step in SIGNALS and not sent.exists():
        sent.touch()
        os.kill(os.getpid(), SIGNALS[context.step])
"""


def test_a_stopped_training_goes_on_to_the_same_weights(tmp_path):
    assert rr("setup", folder=tmp_path).returncode == 0
    whole = rr(*TRAIN, "--run-name", "whole", "--eval-interval", "3", "--eval-samples", "4", folder=tmp_path)
    assert whole.returncode == 0, whole.stderr
    (tmp_path / "stopping.py").write_text(STOPPING)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        stopped = rr_process(*STOPPED, folder=tmp_path)
        assert stopped.returncode == (-9 if number == signal.SIGKILL else 130), stopped.stderr
        assert ("goes on from there" in stopped.stderr) == (number != signal.SIGKILL)
    finished = rr_process(*STOPPED, folder=tmp_path)
    assert finished.returncode == 0, finished.stderr
    run = tmp_path / "checkpoints" / "finetuned_vanilla"
    assert not list(run.glob(".*"))
    for name in ("model.safetensors", "trainer_state/optimizer.safetensors"):
        reference = checkpoints(tmp_path / "checkpoints" / "whole")[-1] / name
        assert (checkpoints(run)[-1] / name).read_bytes() == reference.read_bytes()
    events = EventAccumulator(str(tmp_path / "logs" / "finetuned_vanilla")).Reload()
    assert [event.step for event in events.Scalars("train/loss/total")] == [1, 2, 3, 4, 5, 6]
