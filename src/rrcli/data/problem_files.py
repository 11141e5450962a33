"""Reasoning problems from a file, or from a data set of the hub: `FILE.jsonl`, `.csv`, `.parquet`, or `hf://NAME`.

What a task may say beside that, such as the fields of question and answer, stands in `problem_rows`.

A file is split like all data: `splits.side_of` decides which questions are evaluated, which are for validation, and
which are trained on and used as solved examples. A test set is written `FILE:held_out=all`: all of it is evaluated, and
none of its questions is trained on, even if another task of the same settings asks it too. Its solved examples come
from `examples=OTHER`.

A data set that has splits of its own keeps them: what is in `test` is evaluated, and what is in `train` is trained on.
Without a validation split, the problems of `train` that the rule puts on the validation side are that; without a test
split, the validation split is tested. What stands in two splits, near-twins included, counts for the later one of
train, validation and test. A data set with a single split is split like a file, but one that is called `test` is a test
set.

An answer is a number or a text. If the text ends in `#### 42`, as in GSM8K, the answer is 42, and the whole text is the
solution that training and solved examples show.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from random import Random

from rrcli.data.graders import Grader, grader_file, make_grader
from rrcli.data.hub import hub_name, hub_splits
from rrcli.data.novelty import Questions
from rrcli.data.problem_rows import ProblemSource, is_file_task, problem_source, problems_in
from rrcli.data.rows import TABLES, file_rows, hub_rows, listed
from rrcli.data.splits import SIDE_NAMES, Side, side_of
from rrcli.data.tasks import Problem, Task
from rrcli.errors import RRError, UsageError
from rrcli.files import combine

# The sides that no training sees.
KEPT: tuple[Side, ...] = ("validation", "test")
# The sides, from the lightest: what stands on two of them counts for the later one.
SIDES: tuple[Side, ...] = ("train", "validation", "test")
# Stands for the side of a file, or of a data set with a single split, whose problems the rule puts on the sides.
ALL = "all"
# What the splits of data sets are called: as the library `datasets` recognises files.
SPLIT_NAMES: dict[Side, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


class FileTask:
    """The problems of one file or data set.

    Attributes:
        all: its distinct problems. repeated: how many rows were left out because they ask one of them again.
        twins: how many problems were left out because a split of more weight has a near-twin of them.
        whole: whether it is a test set. own_splits: whether it has splits of its own.
        trains: whether it is one that has problems to train on.
        others: the problems of the file that solved examples come from.

    Raises:
        UsageError: the file does not exist, or an option is unknown. RRError: a row is not a problem.
    """

    def __init__(self, spec: str, directory: Path) -> None:
        self.source = problem_source(spec)
        self.spec, self.name = self.source.spec, self.source.label
        self.grader = make_grader(self.source.options.get("grade", ""), directory)
        splits = _splits(self.source, directory)
        read = {side: _read(self.source, directory, self.grader, split) for side, split in splits.items()}
        self.whole = "held_out" in self.source.options or splits.keys() == {"test"}
        self.trains = not self.whole and not splits.keys().isdisjoint({"train", ALL})
        self.own_splits = not self.whole and ALL not in splits
        self.twins = 0
        self._sides: dict[Side, list[Problem]]
        if self.own_splits:
            self._sides, self.twins = _apart({_side(name): problems for name, problems in read.items()})
        else:
            self._sides = {side: [] for side in SIDES}
            for problem in _distinct(chain(*read.values())):
                self._sides["test" if self.whole else side_of(problem.question)].append(problem)
        self.all = _distinct(chain(*(self._sides[side] for side in SIDES)))
        self.repeated = sum(map(len, read.values())) - len(self.all) - self.twins
        other = self.source.options.get("examples")
        self.others = FileTask(other, directory).all if other else None

    @property
    def notice(self) -> str:
        """Say how many rows were left out, or '' if none was."""
        said = [f"{self.repeated:,} repeated questions"] if self.repeated else []
        said += [f"{self.twins:,} near-twins of problems on a later side"] if self.twins else []
        return f"{self.spec}: {' and '.join(said)} were left out" if said else ""

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
                f"none of the {len(self.all)} problems of {self.source.place} is on the {SIDE_NAMES[side]} side of the "
                "split",
                f"Give more problems (about 50 or more), or evaluate all of them with --task {whole}."
                if side != "train"
                else f"Name a file for solved examples: --task {self.source.place}:held_out=all,examples=OTHER.",
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
        """Return how right an answer is as a whole, in [0, 1], as the task's grader judges it."""
        return self.grader.score(answer, problem)

    def extract(self, output: str) -> str:
        """Return the part of an output that is the answer."""
        return self.grader.extract(output)

    def final(self, answer: str, problem: Problem) -> str | None:
        """Return the final answer in a longer text, or None where there is none."""
        return self.grader.final(answer, problem)


