"""Evaluations that two processes share out: one process's records, log and exits, whatever ends one of them."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

import rrcli
from families import NO_DRIVER, wake
from rrcli.data.dealing import ALONE, deal
from rrcli.errors import RRError
from rrcli.experiment.exits import measure_exits
from rrcli.files import SIDECAR, read_json
from rrcli.recursion.readout import Readout
from rrcli.reporting import Silent
from rrcli.schemas import Results
from rrcli.services.eval import evaluate
from rrcli.services.surgery import surgery
from rrcli.settings import EvalSettings, SurgerySettings, with_changes
from rrcli.training.launching import launch
from rrcli.training.processes import Processes

STAGE = "after_surgery"
# Small batches, so that there are some to share out, and numbers of them that two does not divide.
SETTINGS = EvalSettings(
    device="cpu", problems=2, max_samples=3, max_new_tokens=8, batch_tokens=100, skip_performance=True, samples=2
)
LARGE = 2**20
WAYS = {"one": {}, "two": {}, "parts": {"parallel": "fsdp=2"}}


def settings_of(way: str, **changes: Any) -> EvalSettings:
    return with_changes(SETTINGS, output_dir=way, log_dir=f"logs-{way}", **WAYS.get(way, {}), **changes)


def share_out(folder: Path) -> str:
    """Evaluate, and measure exits, as one of two processes; note how many batches this one scored.

    Returns more than a pipe holds, as an evaluation of more than a few problems does.
    """
    real, scored = Readout.score, []

    def counting(self: Readout, *args: Any, **kwargs: Any) -> Any:
        scored.append(1)
        return real(self, *args, **kwargs)

    Readout.score = counting  # type: ignore[method-assign]
    evaluate(settings_of("two"), STAGE, folder, Silent())
    (folder / f"scored-{os.environ['RANK']}").write_text(str(len(scored)))
    Readout.score = real  # type: ignore[method-assign]
    evaluate(settings_of("begun"), STAGE, folder, Silent())
    measure_exits(settings_of("two"), STAGE, folder, Silent())
    if not NO_DRIVER:
        evaluate(settings_of("parts"), STAGE, folder, Silent())
    return "." * LARGE


def die(folder: Path, rank: str, moment: int) -> None:
    """Evaluate as one of two processes, of which one is killed when it has gathered so often."""
    real, gathered = Processes.gather, []

    def counting(self: Processes, value: Any) -> list[Any]:
        gathered.append(1)
        if os.environ["RANK"] == rank and len(gathered) > moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, value)

    Processes.gather = counting  # type: ignore[method-assign]
    evaluate(settings_of("died"), STAGE, folder, Silent())


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process evaluated (`one`), and two; and half of what one did, which two went on with (`begun`)."""
    folder = tmp_path_factory.mktemp("shared")
    sidecar = surgery(SurgerySettings(device="cpu"), folder, Silent(), verify=False).folder
    assert sidecar is not None
    model, _ = rrcli.load(sidecar, device="cpu")
    save_file(wake(model.recursion, 0.3).state_dict(), sidecar / SIDECAR)
    evaluate(settings_of("one"), STAGE, folder, Silent())
    measure_exits(settings_of("one"), STAGE, folder, Silent())
    lines = log(folder, "one")
    (folder / "begun").mkdir()
    (folder / "begun" / f"{STAGE}_samples.jsonl").write_text("\n".join([*lines[: len(lines) // 2], "{"]))
    assert len(launch(2, share_out, folder)) == LARGE
    return folder


def results(folder: Path, way: str) -> Any:
    return read_json(folder / way / f"{STAGE}_results.json", "rr eval", Results)


def log(folder: Path, way: str) -> list[str]:
    return (folder / way / f"{STAGE}_samples.jsonl").read_text().splitlines()


@pytest.mark.parametrize("way", ["two", pytest.param("parts", marks=pytest.mark.skipif(NO_DRIVER, reason="no driver"))])
def test_two_processes_publish_what_one_does(way: str, measured: Path) -> None:
    one, two = results(measured, "one"), results(measured, way)
    assert len({tuple(r["outputs"]) for r in one["records"]["problems"]}) > 1
    assert any(len(set(r["nll"])) == 3 for r in one["records"]["documents"]), "the depths do not differ"
    for part in ("records", "metrics", "by_depth", "calibration", "inputs"):
        assert two[part] == one[part], part
    assert log(measured, way) == log(measured, "one")
    assert {json.loads(line).get("part") for line in log(measured, way)[1:]} == {
        "documents", "problems", "sampled", "generations", "end"
    }  # fmt: skip
    assert len(list((measured / f"logs-{way}").rglob("events.*"))) == len(
        list((measured / "logs-one").rglob("events.*"))
    )


def test_each_of_them_scores_half_of_the_batches(measured: Path) -> None:
    first, second = (int((measured / f"scored-{rank}").read_text()) for rank in (0, 1))
    batches = sum(json.loads(line).get("part") == "documents" for line in log(measured, "one")[1:])
    assert batches % 2, "an even number shows nothing of the last round"
    checked = first - (batches + 1) // 2  # the head is looked at once, by every process
    assert second == batches // 2 + checked


def test_exits_measured_by_two_are_those_of_one(measured: Path) -> None:
    one, two = (json.loads((measured / way / f"{STAGE}_exits.json").read_text()) for way in ("one", "two"))
    for part in ("validation", "test", "n", "chosen", "why"):
        assert two[part] == one[part], part


def test_two_go_on_with_what_one_began(measured: Path) -> None:
    assert log(measured, "begun") == log(measured, "one")
    assert results(measured, "begun")["records"] == results(measured, "one")["records"]


def test_one_goes_on_where_one_of_two_was_killed(measured: Path) -> None:
    with pytest.raises(RRError, match="SIGKILL"):
        launch(2, die, measured, "1", 12)
    begun = log(measured, "died")
    assert 3 < len(begun) < len(log(measured, "one"))
    evaluate(settings_of("died"), STAGE, measured, Silent())
    assert log(measured, "died")[: len(begun)] == begun
    assert log(measured, "died") == log(measured, "one")
    assert results(measured, "died")["records"] == results(measured, "one")["records"]


# -- without a second process ------------------------------------------------------------------------------------------


class Noted:
    """A process of a team, of which the others' values are made up."""

    def __init__(self, share: int, shares: int, *, in_step: bool = False, tensor: int = 1) -> None:
        self.share, self.shares, self.in_step, self.tensor = share, shares, in_step, tensor
        self.done: list[list[int]] = []
        self.others: Any = None

    def gather(self, value: Any) -> list[Any]:
        found = [self.others or value] * (self.shares * self.tensor)
        found[self.share * self.tensor] = value
        return found


def dealt(team: Noted) -> list[tuple[list[int], Any]]:
    def work(batch: list[int]) -> int:
        team.done.append(batch)
        if batch == [3]:
            raise RRError("three")
        return sum(batch)

    return list(deal([[0], [1], [2], [4, 4], [5]], work, team, idle=lambda _: []))


def test_batches_are_dealt_out_one_after_the_other() -> None:
    assert [batch for batch, _ in dealt(Noted(0, 2))] == [[0], [1], [2], [4, 4], [5]]
    first, second, third = Noted(0, 2), Noted(1, 2), Noted(1, 2, in_step=True)
    for team in (first, second, third):
        dealt(team)
    assert first.done == [[0], [2], [5]]
    assert second.done == [[1], [4, 4]]
    assert third.done == [[1], [4, 4], []]  # one more, to keep up with the other


def test_what_one_process_refuses_all_refuse() -> None:
    with pytest.raises(RRError, match="three"):
        list(deal([[3]], lambda _: (_ for _ in ()).throw(RRError("three")), ALONE))
    team = Noted(0, 2)
    team.others = (None, RRError("memory"))
    with pytest.raises(RRError, match="memory"):
        dealt(team)
    assert team.done == [[0]]


def test_processes_with_the_same_rows_count_once() -> None:
    assert [found for _, found in dealt(Noted(0, 2, tensor=2, in_step=True))][::2] == [0, 2, 5]
