"""Measuring a model, for `rr eval`, for evaluations during training, and for the public API.

Each part returns records (per document, problem, prompt); `metrics` turns records into numbers with intervals. A model
with a recursion is measured at every depth up to the one asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rrcli.data.dealing import ALONE, Team
from rrcli.errors import RRError, UsageError
from rrcli.evaluation import metrics
from rrcli.evaluation.answers import continue_prompts, solve_problems
from rrcli.evaluation.harness import run_harness
from rrcli.evaluation.held_out import EvalData, distinct, held_out_data
from rrcli.evaluation.performance import measure_performance
from rrcli.evaluation.perplexity import score_documents
from rrcli.evaluation.pictures import draw, generate_traced
from rrcli.evaluation.sampled_answers import sample_answers
from rrcli.evaluation.samples import SampleLog
from rrcli.evaluation.tracing import Piece
from rrcli.recursion.calibration import table
from rrcli.recursion.engine import at_depth
from rrcli.recursion.exits import NEVER, ExitRule
from rrcli.reporting import Reporter, Silent
from rrcli.settings import EvalSettings, with_changes
from rrcli.tracker import MetricsTracker

# How many prompts TensorBoard's picture of generations shows, and how many tokens of each.
PICTURED_PROMPTS, PICTURED_TOKENS = 4, 48


@torch.no_grad()
def evaluate_model(
    model: Any,
    tokenizer: Any,
    eval_data: EvalData | Sequence[str] | str | Path,
    metrics_tracker: MetricsTracker | None = None,
    step: int | None = None,
    *,
    stage: str = "model",
    settings: EvalSettings | None = None,
    reporter: Reporter | None = None,
    log: SampleLog | None = None,
    team: Team = ALONE,
) -> dict[str, Any]:
    """Measure a model, and return its metrics and the records that they are computed from.

    Args:
        model: a causal language model of transformers, with or without a recursion attached. With an exit rule
            (`recursion.exit`), the last entry of each record is measured with it, after those of the depths.
        eval_data: an `EvalData`, a list of texts, or the name of a text source (its test side is used).
        metrics_tracker: where scalars `evaluation/<stage>/<metric>` and generations are logged.
        step: the training step that they are logged at.
        settings: lengths, limits and what to leave out; the defaults of `rr eval` if not given.
        log: where entries are written as they are measured; what it holds already is not measured again.
        team: the processes among which the work is dealt out; all of them return the same.

    Returns:
        `metrics` (name -> value, low, high, n), `by_depth`, `calibration` (of the boundary head, by bins of its
        probability), `records`, `depth`, `exit` (the rule, or None).

    Raises:
        RRError: nothing to measure, or logits that are not finite.
    """
    settings = settings or EvalSettings()
    reporter = reporter or Silent()
    log = log or SampleLog()
    given = _eval_data(eval_data, settings)
    data = distinct(given, tokenizer, settings)
    if data is not given:
        reporter.note(data.notice.splitlines()[-1])
    texts = data.texts(tokenizer, settings)
    depth, rule = depth_of(model, settings, reporter), _exit(model)
    training = model.training
    model.eval()
    torch.manual_seed(settings.seed)
    records: dict[str, list[dict[str, Any]]] = {}
    values: dict[str, dict[str, Any]] = {}
    pictured: list[tuple[str, list[Piece]]] = []
    calibration: list[dict[str, Any]] = []
    try:
        if texts and not settings.skip_perplexity:
            records["documents"], chunks = score_documents(
                model, tokenizer, texts,
                depth=depth, settings=settings, reporter=reporter, log=log, exit=rule, team=team,
            )  # fmt: skip
            values |= {name: {"value": value} for name, value in chunks.metrics().items()}
            calibration = table(chunks.reliability)
        if data.problems and not settings.skip_reasoning:
            records["problems"] = solve_problems(
                model, tokenizer, data,
                depth=depth, settings=settings, reporter=reporter, log=log, exit=rule, team=team,
            )  # fmt: skip
            if settings.samples:
                sampled = sample_answers(
                    model, tokenizer, data,
                    depth=depth, settings=settings, reporter=reporter, log=log, exit=rule, team=team,
                )  # fmt: skip
                for record, answers in zip(records["problems"], sampled, strict=True):
                    record["sampled"] = answers
        if data.prompts and not settings.skip_generation:
            records["generations"] = continue_prompts(
                model, tokenizer, data.prompts,
                depth=depth, settings=settings, reporter=reporter, log=log, exit=rule, team=team,
            )  # fmt: skip
            if metrics_tracker is not None:
                prompts = [record["prompt"] for record in records["generations"][:PICTURED_PROMPTS]]
                with at_depth(model, depth):
                    pictured = [(p, generate_traced(model, tokenizer, p, PICTURED_TOKENS)) for p in prompts]
        if data.harness:
            with at_depth(model, depth):
                scores, records["harness"] = run_harness(
                    model, tokenizer, data.harness, settings, reporter, log=log, team=team
                )
            values |= scores
        if texts and not settings.skip_performance:
            values |= measure_performance(model, tokenizer, texts, depth=depth, reporter=reporter)
    finally:
        model.train(training)
    if not records:
        raise RRError("there is nothing to evaluate", "Give documents or problems, and do not skip every part.")
    values = metrics.from_records(records) | values
    if metrics_tracker is not None:
        log_evaluation(metrics_tracker, values, records, stage=stage, step=step or 0, pictured=pictured)
    found = {"metrics": values, "by_depth": metrics.by_depth(records, depth + 1), "calibration": calibration}
    return found | {"records": records, "depth": depth, "exit": None if rule is None else rule.to_dict()}


def log_evaluation(
    tracker: MetricsTracker,
    values: dict[str, Any],
    records: dict[str, Any],
    *,
    stage: str,
    step: int,
    pictured: Sequence[tuple[str, Sequence[Piece]]] = (),
) -> None:
    """Log metrics as scalars, generations as text and `pictured` ones as a picture, under `evaluation/<stage>/`."""
    for name, entry in values.items():
        tracker.log_scalar(f"evaluation/{stage}/{name}", entry["value"], step)
    lines = [f"**{r['prompt']}**{r['text']}" for r in records.get("generations", ())]
    if lines:
        tracker.log_text(f"evaluation/{stage}/generations", "\n\n---\n\n".join(lines), step)
    if pictured:
        tracker.log_image(f"evaluation/{stage}/generations", draw(pictured, f"{stage}, step {step}"), step)
    tracker.flush()


def _eval_data(eval_data: EvalData | Sequence[str] | str | Path, settings: EvalSettings) -> EvalData:
    if isinstance(eval_data, EvalData):
        return eval_data
    if isinstance(eval_data, (str, Path)):
        return held_out_data(
            with_changes(settings, data=str(eval_data)), Path.cwd(), settings.problems, settings.max_samples
        )
    return EvalData(documents=tuple(eval_data))


def _exit(model: Any) -> ExitRule | None:
    recursion = getattr(model, "recursion", None)
    return None if recursion is None or recursion.exit == NEVER else recursion.exit


def depth_of(model: Any, settings: EvalSettings, reporter: Reporter) -> int:
    """Return how many passes after pass 0 a model is measured with; note where there are more than were trained.

    Raises:
        UsageError: the settings ask for passes that it does not have.
    """
    recursion = getattr(model, "recursion", None)
    if recursion is None:
        if settings.depth > 0:
            raise UsageError(f"depth is {settings.depth}, but the model has no recursion", "Leave --depth out.")
        return 0
    if notice := recursion.allow(settings.depth):
        reporter.note(notice)
    return recursion.config.max_steps if settings.depth < 0 else settings.depth
