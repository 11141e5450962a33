"""What a model is evaluated on: the test or the validation side of text and problems, and prompts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from rrcli.data.conversations import Document, asked
from rrcli.data.corpus import Corpus
from rrcli.data.document_store import DocumentStore
from rrcli.data.novelty import Questions, novelty
from rrcli.data.problem_files import FileTask, open_task, trained_against_the_rule
from rrcli.data.rendering import text_of
from rrcli.data.splits import SIDE_NAMES, Side
from rrcli.data.tasks import Problem, Task
from rrcli.data.training_data import task_specs
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
        documents: texts and conversations of the side. tasks, problems: reasoning tasks, and problems of them.
        sets: how many of the problems, in their order, belong to each seed; empty means that they are one set.
        prompts: to continue.
        harness: tasks of lm-evaluation-harness.
        source: what `--data` named. notice: sentences about what was left out of it, or ''.
        held_out: how many documents are on the side, of which `documents` may be a sample.
        side: the side of the split that documents and problems are on.
    """

    documents: tuple[Document, ...] = ()
    tasks: tuple[Task | FileTask, ...] = ()
    problems: tuple[Problem, ...] = ()
    sets: tuple[int, ...] = ()
    prompts: tuple[str, ...] = ()
    source: str = "given"
    notice: str = ""
    held_out: int = 0
    harness: tuple[HarnessTask, ...] = ()
    side: Side = "test"

    @property
    def empty(self) -> bool:
        """Whether there is neither a document nor a problem; possible on the validation side alone."""
        return not self.documents and not self.problems

    @property
    def spans(self) -> list[range]:
        """The numbers of the problems of each set. What a set gives does not depend on the others."""
        ends = list(accumulate(self.sets or (len(self.problems),)))
        return [range(begin, end) for begin, end in zip((0, *ends), ends, strict=False)]

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

    A small source may have nothing on the validation side. Validation does without it, and the notice says so; the data
    may even be empty. A test set (`held_out=all`) has test problems alone.

    Args:
        problems_per_task: how many problems of each task; validation takes fewer where there are fewer.
        max_samples: how many documents at most, the same for every seed; 0 means all.
        side: 'test', or 'validation' for choices.
        seeds: whose problems, `problems_per_task` of each; more than one for a stage that is compared with the runs of
            several seeds. By default that of the settings.

    Raises:
        RRError: no document of the source is on the test side.
        UsageError: a task has too few problems; for example, fewer than all these seeds need.
    """
    corpus = Corpus(settings, directory)
    read = ((document, on) for document, on, _ in corpus.read())
    tasks = tuple(open_task(spec, directory) for spec in task_specs(settings)) if reasoning else ()
    lacking: list[str] = []
    if side == "validation":
        lacking = [task.spec for task in tasks if isinstance(task, FileTask) and not task.on(side)]
        tasks = tuple(task for task in tasks if task.spec not in lacking)
    sets: list[list[Problem]] = [[] for _ in seeds or (settings.seed,)]
    said: list[str] = []
    for task in tasks:
        found, sentence = problems_of(task, problems_per_task, seeds or (settings.seed,), side)
        for own, more in zip(sets, found, strict=True):
            own += more
        said.append(sentence)
    drawn = {task.spec for task in tasks if not isinstance(task, FileTask)}
    made = Questions(problem.question for own in sets for problem in own if problem.task in drawn)
    trained = trained_against_the_rule(task_specs(settings), directory)
    quoted = {novelty(p.question) for own in sets for p in own if p.task in drawn and p.question in trained}
    if settings.eval_data and side == "test":
        trained = Questions()  # training leaves out what is in it
    asking: list[Document] = []
    documents: Sequence[Document] = DocumentStore(
        _of_side(read, side, made=made, quoted=quoted, trained=trained, asking=asking), directory
    )
    if not documents and side == "test":
        raise RRError(
            f"no document of {settings.data} is on the test side of the split (a tenth)",
            "Give more documents (about 50 or more).",
        )
    held_out = len(documents)
    if 0 < max_samples < held_out:
        documents = Random(0).sample(documents, max_samples)
    said.insert(0, corpus.notice)
    if asking:
        said.append(f"{len(asking):,} texts of {settings.data} are left out, because training asks their questions")
    if side == "validation" and not documents:
        lacking.append(settings.data)
    if quoted:
        kept = [[p for p in own if p.task not in drawn or novelty(p.question) not in quoted] for own in sets]
        gone, sets = sum(map(len, sets)) - sum(map(len, kept)), kept
        said.append(
            f"{gone:,} problems of generators are left out, because training texts or training splits hold them"
        )
    if lacking:
        said.append(f"nothing to validate with in: {', '.join(lacking)}")
    notice = "\n".join(filter(None, said))
    return EvalData(
        tuple(documents),
        tasks,
        tuple(chain(*sets)),
        tuple(map(len, sets)),
        PROMPTS,
        settings.eval_data if settings.eval_data and side == "test" else settings.data,
        notice=notice,
        held_out=held_out,
        side=side,
    )


def _of_side(
    read: Iterable[tuple[Document, Side]],
    side: Side,
    *,
    made: Questions,
    quoted: set[str],
    trained: Questions,
    asking: list[Document],
) -> Iterator[Document]:
    """Yield the documents of one side, but for those that ask a question of a training split.

    A question that is a text of its own is on the same side as that text. Inside of a longer one, the text decides.

    Args:
        made: the questions of generators. quoted: gets the novelty keys of those that training texts hold.
        trained: the questions of training splits. asking: gets the documents that ask one of them.
    """
    for document, on in read:
        if on == side and len(trained) and any(text in trained for text in asked(document)):
            asking.append(document)
        elif on == side:
            yield document
        elif on == "train" and len(made):
            quoted.update(key for text in asked(document) for key in made.quoted_in(text))


def problems_of(task: Task | FileTask, count: int, seeds: Sequence[int], side: Side) -> tuple[list[list[Problem]], str]:
    """Return the problems of a task for each seed, each problem once, and a sentence about what is not as asked, or ''.

    The problems of a file, which are the same for all seeds, are the first one's.

    Raises:
        UsageError: two seeds would have the same problems of a generator.
    """
    if isinstance(task, FileTask):
        return [task.problems(count, seeds[0], side=side), *([] for _ in seeds[1:])], task.notice
    drawn = [task.draw(count, seed, side=side) for seed in seeds]
    owners = [owner for _, owner in drawn]
    told = [
        f"seed {seed} has those of seed {owner}" for seed, owner in zip(seeds, owners, strict=True) if seed != owner
    ]
    said = f"{task.spec} has too few {SIDE_NAMES[side]} problems for {count} of every seed's own: {'; '.join(told)}"
    if len(set(owners)) < len(seeds) and side == "test":
        raise UsageError(said, "Take fewer --problems, or fewer seeds.")
    firsts = [owners.index(owner) == place for place, owner in enumerate(owners)]
    sets = [problems if first else [] for (problems, _), first in zip(drawn, firsts, strict=True)]
    return sets, said if told and side == "test" else ""


def distinct(data: EvalData, tokenizer: Any, settings: EvalSettings | TrainSettings) -> EvalData:
    """Return the data with each document, problem and prompt once; the notice says how many were left out.

    Documents are repeats where a model with this tokenizer is shown the same text.
    """
    documents: dict[str, Document] = {}
    problems: dict[str, Problem] = {}
    for text, document in zip(data.texts(tokenizer, settings), data.documents, strict=True):
        documents.setdefault(text, document)
    sets = []
    for span in data.spans:
        before = len(problems)
        for problem in data.problems[span.start : span.stop]:
            problems.setdefault(problem.key, problem)
        sets.append(len(problems) - before)
    prompts = tuple(dict.fromkeys(data.prompts))
    gone = {
        "documents": len(data.documents) - len(documents),
        "problems": len(data.problems) - len(problems),
        "prompts": len(data.prompts) - len(prompts),
    }
    if not any(gone.values()):
        return data
    counts = " and ".join(f"{n:,} {name.removesuffix('s') if n == 1 else name}" for name, n in gone.items() if n)
    said = f"left out, because they repeat others: {counts}"
    return replace(
        data,
        documents=tuple(documents.values()),
        problems=tuple(problems.values()),
        sets=tuple(sets),
        prompts=prompts,
        held_out=max(0, data.held_out - gone["documents"]),
        notice="\n".join(filter(None, (data.notice, said))),
    )


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
