"""`rr board`: where it listens, what it says, how it ends, and what the logs show in TensorBoard."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from rrcli.errors import RRError
from rrcli.experiment.local_servers import PORTS_TO_TRY
from rrcli.reporting import Silent
from rrcli.services import board as service
from rrcli.settings import BoardSettings
from rrcli.tracker import EVALUATION, LAYOUT, MetricsTracker

RR = [sys.executable, "-m", "rrcli"]


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace whose logs hold two runs with a scalar, a text and a picture each."""
    folder = tmp_path_factory.mktemp("logged")
    for run in ("finetuned_vanilla", "finetuned_recursive"):
        with MetricsTracker(folder / "logs" / run) as tracker:
            for step in range(5):
                tracker.log_scalar("train/loss/total", 5.0 - step, step)
            tracker.log_text("evaluation/x/generations", "a *text*", 1)
            tracker.log_image("evaluation/x/generations", np.zeros((4, 4, 3), np.uint8), 1)
    return folder


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*RR, "board", *arguments], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def gone(address: str) -> bool:
    """Tell whether a server stops answering soon."""
    for _ in range(600):
        try:
            urllib.request.urlopen(address, timeout=5).close()
        except OSError:
            return True
        time.sleep(0.1)
    return False


def test_a_busy_port_moves_to_the_next_and_ctrl_c_stops_cleanly(logged: Path, taken: int) -> None:
    process = start(logged, "--json", "--port", str(taken))
    said = json.loads(process.stdout.readline())
    port = int(said["url"].rpartition(":")[2])
    assert taken < port < taken + PORTS_TO_TRY
    assert said["schema"] == "rr.board/1"
    assert said["tunnel"].startswith(f"ssh -L {port}:localhost:{port} ")
    with urllib.request.urlopen(said["url"]) as page:
        assert b"TensorBoard" in page.read()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0
    assert f"port {taken} is taken, using {port}" in errors
    assert gone(said["url"])


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL")
def test_tensorboard_ends_with_the_process_that_started_it(logged: Path) -> None:
    process = start(logged, "--json", "--port", "0")
    address = json.loads(process.stdout.readline())["url"]
    process.kill()
    process.communicate(timeout=120)
    assert gone(address)


