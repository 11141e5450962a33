"""`rr board`: TensorBoard itself, on the experiment's logs."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rrcli.errors import RRError
from rrcli.reporting import Reporter
from rrcli.settings import BoardSettings
from rrcli.workspace import Workspace

PORTS_TO_TRY = 20
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Board:
    """Where TensorBoard listens."""

    url: str
    tunnel: str
    log_dir: Path


def board(settings: BoardSettings, directory: Path, reporter: Reporter, started: Callable[[Board], None]) -> None:
    """Run TensorBoard until it ends or is interrupted; `started` is called once with its address.

    Raises:
        RRError: there are no logs, no free port, or TensorBoard ends with an error.
    """
    logs = Workspace(directory, settings).log_folder()
    if not any(logs.rglob("events.out.tfevents.*")):
        raise RRError(f"{logs} holds no runs yet", "'rr eval --stage baseline' or 'rr train' writes some.")
    port = _free_port(settings.host, settings.port)
    if port != settings.port:
        reporter.warn(f"port {settings.port} is taken, using {port}")
    if settings.host not in LOOPBACK:
        reporter.warn(
            f"listening on {settings.host}: whoever reaches this machine can read the logs, without a password"
        )
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logs), "--host", settings.host]
    command += ["--port", str(port), "--reload_interval", str(settings.reload_interval)]
    shown = "localhost" if settings.host in LOOPBACK else settings.host
    started(Board(f"http://{shown}:{port}", f"ssh -L {port}:localhost:{port} {_user_at_host()}", logs))
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        _, errors = process.communicate()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGTERM)
        process.wait(10)
        return
    finally:
        if process.poll() is None:
            process.kill()
    if process.returncode:
        raise RRError(f"TensorBoard ended with an error: {errors.strip().splitlines()[-1] if errors.strip() else ''}")


def _free_port(host: str, first: int) -> int:
    for port in range(first, first + PORTS_TO_TRY):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, port))
                return int(probe.getsockname()[1])
        except OSError as error:
            if not isinstance(error, PermissionError) and error.errno not in (98, 48):
                raise RRError(f"cannot listen on {host}: {error.strerror}", "Use --host 127.0.0.1.") from error
    raise RRError(f"no free port from {first} to {first + PORTS_TO_TRY - 1}", "Name another with --port.")


def _user_at_host() -> str:
    import getpass

    return f"{getpass.getuser()}@{socket.gethostname()}"