def task_file(spec: str, directory: Path) -> Path:
    """Return the file that a task names.

    Raises:
        UsageError: it does not exist.
    """
    path = (directory / problem_source(spec).place).expanduser()
    if not path.is_file():
        known = f"a {', '.join(TABLES)} file, hf://NAME for a data set of the hub, or a reasoning-gym generator"
        raise UsageError(f"the task file {path} does not exist", f"Name {known}.")
    return path


def task_fingerprints(spec: str, directory: Path, *, grading: bool) -> list[str]:
    """Return hashes of what a task reads: of a file the bytes, of a data set the problems.

    Args:
        grading: whether answers are graded, so that a grader of the user's own counts.
    """
    source = problem_source(spec)
    if source.on_hub:
        task = open_file_task(spec, directory)
        problems = [[p.question, p.answer, p.target] for side in SIDES for p in task.on(side)]
        found = [combine(problems, [len(task.on(side)) for side in SIDES])]
    else:
        found = [hashlib.sha256(task_file(spec, directory).read_bytes()).hexdigest()]
    if other := source.options.get("examples"):
        found += task_fingerprints(other, directory, grading=False)
    own = grader_file(source.options.get("grade", ""), directory) if grading else None
    return found + ([hashlib.sha256(own.read_bytes()).hexdigest()] if own else [])


def open_task(spec: str, directory: Path) -> Task | FileTask:
    """Return the task that `spec` names: a file or a data set of problems, or a generator."""
    return open_file_task(spec, directory) if is_file_task(spec) else Task(spec)


def open_file_task(spec: str, directory: Path) -> FileTask:
    """Return the task of a file or a data set, which is read once while its files stay the same."""
    return _opened(spec.strip(), directory.resolve(), _stamps(problem_source(spec), directory))


def held_out_questions(tasks: Sequence[Task | FileTask]) -> Questions:
    """Return the questions of files that are kept for validation and test; no training may see them, in any form."""
    files = [task for task in tasks if isinstance(task, FileTask)]
    return Questions(p.question for task in files for side in KEPT for p in task.on(side))


def trained_questions(specs: Sequence[str], directory: Path) -> Questions:
    """Return the questions from files that a training with these tasks may have shown to the model.

    Raises:
        RRError: a file is no longer there, or cannot be read.
    """
    tasks = [open_file_task(spec, directory) for spec in specs if is_file_task(spec)]
    kept = held_out_questions(tasks)
    seen = (p.question for task in tasks for p in task.on("train"))
    return Questions(question for question in seen if question not in kept)


def trained_against_the_rule(specs: Sequence[str], directory: Path) -> Questions:
    """Return the questions of training splits that the rule alone would keep for validation or test.

    Nothing that asks them is evaluated: no text and no problem of a generator.
    """
    tasks = [open_file_task(spec, directory) for spec in specs if is_file_task(spec) and problem_source(spec).on_hub]
    own = (p.question for task in tasks if task.own_splits for p in task.on("train"))
    kept = held_out_questions(tasks)
    return Questions(question for question in own if side_of(question) != "train" and question not in kept)


