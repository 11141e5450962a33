"""`rr eval`: measure one stage and publish its results."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rrcli.data import held_out_data
from rrcli.errors import RRError, UsageError
from rrcli.models import ModelSource, load_for
from rrcli.reporting import Reporter
from rrcli.settings import EvalSettings, SurgerySettings, load
from rrcli.store import METRICS, SCHEMA, combine, finite, make_folder, read_json, write_json
from rrcli.workspace import MAKERS, Workspace, check_stage, data_identity, eval_inputs, model_fingerprint, provenance


@dataclass(frozen=True)
class EvalResult:
    """The published results and where they are."""

    stage: str
    results: dict[str, Any]
    file: Path


def evaluate(
    settings: EvalSettings,
    stage: str,
    directory: Path,
    reporter: Reporter,
    *,
    model: str | None = None,
    use_recursive: bool | None = None,
) -> EvalResult:
    """Measure the model of a stage, or another one in its place, and publish `<stage>_results.json`.

    Args:
        model: a model to measure instead of the stage's own.
        use_recursive: True asks for recursion (a model without one gets a fresh, zero-initialised one); False measures
            at depth 0; None follows the model.

    Raises:
        RRError: the stage's model is missing, or cannot be measured.
    """
    check_stage(stage)
    workspace = Workspace(directory, settings)
    file = workspace.results_file(stage)
    source = workspace.resolve(model) if model else workspace.stage_model(stage)
    make_folder(file.parent)
    inputs = eval_inputs(settings, stage, model_fingerprint(source, directory), data_identity(settings, directory))
    data = held_out_data(
        settings, directory, settings.problems, settings.max_samples, reasoning=not settings.skip_reasoning
    )
    if data.notice:
        reporter.note(data.notice)
    if len(data.documents) < data.held_out:
        reporter.warn(
            f"only {len(data.documents):,} of {data.held_out:,} held-out documents are scored (--max-samples, chosen "
            f"with seed {settings.seed}): for trying out, not for claims"
        )

    from rrcli.evaluation import evaluate_model
    from rrcli.tracker import MetricsTracker

    loaded, tokenizer = load_for(settings, source, directory)
    depth = _set_up_recursion(loaded, source, settings, directory, use_recursive)
    training = _training(source)
    step = training["steps"] if training else 0
    tracker = MetricsTracker(workspace.log_folder(stage)) if settings.tensorboard else None
    try:
        measured = evaluate_model(
            loaded, tokenizer, data, tracker, step, stage=stage, settings=depth, reporter=reporter
        )
    finally:
        if tracker is not None:
            tracker.close()
    tokens = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in data.documents]
    recursion = getattr(loaded, "recursion", None)
    results = {
        "schema": SCHEMA,
        "kind": "evaluation",
        "stage": stage,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "inputs": inputs,
        "model": {
            "source": str(source.path if source.name != "default" else source.name),
            "fingerprint": source.fingerprint(),
            "family": loaded.config.model_type,
            "parameters": sum(p.numel() for p in loaded.parameters()),
            "tokenizer": combine(sorted(tokenizer.get_vocab().items())),
            "recursion": recursion.config.to_dict() if recursion is not None else None,
            "depth": measured["depth"],
        },
        "data": {
            "source": data.source,
            "fingerprint": combine(tokens, [problem.key for problem in data.problems]),
            "documents": len(data.documents),
            "held_out": data.held_out,
            "tokens": sum(map(len, tokens)),
            "tasks": [task.spec for task in data.tasks],
        },
        "settings": asdict(settings),
        "provenance": provenance(settings, directory, str(loaded.device), str(loaded.dtype).removeprefix("torch.")),
        "training": training,
        "metrics": measured["metrics"],
        "by_depth": measured["by_depth"],
        "records": measured["records"],
    }
    if file.exists():
        shutil.copyfile(file, file.with_suffix(".json.bak"))
    write_json(file, finite(results))
    return EvalResult(stage, results, file)


def _set_up_recursion(
    model: Any, source: ModelSource, settings: EvalSettings, directory: Path, use_recursive: bool | None
) -> EvalSettings:
    from dataclasses import replace

    recursion = getattr(model, "recursion", None)
    if use_recursive is False:
        if settings.depth > 0:
            raise UsageError(f"--no-use-recursive and --depth {settings.depth} contradict each other")
        return replace(settings, depth=0)
    if use_recursive and recursion is None:
        if source.manifest is not None:
            raise RRError(f"{source.path} was trained without recursion", f"'{MAKERS['finetuned_recursive']}' adds it.")
        from rrcli.recursion.config import RecursionConfig, parse_span
        from rrcli.recursion.engine import attach

        shape = load(SurgerySettings, directory)
        config = RecursionConfig(shape.max_steps, parse_span(shape.span), shape.cell_width or None, shape.chunk_width)
        attach(model, config)
    return settings


def _training(source: ModelSource) -> dict[str, Any] | None:
    """Return what the training behind a checkpoint cost, if there was one."""
    if source.manifest is None or not (source.path / METRICS).is_file():
        return None
    return read_json(source.path / METRICS, "rr train").get("training")
