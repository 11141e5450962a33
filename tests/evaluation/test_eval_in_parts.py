"""`rr eval` and `rr generate` by two processes with a part of the model each: one process's records, one writer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from families import NO_DRIVER
from rrcli.evaluation.samples import SampleLog
from rrcli.evaluation.tracing import Piece
from rrcli.files import read_json
from rrcli.reporting import Silent
from rrcli.schemas import Results
from rrcli.services.eval import evaluate
from rrcli.services.generate import generate
from rrcli.services.surgery import surgery
from rrcli.settings import EvalSettings, GenerateSettings, SurgerySettings, with_changes
from rrcli.training.launching import launch

pytestmark = pytest.mark.skipif(NO_DRIVER, reason="a torch for CUDA does not shard on a CPU")

STAGE = "after_surgery"
SETTINGS = EvalSettings(
    device="cpu", problems=2, max_samples=2, max_new_tokens=6, skip_performance=True, output_dir="one", log_dir="logs-1"
)  # fmt: skip
TWO = {"parallel": "fsdp=2", "output_dir": "two", "log_dir": "logs-2"}


def ignore(_: Piece) -> None: ...


def work(folder: Path) -> tuple[Any, str]:
    """Do surgery, evaluate and generate; return the depths that surgery verified, and the text."""
    made = surgery(SurgerySettings(device="cpu", parallel="fsdp=2"), folder, Silent())
    evaluate(with_changes(SETTINGS, **TWO), STAGE, folder, Silent())
    asked = GenerateSettings(device="cpu", max_new_tokens=6, parallel="fsdp=2")
    return made.verified_depths, generate(asked, "One morning,", folder, ignore, stage=STAGE).text


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int], str]:
    folder = tmp_path_factory.mktemp("eval")
    depths, text = launch(2, work, folder)
    evaluate(SETTINGS, STAGE, folder, Silent())
    return folder, depths, text


def test_surgery_is_verified_in_parts(measured: tuple[Path, list[int], str]) -> None:
    assert measured[1] == [0, 1, 2]


def test_the_records_are_those_of_one_process(measured: tuple[Path, list[int], str]) -> None:
    one, two = (read_json(measured[0] / n / f"{STAGE}_results.json", "rr eval", Results) for n in ("one", "two"))
    assert two["records"] == one["records"]
    assert two["metrics"] == one["metrics"]
    assert two["inputs"] == one["inputs"]


def test_one_process_writes_every_sample_once(measured: tuple[Path, list[int], str]) -> None:
    logs = [(measured[0] / n / f"{STAGE}_samples.jsonl").read_text().splitlines() for n in ("one", "two")]
    assert logs[0][1:] == logs[1][1:]  # the first line is the key, which the settings are a part of
    assert json.loads(logs[1][-1])["part"] == "end"
    assert len(list((measured[0] / "logs-2").rglob("events.*"))) == 1


def test_the_text_is_that_of_one_process(measured: tuple[Path, list[int], str]) -> None:
    folder, _, text = measured
    alone = generate(GenerateSettings(device="cpu", max_new_tokens=6), "One morning,", folder, ignore, stage=STAGE)
    assert text == alone.text


def test_a_process_that_does_not_write_knows_what_was_logged() -> None:
    entry = {"part": "problems", "key": "a"}
    log = SampleLog.following({"problems": [entry]})
    assert log.done("problems", lambda *_: True) == [entry]
    assert log.found == 1
    log.append("problems", [entry])  # which is the writer's work
