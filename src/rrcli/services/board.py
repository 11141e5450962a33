"""`rr board`: TensorBoard itself, on the experiment's logs."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rrcli.errors import RRError
from rrcli.experiment.local_servers import LOOPBACK, START_SECONDS, answer, ended, free_port, serving, watched
from rrcli.experiment.workspace import Workspace
from rrcli.reporting import Reporter
from rrcli.settings import BoardSettings

# So many answers in a row, a second apart, have to equal the one before them.
EQUAL_ANSWERS = 2
# Plugins whose tags `--check` asks for; all of them answer run -> tag -> description under `tags`.
PLUGINS = ("scalars", "text", "images", "histograms")
NAME = "TensorBoard"
WATCHED = watched("from tensorboard.main import run_main\nrun_main()")


@dataclass(frozen=True)
class Board:
    """Where TensorBoard listens, the ssh command that reaches it from another machine, and the logs that it reads."""

    url: str
    tunnel: str
    log_dir: Path


@dataclass(frozen=True)
class Found:
    """What TensorBoard's HTTP API answered: run -> plugin -> tags."""

    log_dir: Path
    runs: dict[str, dict[str, list[str]]]


def board(settings: BoardSettings, directory: Path, reporter: Reporter, *, started: Callable[[Board], None]) -> None:
    """Run TensorBoard until it ends or is interrupted; `started` is called once, when it answers.

    Raises:
        RRError: there are no logs, no free port, or TensorBoard ends with an error.
    """
    logs = _logs(settings, directory)
    port = free_port(settings.host, settings.port)
    if settings.port not in (0, port):
        reporter.warn(f"port {settings.port} is taken, using {port}")
    if settings.host not in LOOPBACK:
        reporter.warn(
            f"listening on {settings.host}: everyone who reaches this machine on port {port} can read every log, text "
            "and setting, without a password"
        )
    with _serving(settings, logs, port) as (process, address):
        tunnel = f"ssh -L {port}:localhost:{port} {_user_at_host()}"
        try:
            started(Board(address, tunnel, logs))
            if settings.open:
                _open(address, reporter)
            code = process.wait()
        except KeyboardInterrupt:  # the usual way to end it
            return
        raise ended(process, code, NAME)


def check(settings: BoardSettings, directory: Path) -> Found:
    """Start TensorBoard on a free port, ask it for its runs and tags, and stop it.

    Raises:
        RRError: as `board`; or TensorBoard does not show a run that is on disk.
    """
    logs = _logs(settings, directory)
    expected = {str(file.parent.relative_to(logs)) for file in _event_files(logs)}
    with _serving(settings, logs, free_port(settings.host, 0)) as (process, address):
        before, equal, end = None, 0, time.monotonic() + START_SECONDS
        while time.monotonic() < end and process.poll() is None:
            tags = {plugin: _get(address, f"data/plugin/{plugin}/tags") for plugin in PLUGINS}
            names = _get(address, "data/runs")
            runs = {name: {plugin: sorted(tags[plugin].get(name, ())) for plugin in PLUGINS} for name in sorted(names)}
            # It loads in steps, which a busy machine spreads: done is what stays as it is, and lacks no run's tags.
            equal = equal + 1 if runs == before else 0
            if equal >= EQUAL_ANSWERS and all(any(runs.get(name, {}).values()) for name in expected):
                return Found(logs, runs)
            before = runs
            time.sleep(1)
        if process.poll() is not None:
            raise ended(process, process.returncode, NAME)
    missing = ", ".join(sorted(expected - (before or {}).keys()))
    raise RRError(f"TensorBoard does not show {missing or 'a stable state'} after {START_SECONDS} s")


def _event_files(logs: Path) -> Iterator[Path]:
    return logs.rglob("events.out.tfevents.*")


def _logs(settings: BoardSettings, directory: Path) -> Path:
    logs = Workspace(directory, settings).log_folder()
    hint = "'rr eval --stage baseline' and 'rr train' write logs; --log-dir names another folder."
    if not logs.is_dir():
        raise RRError(f"the log folder {logs} does not exist", hint)
    if next(_event_files(logs), None) is None:
        raise RRError(f"{logs} has no runs yet", hint)
    return logs


@contextmanager
def _serving(settings: BoardSettings, logs: Path, port: int) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Start TensorBoard, wait until it answers, and stop it at the end."""
    command = [sys.executable, "-c", WATCHED, "--logdir", str(logs), "--host", settings.host, "--port", str(port)]
    # Without its data server TensorBoard would follow only the newest event file of each run.
    command += ["--reload_interval", str(settings.reload_interval), "--reload_multifile=true"]
    shown = "localhost" if settings.host in LOOPBACK or settings.host in ("0.0.0.0", "::") else settings.host
    address = f"http://{f'[{shown}]' if ':' in shown else shown}:{port}"
    with serving(command, address, name=NAME, ready="data/environment") as process:
        yield process, address


def _get(address: str, path: str) -> Any:
    """Return the JSON that TensorBoard answers."""
    return answer(address, path, NAME)


def _open(address: str, reporter: Reporter) -> None:
    import webbrowser

    if not webbrowser.open(address):
        reporter.warn(f"no browser could be opened here; open {address} yourself")


def _user_at_host() -> str:
    import getpass

    return f"{getpass.getuser()}@{socket.gethostname()}"
