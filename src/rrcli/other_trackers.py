"""`--tracker`: what TensorBoard gets is also sent to wandb, trackio, mlflow and others, by accelerate's trackers.

Tags and steps are those of TensorBoard. A project is an experiment, named as its folder is; a run is what one command
logs: `finetuned_recursive`, and `finetuned_recursive evaluation`. Texts, pictures and histograms are for TensorBoard
alone. A tracker that fails is warned about once and left out: no training is lost for it.

Some trackers ignore a step that is lower than one that they have seen. So values are sent step by step; those of an
evaluation, which has depths for steps too, in the order of their steps at its end.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rrcli.errors import UsageError, first_line, suggest

# Tracker -> the argument of accelerate's class that names a run in its project; '' where there is none.
RUN_ARGUMENT = {
    "wandb": "name",
    "trackio": "name",
    "mlflow": "run_name",
    "swanlab": "experiment_name",
    "clearml": "task_name",
    "comet_ml": "",
    "aim": "",
    "dvclive": "",
}
Warn = Callable[[str], object]


class OtherTracker:
    """One tracker besides TensorBoard.

    Args:
        name: of RUN_ARGUMENT. tracker: accelerate's, started. hold: send everything at the end.
        warn: is told of a failure.
    """

    def __init__(self, name: str, tracker: Any, *, hold: bool, warn: Warn) -> None:
        self.name = name
        self._tracker, self._hold, self._warn = tracker, hold, warn
        self._waiting: dict[int, dict[str, float]] = {}

    def log(self, tag: str, value: float, step: int) -> None:
        """Send a number with the others of its step, once a later step begins."""
        if self._waiting and step > max(self._waiting) and not self._hold:
            self._send()
        self._waiting.setdefault(step, {})[tag] = value

    def configure(self, values: Mapping[str, Any]) -> None:
        """Send the settings of the run."""
        with self._failing():
            self._tracker.store_init_configuration(dict(values))

    def close(self) -> None:
        """Send what waits, and end the run."""
        self._send()
        with self._failing():
            self._tracker.finish()

    def _send(self) -> None:
        waiting, self._waiting = self._waiting, {}
        for step in sorted(waiting):
            with self._failing():
                self._tracker.log(waiting[step], step=step)

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            with quiet():
                yield
        except Exception as error:  # whatever its library raises: a tracker is not worth a training
            self._tracker = _GONE
            self._warn(failure(self.name, error))


class _Gone:
    """A tracker that has failed: it ignores every call."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


_GONE = _Gone()


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that there are not, or that are not installed.

    Raises:
        UsageError: names the package to install.
    """
    for name in names:
        if name == "tensorboard":
            raise UsageError("--tracker tensorboard: TensorBoard's log is always written", "Leave it out.")
        if name not in RUN_ARGUMENT:
            raise UsageError(f"there is no tracker '{name}'", suggest(name, RUN_ARGUMENT))
        if not _installed(name):
            raise UsageError(f"--tracker {name} is not installed", f"pip install {name.replace('_', '-')}")


def start_trackers(
    names: Sequence[str], *, project: str, run: str, folder: Path, hold: bool, warn: Warn
) -> list[OtherTracker]:
    """Begin a run of every tracker; one that cannot be started is warned about and left out.

    Args:
        folder: for trackers that keep files of their own. hold: see `OtherTracker`.
    """
    if not names:
        return []
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState(cpu=True)  # accelerate's messages need it; changes nothing where processes have joined
    started = []
    for name in dict.fromkeys(names):
        argument = RUN_ARGUMENT[name]
        options: dict[str, Any] = {argument: run} if argument else {}
        options |= {"logging_dir": str(folder), "experiment": project} if name == "aim" else {}
        options |= {"project_name": project} if name == "clearml" else {}
        options |= {"dir": str(folder / "dvclive")} if name == "dvclive" else {}
        try:
            with quiet():
                tracker: Any = LOGGER_TYPE_TO_CLASS[name](run if name == "aim" else project, **options)
                tracker.start()
                if name == "comet_ml":
                    tracker.tracker.set_name(run)
        except Exception as error:  # no account, no connection, another version
            warn(failure(name, error))
        else:
            started.append(OtherTracker(name, tracker, hold=hold, warn=warn))
    atexit.register(_end_quietly)  # functions that are registered later are called earlier: before the trackers' own
    return started


def failure(name: str, error: Exception) -> str:
    """Return what is said of a tracker that failed."""
    return f"{name} has failed and is left out; TensorBoard's log goes on: {type(error).__name__}: {first_line(error)}"


@contextmanager
def quiet() -> Iterator[None]:
    """Send what a tracker prints to standard error: standard output belongs to results."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def _end_quietly() -> None:
    """Send what trackers print at the end of the process to standard error too."""
    sys.stdout.flush()
    sys.stdout = sys.stderr


def _installed(module: str) -> bool:
    return module in sys.modules or importlib.util.find_spec(module) is not None
