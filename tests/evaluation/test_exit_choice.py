"""The choice of an exit: what may be chosen, from how much data, and that `rr run` makes it before it measures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from random import Random
from typing import Any

import pytest

import rrcli
from commands import rr
from families import build
from rrcli import configuration
from rrcli.evaluation.exit_choice import LEVEL, choose, least_problems, too_few
from rrcli.evaluation.exits import Point
from rrcli.evaluation.paired import PairedAnswers
from rrcli.evaluation.stats import wilson
from rrcli.experiment.exits import choose_exit
from rrcli.experiment.identity import recorded_exit
from rrcli.experiment.planning import plan, status_of
from rrcli.experiment.replicates import Replicate
from rrcli.files import MANIFEST, write_json
from rrcli.models.manifest import read_manifest, write_exit
from rrcli.recursion.exits import ExitRule
from rrcli.reporting import Silent
from rrcli.services.surgery import surgery
from rrcli.settings import EvalSettings, SurgerySettings

N, DOCUMENTS = 400, 30


def point(kind: Any, threshold: float, cost: float, *, wrong: range = range(0), nats: float = 2.0, n: int = N) -> Point:
    """Return what a rule did that got all problems but those of `wrong` right, and has so many nats a token."""
    hits = tuple(number not in wrong for number in range(n))
    spread = [nats * (1 + 0.01 * math.sin(number)) for number in range(DOCUMENTS)]
    return Point(
        ExitRule(kind, threshold), accuracy=wilson(sum(hits), n) if n else None, mflop=cost, hits=hits, nats=nats,
        text_nats=tuple(100 * value for value in spread), text_tokens=(100,) * DOCUMENTS,
    )  # fmt: skip


def chosen(*points: Point, loss: float = 1.0) -> str:
    found = choose(points, loss)
    return f"{found.rule or 'none'}, best {found.best or 'nothing'}"


FULL = point("depth", 2, 9, wrong=range(40))


def test_the_cheapest_exit_that_is_shown_to_lose_little_is_chosen() -> None:
    cheap = point("depth", 0, 1, wrong=range(200))
    good, better = (point("probability", t, cost, wrong=range(40)) for t, cost in ((0.9, 3), (0.99, 4)))
    assert chosen(cheap, FULL, better, good) == "probability:0.9, best depth:2"
    assert chosen(cheap, FULL) == "none, best depth:2"
    assert chosen(cheap, FULL, loss=60) == "depth:0, best depth:2"
    # As dear as every pass is no exit; controls cannot be chosen.
    assert chosen(cheap, FULL, point("head", 0.5, 9, wrong=range(40))) == "none, best depth:2"
    random = point("random", 0, 0.5, wrong=range(40))
    assert chosen(cheap, FULL, random) == "none, best depth:2"


def test_a_loss_that_may_be_luck_is_not_taken() -> None:
    """Eight other answers, as many better as worse: no loss is measured, and one above a point is not excluded."""
    unlike = point("margin", 0.5, 3, wrong=range(8, 48))
    assert sum(unlike.hits) == sum(FULL.hits)
    low, _ = PairedAnswers.of(unlike.hits, FULL.hits).interval(LEVEL) or (0, 0)
    assert low < -0.01
    assert chosen(point("depth", 0, 1, wrong=range(200)), FULL, unlike) == "none, best depth:2"
    assert chosen(point("depth", 0, 1, wrong=range(200)), FULL, unlike, loss=5) == "margin:0.5, best depth:2"


def test_an_exit_may_not_cost_perplexity_either() -> None:
    near, far = (point("head", t, 3, wrong=range(40), nats=nats) for t, nats in ((0.5, 2.005), (0.3, 2.05)))
    assert chosen(FULL, far) == "none, best depth:2"
    assert chosen(FULL, far, near) == "head:0.5, best depth:2"


def test_the_loss_is_that_against_the_best_fixed_depth_whichever_it_is() -> None:
    exit = point("margin", 0.9, 3, wrong=range(40))
    assert chosen(FULL, point("depth", 1, 5, wrong=range(39)), exit) == "margin:0.9, best depth:1"
    better = point("depth", 1, 5, wrong=range(20))  # the exit loses 5 points against it
    assert chosen(FULL, better, exit) == "depth:1, best depth:1"
    assert chosen(FULL, point("depth", 1, 5, wrong=range(20), nats=2.1), exit) == "none, best depth:1"
    # A depth that is better by luck alone is not chosen for it: against all passes it may lose.
    lucky = point("depth", 0, 1, wrong=range(1, 40))
    assert chosen(FULL, lucky) == "depth:0, best depth:0"
    assert chosen(FULL, point("depth", 0, 1, wrong=range(60, 99))) == "none, best depth:0"


def test_text_alone_decides_where_there_is_no_problem() -> None:
    full = point("depth", 2, 9, n=0)
    assert chosen(full, point("depth", 0, 1, n=0, nats=2.3)) == "none, best depth:2"
    assert chosen(full, point("depth", 0, 1, n=0, nats=2.3), point("head", 0.5, 2, n=0)) == "head:0.5, best depth:2"
    assert chosen(full, point("depth", 1, 5, n=0, nats=1.9)) == "depth:1, best depth:1"


@pytest.mark.parametrize("loss", [0.5, 1.0, 5.0, 50.0])
def test_the_least_number_of_problems_is_the_one_at_which_equal_answers_show_enough(loss: float) -> None:
    least = int(least_problems(loss))
    for n, enough in ((least - 1, False), (least, True)):
        interval = PairedAnswers(0, 0, n).interval(LEVEL)
        assert (interval is not None and -100 * interval[0] <= loss) == enough
    assert least_problems(1.0) == 163


def test_too_little_data_is_said_before_anything_is_measured() -> None:
    assert "100 validation problems cannot show that an exit loses at most 1 point" in too_few(100, 50, 1.0)
    assert "that takes 163" in too_few(100, 50, 1.0)
    assert not too_few(163, 0, 1.0)
    assert "no validation problem, and 5 validation documents are fewer than 6" in too_few(0, 5, 1.0)
    assert not too_few(0, 6, 1.0)
    assert "--exit-loss 0" in too_few(10_000, 100, 0.0)
    assert choose([point("depth", 0, 1, n=100), point("depth", 1, 2, n=100)], 1.0).why == too_few(100, 30, 1.0)


def test_rules_that_lose_too_much_are_rarely_chosen() -> None:
    """Twenty rules that truly lose 2 points: the luckiest would be chosen nearly always by what was measured alone."""
    draw, wrong, lucky = Random(1), 0, 0
    for _ in range(100):
        full = [draw.random() < 0.9 for _ in range(N)]
        rules = []
        for number in range(20):
            hits = tuple(hit and draw.random() > 0.0222 for hit in full)
            rules.append(Point(ExitRule("margin", number / 20), accuracy=wilson(sum(hits), N), mflop=1.0, hits=hits))
        every = Point(ExitRule("depth", 2), accuracy=wilson(sum(full), N), mflop=9.0, hits=tuple(full))
        wrong += choose([every, *rules], 1.0).rule is not None
        lucky += any(sum(full) - sum(rule.hits) <= 0.01 * N for rule in rules)
    assert lucky > 80
    assert wrong < 10


# -- in an experiment --------------------------------------------------------------------------------------------------

QUICK = {"RR_TRAIN_STEPS": "2", "RR_TRAIN_BATCH_SIZE": "2", "RR_TRAIN_EVAL_INTERVAL": "0", "RR_TRAIN_MAX_LENGTH": "64"}
QUICK |= {"RR_EVAL_SKIP_REASONING": "1", "RR_EVAL_SKIP_GENERATION": "1", "RR_EVAL_SKIP_PERFORMANCE": "1"}
QUICK |= {"RR_EVAL_MAX_SAMPLES": "8", "RR_EVAL_EXIT_LOSS": "20", "RR_SURGERY_MAX_STEPS": "2"}
RECURSIVE = Replicate("finetuned_recursive", 0)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exits")
    done = rr("run", folder=folder, **QUICK)
    assert done.returncode == 0, done.stderr
    assert "finetuned_recursive: the exit is depth:0, the cheapest on the validation side" in done.stderr
    return folder


def results(folder: Path, stage: str = "finetuned_recursive") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "eval_results" / f"{stage}_results.json").read_text())
    return found


def checkpoint(folder: Path) -> Path:
    return folder / "checkpoints" / "finetuned_recursive" / "step-000002"


def test_rr_run_chooses_before_it_measures_and_measures_once(experiment: Path) -> None:
    found = results(experiment)
    assert found["model"]["exit"] == {"rule": "depth", "threshold": 0.0}
    assert len(found["by_depth"]["perplexity"]) == 3  # all depths are beside it
    assert {len(record["nll"]) for record in found["records"]["documents"]} == {4}
    assert found["metrics"]["perplexity"]["value"] == pytest.approx(found["by_depth"]["perplexity"][0]["value"])
    assert not list((experiment / "eval_results").glob("*_exits.json"))  # which would hold the test side
    assert not list((experiment / "eval_results").glob("finetuned_recursive*.bak"))
    choice = recorded_exit(checkpoint(experiment))
    assert choice is not None
    assert (choice["documents"], choice["problems"], choice["loss"], choice["why"]) == (8, 0, 20.0, "")
    assert read_manifest(checkpoint(experiment))["exit"] == choice["chosen"]
    again = rr("run", folder=experiment, **QUICK)
    assert again.stderr.count("done already") == len(_plan(experiment)) == 9
    shown = rr("status", folder=experiment, **QUICK)
    assert "finetuned_recursive: exit depth:0" in shown.stdout
    assert "Next: rr compare" in shown.stdout


def test_a_choice_is_made_again_where_what_decides_it_changed(experiment: Path) -> None:
    def exit_status(**more: str) -> tuple[str, str]:
        steps = {step["command"]: step for step in _plan(experiment, **more)}
        step = steps["rr eval --stage finetuned_recursive --choose-exit"]
        return step["status"], step["detail"]

    assert exit_status() == ("done", "")
    assert exit_status(RR_EVAL_EXIT_LOSS="5") == ("stale", "its inputs changed")
    assert exit_status(RR_EVAL_MAX_SAMPLES="9") == ("stale", "its inputs changed")
    (experiment / "prompts.txt").write_text("Tom has\n")
    assert exit_status(RR_EVAL_PROMPTS="prompts.txt", RR_EVAL_SKIP_GENERATION="0") == ("done", "")
    assert exit_status(RR_TRAIN_LR="0.1")[0] == "stale"
    # A rule or a depth that is named leaves nothing to choose.
    for named in ({"RR_EVAL_EXIT": "none"}, {"RR_EVAL_DEPTH": "1"}):
        steps = [step["kind"] for step in _plan(experiment, **named)]
        assert "exit" not in steps
        assert steps.count("eval") == 4
    place, choice = checkpoint(experiment), recorded_exit(checkpoint(experiment))
    assert choice is not None
    manifest = read_manifest(place)
    write_json(place / MANIFEST, manifest | {"exit": {"rule": "head", "threshold": 0.5}})  # by hand, or a kill
    try:
        assert exit_status() == ("stale", "the checkpoint has another exit")
        write_exit(place, None)
        assert exit_status() == ("missing", "")
        done = rr("status", "--json", folder=experiment, **QUICK)
        assert json.loads(done.stdout)["next"] == "rr eval --stage finetuned_recursive --choose-exit"
    finally:
        write_exit(place, choice)
    assert exit_status() == ("done", "")


def test_where_nothing_can_be_chosen_every_pass_is_run_and_the_checkpoint_says_why(experiment: Path) -> None:
    place, choice = checkpoint(experiment), recorded_exit(checkpoint(experiment))
    loaded = configuration.load(EvalSettings, experiment, {"problems": 3, "exit_loss": 1.0})
    try:
        found = choose_exit(loaded, "finetuned_recursive", experiment, Silent())
        assert found.rule is None
        assert found.sentence().startswith("finetuned_recursive: no exit, every pass is run: 9 validation problems")
        assert "exit" not in read_manifest(place)
        step = status_of(
            "exit", RECURSIVE, experiment, lambda cls: configuration.load(cls, experiment, {"problems": 3})
        )
        assert step.status == "done"
        assert step.detail.startswith("no exit: 9 validation problems")
    finally:
        write_exit(place, choice)


def test_a_span_before_the_last_layer_has_no_exit(tmp_path: Path) -> None:
    _, tokenizer = rrcli.load("default")
    build("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    surgery(SurgerySettings(model="model", span="0:1"), tmp_path, Silent())
    loaded = EvalSettings(model="model", skip_reasoning=True, max_samples=6)
    found = choose_exit(loaded, "after_surgery", tmp_path, Silent())
    assert found.rule is None
    assert "no exit, every pass is run: layers follow the span" in found.sentence()
    assert found.to_dict()["why"] == found.about["why"]


def test_every_seed_has_its_own_choice(tmp_path: Path) -> None:
    (tmp_path / "rr.toml").write_text("[common]\nseeds = 2\n")
    steps = plan(tmp_path, lambda cls: configuration.load(cls, tmp_path))
    commands = [step.command for step in steps if step.kind == "exit"]
    assert commands == [f"rr eval --stage finetuned_recursive --choose-exit{seed}" for seed in ("", " --seed 1")]
    evaluated = [
        step for step in steps if step.kind == "eval" and step.replicate and step.replicate.stage == RECURSIVE.stage
    ]
    assert {step.detail for step in evaluated} == {"after the choice of its exit"}


def test_without_a_choice_an_evaluation_says_that_every_pass_is_run(experiment: Path) -> None:
    place, choice = checkpoint(experiment), recorded_exit(checkpoint(experiment))
    write_exit(place, None)
    try:
        arguments = ("eval", "--stage", "finetuned_recursive", "--output-dir", "other", "--log-dir", "other")
        done = rr(*arguments, folder=experiment, **QUICK)
    finally:
        write_exit(place, choice)
    assert "'rr eval --stage finetuned_recursive --choose-exit' chooses one" in done.stderr


def _plan(folder: Path, **more: str) -> list[dict[str, Any]]:
    done = rr("run", "--dry-run", "--json", folder=folder, **QUICK | more)
    assert done.returncode == 0, done.stderr
    steps: list[dict[str, Any]] = json.loads(done.stdout)["steps"]
    return steps
