"""Measures the performance of several models in turns: a process for each, and rounds A B C, A B C, ...

A machine is faster in one minute than in the next, and a process remembers what ran in it before: a model that is
measured later, or after another one in the same process, looks slower and larger than it is. So every model has a
process of its own, which holds nothing else; only one works at a time; and what a machine does meanwhile hits all of
them alike. Times are medians with the range of the rounds.

    parent                     child, one for each model
    start            ->        imports libraries; waits
    load             ->        loads the model and decodes the texts once; its peak memory
    round  (times n) ->        every way to decode, timed
    count            ->        FLOPs, caches, chunks

Where the models do not fit into memory together, each round of each model has a new process.

A child ends with its parent, however that ends. What goes wrong in a child is raised in the parent.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing import connection
from typing import TYPE_CHECKING, Any, Literal

import torch

from rrcli.allocator import keep_freed_memory
from rrcli.errors import RRError
from rrcli.evaluation.held_out import EvalData, showable
from rrcli.evaluation.performance import ROUNDS, Performance, Way, Workload
from rrcli.models.source import ModelSource
from rrcli.recursion.config import RecursionConfig
from rrcli.reporting import Reporter, Silent
from rrcli.settings import EvalSettings

if TYPE_CHECKING:
    from pathlib import Path

# How many documents are handed to a child: far more than the texts that it continues take.
DOCUMENTS = 256
# How long a child may take to end when it is told to, in seconds.
GRACE = 5.0
# Models share the memory if as many more as there are, of this many times the size of the first, fit into what is free.
SPARE = 1.3

Request = Literal["load", "round", "count"]


@dataclass(frozen=True)
class Subject:
    """A model to measure, as far as it is known before it is loaded.

    Attributes:
        name: of the stage, for messages and as the key of what was found.
        settings: device, dtype, depth and how conversations are shown. directory: the working directory.
        data: whose first documents are continued.
        prepare: what is done to the tokenizer before anything is shown through it.
        fresh: the recursion that the model is given, if it has none.
    """

    name: str
    source: ModelSource
    settings: EvalSettings
    directory: Path
    data: EvalData
    prepare: Callable[[Any], None] | None = None
    fresh: RecursionConfig | None = None


@dataclass(frozen=True)
class Loaded:
    """What a child says of its model.

    Attributes:
        device, dtype: what it is measured with. threads: that torch computes with.
        method: the way to decode that is measured. exit: the rule by which tokens leave, as JSON; None for no rule.
        memory_mb: see `Performance`. free_mb: what is left for other processes.
    """

    device: str
    dtype: str
    method: Way
    exit: dict[str, Any] | None
    threads: int
    memory_mb: float
    free_mb: float


@dataclass(frozen=True)
class Measured:
    """What was found of one model."""

    loaded: Loaded
    performance: Performance


def measure_in_turns(subjects: Sequence[Subject], reporter: Reporter, *, rounds: int = ROUNDS) -> dict[str, Measured]:
    """Measure models in turns, and return what was found by the names of the subjects.

    Raises:
        RRError: a child raised it, or died.
    """
    found: dict[str, Measured] = {}
    with ExitStack() as stack, reporter.progress("performance", (rounds + 2) * len(subjects), "turns") as progress:
        # All start at once, as importing takes longer than loading a small model; then they work one at a time.
        children = [stack.enter_context(_child(subject, reporter)) for subject in subjects]
        together = True
        for place, child in enumerate(children):
            loaded = child.ask("load")
            found[child.subject.name] = Measured(loaded, Performance(loaded.method, memory_mb=loaded.memory_mb))
            if place == 0:
                together = (len(children) - 1) * SPARE * loaded.memory_mb <= loaded.free_mb
                if not together:
                    reporter.note("the models do not fit into memory together: each turn has a process of its own")
            if not together:
                child.stop()
            progress.advance()
        turns: list[Request] = ["count", *["round"] * rounds]  # type: ignore[list-item]
        for request in turns:
            for child in children:
                performance = found[child.subject.name].performance
                if not together:
                    child.start()
                    child.ask("load")
                answer = child.ask(request)
                if request == "round":
                    performance.rounds.append(answer)
                else:
                    performance.counts, performance.notices, performance.cache_bytes = answer
                if not together:
                    child.stop()
                progress.advance()
    return found


@contextmanager
def _child(subject: Subject, reporter: Reporter) -> Iterator[_Child]:
    child = _Child(subject, reporter)
    child.start()
    try:
        yield child
    finally:
        child.stop()


class _Child:
    """The process of one subject, seen from the parent."""

    def __init__(self, subject: Subject, reporter: Reporter) -> None:
        data = EvalData(subject.data.documents[:DOCUMENTS], source=subject.data.source)
        self.subject, self.reporter = replace(subject, data=data), reporter
        self.process: Any = None
        self.connection: Any = None

    def start(self) -> None:
        """Start the process; it does nothing until it is asked."""
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, self.subject), daemon=True)
        self.process.start()
        other.close()  # so that the end of the child is the end of the pipe

    def ask(self, request: Request) -> Any:
        """Let the process do something, and return what it found.

        Raises:
            RRError: it raised it, or died.
        """
        try:
            self.connection.send(request)
            while True:
                kind, value = self.connection.recv()
                match kind:
                    case "note":
                        self.reporter.note(value)
                    case "warn":
                        self.reporter.warn(value)
                    case "error":
                        raise value
                    case _:
                        return value
        except (EOFError, OSError):
            raise self._died() from None

    def _died(self) -> RRError:
        self.process.join(GRACE)
        code = self.process.exitcode
        how = "no longer answers" if code is None else f"ended with exit code {code}"
        if code is not None and code < 0:
            how = f"was ended by {signal.Signals(-code).name}"
        return RRError(
            f"the process that measured '{self.subject.name}' {how}",
            "SIGKILL often means that memory ran out. --skip-performance leaves speed and memory out.",
        )

    def stop(self) -> None:
        """End the process, if there is one."""
        if self.process is None:
            return
        self.connection.close()
        self.process.terminate()
        self.process.join(GRACE)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.process = None


# -- in the child ------------------------------------------------------------------------------------------------------


class _Told(Silent):
    """A reporter that hands on to the parent what is said; the progress of one model is not shown."""

    def __init__(self, parent: connection.Connection) -> None:
        super().__init__()
        self.parent = parent

    def note(self, message: str) -> None:
        self.parent.send(("note", message))

    def warn(self, message: str) -> None:
        self.parent.send(("warn", message))


def _serve(parent: connection.Connection, subject: Subject) -> None:
    """Be the process of a subject.

    It has a group of its own, so that a terminal's Ctrl-C reaches it through the parent alone.
    """
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    keep_freed_memory()
    _answer(parent, subject)


def _answer(parent: connection.Connection, subject: Subject) -> None:
    """Answer requests until the parent ends the pipe; what goes wrong is the last answer."""
    try:
        with torch.no_grad():
            work = _Work(subject, _Told(parent))
            while (request := _received(parent)) is not None:
                parent.send(("value", getattr(work, request)()))
        return
    except RRError as error:
        found = error
    except Exception as error:
        if os.environ.get("RR_DEBUG"):
            traceback.print_exc(file=sys.stderr)
        told = f"measuring the performance of '{subject.name}' failed: {type(error).__name__}: {error}"
        found = RRError(told, "--debug shows where; --skip-performance leaves speed and memory out.")
    with suppress(OSError):  # the parent may have ended meanwhile
        parent.send(("error", found))


def _received(parent: connection.Connection) -> Request | None:
    """Return the next request; None where the parent has what it wanted, or has ended."""
    try:
        request: Request = parent.recv()
    except (EOFError, OSError):
        return None
    return request


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


class _Work:
    """What a child does for each request."""

    def __init__(self, subject: Subject, reporter: Reporter) -> None:
        # What loading and decoding import would count as the model's memory.
        import transformers.generation
        import transformers.models.auto.modeling_auto  # noqa: F401

        import rrcli.models.loading
        import rrcli.recursion.engine  # noqa: F401

        self.subject, self.reporter = subject, reporter

    def load(self) -> Loaded:
        """Load the model, and decode the texts once."""
        from rrcli.evaluation.evaluate import depth_of
        from rrcli.evaluation.peak_memory import PeakMemory
        from rrcli.models.loading import load_for, pick_device
        from rrcli.recursion.engine import attach
        from rrcli.recursion.exits import exit_for
        from rrcli.recursion.families import input_device

        subject = self.subject
        memory = PeakMemory(pick_device(subject.settings.device))
        model, tokenizer = load_for(subject.settings, subject.source, subject.directory, self.reporter)
        if subject.fresh is not None and getattr(model, "recursion", None) is None:
            attach(model, subject.fresh)
        recursion = getattr(model, "recursion", None)
        rule = exit_for(recursion, subject.settings.exit, subject.settings.depth)
        if recursion is not None:
            recursion.exit = rule
        depth = depth_of(model, subject.settings, self.reporter)
        if subject.prepare is not None:
            subject.prepare(tokenizer)
        texts = showable(subject.data, tokenizer, subject.settings).texts(tokenizer, subject.settings)
        self.workload = Workload(model, tokenizer, texts, depth)
        self.workload.warm_up()
        dtype = str(model.dtype).removeprefix("torch.")
        return Loaded(
            device=str(input_device(model)),
            dtype=dtype,
            method=self.workload.method,
            exit=None if rule is None else rule.to_dict(),
            threads=torch.get_num_threads(),
            memory_mb=memory.above(),
            free_mb=memory.free(),
        )

    def round(self) -> Any:
        """Time every way once."""
        return self.workload.round()

    def count(self) -> Any:
        """Return what every way takes and does, notices about it, and what the caches grow by."""
        counts, notices = self.workload.count()
        return counts, notices, self.workload.cache_growth()
