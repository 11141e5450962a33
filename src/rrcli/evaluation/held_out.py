"""What a model is evaluated on: the test or the validation side of text and problems, and prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from rrcli.data.conversations import Document
from rrcli.data.document_store import DocumentStore
from rrcli.data.problem_files import FileTask, open_task
from rrcli.data.rendering import text_of
from rrcli.data.sources import Notes, read_split
from rrcli.data.splits import Side
from rrcli.data.tasks import MAX_DRAWS_PER_PROBLEM, Problem, Task
from rrcli.data.training_data import TRAINING_SEEDS, task_specs
from rrcli.errors import RRError, UsageError
from rrcli.settings import CommonSettings, EvalSettings, TrainSettings

if TYPE_CHECKING:
    from rrcli.evaluation.harness import HarnessTask

# Built-in prompts of the sample generations: plain openings that a story model and a large model can both continue.
PROMPTS = (
    "Once upon a time",
    "Tom has a red ball and",
    "The capital of France is",
    "Question: State the final answer to the following arithmetic problem: 3 + 4 - 2 =\nAnswer:",
)


@dataclass(frozen=True)
class EvalData:
    """What a model is evaluated on.

    Attributes:
        documents: texts and conversations of the side. tasks, problems: reasoning tasks and the problems of each.
        prompts: to continue.
        harness: tasks of lm-evaluation-harness.
        source: what `--data` named. notice: sentences about what was left out of it, or ''.
        held_out: how many documents are on the side, of which `documents` may be a sample.
    """

    documents: tuple[Document, ...] = ()
    tasks: tuple[Task | FileTask, ...] = ()
    problems: tuple[Problem, ...] = ()
    prompts: tuple[str, ...] = ()
    source: str = "given"
    notice: str = ""
    held_out: int = 0
    harness: tuple[HarnessTask, ...] = ()

    def texts(self, tokenizer: Any, settings: EvalSettings | TrainSettings) -> tuple[str, ...]:
        """Return every document as the text that a model with this tokenizer is shown."""
        return tuple(text_of(tokenizer, document, settings) for document in self.documents)


def held_out_data(
    settings: CommonSettings,
    directory: Path,
    problems_per_task: int,
    max_samples: int = 0,
    *,
    side: Side = "test",
    seeds: Sequence[int] = (),
    reasoning: bool = True,
) -> EvalData:
    """Return the documents and problems of one side of the split, and the built-in prompts.

    A small source may have nothing on the validation side. Validation does without it, and the notice says so: it is an
    error only if there is nothing at all. A test set (`held_out=all`) has test problems alone.

    Args:
        problems_per_task: how many problems of each task; validation takes fewer where there are fewer.
        max_samples: how many documents at most; 0 means all. side: 'test', or 'validation' for choices.
        seeds: whose problems; `problems_per_task` of each. By default those of the settings' seed.

    Raises:
        RRError: no document of the source is on the test side, or nothing at all on the validation side.
        UsageError: the seed reaches into those of training.
    """
    seeds = seeds or (settings.seed,)
    if max(seeds) + problems_per_task * MAX_DRAWS_PER_PROBLEM > TRAINING_SEEDS:
        raise UsageError(
            f"--seed {max(seeds)} with {problems_per_task} problems per task reaches into the seeds of training, "
            f"which begin at {TRAINING_SEEDS}",
            "Take a smaller --seed, or fewer problems.",
        )
    notes = Notes()
    read = read_split(settings.data, directory, settings.text_field, notes, on_bad_row=settings.on_bad_row)
    documents: Sequence[Document] = DocumentStore((d for d, on in read if on == side), directory)
    if not documents and side == "test":
        raise RRError(
            f"no document of {settings.data} is on the test side of the split (a tenth)",
            "Give more documents (about 50 or more).",
        )
    held_out = len(documents)
    if 0 < max_samples < held_out:
        documents = Random(settings.seed).sample(documents, max_samples)
    tasks = tuple(open_task(spec, directory) for spec in task_specs(settings)) if reasoning else ()
    if side == "validation":
        lacking = [task.spec for task in tasks if isinstance(task, FileTask) and not task.on(side)]
        tasks = tuple(task for task in tasks if task.spec not in lacking)
        lacking += [] if documents else [settings.data]
        if not documents and not tasks:
            raise RRError(
                f"nothing of {', '.join(lacking)} is on the validation side of the split (a twentieth)",
                "Give more documents or problems (about 100 or more); --eval-interval 0 trains without validation.",
            )
    drawn = [p for seed in seeds for task in tasks for p in task.problems(problems_per_task, seed, side=side)]
    problems = tuple({problem.key: problem for problem in drawn}.values())  # of a small file, all seeds have the same
    notice = notes.notice(settings.data)
    if side == "validation" and lacking:
        notice = "\n".join(filter(None, (notice, f"nothing to validate with in: {', '.join(lacking)}")))
    return EvalData(tuple(documents), tasks, problems, PROMPTS, settings.data, notice=notice, held_out=held_out)


def showable(data: EvalData, tokenizer: Any, settings: EvalSettings | TrainSettings) -> EvalData:
    """Return the data without conversations that cannot be shown to the model, if `--on-bad-row skip` asks for that.

    Its chat template may refuse them, or it has none and they use tools.

    Raises:
        RRError: none is left.
    """
    if settings.on_bad_row != "skip":
        return data
    kept, first = [], ""
    for document in data.documents:
        try:
            text_of(tokenizer, document, settings)
        except RRError as error:
            first = first or error.message
        else:
            kept.append(document)
    if data.documents and not kept:
        raise RRError(f"no document of {data.source} can be shown to this model (the first: {first})")
    if len(kept) == len(data.documents):
        return data
    gone = len(data.documents) - len(kept)
    said = (
        f"{data.source}: documents left out because they cannot be shown to this model: {gone:,} (the first: {first})"
    )
    notice = "\n".join(filter(None, (data.notice, said)))
    return replace(data, documents=tuple(kept), held_out=data.held_out - gone, notice=notice)
