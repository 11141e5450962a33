"""Text and problems: which side of the split they are on, and how they become batches.

Documents come from `sources`. A source that is shared by training and evaluation is split by `splits.is_held_out`.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from tempfile import SpooledTemporaryFile
from typing import TYPE_CHECKING, Any

from rrcli import demo
from rrcli.errors import RRError, UsageError
from rrcli.problem_files import FileTask, evaluated_whole, open_task
from rrcli.settings import CommonSettings, TrainSettings
from rrcli.sources import Dropped, fingerprint, read_documents
from rrcli.splits import is_held_out
from rrcli.store import combine
from rrcli.tasks import Problem, Task, prompt_of

if TYPE_CHECKING:
    from rrcli.batching import Batch
    from rrcli.harness import HarnessTask

# Texts up to this many bytes stay in memory; more go to a temporary file.
MEMORY_BYTES = 2**28
TRAINING_SEEDS = 2**30
# Labels with this value bear no loss.
IGNORED = -100
# Built-in prompts of the sample generations: plain openings that a story model and a large model can both go on from.
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
        documents: held-out texts. tasks, problems: reasoning tasks and the problems of each. prompts: to continue.
        harness: tasks of lm-evaluation-harness.
        source: what `--data` named. notice: what was left out of it, for people; '' if nothing was.
        held_out: how many documents are held out, of which `documents` may be a sample.
    """

    documents: tuple[str, ...] = ()
    tasks: tuple[Task | FileTask, ...] = ()
    problems: tuple[Problem, ...] = ()
    prompts: tuple[str, ...] = ()
    source: str = "given"
    notice: str = ""
    held_out: int = 0
    harness: tuple[HarnessTask, ...] = ()


class TextStore(Sequence[str]):
    """Texts by number, in a temporary file if they are many: eight bytes of memory for each."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._file = SpooledTemporaryFile(max_size=MEMORY_BYTES)  # noqa: SIM115 (it lives as long as the store)
        self._ends = array("Q", [0])
        for text in texts:
            data = text.encode()
            self._file.write(data)
            self._ends.append(self._ends[-1] + len(data))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        self._file.seek(self._ends[index])
        return self._file.read(self._ends[index + 1] - self._ends[index]).decode()


def source_fingerprint(settings: CommonSettings, directory: Path) -> str:
    """Return a hash of the text source and of the task names: "the same data" for `rr run`."""
    return combine(task_specs(settings), fingerprint(settings.data, directory, settings.text_field))


def task_specs(settings: CommonSettings) -> tuple[str, ...]:
    """Return the reasoning tasks in use: those that were asked for, else the embedded ones."""
    return settings.task or demo.TASKS


def held_out_data(
    settings: CommonSettings, directory: Path, problems_per_task: int, max_samples: int = 0, *, reasoning: bool = True
) -> EvalData:
    """Return the evaluation side of the split.

    Raises:
        RRError: no document of the source is held out.
    """
    dropped = Dropped()
    texts = read_documents(settings.data, directory, settings.text_field, dropped)
    documents: Sequence[str] = TextStore(text for text in texts if is_held_out(text))
    if not documents:
        raise RRError(
            f"no document of {settings.data} falls into the held-out tenth", "Give more documents (about 50 or more)."
        )
    held_out = len(documents)
    if 0 < max_samples < held_out:
        documents = Random(settings.seed).sample(documents, max_samples)
    tasks = tuple(open_task(spec, directory) for spec in task_specs(settings)) if reasoning else ()
    problems = [problem for task in tasks for problem in task.problems(problems_per_task, settings.seed, held_out=True)]
    notice = dropped.notice(settings.data)
    return EvalData(tuple(documents), tasks, tuple(problems), PROMPTS, settings.data, notice=notice, held_out=held_out)


class TrainingData:
    """The training side of the split as an endless row of batches; batch `step` depends on seed and step alone.

    So resuming needs no position, and every run with the same seed sees the same batches in the same order.
    """

    def __init__(self, settings: TrainSettings, directory: Path, tokenizer: Any) -> None:
        self.settings, self.tokenizer = settings, tokenizer
        dropped = Dropped()
        texts = read_documents(settings.data, directory, settings.text_field, dropped)
        self.documents = TextStore(text for text in texts if not is_held_out(text))
        self.notice = dropped.notice(settings.data)
        tasks = [open_task(spec, directory) for spec in task_specs(settings)] if settings.task_share > 0 else []
        self.evaluated = evaluated_whole(tasks)
        self.tasks = [task for task in tasks if not (isinstance(task, FileTask) and task.whole)]
        if tasks and not self.tasks:
            raise UsageError(
                "every task is evaluated whole (held_out=all): there is no problem to train on",
                "Add a task to train on, or train on text alone with --task-share 0.",
            )
        if not self.documents and settings.task_share < 1:
            raise RRError(f"every document of {settings.data} is held out", "Give more documents (about 50 or more).")
        self.cut = 0

    def batch(self, step: int) -> Batch:
        """Return the examples of one optimiser step (`batch_size` of them)."""
        from rrcli.batching import collate

        random = Random(f"{self.settings.seed}/{step}")
        examples = []
        for position in range(self.settings.batch_size):
            if self.tasks and random.random() < self.settings.task_share:
                examples.append(self._problem(random, step * self.settings.batch_size + position))
            else:
                examples.append(self._document(random.choice(self.documents)))
        return collate(examples, pad=_pad_id(self.tokenizer))

    def _problem(self, random: Random, index: int) -> tuple[list[int], list[int]]:
        task = random.choice(self.tasks)
        # Generators seed problem i with seed + i: leave room between the seeds, so that examples don't repeat, and keep
        # away from the small seeds that pretraining and evaluation draw from.
        seed = TRAINING_SEEDS + (self.settings.seed * 1_000_003 + index * 64) % TRAINING_SEEDS
        drawn = task.stream(seed, limit=4096, held_out=False)
        problem = next((problem for problem in drawn if problem.question not in self.evaluated), None)
        if problem is None:
            raise UsageError(f"task '{task.spec}' has no problems with a text answer to train on", "Leave it out.")
        prompt = encode_prompt(self.tokenizer, prompt_of(problem.question))
        answer = self.tokenizer(" " + problem.target, add_special_tokens=False)["input_ids"] + _end(self.tokenizer)
        ids = self._cut(prompt + answer)
        return ids, [IGNORED] * (min(len(prompt), len(ids)) - 1) + ids[len(prompt) :] + [IGNORED]

    def _document(self, text: str) -> tuple[list[int], list[int]]:
        ids = self._cut(_start(self.tokenizer) + self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if len(ids) < self.settings.max_length:
            ids += _end(self.tokenizer)
        return ids, [*ids[1:], IGNORED]

    def _cut(self, ids: list[int]) -> list[int]:
        self.cut += len(ids) > self.settings.max_length
        return ids[: self.settings.max_length]


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Return the ids of a prompt, with the start token that the tokenizer itself would put before it."""
    return tokenizer(prompt)["input_ids"]


def start_token(tokenizer: Any) -> int | None:
    """Return the token that scoring starts from: BOS, or EOS where there is none (as lm-eval does)."""
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id


def _start(tokenizer: Any) -> list[int]:
    token = start_token(tokenizer)
    return [] if token is None else [token]


def _end(tokenizer: Any) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _pad_id(tokenizer: Any) -> int:
    return next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
