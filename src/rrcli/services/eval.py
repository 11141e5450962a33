"""`rr eval`: measure one stage and publish its results."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import Field, asdict, dataclass, fields, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from rrcli.comparison.claims import read_declaration
from rrcli.comparison.preservation import Preservation, check_preserved
from rrcli.comparison.results import read_results
from rrcli.configuration import load
from rrcli.data.novelty import Questions
from rrcli.data.problem_files import FileTask, trained_questions
from rrcli.data.prompts import read_prompts, stop_strings
from rrcli.data.splits import SPLIT_RULE
from rrcli.data.tokens import end_notice, text_ids
from rrcli.errors import RRError, UsageError
from rrcli.evaluation.harness import harness_tasks, load_tasks
from rrcli.evaluation.held_out import EvalData, distinct, held_out_data, showable
from rrcli.evaluation.samples import SampleLog
from rrcli.experiment import declarations
from rrcli.experiment.identity import data_identity, eval_inputs, model_fingerprint, recorded_exit, within_context
from rrcli.experiment.planning import chooses_exit
from rrcli.experiment.provenance import provenance
from rrcli.experiment.replicates import TRAINED, evaluated_seeds
from rrcli.experiment.revisions import moved
from rrcli.experiment.template_date import fix_date
from rrcli.experiment.under_test import put_under_test
from rrcli.experiment.workspace import MAKERS, SURGERY_STAGE, Workspace
from rrcli.files import MANIFEST, METRICS_FILE, SCHEMA, back_up, checkpoints, combine, finite, read_json, write_json
from rrcli.locks import holding
from rrcli.models.loading import load_for
from rrcli.models.placement import read_placement
from rrcli.models.source import ModelSource, base_of
from rrcli.models.weights import stamps
from rrcli.other_trackers import check_trackers, start_trackers
from rrcli.recursion.config import RecursionConfig
from rrcli.recursion.exits import exit_for
from rrcli.reporting import Reporter, Silent
from rrcli.schemas import CheckpointMetrics
from rrcli.settings import CompareSettings, EvalSettings, Reach, SurgerySettings
from rrcli.tracker import EVALUATION, SUMMARY, MetricsTracker
from rrcli.training.launching import launch, launched
from rrcli.training.processes import Processes, join


@dataclass(frozen=True)
class EvalResult:
    """The published results and their file; for the stage after surgery also whether it preserved the baseline."""

    stage: str
    results: dict[str, Any]
    file: Path
    preserved: Preservation | None = None


@holding
def evaluate(
    held: ExitStack,
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
        RRError: the stage's model is missing, or cannot be measured. UsageError: the claims of `rr.toml`, which are
            recorded before a fine-tuned stage is measured, cannot be read.
    """
    check_trackers(settings.tracker)
    placement = read_placement(settings, directory)
    parallel = placement.parallel
    if placement.processes > 1 and not launched():
        return launch(
            placement.processes,
            evaluate, settings, stage, directory, reporter, model=model, use_recursive=use_recursive,
        )  # fmt: skip
    processes = join(settings.device, parallel)
    reporter = reporter if processes.main else Silent()
    tested = put_under_test(
        held, settings, stage, directory,
        processes=processes, model=model, file=Workspace.results_file, what="the evaluation of",
    )  # fmt: skip
    workspace, replicate, source, file = tested.workspace, tested.replicate, tested.source, tested.file
    if stage in TRAINED:
        declared = read_declaration(load(CompareSettings, directory)).texts
        processes.on_main(lambda: declarations.record(workspace, declared))
    if stage == "baseline" and model is None and (said := moved(workspace)):
        reporter.warn(said)
    fingerprint = source.fingerprint()
    settings = tested.settings
    made_from = (model_fingerprint(source, directory), data_identity(settings, directory))
    inputs = eval_inputs(within_context(settings, source, directory), stage, *made_from)
    written = stamps(source.path, base_of(source, directory).path)
    seeds = evaluated_seeds(stage, settings)
    # What else is drawn (a sample of documents, solved examples) is alike in all replicates.
    settings = replace(settings, seed=settings.all_seeds[0])
    data = _data(settings, directory, seeds)
    # Where the best checkpoint is used, the whole run has been paid for.
    own = stage in TRAINED and model is None
    training = _training(checkpoints(source.path.parent)[-1] if own else source.path)
    _check_problems(data, settings, training, directory, reporter)

    fresh = _fresh_recursion(source, settings, directory, use_recursive)
    measuring = replace(settings, depth=0) if use_recursive is False else settings
    # Before the model is loaded here, so that two do not have to fit into memory.
    performance = None
    if processes.count > 1 and not settings.skip_performance:
        reporter.note("speed and memory are not measured where several processes work together")
    elif data.documents and not settings.skip_performance:
        from rrcli.evaluation.interleaved import Subject, measure_in_turns

        prepare = partial(fix_date, day=settings.template_date)
        subject = Subject(replicate.name, source, measuring, directory, data, prepare, fresh)
        performance = measure_in_turns([subject], reporter)[replicate.name].performance
        for notice in performance.notices:
            reporter.warn(notice)

    from rrcli.evaluation.evaluate import evaluate_model
    from rrcli.recursion.families import input_device

    loaded, tokenizer = tested.load(reporter)
    if notice := end_notice(loaded, tokenizer):
        reporter.note(notice)
    _say_unfollowed(loaded, data, settings, reporter)
    data = distinct(showable(data, tokenizer, settings), tokenizer, settings)
    _tell_about(data, settings, reporter)
    if tokenizer.chat_template:
        _check_form(settings, training, reporter)
    if fresh is not None:
        from rrcli.recursion.engine import attach

        attach(loaded, fresh)
    recursion = getattr(loaded, "recursion", None)
    exit = exit_for(recursion, measuring.exit, measuring.depth)
    if recursion is not None:
        recursion.exit = exit
        if own and chooses_exit(measuring) and recorded_exit(source.path) is None:
            chooser = f"rr eval --stage {stage} --choose-exit{replicate.flag}"
            reporter.note(f"no exit was chosen for this checkpoint, so every pass is run: '{chooser}' chooses one")
    shape = recursion.config.to_dict() if recursion is not None else None
    is_baseline = _is_baseline(loaded, source, workspace)
    device, dtype = str(input_device(loaded)), str(loaded.dtype).removeprefix("torch.")
    options = {item.name: getattr(measuring, item.name) for item in fields(measuring) if _reaches_entries(item)}
    beside = (options | {"seeds": ()}, shape, device, dtype, *([written] if written else []))
    key = combine(inputs, *beside)
    # What was measured with the first seeds alone is what a measurement with all of them begins with; and what was
    # measured without sampled answers, what one with these does.
    fewer = [replace(settings, seeds=seeds[:count]) for count in range(1, len(seeds))]
    if settings.samples:
        fewer += [replace(each, samples=0) for each in [*fewer, settings]]
    extends = [
        combine(eval_inputs(within_context(each, source, directory), stage, *made_from), *beside) for each in fewer
    ]
    step = training["steps"] if training else 0
    logs = workspace.log_folder(replicate.name)
    tracker = None
    if settings.tensorboard:
        others = start_trackers(
            settings.tracker if processes.main else (),
            project=directory.resolve().name,
            run=f"{replicate.name} evaluation",
            folder=logs,
            hold=True,
            warn=reporter.warn,
        )
        tracker = MetricsTracker(logs if processes.main else None, part=EVALUATION, others=others, warn=reporter.warn)
    log_file = file.with_name(f"{replicate.name}_samples.jsonl")
    with _log(log_file, key, extends, processes) as log, tracker or nullcontext():
        if log.found:
            reporter.note(f"going on with an earlier evaluation: {log_file} holds {log.found:,} entries")
        measured = evaluate_model(
            loaded, tokenizer, data, tracker, step,
            stage=stage, settings=replace(measuring, skip_performance=True), reporter=reporter, log=log,
            team=processes,
        )  # fmt: skip
        if performance is not None:
            measured["metrics"] |= performance.metrics()
            measured["by_depth"] |= performance.by_depth()
        if tracker is not None:
            for name, entry in performance.metrics().items() if performance is not None else ():
                tracker.log_scalar(f"evaluation/{stage}/{name}", entry["value"], step)
            _log_summary(tracker, measured, step)
        about = {"family": loaded.config.model_type, "parameters": sum(p.numel() for p in loaded.parameters())}
        # The main process alone, unless the others hold parts of the model that it needs.
        if measured["records"].get("generations") and (processes.main or processes.in_step):
            baseline = (loaded, tokenizer) if is_baseline else None
            del loaded, recursion  # so that only one model is in memory if the baseline is another one
            baseline = baseline or load_for(
                replace(settings, device=processes.device), workspace.stage_model("baseline"), directory
            )
            _add_relevance(measured, baseline, reporter)
            if tracker is not None:
                tracker.log_scalar(f"evaluation/{stage}/relevance", measured["metrics"]["relevance"]["value"], step)
        results = {
            "schema": SCHEMA,
            "kind": "evaluation",
            "stage": stage,
            "seed": replicate.seed,
            "test_seeds": list(seeds),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "inputs": inputs,
            "model": {
                "source": source.recorded(directory),
                **({"commit": commit} if (commit := base_of(source, directory).commit) else {}),
                "fingerprint": fingerprint,
                **about,
                "tokenizer": combine(sorted(tokenizer.get_vocab().items())),
                "recursion": shape,
                "depth": measured["depth"],
                "exit": measured["exit"],
            },
            "data": _described(data, tokenizer, settings),
            "settings": asdict(settings),
            "provenance": provenance(settings, directory, device, dtype),
            "training": training,
            "metrics": measured["metrics"],
            "by_depth": measured["by_depth"],
            "calibration": measured["calibration"],
            "records": measured["records"],
        }
        if written:
            results["stamps"] = written
        preserved = _preserved(results, workspace) if stage == SURGERY_STAGE else None
        if preserved is not None:
            results["preservation"] = preserved.to_dict()
        processes.on_main(partial(_publish, file, results))
        log.end()
    processes.leave()
    return EvalResult(stage, results, file, preserved)


