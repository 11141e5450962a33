"""Several models in turns: their order, a process for each, its memory, and what becomes of it when something fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import Pipe
from pathlib import Path
from threading import Thread
from typing import Any

import psutil
import pytest

from rrcli.errors import CheckFailed, RRError, UsageError
from rrcli.evaluation import interleaved, peak_memory
from rrcli.evaluation.held_out import EvalData
from rrcli.evaluation.interleaved import Loaded, Subject, measure_in_turns
from rrcli.evaluation.peak_memory import PeakMemory
from rrcli.evaluation.performance import Counts, Times, Way
from rrcli.models.source import resolve
from rrcli.recursion.config import RecursionConfig
from rrcli.reporting import Silent
from rrcli.settings import EvalSettings

TEXTS = EvalData(("Once upon a time there was a red ball. " * 8, "Tom has a ball and a dog. " * 12))


def subject(name: str, prepare: Callable[[Any], None] | None = None, **options: Any) -> Subject:
    fresh = options.pop("fresh", None)
    return Subject(name, resolve("default", Path()), EvalSettings(**options), Path(), TEXTS, prepare, fresh)


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    """Two stages of one architecture, and one with a recursion: three processes, one round."""
    subjects = [subject("one"), subject("deep", fresh=RecursionConfig(max_steps=1)), subject("same")]
    return measure_in_turns(subjects, Silent(), rounds=1)


def test_every_model_has_a_process_of_its_own_and_one_architecture_one_memory(measured):
    """In one process the second of two equal models was said to take 16 MB more than the first."""
    one, deep, same = (measured[name] for name in ("one", "deep", "same"))
    assert one.performance.memory_mb == pytest.approx(same.performance.memory_mb, rel=0.05)
    assert deep.performance.memory_mb > 20
    assert one.performance.counts == same.performance.counts
    assert [len(each.performance.rounds) for each in measured.values()] == [1, 1, 1]
    assert (one.loaded.method, deep.loaded.method) == (Way(0, in_chunks=False), Way(1, in_chunks=True))
    assert one.loaded.threads >= 1
    stock = one.performance.metrics()["decode_flops_per_token"]
    assert deep.performance.by_depth()["decode_flops_per_token"][0] == stock
    assert deep.performance.metrics()["decode_flops_per_token"]["value"] > 1.5 * stock["value"]


class Scripted:
    """A child that notes what it is asked and answers at once."""

    asked: list[str]
    free_mb: float

    def __init__(self, subject: Subject, reporter: Any) -> None:
        self.subject = subject

    def start(self) -> None:
        self.asked.append(f"start {self.subject.name}")

    def stop(self) -> None:
        self.asked.append(f"stop {self.subject.name}")

    def ask(self, request: str) -> Any:
        self.asked.append(f"{request} {self.subject.name}")
        way = Way(0, in_chunks=False)
        answers = {"round": {way: Times(1, 1)}, "count": ({way: Counts(1, 1)}, ["a notice"], 8)}
        return answers.get(request) or Loaded("cpu", "float32", way, None, 1, 100.0, self.free_mb)


@pytest.mark.parametrize("fit", [True, False])
def test_turns_alternate(fit, monkeypatch):
    """Where the models do not fit together, each turn has a new process, and no two of them a model at one time."""
    monkeypatch.setattr(Scripted, "asked", [], raising=False)
    monkeypatch.setattr(Scripted, "free_mb", 1000.0 if fit else 200.0, raising=False)
    monkeypatch.setattr(interleaved, "_Child", Scripted)
    found = measure_in_turns([subject(name) for name in "abc"], Silent(), rounds=3)
    asked = [what for what in Scripted.asked if what.split()[0] in ("round", "count")]
    assert asked == [f"{what} {name}" for what in ("count", "round", "round", "round") for name in "abc"]
    assert all(len(each.performance.rounds) == 3 and each.performance.cache_bytes == 8 for each in found.values())
    loaded: list[str] = []
    most = 0
    for what, name in map(str.split, Scripted.asked):
        loaded += [name] * (what == "load")
        loaded = [other for other in loaded if what != "stop" or other != name]
        most = max(most, len(loaded))
    assert loaded == []
    assert most == (3 if fit else 1)


def fail(how: str, _: Any) -> None:
    if how == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "raises":
        raise ZeroDivisionError("division by zero")
    if how == "disk":
        raise OSError(28, "No space left on device")
    time.sleep(60)


def test_a_child_that_dies_is_an_error():
    with pytest.raises(RRError, match="process that measured 'it' was ended by SIGKILL"):
        measure_in_turns([subject("it", partial(fail, "dies"))], Silent())


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"depth": 2}, UsageError, "depth is 2, but the model has no recursion"),
        ({"prepare": partial(fail, "raises")}, RRError, "performance of 'it' failed: ZeroDivisionError: division by"),
        ({"prepare": partial(fail, "disk")}, RRError, "performance of 'it' failed: OSError: .*No space left on device"),
    ],
)
def test_what_is_raised_in_a_child_is_raised_in_the_parent(options, kind, message):
    """Without a process: what a child does is run in a thread, and what a parent does is done here."""
    ours, theirs = Pipe()
    child = interleaved._Child(subject("it", **options), Silent())
    child.connection = ours
    thread = Thread(target=interleaved._answer, args=(theirs, child.subject))
    thread.start()
    with pytest.raises(kind, match=message):
        child.ask("load")
    thread.join()


SCRIPT = """
import sys
from functools import partial
from test_interleaved import fail, subject
from rrcli.evaluation.interleaved import measure_in_turns
from rrcli.reporting import Silent
if __name__ == "__main__":
    measure_in_turns([subject("it", partial(fail, "sleeps"))], Silent())
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_no_child_outlives_its_parent(number, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    folders = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1]), *sys.path])
    parent = subprocess.Popen(
        [sys.executable, "script.py"], cwd=tmp_path, env=os.environ | {"PYTHONPATH": folders}, stderr=subprocess.DEVNULL
    )
    try:
        children: list[psutil.Process] = []
        until = time.monotonic() + 60
        while len(children) < 2 and time.monotonic() < until:  # with the one that multiprocessing has for itself
            time.sleep(0.1)
            children = psutil.Process(parent.pid).children(recursive=True)
        assert len(children) == 2
        time.sleep(0.5)
        parent.send_signal(number)
        _, alive = psutil.wait_procs(children, timeout=30)
        assert alive == []
    finally:
        parent.kill()
        parent.wait()


def test_a_peak_below_what_was_there_before_is_an_error(monkeypatch):
    memory = PeakMemory("cpu")
    assert memory.above() >= 0
    assert memory.free() > 0
    monkeypatch.setattr(peak_memory, "peak_resident_mb", lambda: memory.before - 1)
    with pytest.raises(CheckFailed, match="is below what there was before the model"):
        memory.above()


def test_what_is_held_is_seen():
    memory = PeakMemory("cpu")
    held = bytearray(os.urandom(1)) * (64 * 2**20)
    del held
    assert 60 < memory.above() < 90
