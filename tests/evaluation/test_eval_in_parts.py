"""Surgery and generation by two processes with a part of the model each. Evaluation: test_shared_evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from families import NO_DRIVER
from rrcli.evaluation.samples import SampleLog
from rrcli.evaluation.tracing import Piece
from rrcli.reporting import Silent
from rrcli.services.generate import generate
from rrcli.services.surgery import surgery
from rrcli.settings import GenerateSettings, SurgerySettings
from rrcli.training.launching import launch

pytestmark = pytest.mark.skipif(NO_DRIVER, reason="a torch for CUDA does not shard on a CPU")

STAGE = "after_surgery"


def ignore(_: Piece) -> None: ...


def work(folder: Path) -> tuple[Any, str]:
    """Do surgery and generate; return the depths that surgery verified, and the text."""
    made = surgery(SurgerySettings(device="cpu", parallel="fsdp=2"), folder, Silent())
    asked = GenerateSettings(device="cpu", max_new_tokens=6, parallel="fsdp=2")
    return made.verified_depths, generate(asked, "One morning,", folder, ignore, stage=STAGE).text


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int], str]:
    folder = tmp_path_factory.mktemp("parts")
    depths, text = launch(2, work, folder)
    return folder, depths, text


def test_surgery_is_verified_in_parts(measured: tuple[Path, list[int], str]) -> None:
    assert measured[1] == [0, 1, 2]


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
