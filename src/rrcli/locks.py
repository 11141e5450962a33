"""Locks: of two commands that would write the same, the second is refused in one sentence that names the first.

A lock is a file beside what it protects, locked by the operating system and holding who has it. The system's lock ends
with its process, however that ends, so a killed command leaves nothing behind that blocks. Who only reads takes no
lock, waits for none and fails because of none.

Where the system's lock says nothing (a file system without locks, or a lock file of another machine), the file's
content decides: a process of this machine is looked up, with the time it started, since numbers of processes are used
again; one of another machine cannot be, and the hint says which file to remove.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from functools import wraps
from pathlib import Path
from typing import IO, Concatenate, ParamSpec, Protocol, TypeVar

import psutil

from rrcli.errors import RRError
from rrcli.files import MANIFEST, make_folder, unwritable

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

P = ParamSpec("P")
R = TypeVar("R")


class Placed(Protocol):
    """Anything that lies in a folder, as a model does."""

    @property
    def path(self) -> Path: ...


Source = TypeVar("Source", bound=Placed)

# On Windows a locked byte cannot be read: the one that is locked lies far after the content.
LOCKED_BYTE = 2**30
# How long a lock that has just been taken may be without content, in seconds.
PATIENCE = 1.0
# How far two readings of one process's start may lie apart, in seconds.
SAME_START = 2.0


@dataclass(frozen=True)
class Holder:
    """Who has a lock.

    Attributes:
        boot: which start of which machine; the same in all containers of it. Empty where the system does not tell.
        began: when the process started, in seconds since 1970. since: when it took the lock, to be read.
        command: what was typed.
    """

    pid: int
    host: str
    boot: str
    began: float
    since: str
    command: str

    @classmethod
    def this(cls) -> Holder:
        """Return this process."""
        command = shlex.join([Path(sys.argv[0]).name or "python", *sys.argv[1:]])
        since = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S")
        return cls(os.getpid(), socket.gethostname(), _boot(), _began(os.getpid()), since, command)

    @property
    def here(self) -> bool:
        """Whether it ran on this machine; in another container of it the host has another name."""
        return self.host == socket.gethostname() or bool(self.boot and self.boot == _boot())

    def gone(self, *, unlocked: bool) -> bool:
        """Tell whether it has certainly ended, where its lock was found `unlocked` or where there are no locks."""
        if unlocked:
            return self.here
        return self.host == socket.gethostname() and abs(_began(self.pid) - self.began) > SAME_START

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} (since {self.since}: {self.command})"


def holding(service: Callable[Concatenate[ExitStack, P], R]) -> Callable[P, R]:
    """Call a service with a stack for the locks that it takes when it knows what it writes; they end with it."""

    @wraps(service)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with ExitStack() as held:
            return service(held, *args, **kwargs)

    return call


@contextmanager
def lock(path: Path, what: str) -> Iterator[None]:
    """Be the only process that writes `path`, as long as the context lasts.

    Args:
        path: a file or folder, which need not exist; the lock file lies beside it. what: its name in the sentence.

    Raises:
        RRError: another process has the lock, or the folder cannot be written.
    """
    file = path.with_name(f".{path.name}.lock")
    made = not file.parent.exists()
    make_folder(file.parent)
    try:
        opened = _take(file, what)
    except OSError as error:
        raise unwritable(file, error) from error
    try:
        yield
    finally:
        with opened, suppress(OSError):
            opened.truncate(0)  # an empty file is nobody's: Windows removes none that is open
            file.unlink()
            if made:  # for the lock alone, where nothing was written
                file.parent.rmdir()


def _take(file: Path, what: str) -> IO[str]:
    while True:
        opened = os.fdopen(os.open(file, os.O_RDWR | os.O_CREAT, 0o666), "r+", encoding="utf-8")
        try:
            locked = _lock(opened.fileno())
            holder = _read(opened) if locked is not False else None
            if locked is False or (holder is not None and not holder.gone(unlocked=bool(locked))):
                raise _refused(file, what, opened)
            if not _is(opened.fileno(), file):  # removed by the one who had it, since it was opened
                opened.close()
                continue
            opened.seek(0)
            opened.truncate()
            json.dump(asdict(Holder.this()), opened)
            opened.flush()
            return opened
        except BaseException:
            opened.close()
            raise


def _lock(descriptor: int) -> bool | None:
    """Lock a file for this process alone; False: another one has it, None: the system has no locks here."""
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            import msvcrt

            os.lseek(descriptor, LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            os.lseek(descriptor, 0, os.SEEK_SET)
        return True
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return None


def _read(opened: IO[str]) -> Holder | None:
    opened.seek(0)
    try:
        found = Holder(**json.loads(opened.read()))
        return replace(found, pid=int(found.pid), began=float(found.began))
    except (ValueError, TypeError, OverflowError):  # empty, or cut off when its process was killed
        return None


def _refused(file: Path, what: str, opened: IO[str]) -> RRError:
    end = time.monotonic() + PATIENCE
    while (holder := _read(opened)) is None and time.monotonic() < end:
        time.sleep(0.02)
    hint = "Wait until it has ended, or stop it first."
    if holder is not None and not holder.here:
        hint = f"If that process is gone, which cannot be seen from {socket.gethostname()}, remove {file}."
    return RRError(f"{what} is being written by {holder or 'another process'}", hint)


def _is(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


def _began(pid: int) -> float:
    try:
        return float(psutil.Process(pid).create_time())
    except (psutil.Error, ValueError, OverflowError):
        return float("-inf")


def _boot() -> str:
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return ""


# -- checkpoints that are being read -----------------------------------------------------------------------------------


@contextmanager
def reading(find: Callable[[], Source]) -> Iterator[Source]:
    """Keep training from dropping the checkpoint that `find` returns, as long as the context lasts.

    Any number of readers share the system's lock on its manifest. Without such locks nothing is kept.

    Args:
        find: names the model; called again if its folder goes between its answer and the lock.
    """
    while True:
        source = find()
        manifest = source.path / MANIFEST
        try:
            opened = manifest.open("rb")
        except OSError:  # a model of somebody else, or gone since it was found
            if not source.path.exists():
                continue
            yield source
            return
        with opened:
            if fcntl is not None:
                with suppress(OSError):
                    fcntl.flock(opened.fileno(), fcntl.LOCK_SH)
            if _is(opened.fileno(), manifest):
                yield source
                return


@contextmanager
def dropping(checkpoint: Path) -> Iterator[bool]:
    """Tell whether nobody reads a checkpoint; as long as the context lasts, nobody begins to."""
    with (checkpoint / MANIFEST).open("r+b") as opened:
        free = True
        if fcntl is not None:
            try:
                fcntl.flock(opened.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                free = False
            except OSError:
                pass
        yield free
