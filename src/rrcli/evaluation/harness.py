"""Runs tasks of lm-evaluation-harness (the extra `harness`) on the model object itself, at its current depth.

Prompts, few-shot examples, filters, metrics and seeds are lm-eval's own, so the numbers are those that its command line
gives for the same model. Loads lm-eval and torch only when it runs.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rrcli.data.dealing import ALONE, Team, deal
from rrcli.data.rendering import chats
from rrcli.data.tokens import closes_prompts
from rrcli.errors import RRError, UsageError, first_line, suggest
from rrcli.evaluation import distributions
from rrcli.evaluation.samples import SampleLog
from rrcli.evaluation.stats import CONFIDENCE, LEAST_UNITS
from rrcli.files import finite
from rrcli.reporting import Reporter
from rrcli.settings import EvalSettings

SUFFIXES = (".yaml", ".yml")
# A batch has one row for every so many tokens of --batch-tokens; requests of lm-eval's tasks are seldom longer.
TOKENS_PER_ROW = 1024
# Bootstrap draws for standard errors that have no formula.
BOOTSTRAP_DRAWS = 1000
# The seed with which lm-eval's command line draws few-shot examples.
FEWSHOT_SEED = 1234


def harness_tasks(names: Sequence[str], directory: Path) -> tuple[str, ...]:
    """Return the tasks that `--harness` names: names as they are, files and folders as absolute paths.

    Raises:
        UsageError: a file or folder does not exist, or a name is empty.
    """
    found = []
    for name in (part.strip() for text in names for part in text.split(",")):
        path = (directory / name).expanduser()
        if not name:
            raise UsageError("--harness has an empty name", "Write NAME,NAME or a .yaml file.")
        if name.endswith(SUFFIXES) or "/" in name or path.is_dir():
            if not path.exists():
                raise UsageError(f"the --harness task {path} does not exist", "Name a .yaml file or a folder of them.")
            found.append(str(path.resolve()))
        else:
            found.append(name)
    return tuple(dict.fromkeys(found))


def task_files(names: Sequence[str], directory: Path) -> list[Path]:
    """Return the local files that `--harness` names, because results depend on them."""
    paths = [Path(name) for name in harness_tasks(names, directory) if Path(name).is_absolute()]
    files = {file for path in paths for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()}
    return sorted(files)


@dataclass(frozen=True)
class HarnessTask:
    """What one name of `--harness` stands for: lm-eval's loaded tasks and groups (its own `TaskDict`)."""

    name: str
    loaded: Any


def load_tasks(names: Sequence[str]) -> tuple[HarnessTask, ...]:
    """Load tasks and their data; those of a folder one by one.

    Args:
        names: as `harness_tasks` returns them.

    Raises:
        UsageError: lm-eval is not installed, or has no task of a name. RRError: a task or its data cannot be had.
    """
    if not names:
        return ()
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UsageError("--harness needs lm-eval", "pip install 'rrcli[harness]'") from error
    import datasets

    datasets.disable_progress_bars()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    local = [name for name in names if Path(name).is_absolute()]
    folders = [name for name in local if Path(name).is_dir()]
    # The index of lm-eval's own tasks takes seconds: it is only read where a name is looked up in it.
    manager = TaskManager(include_path=folders, include_defaults=len(local) < len(names))
    tasks: list[str] = []
    for name in names:
        if name not in local and name not in manager.all_tasks:
            raise UsageError(f"lm-eval has no task '{name}'", _similar(name, manager.all_tasks))
        inside = TaskManager(include_path=name, include_defaults=False).all_subtasks if name in folders else [name]
        if not inside:
            raise UsageError(f"the folder {name} holds no task of lm-eval", "Name a .yaml file or a folder of them.")
        tasks += inside
    return tuple(HarnessTask(name, _load(manager, name)) for name in dict.fromkeys(tasks))