def _reaches_entries(option: Field[Any]) -> bool:
    """Tell whether an option changes what an evaluation logs: not how many processes share the work, for example.

    Sampled answers come on top of what is logged without them.
    """
    return option.metadata["reaches"] is not Reach.NOTHING and option.metadata["only"] != "sampled"


def _log(file: Path, key: str, extends: Sequence[str], processes: Processes) -> SampleLog:
    """Open the log of the samples: one process writes it, and all know what it holds already."""
    opened: list[SampleLog] = []

    def open_it() -> dict[str, list[dict[str, Any]]]:
        opened.append(SampleLog(file, key, extends=extends))
        return opened[0].known

    known = processes.decided(open_it)
    return opened[0] if opened else SampleLog.following(known)


def _publish(file: Path, results: dict[str, Any]) -> None:
    back_up(file)
    write_json(file, finite(results))


def _preserved(results: dict[str, Any], workspace: Workspace) -> Preservation | None:
    """Compare the stage after surgery with the baseline's results, if there are any."""
    file = workspace.results_file("baseline")
    return check_preserved(finite(results), read_results(file, "rr eval --stage baseline")) if file.is_file() else None


def _data(settings: EvalSettings, directory: Path, seeds: Sequence[int]) -> EvalData:
    """Read the documents of the test side, the problems of `seeds`, the prompts and the tasks of lm-eval."""
    data = held_out_data(
        settings,
        directory,
        settings.problems,
        settings.max_samples,
        seeds=seeds,
        reasoning=not settings.skip_reasoning,
    )
    return replace(
        data,
        prompts=read_prompts(settings.prompts, directory) if settings.prompts else data.prompts,
        harness=load_tasks(harness_tasks(settings.harness, directory)),
    )


