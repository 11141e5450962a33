"""The exit of a checkpoint: chosen on the validation side, and the frontier of all rules on both sides.

`rr run` chooses after each recursive training (`choose_exit`), before anything is measured on the test side, which so
is read once. `rr eval --exits` also shows what every rule does on the test side (`measure_exits`).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rrcli.data.tokens import text_ids
from rrcli.errors import RRError, UsageError
from rrcli.evaluation.exit_choice import CONFIDENCE, Choice, choose, too_few
from rrcli.evaluation.held_out import EvalData, held_out_data, showable
from rrcli.experiment.identity import exit_inputs
from rrcli.experiment.provenance import provenance
from rrcli.experiment.replicates import evaluated_seeds
from rrcli.experiment.under_test import UnderTest, put_under_test
from rrcli.experiment.workspace import MAKERS, Workspace
from rrcli.files import SCHEMA, back_up, finite, write_json
from rrcli.locks import holding, lock
from rrcli.models.manifest import write_exit
from rrcli.models.placement import read_placement
from rrcli.recursion.exits import ExitRule
from rrcli.reporting import Reporter, Silent
from rrcli.schemas import ExitChoice
from rrcli.settings import EvalSettings
from rrcli.training.launching import launch, launched
from rrcli.training.processes import Processes, join

NO_SAVING = "leaving early saves nothing here: the cache of this model cannot be taken back to any length"
NO_EXIT = "layers follow the span, and only the last pass runs them: no text can be decoded with an exit"


@dataclass(frozen=True)
class ExitChosen:
    """The exit that was chosen, and for which checkpoint.

    Attributes:
        points: of the chosen rule and of the best fixed depth, as `Point.to_dict` gives them; by name.
    """

    name: str
    checkpoint: Path
    about: ExitChoice
    points: Mapping[str, Mapping[str, Any]]

    @property
    def rule(self) -> ExitRule | None:
        """The rule; None where every pass is run."""
        return None if self.about["chosen"] is None else ExitRule.from_dict(dict(self.about["chosen"]))

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        about = {name: value for name, value in self.about.items() if name != "inputs"}
        return {
            "name": self.name,
            "checkpoint": str(self.checkpoint),
            **about,
            "validation": list(self.points.values()),
        }

    def sentence(self) -> str:
        """Say what was chosen and why."""
        if self.rule is None:
            return f"{self.name}: no exit, every pass is run: {self.about['why']}"
        loss, what = f"{self.about['loss']:g}", []
        if problems := self.about["problems"]:
            what.append(f"{loss} point{'s' * (loss != '1')} of accuracy ({problems:,} problems)")
        if documents := self.about["documents"]:
            what.append(f"{loss} % of perplexity ({documents:,} documents)")
        return (
            f"{self.name}: the exit is {self.rule}, the cheapest on the validation side that is shown (at "
            f"{100 * CONFIDENCE:g} %) to lose at most {' and '.join(what)} against every fixed depth"
        )


@dataclass(frozen=True)
class ExitsResult:
    """The published frontier and its file, and what was chosen."""

    stage: str
    results: dict[str, Any]
    file: Path
    chosen: ExitChosen


@holding
def choose_exit(
    held: ExitStack,
    settings: EvalSettings,
    stage: str,
    directory: Path,
    reporter: Reporter,
    *,
    model: str | None = None,
) -> ExitChosen:
    """Choose an exit on the validation side, and write it into the checkpoint.

    Where none can be chosen (too little data, layers after the span, a cache that cannot be taken back), every pass is
    run, and the checkpoint says why.

    Args:
        model: a folder that rr wrote, instead of the stage's own model.

    Raises:
        UsageError: settings of a single rule or depth are given too. RRError: the stage has no model with a recursion.
    """
    placement = read_placement(settings, directory)
    if placement.processes > 1 and not launched():
        return launch(placement.processes, choose_exit, settings, stage, directory, reporter, model=model)
    processes = join(settings.device, placement.parallel)
    reporter = reporter if processes.main else Silent()
    tested = _under_test(held, settings, stage, directory, processes=processes, model=model)
    data = _validation(tested)
    points: dict[str, Any] = {}
    choice = Choice(why=too_few(*_amounts(data, tested.settings), tested.settings.exit_loss))
    if not choice.why:
        loaded, tokenizer = tested.load(reporter)
        choice, costs = _saving(loaded)
        if not choice.why:
            from rrcli.evaluation.exits import Frontier

            shown = showable(data, tokenizer, tested.settings)
            frontier = Frontier(
                loaded, tokenizer, shown,
                settings=tested.settings, reporter=reporter, costs=costs, team=processes,
            )  # fmt: skip
            measured = frontier.measure(frontier.rules(), controls=False)
            choice = choose(measured, tested.settings.exit_loss)
            points = {str(point.rule): point.to_dict() for point in measured}
    chosen = _publish(tested, choice, data, points)
    processes.leave()
    return chosen


@holding
def measure_exits(
    held: ExitStack,
    settings: EvalSettings,
    stage: str,
    directory: Path,
    reporter: Reporter,
    *,
    model: str | None = None,
) -> ExitsResult:
    """Measure every exit rule on both sides, choose on validation, and write the choice into the checkpoint.

    Args:
        model: a folder that rr wrote, to measure instead of the stage's own model.

    Raises:
        UsageError: settings of a single rule or depth are given too. RRError: the stage has no model with a recursion,
            or one whose texts cannot be decoded with an exit rule; nothing on the validation side.
    """
    placement = read_placement(settings, directory)
    if placement.processes > 1 and not launched():
        return launch(placement.processes, measure_exits, settings, stage, directory, reporter, model=model)
    processes = join(settings.device, placement.parallel)
    reporter = reporter if processes.main else Silent()
    tested = _under_test(held, settings, stage, directory, processes=processes, model=model)
    source, settings = tested.source, tested.settings
    test_seeds = evaluated_seeds(stage, settings)
    data = {
        "validation": _validation(tested),
        "test": _data(replace(settings, seed=settings.all_seeds[0]), directory, "test", test_seeds),
    }
    if data["validation"].empty:
        raise RRError(
            f"there is nothing to choose an exit with: {data['validation'].notice}",
            "Give more documents or problems (about 100 or more).",
        )
    from rrcli.evaluation.exits import Frontier
    from rrcli.recursion.families import input_device

    loaded, tokenizer = tested.load(reporter)
    choice, costs = _saving(loaded)
    if not loaded.recursion.can_exit:
        raise RRError(NO_EXIT, "This needs a span that ends with the last layer ('rr surgery --span').")
    if costs is None:
        reporter.warn(choice.why)
    elif costs.notice:
        reporter.warn(costs.notice)
    points, counts, rules = {}, {}, None
    for side, found in data.items():
        shown = showable(found, tokenizer, settings)
        frontier = Frontier(loaded, tokenizer, shown, settings=settings, reporter=reporter, costs=costs, team=processes)
        rules = rules or frontier.rules()
        points[side] = frontier.measure(rules)
        counts[side] = _counts(shown, tokenizer, settings)
    if not choice.why:
        choice = choose(points["validation"], settings.exit_loss)
    published = {side: [point.to_dict() for point in found] for side, found in points.items()}
    chosen = _publish(tested, choice, data["validation"], {point["name"]: point for point in published["validation"]})
    results = {
        "schema": SCHEMA,
        "kind": "exits",
        "stage": stage,
        "seed": tested.replicate.seed,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": {"source": source.recorded(directory), "recursion": loaded.recursion.config.to_dict()},
        **{name: chosen.about[name] for name in ("loss", "chosen", "best", "why")},
        "n": counts,
        **published,
        "settings": asdict(settings),
        "provenance": provenance(
            settings, directory, str(input_device(loaded)), str(loaded.dtype).removeprefix("torch.")
        ),
    }

    def publish() -> None:
        back_up(tested.file)
        write_json(tested.file, finite(results))

    processes.on_main(publish)
    processes.leave()
    return ExitsResult(stage, results, tested.file, chosen)


def _under_test(
    held: ExitStack, settings: EvalSettings, stage: str, directory: Path, *, processes: Processes, model: str | None
) -> UnderTest:
    """Find the checkpoint to choose for, and lock it: against other commands that measure exits, and its training.

    Raises:
        UsageError: settings of a single rule or depth. RRError: the stage has no model with a recursion.
    """
    if settings.exit or settings.depth >= 0:
        option = f"--exit {settings.exit}" if settings.exit else f"--depth {settings.depth}"
        raise UsageError(f"an exit is chosen among all rules and depths, but {option} names one", "Leave it out.")
    tested = put_under_test(
        held, settings, stage, directory,
        processes=processes, model=model, file=Workspace.exits_file, what="the exits of",
    )  # fmt: skip
    if tested.source.manifest is None or tested.source.manifest["recursion"] is None:
        raise RRError(f"{tested.source.name} has no recursion", f"'{MAKERS['finetuned_recursive']}' makes one.")
    run = tested.workspace.run_folder(tested.replicate.name)
    if tested.source.path.parent == run.resolve():
        processes.on_main(lambda: held.enter_context(lock(run, f"the run '{tested.replicate.name}'")))
    return tested


def _saving(loaded: Any) -> tuple[Choice, Any]:
    """Return the reason why no exit can be chosen for a model, if there is one, and what the parts of decoding cost.

    The costs are None where leaving early saves nothing, or where they cannot be counted.
    """
    from rrcli.evaluation.exit_costs import count_costs, saves

    loaded.recursion.exit = None
    if not loaded.recursion.can_exit:
        return Choice(why=NO_EXIT), None
    if not saves(loaded):
        return Choice(why=NO_SAVING), None
    try:
        return Choice(), count_costs(loaded)
    except RRError as error:
        return Choice(why=error.message), None


def _publish(tested: UnderTest, choice: Choice, data: EvalData, points: Mapping[str, Mapping[str, Any]]) -> ExitChosen:
    """Write the choice into the checkpoint."""
    problems, documents = _amounts(data, tested.settings)
    about: ExitChoice = {
        "inputs": exit_inputs(tested.settings, tested.workspace.directory),
        "chosen": None if choice.rule is None else choice.rule.to_dict(),  # type: ignore[typeddict-item]
        "best": None if choice.best is None else str(choice.best),
        "loss": tested.settings.exit_loss,
        "why": choice.why,
        "problems": problems,
        "documents": documents,
    }
    tested.processes.on_main(lambda: write_exit(tested.source.path, about))
    kept = {str(rule): points[str(rule)] for rule in (choice.rule, choice.best) if str(rule) in points}
    return ExitChosen(tested.replicate.name, tested.source.path, about, kept)


def _validation(tested: UnderTest) -> EvalData:
    return _data(tested.settings, tested.workspace.directory, "validation", (tested.settings.seed,))


def _data(settings: EvalSettings, directory: Path, side: Any, seeds: tuple[int, ...]) -> EvalData:
    reasoning = not settings.skip_reasoning
    return held_out_data(
        settings, directory, settings.problems, settings.max_samples, side=side, seeds=seeds, reasoning=reasoning
    )


def _amounts(data: EvalData, settings: EvalSettings) -> tuple[int, int]:
    """Return how many problems and documents a choice rests on."""
    return len(data.problems), 0 if settings.skip_perplexity else len(data.documents)


def _counts(data: EvalData, tokenizer: Any, settings: EvalSettings) -> dict[str, int]:
    """Return how much a side holds of what was measured."""
    texts = () if settings.skip_perplexity else data.texts(tokenizer, settings)
    tokens = sum(len(text_ids(tokenizer, text)) for text in texts)
    return {"problems": len(data.problems), "documents": len(texts), "tokens": tokens}
