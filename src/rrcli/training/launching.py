"""Start the processes of a command that work together, with torch's own launcher.

Ctrl-C and SIGTERM are passed on to them. An error of a process is raised again here; the result of the first one is
returned.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rrcli.errors import Interrupted, RRError, UsageError

# The environment variable with the path of a file through which the processes of one launch find each other. It is not
# a port: one that was free when it was chosen may be taken by another program before it is used, and a process that
# connects before another one listens may even reach itself.
MEETING_PLACE = "RR_MEETING_PLACE"
# How long processes may take to end by themselves after one of them has failed, in seconds.
GRACE = 10.0

Result = TypeVar("Result")


def launched() -> bool:
    """Return whether a launcher has started this process, as one of several or as the only one."""
    return "RANK" in os.environ


def speaks(*, on_this_machine: bool = False) -> bool:
    """Return whether this process prints results; with `on_this_machine`, whether it prints this machine's errors."""
    return os.environ.get("LOCAL_RANK" if on_this_machine else "RANK", "0") == "0"


def launch(count: int, work: Callable[..., Result], /, *arguments: Any, **options: Any) -> Result:
    """Call `work` in `count` processes on this machine and return what the first one returns.

    The arguments are pickled, so `work` must be a function of a module.

    Raises:
        RRError: a process raised it, died, or ended without a result. Interrupted: they were stopped before they could
            report an error.
    """
    from torch.multiprocessing import get_context, start_processes
    from torch.multiprocessing.spawn import ProcessException, ProcessRaisedException

    # All processes together have one thread for each core.
    before = os.environ.get("OMP_NUM_THREADS")
    if before is None:
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // count))
    # Each process has a pipe of its own, which is read while it runs: what does not fit into a pipe waits in it, and a
    # process that is killed while it writes keeps no other one waiting.
    pipes = [get_context("spawn").Pipe(duplex=False) for _ in range(count)]
    found: list[tuple[int, Any]] = []
    listeners = [threading.Thread(target=_listen, args=(reader, found), daemon=True) for reader, _ in pipes]
    signals: list[int] = []
    handlers = {}
    meeting = tempfile.TemporaryDirectory(prefix="rr-", ignore_cleanup_errors=True)
    try:
        place = os.path.join(meeting.name, "meeting")
        writers = [writer for _, writer in pipes]
        context = start_processes(_work, (count, place, writers, work, arguments, options), nprocs=count, join=False)
        for writer in writers:
            writer.close()
        for listener in listeners:
            listener.start()

        def pass_on(number: int, _: Any) -> None:
            signals.append(number)
            for process in context.processes:
                if process.is_alive():
                    os.kill(process.pid, number)

        if threading.current_thread() is threading.main_thread():
            handlers = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
        died = None
        try:
            while not context.join(grace_period=GRACE):
                pass
        except ProcessException as error:
            died = error
    finally:
        meeting.cleanup()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
    for listener in listeners:
        listener.join(GRACE)
    errors = [value for _, value in sorted(found, key=lambda pair: pair[0]) if isinstance(value, RRError)]
    if errors:
        raise errors[0]
    if signals:
        raise Interrupted("by the user", "The same command goes on from what it has finished.")
    if isinstance(died, ProcessRaisedException):  # a bug: its traceback
        raise died
    if died is not None:
        raise RRError(
            f"{str(died)[:1].upper()}{str(died)[1:]}",
            "SIGKILL often means that memory ran out: try fewer processes. The same command goes on.",
        )
    for rank, value in found:
        if rank == 0:
            return value
    raise RRError("the first process ended without a result", "What it finished is kept: run the same command again.")


def _listen(reader: Any, found: list[tuple[int, Any]]) -> None:
    """Receive what a process has to say, if it lives to say it."""
    with contextlib.suppress(EOFError, OSError):
        found.append(reader.recv())


def launch_elsewhere(launcher: str, arguments: Sequence[str], directory: Path) -> int:
    """Run a command of rr by somebody else's launcher, and return its exit code.

    What it prints goes to stderr. SIGTERM and Ctrl-C are passed on to it, and waited for: a training saves its step.

    Args:
        launcher: what stands before the command, such as `torchrun --nproc-per-node 8 -m rrcli`.

    Raises:
        UsageError: there is no such program. Interrupted: it was stopped.
    """
    words = shlex.split(launcher)
    if not words or shutil.which(words[0]) is None:
        raise UsageError(f"--launcher is '{launcher}', which is no program here", "Try torchrun ... -m rrcli.")
    signals: list[int] = []
    started: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, _: Any) -> None:
        signals.append(number)
        for process in started:
            process.send_signal(number)

    handlers = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        # In a process group of its own, so that a terminal's Ctrl-C reaches it through this process alone.
        process = subprocess.Popen([*words, *arguments], cwd=directory, start_new_session=True, stdout=2)
        started.append(process)
        for number in signals:  # that came before it was there
            process.send_signal(number)
        code = process.wait()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if signals:
        raise Interrupted("by the user", "The same command goes on from what it has finished.")
    return code


def _work(
    rank: int, count: int, place: str, writers: Any, work: Callable[..., Any], arguments: Any, options: Any
) -> None:
    """Run `work` as process `rank`.

    It gets a process group of its own, so that a terminal's Ctrl-C reaches it through the parent alone, and only once.
    """
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(count), MEETING_PLACE: place}
    try:
        result = work(*arguments, **options)
        writers[rank].send((rank, result if rank == 0 else None))
    except RRError as error:
        writers[rank].send((rank, error))
        sys.exit(1)  # so that processes that wait for this one are ended
    # All is written. The process ends without the usual cleanup, as shutting down the threads of libraries can abort a
    # process that has succeeded.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
