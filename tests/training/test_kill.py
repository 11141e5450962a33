"""`kill -9` at any system call: what is there is whole, and the same command ends as if it had never been killed.

The calls are drawn from a seed. What may differ from a run that was never killed, and nothing else: times and what is
computed from them, the process's memory, the copies `*.bak` of what was replaced, how many event files a run has, and
the file of a lock that nobody holds.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import rrcli
from killing import Killer, Outcome
from rrcli.files import checkpoints

pytestmark = pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="system calls are named by their numbers"
)

STEPS = 4
SMALL = {"train_steps": STEPS, "train_batch_size": 2, "train_max_length": 64, "train_save_interval": 1}
SMALL |= {"train_eval_interval": 2, "train_eval_samples": 1, "train_keep": 2, "train_ema": 0.9, "common_device": "cpu"}
SMALL |= {"eval_problems": 2, "eval_max_samples": 3, "eval_max_new_tokens": 8, "eval_skip_performance": "true"}
# What the clock or the allocator decides: parts of the keys of JSON objects and of tags.
MAY_DIFFER = {"created", "seconds", "tokens_per_sec", "memory_mb"}
MAY_DIFFER |= {"prefill_tokens_per_sec", "decode_tokens_per_sec", "time_per_output_token", "load"}
# Command -> what it makes, which is missing at its beginning, and how many kills of the slow test are its share of 60.
COMMANDS = {
    "eval --stage finetuned_recursive": (("eval_results/finetuned_recursive*",), 14),
    "train --mode recursive": (("checkpoints/finetuned_recursive", "logs/finetuned_recursive"), 13),
    "surgery --overwrite --export alone": (("checkpoints/after_surgery", "alone"), 12),
    "run": (("*",), 7),
    "compare --out compared.json --report page.html": (("compared.json", "page.html"), 10),
    "costs finetuned_recursive --rounds 1": (("eval_results/costs*",), 4),
}
# What the whole experiment holds besides what `rr run` makes.
BESIDE = ("alone", "compared.json", "page.html")
LOGGED_IN_TRAINING = ("train/", "evaluation/during_training/")
QUICK = {"eval": 2, "train": 3, "surgery": 2, "compare": 1, "run": 0, "costs": 0}
CASES = [pytest.param(c, QUICK[c.split()[0]], id=f"{c.split()[0]}-quick") for c in COMMANDS if QUICK[c.split()[0]]]
CASES += [pytest.param(c, n, id=c.split()[0], marks=pytest.mark.slow) for c, (_, n) in COMMANDS.items()]
STOPPED = [command for command in COMMANDS if command.startswith(("eval", "surgery"))]


@pytest.fixture(scope="module")
def killer() -> Iterator[Killer]:
    environment = {f"RR_{name.upper()}": str(value) for name, value in SMALL.items()}
    with Killer(OMP_NUM_THREADS="1", **environment) as started:
        yield started


@pytest.fixture(scope="module")
def whole(killer: Killer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole experiment that was never killed; each test works in a copy of it at the same place."""
    place = tmp_path_factory.mktemp("kill") / "work"
    place.mkdir()
    for command in ("run", "surgery --overwrite --export alone", "compare --out compared.json --report page.html"):
        done = killer.rr(*command.split(), folder=place)
        assert done.code == 0, done.said
    return Path(shutil.copytree(place, place.with_name("whole")))


@pytest.fixture(scope="module")
def priced(killer: Killer, whole: Path) -> Path:
    """The whole experiment with the costs of a stage, which a run without its performance does not measure."""
    place = begin(whole, ())
    done = killer.rr("costs", "finetuned_recursive", "--rounds", "1", folder=place)
    assert done.code == 0, done.said
    return Path(shutil.copytree(place, place.with_name("priced")))


def begin(whole: Path, missing: tuple[str, ...]) -> Path:
    """Return a copy of the whole experiment without what the command is to make."""
    place = whole.with_name("work")
    shutil.rmtree(place)
    shutil.copytree(whole, place)
    for path in [path for pattern in missing for path in place.glob(pattern)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return place


def files(folder: Path) -> dict[str, Path]:
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path for name, path in found.items() if "tfevents" not in name and not name.endswith(".bak")}


def settled(value: Any) -> Any:
    """Return a JSON value without what may differ."""
    if isinstance(value, dict):
        return {key: settled(v) for key, v in value.items() if not MAY_DIFFER & {*key.split("/")}}
    return [settled(entry) for entry in value] if isinstance(value, list) else value


def content(path: Path, *, without: str = "") -> Any:
    """Return what a file holds; of a JSON object, but for a key."""
    if path.suffix != ".json":
        return path.read_bytes()
    value = json.loads(path.read_text())
    return json.dumps(settled({key: each for key, each in value.items() if key != without} if without else value))


def curves(folder: Path) -> dict[str, dict[int, float]]:
    """Return the last value at each step of every tag."""
    events = EventAccumulator(str(folder)).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not MAY_DIFFER & {*tag.split("/")}]
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in sorted(tags)}


