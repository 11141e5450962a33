"""Trackers besides TensorBoard: the same tags and steps, and a failure that costs no training."""

from __future__ import annotations

import json
import sqlite3
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from rrcli.errors import UsageError
from rrcli.other_trackers import RUN_ARGUMENT, check_trackers, start_trackers
from rrcli.reporting import Silent
from rrcli.services import train as training
from rrcli.services.eval import evaluate
from rrcli.settings import EvalSettings, TrainSettings
from rrcli.tracker import EVALUATION, MetricsTracker

SHORT = {"steps": 3, "batch_size": 2, "max_length": 128, "eval_interval": 0, "warmup_steps": 0}
QUICK = {"skip_perplexity": True, "skip_generation": True, "skip_performance": True, "max_new_tokens": 2}


class Fake:
    """A tracker in the form of accelerate's, which remembers what it was told."""

    made: ClassVar[list[Fake]] = []
    fails_in = ""

    def __init__(self, project: str, **options: Any) -> None:
        self.project, self.options = project, options
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.config: dict[str, Any] = {}
        self.ended = False
        Fake.made.append(self)

    def _do(self, name: str) -> None:
        if self.fails_in == name:
            raise ConnectionError(f"no network for {name}\nmore")

    def start(self) -> None:
        print("a banner")
        self._do("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._do("configure")
        self.config |= values

    def log(self, values: dict[str, float], step: int) -> None:
        self._do("log")
        self.rows.append((step, values))

    def finish(self) -> None:
        self._do("finish")
        self.ended = True

    def tags(self) -> dict[str, list[tuple[int, float]]]:
        found: dict[str, list[tuple[int, float]]] = {}
        for step, values in self.rows:
            for tag, value in values.items():
                found.setdefault(tag, []).append((step, value))
        return found


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[Fake]:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Fake)
    monkeypatch.setitem(sys.modules, "wandb", ModuleType("wandb"))
    monkeypatch.setattr(Fake, "made", [])
    monkeypatch.setattr(Fake, "fails_in", "")
    return Fake


class Listening(Silent):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_a_training_and_its_evaluation_are_tracked_as_in_tensorboard(
    tmp_path: Path, fake: type[Fake], capsys: pytest.CaptureFixture[str]
) -> None:
    training.train(TrainSettings(tracker=("wandb",), **SHORT), "vanilla", tmp_path, Silent())
    [trained] = fake.made
    assert trained.project == tmp_path.name
    assert trained.options == {"name": "finetuned_vanilla"}
    assert trained.config["steps"] == 3
    assert trained.ended
    logged = scalars(tmp_path / "logs" / "finetuned_vanilla")
    assert trained.tags().keys() == logged.keys() > {"train/loss/total"}
    for tag, values in trained.tags().items():
        assert [step for step, _ in values] == [step for step, _ in logged[tag]]
        assert [value for _, value in values] == pytest.approx([value for _, value in logged[tag]])
    steps = [step for step, _ in trained.rows]
    assert steps == sorted(set(steps))

    evaluate(EvalSettings(tracker=("wandb",), problems=2, **QUICK), "finetuned_vanilla", tmp_path, Silent())
    evaluated = fake.made[1]
    assert evaluated.options == {"name": "finetuned_vanilla evaluation"}
    again = {
        tag: values for tag, values in scalars(tmp_path / "logs" / "finetuned_vanilla").items() if tag not in logged
    }
    assert evaluated.tags().keys() == again.keys() > {"final/reasoning_accuracy"}
    assert capsys.readouterr().out == "", "standard output belongs to results"


def test_the_steps_of_an_evaluation_come_in_order(tmp_path: Path, fake: type[Fake]) -> None:
    others = start_trackers(["wandb"], project="p", run="r", folder=tmp_path, hold=True, warn=pytest.fail)
    with MetricsTracker(tmp_path, part=EVALUATION, others=others) as tracker:
        tracker.log_scalar("final/perplexity", 3.0, 0)
        for depth in (0, 1, 2):
            tracker.log_scalar("depth/perplexity", 5.0 - depth, depth)
        tracker.log_scalar("final/relevance", 1.0, 0)
    assert fake.made[0].rows == [
        (0, {"final/perplexity": 3.0, "depth/perplexity": 5.0, "final/relevance": 1.0}),
        (1, {"depth/perplexity": 4.0}),
        (2, {"depth/perplexity": 3.0}),
    ]


def test_what_a_tracker_prints_at_the_end_of_the_process_is_no_result(
    tmp_path: Path, fake: type[Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    ends: list[Any] = []
    monkeypatch.setattr("atexit.register", ends.append)
    start_trackers(["wandb"], project="p", run="r", folder=tmp_path, hold=True, warn=pytest.fail)
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # and back, after the test
    [end] = ends
    end()
    assert sys.stdout is sys.stderr


@pytest.mark.parametrize("where", ["start", "configure", "log", "finish"])
def test_a_tracker_that_fails_is_warned_about_once_and_costs_nothing(
    tmp_path: Path, fake: type[Fake], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setattr(Fake, "fails_in", where)
    reporter = Listening()
    result = training.train(TrainSettings(tracker=("wandb",), **SHORT), "vanilla", tmp_path, reporter)
    assert result.steps == 3
    said = [text for text in reporter.warnings if "wandb" in text]
    assert said == [
        f"wandb has failed and is left out; TensorBoard's log goes on: ConnectionError: no network for {where}"
    ]
    assert [step for step, _ in scalars(tmp_path / "logs" / "finetuned_vanilla")["train/loss/total"]] == [1, 2, 3]


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("wand", "no tracker 'wand'", "Did you mean 'wandb'?"),
        ("tensorboard", "always written", "Leave it out"),
        ("comet_ml", "comet_ml is not installed", "pip install comet-ml"),
    ],
)
def test_a_tracker_that_cannot_be_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str, hint: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=message) as caught:
        training.train(TrainSettings(tracker=(name,), **SHORT), "vanilla", tmp_path, Silent())
    assert hint in caught.value.hint
    assert not list(tmp_path.iterdir())


def test_every_tracker_is_one_of_accelerates() -> None:
    assert RUN_ARGUMENT.keys() == LOGGER_TYPE_TO_CLASS.keys() - {"tensorboard"}


def test_trackio_holds_the_tags_and_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    monkeypatch.setattr("trackio.utils.TRACKIO_DIR", tmp_path / "trackio", raising=False)
    check_trackers(["trackio"])
    others = start_trackers(["trackio"], project="birds", run="r", folder=tmp_path, hold=False, warn=pytest.fail)
    with MetricsTracker(tmp_path / "logs", others=others) as tracker:
        tracker.log_hparams({"lr": 0.5}, [])
        for step in (1, 2):
            tracker.log_scalar("train/loss/total", 3.0 - step, step)
            tracker.log_scalar("train/lr", 0.5, step)
    [file] = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(file) as database:
        rows = database.execute("select step, metrics from metrics order by step").fetchall()
    assert [(step, json.loads(metrics)) for step, metrics in rows] == [
        (1, {"train/loss/total": 2.0, "train/lr": 0.5}),
        (2, {"train/loss/total": 1.0, "train/lr": 0.5}),
    ]
