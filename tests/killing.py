"""A command that is killed, or told to stop, at one of its system calls: `Killer` for tests, and the process it starts.

That process forks once for each command, so that what takes seconds to import is imported once, and follows the fork
with ptrace. It counts the system calls that change something below a folder, and sends a signal before the one that it
was asked for; a `write` may be carried out half before a SIGKILL. A seccomp filter stops the command at the calls that
may matter and at no other, so it runs at its own speed. Linux on x86-64 only; no rights are needed.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import struct
import subprocess
import sys
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Numbers of system calls on x86-64, by how the file that they change is named in their arguments.
BY_DESCRIPTOR = {1: "write", 18: "pwrite64", 20: "writev", 74: "fsync", 75: "fdatasync", 77: "ftruncate"}
BY_DESCRIPTOR |= {73: "flock", 91: "fchmod", 40: "sendfile", 285: "fallocate"}
BY_PATH = {82: "rename", 83: "mkdir", 84: "rmdir", 86: "link", 87: "unlink", 88: "symlink", 90: "chmod", 76: "truncate"}
BY_FOLDER_AND_PATH = {263: "unlinkat", 264: "renameat", 316: "renameat2", 258: "mkdirat", 265: "linkat"}
BY_FOLDER_AND_PATH |= {268: "fchmodat", 280: "utimensat"}
OPEN, OPENAT, COPY_RANGE = 2, 257, 326
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

TRACEME, CONT, GETREGS, SETREGS, SYSCALL, SETOPTIONS = 0, 7, 12, 13, 24, 0x4200
# fork, vfork, clone, exec, seccomp, and SIGKILL for all when this process ends.
OPTIONS = 0x1 | 0x2 | 0x4 | 0x8 | 0x10 | 0x80 | 0x100000
SECCOMP_EVENT = signal.SIGTRAP | 7 << 8
WALL = 0x40000000
REGISTERS = "r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi orig_rax rip"
REGISTERS += " cs eflags rsp ss fs_base gs_base ds es fs gs"

libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
libc.ptrace.restype = ctypes.c_long


class Registers(ctypes.Structure):
    """`user_regs_struct` of x86-64."""

    _fields_ = [(name, ctypes.c_ulonglong) for name in REGISTERS.split()]


def ptrace(request: int, pid: int, data: Any = 0) -> None:
    if libc.ptrace(request, pid, None, data) < 0:
        raise OSError(ctypes.get_errno(), f"ptrace {request}")


def filter_calls() -> None:
    """Let the calls that may change a file stop this process and its children; everything else goes on."""
    load, equal, any_bit, end = 0x20, 0x15, 0x45, 0x06
    trace, allow = 0x7FF00000, 0x7FFF0000
    numbers = [*BY_DESCRIPTOR, *BY_PATH, *BY_FOLDER_AND_PATH, COPY_RANGE]
    code = [(load, 0, 0, 0)]
    for number in numbers:
        code += [(equal, 0, 1, number), (end, 0, 0, trace)]
    for number, flags in ((OPEN, 24), (OPENAT, 32)):  # where the flags lie in seccomp_data
        code += [(equal, 0, 4, number), (load, 0, 0, flags), (any_bit, 0, 1, WRITING), (end, 0, 0, trace)]
        code += [(end, 0, 0, allow)]
    code += [(end, 0, 0, allow)]
    program = b"".join(struct.pack("HBBI", *line) for line in code)
    buffer = ctypes.create_string_buffer(program)
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(code), ctypes.addressof(buffer)))
    if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, header, 0, 0):  # no new privileges; seccomp filter
        raise OSError(ctypes.get_errno(), "prctl")


def text_at(pid: int, address: int) -> str:
    with open(f"/proc/{pid}/mem", "rb") as memory:
        memory.seek(address)
        return memory.read(min(4096, 4096 - address % 4096)).partition(b"\0")[0].decode(errors="replace")


def target(pid: int, registers: Registers) -> str:
    """Return the path that a call changes, absolute; the empty string for what is no file."""
    number, r = registers.orig_rax, registers
    try:
        if number in BY_DESCRIPTOR:
            return os.readlink(f"/proc/{pid}/fd/{r.rdi}")
        if number == COPY_RANGE:
            return os.readlink(f"/proc/{pid}/fd/{r.rdx}")
        if number in BY_PATH or number == OPEN:
            folder, path = f"/proc/{pid}/cwd", text_at(pid, r.rdi)
        else:
            descriptor = ctypes.c_int(r.rdi).value
            folder = f"/proc/{pid}/cwd" if descriptor < 0 else f"/proc/{pid}/fd/{descriptor}"
            path = text_at(pid, r.rsi)
        return os.path.normpath(os.path.join(os.readlink(folder), path))
    except OSError:
        return ""


def name_of(number: int) -> str:
    known = BY_DESCRIPTOR | BY_PATH | BY_FOLDER_AND_PATH
    return known.get(number, {OPEN: "open", OPENAT: "openat"}.get(number, "copy_file_range"))


def watch(child: int, root: str, at: int, number: int, *, torn: bool) -> dict[str, Any]:
    """Let the stopped child run to its end, and send it a signal at a call; return what was seen."""
    calls: Counter[str] = Counter()
    seen, hit, tearing = 0, "", 0
    ptrace(SETOPTIONS, child, OPTIONS)
    ptrace(CONT, child)
    while True:
        try:
            pid, status = os.waitpid(-1, WALL)
        except ChildProcessError:
            return {"calls": dict(calls), "count": seen, "hit": hit, "code": -9}
        if os.WIFEXITED(status) or os.WIFSIGNALED(status):
            if pid == child:
                code = os.waitstatus_to_exitcode(status)
                return {"calls": dict(calls), "count": seen, "hit": hit, "code": code}
            continue
        deliver, stop = 0, status >> 8
        try:
            if pid == tearing:  # the half that was allowed is written
                os.kill(child, signal.SIGKILL)
                continue
            if stop == SECCOMP_EVENT:
                registers = Registers()
                ptrace(GETREGS, pid, ctypes.byref(registers))
                path = target(pid, registers)
                if path == root or path.startswith(root + "/"):
                    seen += 1
                    calls[name_of(registers.orig_rax)] += 1
                    if seen == at:
                        hit = f"{name_of(registers.orig_rax)} {path}"
                        if torn and registers.orig_rax == 1 and registers.rdx > 1:
                            hit = f"torn {hit}"
                            registers.rdx //= 2
                            ptrace(SETREGS, pid, ctypes.byref(registers))
                            tearing = pid
                            ptrace(SYSCALL, pid)
                            continue
                        os.kill(child, number)
                        if number == signal.SIGKILL:
                            continue
            elif stop < 256 and stop not in (signal.SIGSTOP, signal.SIGTRAP):
                deliver = stop
            ptrace(CONT, pid, deliver)
        except ProcessLookupError:
            continue  # it was killed meanwhile


def perform(arguments: list[str], folder: str, output: str) -> None:
    """Be `rr` in a folder, in a process that is followed."""
    os.setsid()
    os.chdir(folder)
    for descriptor, path, flags in ((0, os.devnull, os.O_RDONLY), (1, output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)):
        os.dup2(os.open(path, flags), descriptor)
    os.dup2(1, 2)
    from rrcli.__main__ import main as rr

    signal.signal(signal.SIGINT, signal.default_int_handler)
    libc.ptrace(TRACEME, 0, None, None)
    os.kill(os.getpid(), signal.SIGSTOP)
    filter_calls()
    sys.argv = ["rr", *arguments]
    code: Any = 1
    try:
        rr()
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve() -> None:
    """Do what the lines of standard input ask for, and answer each with a line."""
    import transformers.models.llama.modeling_llama  # noqa: F401

    import rrcli.services.eval
    import rrcli.services.surgery
    import rrcli.services.train
    import rrcli.training.trainer  # noqa: F401

    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if child == 0:
            perform(asked["arguments"], asked["folder"], asked["output"])
        os.waitpid(child, WALL)
        found = watch(child, os.path.realpath(asked["folder"]), asked["at"], asked["number"], torn=asked["torn"])
        print(json.dumps(found), flush=True)


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Attributes:
        code: the exit code; minus the signal's number where one ended it. count: calls that changed the folder.
        hit: the call before which the signal was sent, and its path; empty if it was not reached. said: all it printed.
    """

    code: int
    count: int
    hit: str
    calls: dict[str, int]
    said: str


class Killer:
    """Runs commands and sends them a signal at a system call; a context manager."""

    def __init__(self, **environment: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"} | environment,
        )  # fmt: skip

    def __enter__(self) -> Killer:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def rr(
        self, *arguments: str, folder: Path, at: int = 0, number: int = signal.SIGKILL, torn: bool = False
    ) -> Outcome:
        """Run `rr` in a folder; before its call `at` (from 1; 0: none) send the signal."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        output = folder.with_name(f"{folder.name}.out")
        asked = {"arguments": arguments, "folder": str(folder), "output": str(output)}
        asked |= {"at": at, "number": number, "torn": torn}
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        return Outcome(**json.loads(self._process.stdout.readline()), said=output.read_text())


if __name__ == "__main__":
    serve()