def check_same(command: str, place: Path, whole: Path) -> None:
    """Check that a command made what it would have made without being killed."""
    found, expected = files(place), files(whole)
    if command == "run":
        expected = {name: path for name, path in expected.items() if not name.startswith(BESIDE)}
        # A step that was killed after it had published is not done again, so its lock, which nobody holds, stays.
        found = {name: path for name, path in found.items() if path.suffix != ".lock"}
    assert sorted(found) == sorted(expected)
    later = "exit" if command.startswith("train") else ""  # what `rr run` notes in a checkpoint after its training
    unlike = [n for n in found if content(found[n], without=later) != content(expected[n], without=later)]
    assert unlike == []
    runs = sorted(path.name for path in (whole / "logs").iterdir())
    assert sorted(path.name for path in (place / "logs").iterdir()) == runs
    for run in runs:
        got, wanted = curves(place / "logs" / run), curves(whole / "logs" / run)
        if command.startswith("train") and run == "finetuned_recursive":  # what `rr eval` logs into it was removed
            wanted = {tag: values for tag, values in wanted.items() if tag.startswith(LOGGED_IN_TRAINING)}
        assert got == wanted, run
    for run in ("finetuned_vanilla", "finetuned_recursive"):
        assert list(curves(place / "logs" / run)["train/loss/total"]) == list(range(1, STEPS + 1))


def check_whole(place: Path) -> None:
    """Check that what a reader finds after a kill is whole."""
    for path in [*place.glob("*.json"), *place.glob("eval_results/*.json")]:
        json.loads(path.read_text())
    for run in place.glob("checkpoints/finetuned_*"):
        for checkpoint in checkpoints(run):
            rrcli.load(checkpoint)
    for sidecar in (place / "checkpoints" / "after_surgery", place / "alone"):
        if sidecar.exists():
            rrcli.load(sidecar)


def note(command: str, outcome: Outcome) -> None:
    """Append a kill to the file that RR_KILLS names, for whoever counts them."""
    if "RR_KILLS" in os.environ:
        with Path(os.environ["RR_KILLS"]).open("a") as file:
            print(command.split()[0], outcome.code, outcome.hit, sep="\t", file=file)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("command", "kills"), CASES)
def test_killed_at_any_call_the_same_command_ends_as_if_never_killed(command, kills, killer, whole, request):
    if command.startswith("costs"):
        whole = request.getfixturevalue("priced")
    arguments, (missing, _), random = command.split(), COMMANDS[command], Random(f"{command} {kills}")
    place = begin(whole, missing)
    calls = killer.rr(*arguments, folder=place).count
    check_same(command, place, whole)
    killed = 0
    while killed < kills:
        place, at = begin(whole, missing), random.randint(1, calls)
        while at:
            outcome = killer.rr(*arguments, folder=place, at=at, torn=random.random() < 0.5)
            note(command, outcome)
            if not outcome.hit:  # it had less to do than at first
                break
            assert outcome.code == -signal.SIGKILL
            check_whole(place)
            killed += 1
            at = random.randint(1, calls) if killed < kills and random.random() < 0.5 else 0
        else:
            outcome = killer.rr(*arguments, folder=place)
            note(command, outcome)
        assert outcome.code == 0, outcome.said
        check_same(command, place, whole)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_while_a_seed_is_added_the_same_command_ends_as_if_never_killed(killer, whole):
    arguments, random = ("run", "--seeds", "2"), Random(2)
    place = begin(whole, ())
    first = killer.rr(*arguments, folder=place)
    assert first.code == 0, first.said
    expected = Path(shutil.copytree(place, place.with_name("seeds"), dirs_exist_ok=True))
    for _ in range(5):
        place = begin(whole, ())
        outcome = killer.rr(*arguments, folder=place, at=random.randint(1, first.count), torn=random.random() < 0.5)
        note("run", outcome)
        check_whole(place)
        again = killer.rr(*arguments, folder=place)
        assert again.code == 0, again.said
        check_same("run --seeds 2", place, expected)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("stops", [1, pytest.param(5, marks=pytest.mark.slow)])
# SIGTERM is handled as SIGINT is; in the default run, test_stopping sends it.
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
@pytest.mark.parametrize("command", STOPPED, ids=lambda command: command.split()[0])
def test_stopped_by_the_user_at_any_call_nothing_is_left_half_written(command, number, stops, killer, whole):
    arguments, (missing, _), random = command.split(), COMMANDS[command], Random(f"{command} {number} {stops}")
    calls = killer.rr(*arguments, folder=begin(whole, missing)).count
    done = 0
    while done < stops:
        place = begin(whole, missing)
        stopped = killer.rr(*arguments, folder=place, at=random.randint(1, calls), number=number)
        if not stopped.hit:  # the number of calls varies a little, so that its last ones may not come
            assert stopped.code == 0, stopped.said
            calls = stopped.count
            continue
        done += 1
        assert stopped.code == 130, (stopped.hit, stopped.said)
        assert "interrupted: by the user" in stopped.said
        assert not [path for path in place.rglob(".*") if path.suffix in (".tmp", ".old")], stopped.hit
        check_whole(place)
        again = killer.rr(*arguments, folder=place)
        assert again.code == 0, again.said
        check_same(command, place, whole)
