"""What TensorBoard's event files hold: the newest evaluation alone, and what can still be written to a full disk."""

from __future__ import annotations

import errno
import threading
from pathlib import Path
from typing import Any

import pytest

import rrcli.upstream
from rrcli.tracker import EVALUATION, MetricsTracker

TAG = "final/perplexity"


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return tag -> (step, value) of every event, as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def measure(folder: Path, value: float, step: int = 3) -> None:
    with MetricsTracker(folder, part=EVALUATION) as tracker:
        tracker.log_scalar(TAG, value, step)


def test_a_new_evaluation_replaces_the_earlier_ones_and_nothing_of_the_training(tmp_path: Path) -> None:
    with MetricsTracker(tmp_path, 1) as training:
        for step in range(1, 4):
            training.log_scalar("train/loss/total", 5.0 - step, step)
            training.log_scalar("evaluation/training/perplexity", 9.0, step)
    before = scalars(tmp_path)
    for value, step in ((1.0, 3), (2.0, 3), (4.0, 2)):
        measure(tmp_path, value, step)
        assert scalars(tmp_path) == before | {TAG: [(step, value)]}


def test_an_evaluation_that_fails_leaves_what_an_earlier_one_logged(tmp_path: Path) -> None:
    measure(tmp_path, 1.0)

    def fail() -> None:
        with MetricsTracker(tmp_path, part=EVALUATION) as tracker:
            tracker.log_scalar(TAG, 2.0, 3)
            tracker.flush()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert scalars(tmp_path) == {TAG: [(3, 1.0)]}


class FullDisk:
    """A file in which so many bytes still fit."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: bytes) -> None:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.file.write(data)

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> None:
        self.file.close()
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("room", [0, 2000, 10**9], ids=["at once", "later", "at the end"])
def test_a_full_disk_is_warned_about_once_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda args: pytest.fail(f"a traceback is printed: {args.exc_value}"))
    guard = rrcli.upstream.guard_events

    def fill(writer: Any, failed: Any) -> bool:
        records = writer.file_writer.event_writer._async_writer._writer
        records._writer = FullDisk(records._writer, room)
        return guard(writer, failed)

    monkeypatch.setattr(rrcli.upstream, "guard_events", fill)
    said: list[str] = []
    with MetricsTracker(tmp_path, warn=said.append) as tracker:
        for step in range(100):
            tracker.log_scalar("a", 1.0, step)
        tracker.flush()
        tracker.log_text("t", "text", 1)
        file = tracker.save_checkpoint_metrics(tmp_path)
    assert said == [f"TensorBoard's log in {tmp_path} is incomplete: No space left on device"]
    assert '"step": 99' in file.read_text()


def test_a_disk_that_is_full_from_the_start_is_warned_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("rrcli.tracker.tempfile.TemporaryFile", full)
    with pytest.warns(UserWarning, match="is incomplete: No space left on device"):
        measure(tmp_path, 1.0)
    assert not list(tmp_path.iterdir())