def _apart(read: Mapping[Side, Iterable[Problem]]) -> tuple[dict[Side, list[Problem]], int]:
    """Return the problems of each side, and how many were left out as near-twins of problems on a later side."""
    sides = {side: _distinct(read.get(side, ())) for side in SIDES}
    if not sides["validation"]:
        trained = sides["train"]
        sides["validation"] = [p for p in trained if side_of(p.question) == "validation"]
        sides["train"] = [p for p in trained if side_of(p.question) != "validation"]
    later, twins = list[Problem](), 0
    for side in reversed(SIDES):
        same, kept = {problem.question for problem in later}, Questions(problem.question for problem in later)
        twins += sum(p.question in kept and p.question not in same for p in sides[side])
        sides[side] = [problem for problem in sides[side] if problem.question not in kept]
        later += sides[side]
    return sides, twins


def _splits(source: ProblemSource, directory: Path) -> dict[str, str]:
    """Return side -> split of a data set with splits of its own; else ALL -> its single split. A file's is ''.

    Raises:
        UsageError: there is no such file; a split is named that there is not; none is for training or for test.
    """
    if not source.on_hub:
        task_file(source.spec, directory)
        return {ALL: ""}
    hub = hub_name(source.place)
    named = {name: source.options[name] for name in SIDES if name in source.options}
    if hub.split and named:
        raise UsageError(f"'{source.spec}' names a split, and then splits for the sides", "Leave one of them out.")
    there = [hub.split] if hub.split else hub_splits(hub, directory)
    for name in named.values():
        if name not in there:
            raise UsageError(f"{source.place} has no split '{name}'", f"It has {listed(there)}.")
    found: dict[str, str] = {}
    side: str
    for side, names in SPLIT_NAMES.items():
        free = [name for name in names if name in there and name not in named.values()]
        if free:
            found[side] = free[0]
    if "test" not in found | named and "validation" in found:
        found["test"] = found.pop("validation")
    found.update({str(name): split for name, split in named.items()})
    if (found.keys() & {"train", "test"} and len(found) > 1) or found.keys() == {"test"}:
        return found
    if len(there) == 1 or found.keys() == {"train"}:
        return {ALL: found.get("train", there[0])}
    hint = f"Name them: --task {source.place}:train=NAME,test=NAME."
    raise UsageError(f"{source.place} has the splits {listed(there)}", hint)


def _read(source: ProblemSource, directory: Path, grader: Grader, split: str) -> list[Problem]:
    """Return the problem of each row, also of those that ask the same.

    Raises:
        RRError: there is none, or a row is not a problem; names its place.
    """
    if source.on_hub:
        hub = dataclasses.replace(hub_name(source.place), split=split)
        name = f"{source.place} ({split})"
        rows = hub_rows(hub, directory, streaming=False)
    else:
        path = task_file(source.spec, directory)
        name, rows = str(path), file_rows(path)
    problems = list(problems_in(rows, source, grader))
    if not problems:
        raise RRError(f"{name} is empty", "It needs at least one problem.")
    return problems


def _distinct(problems: Iterable[Problem]) -> list[Problem]:
    """Return the problems, of those that ask the same, word for word, the first one."""
    found: dict[str, Problem] = {}
    for problem in problems:
        found.setdefault(problem.question, problem)
    return list(found.values())


def _stamps(source: ProblemSource, directory: Path) -> tuple[object, ...]:
    """Return what changes when a task's local files are written again; of the hub, nothing does in one process."""
    place = source.place
    if source.on_hub:
        hub = hub_name(place)
        folder = directory / hub.name
        files = sorted(file for file in folder.rglob("*") if file.is_file()) if hub.is_folder else []
    else:
        files = [task_file(source.spec, directory)]
    found = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    other = source.options.get("examples")
    return (*found, *(_stamps(problem_source(other), directory) if other else ()))


@functools.lru_cache(maxsize=16)
def _opened(spec: str, directory: Path, stamps: tuple[object, ...]) -> FileTask:
    """Return a task, which is read again only if its files have changed: a command asks for it several times."""
    return FileTask(spec, directory)


def _side(name: str) -> Side:
    return next(side for side in SIDES if side == name)
