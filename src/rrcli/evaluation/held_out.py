"""What a model is evaluated on: the held-out side of text and problems, and prompts."""

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
        documents: held-out texts and conversations. tasks, problems: reasoning tasks and the problems of each.
        prompts: to continue.
        harness: tasks of lm-evaluation-harness.
        source: what `--data` named. notice: sentences about what was left out of it, or ''.
        held_out: how many documents are held out, of which `documents` may be a sample.
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
    settings: CommonSettings, directory: Path, problems_per_task: int, max_samples: int = 0, *, reasoning: bool = True
) -> EvalData:
    """Return the evaluation side of the split: documents, problems and the built-in prompts.

    Raises:
        RRError: no document of the source is held out. UsageError: the seed reaches into those of training.
    """
    if settings.seed + problems_per_task * MAX_DRAWS_PER_PROBLEM > TRAINING_SEEDS:
        raise UsageError(
            f"--seed {settings.seed} with {problems_per_task} problems per task reaches into the seeds of training, "
            f"which begin at {TRAINING_SEEDS}",
            "Take a smaller --seed, or fewer problems.",
        )
    notes = Notes()
    read = read_split(settings.data, directory, settings.text_field, notes, on_bad_row=settings.on_bad_row)
    documents: Sequence[Document] = DocumentStore((d for d, held_out in read if held_out), directory)
    if not documents:
        raise RRError(
            f"no document of {settings.data} falls into the held-out tenth", "Give more documents (about 50 or more)."
        )
    held_out = len(documents)
    if 0 < max_samples < held_out:
        documents = Random(settings.seed).sample(documents, max_samples)
    tasks = tuple(open_task(spec, directory) for spec in task_specs(settings)) if reasoning else ()
    problems = [problem for task in tasks for problem in task.problems(problems_per_task, settings.seed, held_out=True)]
    notice = notes.notice(settings.data)
    return EvalData(tuple(documents), tasks, tuple(problems), PROMPTS, settings.data, notice=notice, held_out=held_out)


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
