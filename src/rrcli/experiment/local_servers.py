"""Start a server of another package on this machine, ask it, and end it. Loads no torch."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from rrcli.errors import RRError

PORTS_TO_TRY = 20
LOOPBACK = ("127.0.0.1", "localhost", "::1")
START_SECONDS = 120
# How many of a server's last lines an error shows.
LAST_LINES = 5
# A program that ends when its standard input is closed. That happens whenever the process that started it ends, in
# whatever way. (A signal at the end of the parent exists on Linux only.)
WATCH = """
import os, signal, sys, threading
def watch():
    while os.read(0, 4096):  # sys.stdin would be locked at the end of the process, which aborts it
        pass
    os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=watch, daemon=True).start()
"""


def watched(program: str) -> str:
    """Return Python code that runs a program, and ends it when the standard input is closed."""
    return f"{WATCH}{program}\n"


@contextmanager
def serving(
    command: Sequence[str],
    address: str,
    *,
    name: str,
    ready: str,
    seconds: float = START_SECONDS,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a server, wait until it answers, and stop it at the end.

    Args:
        command: starts it; see `watched`. address: where it will listen. name: of the server, for error messages.
        ready: a path that it answers with JSON once it is ready. seconds: how long that may take.
        folder: where it runs; here if not given. environment: more variables.

    Raises:
        RRError: it ends, or does not answer in time.
    """
    with tempfile.TemporaryFile() as errors:  # a pipe that nobody reads becomes full and blocks
        # In its own session Ctrl-C does not reach it; this process stops it.
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
            cwd=folder,
            env={**os.environ, **(environment or {})},
        )
        process.stderr = errors
        try:
            _wait_for(process, address, name, ready=ready, seconds=seconds)
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_for(process: subprocess.Popen[bytes], address: str, name: str, *, ready: str, seconds: float) -> None:
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        try:
            answer(address, ready, name)
            return
        except RRError:
            time.sleep(0.1)
    if process.poll() is not None:
        raise ended(process, process.returncode, name)
    raise RRError(f"{name} does not answer on {address} after {seconds:.0f} s")


def answer(address: str, path: str, name: str) -> Any:
    """Return the JSON that a server answers; the proxies of the environment are not used.

    Raises:
        RRError: no answer.
    """
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{address}/{path}", timeout=10) as found:
            return json.load(found)
    except (OSError, urllib.error.URLError, ValueError) as error:
        raise RRError(f"{name} does not answer on {address}/{path}: {error}") from error


def ended(process: subprocess.Popen[bytes], code: int, name: str) -> RRError:
    """Return the error for a server that ended, with its last lines."""
    errors: IO[bytes] = process.stderr  # type: ignore[assignment]
    errors.seek(0)
    lines = [line for line in errors.read().decode(errors="replace").splitlines() if line.strip()]
    how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
    return RRError("\n".join([f"{name} {how}", *lines[-LAST_LINES:]]))


def free_port(host: str, first: int) -> int:
    """Return the first port from `first` on that can be listened on; any free one for 0.

    Raises:
        RRError: there is none, or the host or the port cannot be listened on.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    last = min(first + PORTS_TO_TRY, 65536) - 1
    for port in range(first, last + 1):
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, port))
                return int(probe.getsockname()[1])
        except OSError as error:
            if error.errno == errno.EACCES:
                raise RRError(f"port {port} needs root privileges", "Name one from 1024 on with --port.") from error
            if error.errno != errno.EADDRINUSE:
                raise RRError(f"cannot listen on {host}: {error.strerror}", "Use --host 127.0.0.1.") from error
    raise RRError(f"no free port from {first} to {last}", "Name another with --port.")