def test_check_prints_the_runs_and_tags_and_exits(logged: Path) -> None:
    done = subprocess.run([*RR, "board", "--check", "--json"], cwd=logged, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    runs = json.loads(done.stdout)["runs"]
    assert runs.keys() == {"finetuned_vanilla", "finetuned_recursive"}
    for found in runs.values():
        assert found["scalars"] == ["train/loss/total"]
        assert found["images"] == ["evaluation/x/generations"]
        assert found["text"] == ["evaluation/x/generations/text_summary"]


def test_check_says_what_tensorboard_says_when_it_fails(logged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what the line before the last says, and while its standard input is watched."""
    failing = "raise SystemExit('no luck today\\nat port 1')"
    monkeypatch.setattr(service, "WATCHED", service.WATCHED.replace("from tensorboard.main import run_main", failing))
    with pytest.raises(RRError, match=r"^TensorBoard ended with exit code 1\nno luck today\nat port 1$"):
        service.check(BoardSettings(), logged)


def test_check_waits_until_the_tags_of_every_run_stay_as_they_are(
    logged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A busy TensorBoard shows runs before their tags, and some tags before the others, for seconds."""
    whole = {"train/loss/total": 1}
    states = [{}, {}, {}, {"a": whole}, {"a": whole}, *[{"a": whole, "b": whole}] * 4]
    looks = iter([state for state in states for _ in service.PLUGINS])

    class Running:
        def poll(self) -> None:
            return None

    @contextmanager
    def serving(*_: object) -> Iterator[tuple[Running, str]]:
        yield Running(), "address"

    def get(_: str, path: str) -> object:
        return ["a", "b"] if path == "data/runs" else next(looks)

    folder = logged.parent / "two"
    for run in ("a", "b"):
        (folder / "logs" / run).mkdir(parents=True)
        (folder / "logs" / run / "events.out.tfevents.1").touch()
    for name, put in (("_serving", serving), ("_get", get)):
        monkeypatch.setattr(service, name, put)
    monkeypatch.setattr(service.time, "sleep", lambda _: None)
    found = service.check(BoardSettings(), folder)
    assert all(found.runs[run]["scalars"] == ["train/loss/total"] for run in ("a", "b"))


def test_all_event_files_of_a_run_are_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also without TensorBoard's data server: a training goes on in its file while an evaluation writes another."""
    monkeypatch.setattr(service, "WATCHED", "import sys; sys.argv.append('--load_fast=false')\n" + service.WATCHED)
    folder = tmp_path / "logs" / "run"
    found = []

    def go_on(board: service.Board) -> None:
        end = time.monotonic() + 240
        while "run" not in service._get(board.url, "data/plugin/scalars/tags") and time.monotonic() < end:
            time.sleep(0.1)
        training.log_scalar("train/loss/total", 3.0, 2)
        training.flush()
        while len(found) < 2 and time.monotonic() < end:
            found[:] = service._get(board.url, "data/plugin/scalars/scalars?run=run&tag=train/loss/total")
            time.sleep(0.1)
        raise KeyboardInterrupt

    with MetricsTracker(folder) as training:
        training.log_scalar("train/loss/total", 4.0, 1)
        training.flush()
        with MetricsTracker(folder, part=EVALUATION) as evaluation:
            evaluation.log_scalar("final/perplexity", 2.0, 1)
        service.board(BoardSettings(port=0, reload_interval=1), tmp_path, Silent(), started=go_on)
    assert [(step, value) for _, step, value in found] == [(1, 4.0), (2, 3.0)]


def test_the_layout_of_custom_scalars_is_in_every_run(logged: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

    events = EventAccumulator(str(logged / "logs" / "finetuned_vanilla")).Reload()
    layout = Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == list(LAYOUT)
    assert list(LAYOUT) == ["Losses", "Generation", "Performance", "Evaluation", "Depth"]


@pytest.mark.parametrize("make", [False, True], ids=["missing", "empty"])
def test_a_log_folder_without_runs_says_what_to_do(tmp_path: Path, make: bool) -> None:
    if make:
        (tmp_path / "logs" / "empty").mkdir(parents=True)
    with pytest.raises(RRError, match="has no runs yet" if make else "does not exist") as caught:
        service.board(BoardSettings(), tmp_path, Silent(), started=lambda _: None)
    assert "rr eval --stage baseline" in caught.value.hint
    assert "--log-dir" in caught.value.hint


def test_an_open_host_is_warned_about_and_an_impossible_one_refused(
    logged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reporter, seen = Silent(), []

    def stop(found: service.Board) -> None:
        seen.append(found)
        raise KeyboardInterrupt  # Ctrl-C ends it from the moment its address is shown

    service.board(BoardSettings(host="0.0.0.0", port=0), logged, reporter, started=stop)
    assert "without a password" in reporter.warnings[0]
    assert seen[0].url.startswith("http://localhost:")
    with pytest.raises(RRError, match=r"cannot listen on 192\.0\.2\.1"):
        service.board(BoardSettings(host="192.0.2.1"), logged, Silent(), started=stop)


def test_no_free_port_at_the_end_of_the_range(logged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(98, "Address already in use")

    monkeypatch.setattr(socket.socket, "bind", refuse)
    with pytest.raises(RRError, match="no free port from 65530 to 65535"):
        service.board(BoardSettings(port=65530), logged, Silent(), started=lambda _: None)


def test_no_browser_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("webbrowser.open", lambda _: False)
    reporter = Silent()
    service._open("http://localhost:1", reporter)
    assert "open http://localhost:1 yourself" in reporter.warnings[0]