def run_harness(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[HarnessTask],
    settings: EvalSettings,
    reporter: Reporter,
    *,
    log: SampleLog | None = None,
    team: Team = ALONE,
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """Run tasks one after the other, and log each as soon as it is complete.

    The tasks are dealt out among the processes of a team; where these hold parts of the model, all run all of them.

    Returns:
        The metrics, in lm-eval's own units, and a record for each sample and metric. A metric is named
        `harness/<task>/<metric>`, or `harness/<task>/<metric>/<filter>` where the task names a filter; it has a value,
        n, and low and high where lm-eval gives a standard error. A record has `key` and `target` (lm-eval's hashes),
        `task`, `metric`, `score` and `output`.

    Raises:
        RRError: a task cannot be run.
    """
    log = log or SampleLog()
    if closes_prompts(tokenizer):
        reporter.warn(
            "this tokenizer puts an end token after every text, and lm-eval leaves it after prompts too: the scores of "
            "--harness are lm-eval's, of a model that was told that its prompt is over"
        )
    names = [task.name for task in tasks]
    entries = log.done("harness", lambda place, entry: entry["name"] == names[place] if place < len(names) else False)
    from rrcli.evaluation.harness_model import HarnessModel

    rows = max(1, settings.batch_tokens // TOKENS_PER_ROW)  # the argument of `simple_evaluate` is ignored
    harness = HarnessModel(model, tokenizer, batch_size=rows)

    def run(one: list[HarnessTask]) -> dict[str, Any]:
        results = _evaluate(harness, one[0], settings, reporter)
        entry: dict[str, Any] = finite(
            {"name": one[0].name, "metrics": _metrics(results), "samples": _samples(results)}
        )
        return entry

    with reporter.progress("harness", len(tasks), "tasks") as progress:
        progress.advance(len(entries))
        left = [[task] for task in tasks[len(entries) :]]
        for (task,), entry in deal(left, run, ALONE if team.in_step else team):
            log.append("harness", [entry])
            entries.append(entry)
            progress.advance(note=task.name)
    metrics = {key: value for entry in entries for key, value in entry["metrics"].items()}
    return metrics, [record for entry in entries for record in entry["samples"]]


def _similar(name: str, known: Sequence[str]) -> str:
    hint = suggest(name, known)
    return (
        hint if hint.startswith("Did") else "'lm-eval ls tasks' lists them; local tasks are named by their .yaml file."
    )


def _load(manager: Any, name: str) -> Any:
    try:
        return manager.load([name])
    except Exception as error:
        raise RRError(
            f"the --harness task '{name}' cannot be loaded: {first_line(error)}",
            "Its data comes from the Hugging Face hub or from the files that its .yaml names: check the connection, "
            "HF_HUB_OFFLINE and the paths.",
        ) from error


def _evaluate(harness: Any, task: HarnessTask, settings: EvalSettings, reporter: Reporter) -> Any:
    import torch
    from lm_eval.api.task import Task
    from lm_eval.evaluator import evaluate

    from rrcli.evaluation.generation_settings import without_own_settings

    tasks: list[Task] = list(task.loaded["tasks"].values())
    # As in `simple_evaluate`: a task that asks for 0 examples gets none, whatever the settings are.
    for one in tasks:
        own = one.get_config("num_fewshot")
        if own is None or (settings.num_fewshot >= 0 and own != 0):
            one.set_config(key="num_fewshot", value=max(0, settings.num_fewshot))
        one.set_fewshot_seed(seed=FEWSHOT_SEED)
    chat = chats(harness.tokenizer, settings)
    while True:
        try:
            with without_own_settings(harness.model, choosing=True):
                return evaluate(
                    harness,
                    task.loaded,
                    limit=settings.max_samples or None,
                    bootstrap_iters=BOOTSTRAP_DRAWS,
                    apply_chat_template=chat,
                    fewshot_as_multiturn=chat,
                )
        except torch.OutOfMemoryError as error:
            if harness.batch_size_per_gpu == 1:
                raise RRError(f"memory runs out for one request of '{task.name}'", "Use a smaller --dtype.") from error
        except Exception as error:
            raise RRError(f"lm-eval cannot run '{task.name}': {first_line(error)}") from error
        harness.batch_size_per_gpu //= 2
        reporter.warn(f"memory ran out: '{task.name}' begins again in batches of {harness.batch_size_per_gpu}")


def _metrics(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    found = {}
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, comma, kind = key.partition(",")
            if (
                not comma
                or metric.endswith("_stderr")
                or isinstance(value, bool)
                or not isinstance(value, (int, float))
            ):
                continue
            entry: dict[str, Any] = {"value": float(value)}
            if task in results["n-samples"]:
                entry["n"] = results["n-samples"][task]["effective"]
            error = values.get(f"{metric}_stderr,{kind}")
            if isinstance(error, (int, float)) and entry.get("n", 0) >= LEAST_UNITS:
                reach = distributions.t_quantile(CONFIDENCE, entry["n"] - 1) * float(error)
                entry |= {"low": float(value) - reach, "high": float(value) + reach}
            higher = results["higher_is_better"].get(task, {}).get(metric)
            entry["better"] = {True: "higher", False: "lower"}.get(higher, "")
            found[f"harness/{task}/{_named(metric, kind)}"] = entry
    return found


def _samples(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a record for each sample and each metric that has one number per sample."""
    records = []
    for task, samples in results["samples"].items():
        seen: Counter[tuple[str, str]] = Counter()
        for sample in sorted(samples, key=lambda sample: (sample["filter"], sample["doc_id"])):
            copies = seen[sample["filter"], sample["doc_hash"]]
            seen[sample["filter"], sample["doc_hash"]] += 1
            answer = sample["filtered_resps"][0]
            for metric in sample["metrics"]:
                if isinstance(sample[metric], (bool, int, float)):
                    records.append(
                        {
                            "key": sample["doc_hash"] + (f"/{copies}" if copies else ""),
                            "target": sample["target_hash"],
                            "task": task,
                            "metric": _named(metric, sample["filter"]),
                            "score": float(sample[metric]),
                            "output": answer if isinstance(answer, str) else "",
                        }
                    )
    return records


def _named(metric: str, kind: str) -> str:
    return metric if kind == "none" else f"{metric}/{kind}"