def _tell_about(data: EvalData, settings: EvalSettings, reporter: Reporter) -> None:
    """Say which documents were left out."""
    if data.notice:
        reporter.note(data.notice)
    if len(data.documents) < data.held_out:
        reporter.warn(
            f"only {len(data.documents):,} of {data.held_out:,} test documents are scored (--max-samples): "
            "for trying out, not for claims"
        )


def _say_unfollowed(model: Any, data: EvalData, settings: EvalSettings, reporter: Reporter) -> None:
    """Say which generation settings of the model its answers are decoded without."""
    from rrcli.evaluation.generation_settings import unfollowed_settings

    decodes = (data.problems and not settings.skip_reasoning) or (data.prompts and not settings.skip_generation)
    unfollowed = unfollowed_settings(model) if decodes or data.harness else ""
    if unfollowed:
        lm_eval = " (tasks of lm-eval follow those that choose tokens, as lm-eval does)" if data.harness else ""
        reporter.note(unfollowed + lm_eval)


def _check_form(settings: EvalSettings, training: dict[str, Any] | None, reporter: Reporter) -> None:
    """Warn where problems are not asked in the form, chat or plain text, that the training showed them in."""
    in_chat = training.get("chat_template", settings.chat_template) if training else settings.chat_template
    if in_chat != settings.chat_template:
        form = "through the chat template" if in_chat else "as plain text"
        reporter.warn(f"the model was shown problems {form} in training, which is not how they are asked here")


