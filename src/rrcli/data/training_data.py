"""The data that training reads: text and problems on the training side of the split, as batches.

Documents come from `sources`, which say on which side of the split each one is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from rrcli.data.conversations import Document, Form, asked, identity, noting_forms
from rrcli.data.corpus import Corpus, Mixture, corpus_fingerprint
from rrcli.data.problem_files import FileTask, held_out_questions, open_task
from rrcli.data.problem_rows import is_file_task
from rrcli.data.rendering import Example, example_of, solved_problem
from rrcli.data.splits import side_of
from rrcli.data.tasks import TRAINING_SEEDS, Task
from rrcli.demo import defaults
from rrcli.errors import RRError, UsageError
from rrcli.files import combine
from rrcli.recursion.batch import IGNORED, Batch
from rrcli.recursion.facts import refuse_unknown_tokens
from rrcli.settings import CommonSettings, TrainSettings

# How many documents or problems are tried for one example before giving up.
CANDIDATES = 64


def source_fingerprint(settings: CommonSettings, directory: Path) -> str:
    """Return a hash of the text source and of the task names: "the same data" for `rr run`."""
    return combine(task_specs(settings), *corpus_fingerprint(settings, directory))


def task_specs(settings: CommonSettings) -> tuple[str, ...]:
    """Return the reasoning tasks in use: those that were asked for, else the embedded ones."""
    return settings.task or defaults.TASKS


class TrainingData:
    """An endless sequence of training examples, of which example n depends on the seed and n alone.

    So a resumed run needs no saved position, and all runs with the same seed see the same batches in the same order.
    Problems are spread evenly and make up `task_share` of the sequence; documents come in epochs, each in a new order.

    Attributes:
        kept: the questions that are kept for validation and test; none of them is trained on.
        drawn: how many examples were made so far.
        cut: how many of them were longer than `max_length` and were cut.
        skipped: how many documents or problems were replaced by others, because nothing to learn would have been left
            of them within `max_length`.
        refused: the documents that were replaced because they cannot be shown to this model (`--on-bad-row skip`).

    Args:
        vocabulary: how many tokens the model's embedding has; None = not known, and not checked.

    Raises:
        RRError: nothing to train on, or the chat template refuses a conversation.
    """

    def __init__(
        self, settings: TrainSettings, directory: Path, tokenizer: Any, *, vocabulary: int | None = None
    ) -> None:
        self.settings, self.tokenizer, self.vocabulary = settings, tokenizer, vocabulary
        share = settings.task_share
        tasks = [open_task(spec, directory) for spec in task_specs(settings) if share > 0 or is_file_task(spec)]
        self.kept = held_out_questions(tasks)
        self.tasks = [task for task in tasks if share > 0 and (isinstance(task, Task) or task.trains)]
        if share > 0 and not self.tasks:
            raise UsageError(
                "every task is evaluated whole (held_out=all): there is no problem to train on",
                "Add a task to train on, or train on text alone with --task-share 0.",
            )
        self.corpus = Corpus(settings, directory)
        kept = (
            (document, number)
            for document, side, number in self.corpus.read()
            if side == "train" and not self.kept.asked_in(asked(document))
        )
        forms: dict[Form, Document] = {}
        self.documents = Mixture(noting_forms(kept, forms), self.corpus.sources, directory)
        for document in forms.values() if settings.on_bad_row == "error" else ():
            example_of(tokenizer, document, settings)  # what the chat template refuses is found before the first step
        self.notice = self.corpus.notice
        if not self.documents and share < 1:
            raise RRError(
                f"no document of {settings.data} is on the training side of the split",
                "Give more documents (about 50 or more).",
            )
        self.drawn = self.cut = self.skipped = 0
        self.refused: set[str] = set()

    def batch(self, step: int) -> Batch:
        """Return the examples of one optimiser step (`batch_size` of them).

        Raises:
            RRError: nothing can be learned from the data within `max_length`.
        """
        from rrcli.data.batching import collate
        from rrcli.data.packing import pack

        first = step * self.settings.batch_size
        examples = [self.example(first + position) for position in range(self.settings.batch_size)]
        pad = next((t for t in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id) if t is not None), 0)
        return pack(examples, self.settings.max_length, pad) if self.settings.packing else collate(examples, pad)

    def example(self, number: int) -> tuple[list[int], list[int]]:
        """Return the token ids of example `number`, from 0, and what each position should predict.

        Raises:
            RRError: see `batch`.
        """
        longest = self.settings.max_length
        share = self.settings.task_share if self.tasks else 0.0
        before = math.floor(number * share)
        asked = math.floor((number + 1) * share) > before
        task = Random(f"tasks/{self.settings.seed}/{number}").choice(self.tasks) if asked else None
        for ids, learned in self._documents(number - before) if task is None else self._problems(task, number):
            if any(learned[1:longest]):
                if self.vocabulary is not None:
                    what = f"an example of {self.settings.data if task is None else task.spec}"
                    what += f" ({self.tokenizer.decode(ids[:16])!r}...)"
                    refuse_unknown_tokens(self.vocabulary, self.tokenizer, ids[:longest], what)
                self.drawn += 1
                self.cut += len(ids) > longest
                ids = ids[:longest]
                after = zip(ids[1:], learned[1:], strict=False)
                return ids, [token if own else IGNORED for token, own in after] + [IGNORED]
            self.skipped += 1
        raise RRError(
            f"{CANDIDATES} examples in a row of {self.settings.data if task is None else task.spec} leave nothing to "
            f"learn in {longest} tokens: their prompts alone fill them",
            "Raise --max-length, or leave this source out.",
        )

    def warning(self) -> str:
        """Say how many examples were cut or left out; '' if none was."""
        said = []
        if self.cut + self.skipped:
            length = self.settings.max_length
            said.append(f"{self.cut:,} of {self.drawn:,} examples were longer than {length} tokens and were cut")
        if self.skipped:
            said.append(f"{self.skipped:,} more had nothing to learn within it and were left out")
        if self.refused:
            said.append(f"conversations left out because they cannot be shown to this model: {len(self.refused):,}")
        return "; ".join(said)

    def _documents(self, place: int) -> Iterator[Example]:
        """Yield the document at a place in the sequence of epochs, then those after it, which may replace it.

        Raises:
            RRError: one cannot be shown to the model; with `--on-bad-row skip`, none of them can.
        """
        refused = 0
        for other in range(CANDIDATES):
            document = self.documents.in_order(place + other, self.settings.seed)
            try:
                example = example_of(self.tokenizer, document, self.settings)
            except RRError:
                refused += 1
                if self.settings.on_bad_row != "skip" or refused == CANDIDATES:
                    raise
                self.refused.add(identity(document))
                continue
            yield example

    def _problems(self, task: Task | FileTask, number: int) -> Iterator[Example]:
        """Yield the problem of example `number`, then others that may replace it.

        Raises:
            UsageError: the task has none. RRError: one is kept for evaluation.
        """
        found, own_splits = 0, isinstance(task, FileTask) and task.own_splits
        for problem in task.stream(training_seed(self.settings.seed, number), limit=4096, side="train"):
            if problem.question in self.kept or self.corpus.tests(problem.question):
                continue
            if not own_splits and side_of(problem.question) != "train":
                raise RRError(
                    f"a problem of task '{task.spec}' that is kept for evaluation turned up in training: "
                    f"{problem.question[:80]!r}",
                    "Training was stopped, as its evaluation would mean nothing. This is a fault of rr: report it.",
                )
            yield solved_problem(self.tokenizer, problem, self.settings)
            found += 1
            if found == CANDIDATES:
                return
        if not found:
            raise UsageError(f"task '{task.spec}' has no problems with a text answer to train on", "Leave it out.")


def training_seed(seed: int, number: int) -> int:
    """Return the seed of the problem generators for example `number` of a run, far from the seeds of evaluation.

    Generators make problem i from seed + i, so there is room between the seeds: examples do not repeat.
    """
    return TRAINING_SEEDS + (seed * 1_000_003 + number * CANDIDATES) % TRAINING_SEEDS
