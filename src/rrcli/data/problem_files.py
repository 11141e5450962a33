"""Reasoning problems from a file: JSON lines with a `question` and an `answer`.

Such a task is written `FILE.jsonl` and is split like all data: `splits.side_of` decides which questions are evaluated,
which are for validation, and which are trained on and used as solved examples. A test set is written
`FILE.jsonl:held_out=all`: all of it is evaluated, and none of its questions is trained on, even if another file of the
same settings asks it too. Its solved examples come from `examples=OTHER.jsonl`.

An answer is a number or a text. If the text ends in `#### 42`, as in GSM8K, the answer is 42, and the whole text is the
solution that training and solved examples show.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from random import Random
from typing import Any

from rrcli.data.lines import file_lines, json_objects
from rrcli.data.novelty import Questions
from rrcli.data.numbers import number, plain, unwrapped
from rrcli.data.splits import SIDE_NAMES, Side, side_of
from rrcli.data.tasks import Problem, Task, parse_spec, tagged
from rrcli.errors import RRError, UsageError, suggest

SUFFIX = ".jsonl"
OPTIONS = ("held_out", "examples")
MARK = "####"
# The sides that no training sees.
KEPT: tuple[Side, ...] = ("validation", "test")
LINE_HINT = 'Write {"question": "...", "answer": "..."} on each line.'


class FileTask:
    """The problems of one file.

    Attributes:
        all: its distinct problems. repeated: how many lines were left out because they ask one of them again.
        whole: whether it is a test set. others: the problems of the file that solved examples come from.

    Raises:
        UsageError: the file does not exist, or an option is unknown. RRError: a line is not a problem.
    """

    def __init__(self, spec: str, directory: Path) -> None:
        self.spec = spec.strip()
        name, options = parse_spec(self.spec)
        self.name = Path(name).name
        self.path = task_file(self.spec, directory)
        for key in options:
            if key not in OPTIONS:
                raise UsageError(f"task '{self.name}' has no option '{key}'", suggest(key, OPTIONS))
        if options.get("held_out", "all") != "all":
            raise UsageError(
                f"held_out is '{options['held_out']}' in '{spec}'",
                "Write held_out=all to evaluate all of the file, or leave it out to evaluate a tenth.",
            )
        self.whole = "held_out" in options
        self.all, self.repeated = read_problems(self.path, self.spec)
        self._sides: dict[Side, list[Problem]] = {"train": [], "validation": [], "test": []}
        for problem in self.all:
            self._sides["test" if self.whole else side_of(problem.question)].append(problem)
        other = options.get("examples")
        self.others = read_problems(task_file(str(other), directory), self.spec)[0] if other else None

    def on(self, side: Side) -> list[Problem]:
        """Return the problems of one side of the split, in the file's order; of a test set all are on the test side."""
        return self._sides[side]

    def problems(self, count: int, seed: int, *, side: Side) -> list[Problem]:
        """Return `count` problems of one side, or all of them if there are fewer: the same for every seed.

        A file ends, so seeds cannot have problems of their own, as they have of a generator (see `Task.draw`).

        Raises:
            UsageError: that side has none.
        """
        found = self.on(side)
        if not found:
            whole = f"{self.spec}:held_out=all"
            raise UsageError(
                f"none of the {len(self.all)} problems of {self.path} is on the {SIDE_NAMES[side]} side of the split",
                f"Give more problems (about 50 or more), or evaluate all of them with --task {whole}."
                if side != "train"
                else "Name a file for solved examples: --task FILE.jsonl:held_out=all,examples=OTHER.jsonl.",
            )
        return Random(0).sample(found, len(found))[:count]

    def examples(self, count: int) -> list[Problem]:
        """Return `count` problems to show as solved examples, none of which is evaluated.

        Raises:
            UsageError: there are fewer.
        """
        if self.others is None:
            pool = self.problems(len(self.all), 0, side="train")
        else:
            kept = Questions(p.question for side in KEPT for p in self.on(side))
            pool = [p for p in self.others if p.question not in kept]
            pool = Random(0).sample(pool, len(pool))
        if len(pool) < count:
            raise UsageError(f"--num-fewshot is {count}, but task '{self.spec}' has {len(pool)} solved examples")
        return pool[:count]

    def stream(self, seed: int, limit: int, *, side: Side) -> Iterator[Problem]:
        """Yield `limit` problems of one side, drawn by `seed` with repeats; none if that side is empty."""
        found, random = self.on(side), Random(seed)
        for _ in range(limit if found else 0):
            yield random.choice(found)

    def score(self, answer: str, problem: Problem) -> float:
        """Return 1 for the expected answer, else 0.

        Numbers and lists of numbers are compared by their values, words without regard to case and white space.
        """
        return float(_value(answer) == _value(problem.answer))

    def extract(self, output: str) -> str:
        """Return the part of an output that is the answer: after `####`, or between answer tags, or all of it."""
        return tagged(output.rpartition(MARK)[2])