def _described(data: EvalData, tokenizer: Any, settings: EvalSettings) -> dict[str, Any]:
    """Return what the results say about the data: where they are from, how many there are, and their hash."""
    tokens = [text_ids(tokenizer, text) for text in data.texts(tokenizer, settings)]
    return {
        "source": data.source,
        "fingerprint": combine(tokens, [problem.key for problem in data.problems]),
        "documents": len(data.documents),
        "held_out": data.held_out,
        "tokens": sum(map(len, tokens)),
        "split": SPLIT_RULE,
        "tasks": [task.spec for task in data.tasks],
        "harness": [task.name for task in data.harness],
    }


def _log_summary(tracker: MetricsTracker, measured: dict[str, Any], step: int) -> None:
    """Log the main metrics under tags that all stages share, which puts stages into the same charts and columns."""
    for name in SUMMARY:
        if name in measured["metrics"]:
            tracker.log_scalar(f"final/{name}", measured["metrics"][name]["value"], step)
    for name, values in measured["by_depth"].items():
        for depth, entry in enumerate(values):
            tracker.log_scalar(f"depth/{name}", entry["value"], depth)


def _fresh_recursion(
    source: ModelSource, settings: EvalSettings, directory: Path, use_recursive: bool | None
) -> RecursionConfig | None:
    """Return the shape of the recursion that a model is given because it has none; None if it is given none.

    Raises:
        UsageError: a depth without recursion. RRError: the model was trained without one.
    """
    if use_recursive is False and (settings.depth > 0 or settings.exit):
        option = f"--exit {settings.exit}" if settings.exit else f"--depth {settings.depth}"
        raise UsageError(f"--no-use-recursive and {option} contradict each other")
    manifest = source.manifest
    if not use_recursive or (manifest is not None and manifest["recursion"]):
        return None
    if manifest is not None:
        raise RRError(f"{source.path} was trained without recursion", f"'{MAKERS['finetuned_recursive']}' adds it.")
    return load(SurgerySettings, directory).recursion


def _check_problems(
    data: EvalData, settings: EvalSettings, training: dict[str, Any] | None, directory: Path, reporter: Reporter
) -> None:
    """Say how much of each problem file is evaluated, and refuse what cannot be evaluated, before a model is loaded."""
    stop_strings(settings.stop)
    if training is not None and training.get("split") != SPLIT_RULE:
        raise RRError(
            "the model was trained by a version of rr that split data by another rule: it may have seen what would be "
            "evaluated",
            "Train it again: 'rr run' does so.",
        )
    for task in data.tasks:
        if settings.num_fewshot > 0:
            task.examples(settings.num_fewshot)
        if isinstance(task, FileTask):
            count = sum(problem.task == task.spec for problem in data.problems)
            rest = "; the rest is for training (FILE:held_out=all evaluates all of it)"
            rest = "" if task.whole else "; it has splits of its own" if task.own_splits else rest
            reporter.note(f"{task.spec}: {count} of its {len(task.all)} problems are evaluated{rest}")
    seen = trained_questions(training.get("tasks", ()), directory) if training else Questions()
    for task in data.tasks:
        spoiled = [p for p in data.problems if p.task == task.spec and p.question in seen]
        if spoiled:
            raise RRError(
                f"the model was trained on {len(spoiled)} of the problems that task '{task.spec}' would evaluate",
                "Evaluate the test side alone, or name the test set in --task for training too: it is left out.",
            )


def _is_baseline(model: Any, source: ModelSource, workspace: Workspace) -> bool:
    """Tell whether a model is the experiment's baseline when it is run at depth 0."""
    lora = getattr(model, "lora", None)
    same = base_of(source, workspace.directory).fingerprint() == workspace.stage_model("baseline").fingerprint()
    return same and not (lora is not None and lora.always)


def _add_relevance(measured: dict[str, Any], baseline: tuple[Any, Any], reporter: Reporter) -> None:
    from rrcli.evaluation.metrics import from_records
    from rrcli.evaluation.relevance import relevance

    generations = measured["records"].get("generations", [])
    for record, value in zip(generations, relevance(*baseline, generations, reporter=reporter), strict=True):
        record["relevance"] = value
    measured["metrics"] |= from_records({"generations": generations})


def _training(folder: Path) -> dict[str, Any] | None:
    """Return the record of the training that wrote a checkpoint, or None if no training did."""
    if not (folder / MANIFEST).is_file() or not (folder / METRICS_FILE).is_file():
        return None
    training = read_json(folder / METRICS_FILE, "rr train", CheckpointMetrics).get("training")
    return None if training is None else dict(training)
