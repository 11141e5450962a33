"""The lookup baseline: answers each problem with the answer of the nearest training problem, without any model.

What it gets right says nothing about reasoning, so a score means something as far as it is above this one. It is high
where the problems of training and test are near-twins (see `rrcli.data.novelty`).

Training problems are PROBLEMS of each task: of a generator the first ones of the seeds of training, of a file a sample,
or all. The nearest one shares the longest beginning with the question, counted in tokens, if that is at least half of
the question; of several, it has the most equal tokens at equal places. So the same row but for its end is found. If no
problem shares half of the question, then no template made it, and the nearest one has the largest cosine of TF-IDF
vectors. Ties go to the first one.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from itertools import islice
from random import Random
from typing import Any

import numpy as np

from rrcli.data.novelty import Questions, tokens_of
from rrcli.data.problem_files import FileTask
from rrcli.data.tasks import TRAINING_SEEDS, Problem, Task
from rrcli.evaluation.judging import judge

# How many training problems of each task are looked up, and how many candidates are drawn for them at most.
PROBLEMS, DRAWS = 2048, 4096
# The width of TF-IDF vectors, in which tokens are counted by their hash; and how many questions are compared at once.
WIDTH, AT_ONCE = 1024, 256


def look_up(tasks: Sequence[Task | FileTask], problems: Sequence[Problem]) -> list[bool | None]:
    """Return for each problem whether the nearest training problem has its answer; None if there is none to look up."""
    by_spec = {task.spec: task for task in tasks}
    found = zip(problems, nearest_answers(tasks, problems), strict=True)
    return [None if a is None else judge(by_spec[p.task], p, a).correct for p, a in found]


def nearest_answers(tasks: Sequence[Task | FileTask], problems: Sequence[Problem]) -> list[str | None]:
    """Return for each problem the answer of the nearest training problem; None if there is no training problem."""
    known = _training_problems(tasks)
    if not known or not problems:
        return [None] * len(problems)
    memory = _Memory([tokens_of(problem.question) for problem in known])
    return [known[index].answer for index in memory.nearest([tokens_of(problem.question) for problem in problems])]


class _Memory:
    """Token sequences, among which the nearest to others are found."""

    def __init__(self, sequences: Sequence[Sequence[str]]) -> None:
        self._sequences = sequences
        self._ids: dict[str, int] = {}
        for sequence in sequences:
            for token in sequence:
                self._ids.setdefault(token, len(self._ids) + 1)
        self._longest = max(map(len, sequences))
        self._known = self._numbered(sequences)

    def nearest(self, questions: Sequence[Sequence[str]]) -> list[int]:
        """Return the index of the sequence that is nearest to each question."""
        found = [
            self._by_beginning(question, ids)
            for question, ids in zip(questions, self._numbered(questions), strict=True)
        ]
        others = [number for number, index in enumerate(found) if index is None]
        by_words = dict(zip(others, self._by_words([questions[number] for number in others]), strict=True))
        return [by_words[number] if index is None else index for number, index in enumerate(found)]

    def _by_beginning(self, question: Sequence[str], ids: Any) -> int | None:
        """Return the sequence that shares most of the question's beginning; None if that is less than half of it."""
        same = self._known == ids
        same &= ids != 0
        # The place of the first difference is the length of the shared beginning.
        shared = np.where(same.all(1), self._longest, same.argmin(1))
        most = shared.max()
        if not question or 2 * most < len(question):
            return None
        candidates = np.flatnonzero(shared == most)
        return int(candidates[np.argmax(same[candidates].sum(1))])

    def _by_words(self, questions: Sequence[Sequence[str]]) -> list[int]:
        """Return the sequence whose TF-IDF vector has the largest cosine with each question's."""
        if not questions:
            return []
        counts = _hashed(self._sequences)
        idf = np.log(len(counts) / np.maximum(1, (counts > 0).sum(0)))
        vectors = _unit(counts * idf).T
        found: list[int] = []
        for start in range(0, len(questions), AT_ONCE):
            cosines = _unit(_hashed(questions[start : start + AT_ONCE]) * idf) @ vectors
            found += np.round(cosines, 6).argmax(1).tolist()
        return found

    def _numbered(self, sequences: Sequence[Sequence[str]]) -> Any:
        """Return `[sequence, place]` numbers of tokens, 0 after the end; unknown tokens have -1."""
        table = np.zeros((len(sequences), self._longest), np.int32)
        for row, sequence in zip(table, sequences, strict=True):
            numbers = [self._ids.get(token, -1) for token in sequence[: self._longest]]
            row[: len(numbers)] = numbers
        return table


def _training_problems(tasks: Sequence[Task | FileTask]) -> list[Problem]:
    """Return training problems of all tasks, none of which is evaluated by a test set."""
    files = [task for task in tasks if isinstance(task, FileTask)]
    tested = Questions(problem.question for task in files for problem in task.on("test"))
    found: list[Problem] = []
    for task in tasks:
        if isinstance(task, FileTask):
            pool = [problem for problem in task.others or task.on("train") if problem.question not in tested]
            found += pool if len(pool) <= PROBLEMS else Random(0).sample(pool, PROBLEMS)
        else:
            drawn = task.stream(TRAINING_SEEDS, DRAWS, side="train")
            found += islice((problem for problem in drawn if problem.question not in tested), PROBLEMS)
    return found


def _hashed(sequences: Sequence[Sequence[str]]) -> Any:
    """Return `[sequence, WIDTH]` counts of tokens, by a hash that is the same in every process."""
    counts = np.zeros((len(sequences), WIDTH), np.float32)
    places: dict[str, int] = {}
    for row, sequence in zip(counts, sequences, strict=True):
        for token in sequence:
            if token not in places:
                places[token] = zlib.crc32(token.encode("utf-8", "surrogatepass")) % WIDTH
            row[places[token]] += 1
    return counts


def _unit(vectors: Any) -> Any:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