def is_file_task(spec: str) -> bool:
    """Tell whether a task names a file of problems rather than a generator."""
    return parse_spec(spec)[0].endswith(SUFFIX)


def task_file(spec: str, directory: Path) -> Path:
    """Return the file that a task names.

    Raises:
        UsageError: it does not exist.
    """
    path = (directory / parse_spec(spec)[0]).expanduser()
    if not path.is_file():
        raise UsageError(f"the task file {path} does not exist", f"Name a {SUFFIX} file, or a reasoning-gym generator.")
    return path


def open_task(spec: str, directory: Path) -> Task | FileTask:
    """Return the task that `spec` names: a file of problems, or a generator."""
    return FileTask(spec, directory) if is_file_task(spec) else Task(spec)


def evaluated_whole(tasks: Sequence[Task | FileTask]) -> Questions:
    """Return the questions of test sets: no training may see them, in addition to what the split holds out."""
    return Questions(p.question for task in tasks if isinstance(task, FileTask) and task.whole for p in task.all)


def held_out_questions(tasks: Sequence[Task | FileTask]) -> Questions:
    """Return the questions of files that are kept for validation and test; no training may see them, in any form."""
    files = [task for task in tasks if isinstance(task, FileTask)]
    return Questions(p.question for task in files for side in KEPT for p in task.on(side))


def trained_questions(specs: Sequence[str], directory: Path) -> Questions:
    """Return the questions from files that a training with these tasks may have shown to the model.

    Raises:
        RRError: a file is no longer there, or cannot be read.
    """
    tasks = [FileTask(spec, directory) for spec in specs if is_file_task(spec)]
    tested = evaluated_whole(tasks)
    seen = (p.question for task in tasks if not task.whole for p in task.on("train"))
    return Questions(question for question in seen if question not in tested)


def read_problems(path: Path, task: str) -> tuple[list[Problem], int]:
    """Return every distinct problem of a file, in its order, and how many lines ask one of them again.

    A problem is one question: of lines that ask the same, word for word, the first one counts.

    Raises:
        RRError: the file is not UTF-8 or empty, or a line is not a problem; names the line.
    """
    problems: dict[str, Problem] = {}
    lines = 0
    for place, value in json_objects(file_lines(path), str(path)):
        question = value.get("question")
        if not isinstance(question, str) or not question.strip():
            raise RRError(f"{place}: no 'question'", LINE_HINT)
        question = question.strip()
        answer, solution = _answer(value.get("answer"), place)
        problems.setdefault(question, Problem(task, question, answer, {}, solution))
        lines += 1
    if not problems:
        raise RRError(f"{path} is empty", LINE_HINT)
    return list(problems.values()), lines - len(problems)


def _answer(value: Any, place: str) -> tuple[str, str]:
    """Return (answer, solution); the solution is empty where it is the answer itself."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return format(Decimal(repr(value)), "f"), ""
    if isinstance(value, str) and value.strip():
        solution = value.strip()
        answer = solution.rpartition(MARK)[2].strip()
        if answer:
            return answer, solution if MARK in solution else ""
        raise RRError(f"{place}: no answer after '{MARK}'", LINE_HINT)
    raise RRError(f"{place}: no 'answer' that is a text or a number", LINE_HINT)


def _value(answer: str) -> object:
    """Return what two answers are compared by: a number, the numbers of a list, or words."""
    if (value := number(answer)) is not None:
        return value
    text = unwrapped(plain(answer))
    parts = [number(part) for part in text.strip("[](){} ").split(",")]
    if len(parts) > 1 and None not in parts:
        return parts
    return " ".join(text.casefold().split())
