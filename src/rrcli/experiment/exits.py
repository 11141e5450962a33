"""`rr eval --exits`: compare exit rules on a trained recursion, and choose one for its checkpoint."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rrcli.data.tokens import text_ids
from rrcli.errors import RRError, UsageError
from rrcli.evaluation.held_out import EvalData, held_out_data, showable
from rrcli.experiment.provenance import provenance
from rrcli.experiment.replicates import evaluated_seeds
from rrcli.experiment.template_date import fix_date, with_template_date
from rrcli.experiment.workspace import MAKERS, Workspace, check_stage
from rrcli.files import SCHEMA, back_up, finite, write_json
from rrcli.locks import holding, lock, reading
from rrcli.models.loading import load_for
from rrcli.models.manifest import write_exit
from rrcli.recursion.exits import ExitRule
from rrcli.reporting import Reporter
from rrcli.settings import EvalSettings


@dataclass(frozen=True)
class ExitsResult:
    """The published frontier and its file; `chosen` is None where every pass is worth running."""

    stage: str
    results: dict[str, Any]
    file: Path
    chosen: ExitRule | None


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
            or one whose texts cannot be decoded with an exit rule.
    """
    if settings.exit or settings.depth >= 0:
        raise UsageError("--exits compares rules and depths; --exit and --depth name one", "Leave them out.")
    workspace = Workspace(directory, settings)
    name = workspace.replicate(check_stage(stage)).name
    file = workspace.exits_file(name)
    source = held.enter_context(reading(lambda: workspace.resolve(model) if model else workspace.stage_model(stage)))
    if source.manifest is None or source.manifest["recursion"] is None:
        raise RRError(f"{source.name} has no recursion", f"'{MAKERS['finetuned_recursive']}' makes one.")
    held.enter_context(lock(file, f"the exits of '{name}'"))
    settings = with_template_date(settings, source, directory)
    test_seeds = evaluated_seeds(stage, settings)
    data = {
        "validation": _data(settings, directory, "validation", (settings.seed,)),
        "test": _data(replace(settings, seed=settings.all_seeds[0]), directory, "test", test_seeds),
    }

    if data["validation"].empty:
        raise RRError(
            f"there is nothing to choose an exit with: {data['validation'].notice}",
            "Give more documents or problems (about 100 or more).",
        )
    from rrcli.evaluation.exit_costs import count_costs, saves
    from rrcli.evaluation.exits import Frontier, choose
    from rrcli.recursion.families import input_device

    loaded, tokenizer = load_for(settings, source, directory, reporter)
    if not loaded.recursion.can_exit:
        raise RRError(
            "layers follow the span, and only the last pass runs them: no text can be decoded with an exit",
            "This needs a span that ends with the last layer ('rr surgery --span').",
        )
    fix_date(tokenizer, settings.template_date)
    loaded.recursion.exit = None
    costs = count_costs(loaded) if saves(loaded) else None
    if costs is None:
        reporter.warn("leaving early saves nothing here: the cache of this model cannot be taken back to any length")
    elif costs.notice:
        reporter.warn(costs.notice)
    points, counts, rules = {}, {}, None
    for side, found in data.items():
        shown = showable(found, tokenizer, settings)
        frontier = Frontier(loaded, tokenizer, shown, settings=settings, reporter=reporter, costs=costs)
        rules = rules or frontier.rules()
        points[side] = frontier.measure(rules)
        counts[side] = _counts(shown, tokenizer, settings)
    device = str(input_device(loaded))
    chosen = choose(points["validation"], settings.exit_loss)
    rule = None if chosen is None else chosen.rule
    results = {
        "schema": SCHEMA,
        "kind": "exits",
        "stage": stage,
        "seed": workspace.replicate(stage).seed,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": {"source": source.recorded(directory), "recursion": loaded.recursion.config.to_dict()},
        "loss": settings.exit_loss,
        "chosen": None if rule is None else rule.to_dict(),
        "n": counts,
        "validation": [point.to_dict() for point in points["validation"]],
        "test": [point.to_dict() for point in points["test"]],
        "settings": asdict(settings),
        "provenance": provenance(settings, directory, device, str(loaded.dtype).removeprefix("torch.")),
    }
    back_up(file)
    write_json(file, finite(results))
    write_exit(source.path, rule)
    return ExitsResult(stage, results, file, rule)


def _data(settings: EvalSettings, directory: Path, side: Any, seeds: tuple[int, ...]) -> EvalData:
    reasoning = not settings.skip_reasoning
    return held_out_data(
        settings, directory, settings.problems, settings.max_samples, side=side, seeds=seeds, reasoning=reasoning
    )


def _counts(data: EvalData, tokenizer: Any, settings: EvalSettings) -> dict[str, int]:
    """Return how much a side holds of what was measured."""
    texts = () if settings.skip_perplexity else data.texts(tokenizer, settings)
    tokens = sum(len(text_ids(tokenizer, text)) for text in texts)
    return {"problems": len(data.problems), "documents": len(texts), "tokens": tokens}
