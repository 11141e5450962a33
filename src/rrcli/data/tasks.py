"""Reasoning problems with a verifier: reasoning-gym generators, addressed by name and options.

A task is written `NAME` or `NAME:key=value,key=value`, for example `chain_sum:min_terms=2,max_terms=3`. Options are the
fields of the generator's own configuration. On which side of the split a problem is, `splits.side_of` decides. Problems
from a file are in `problem_files`.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from rrcli.data.splits import SIDE_NAMES, Side, content_hash, side_of
from rrcli.errors import UsageError, suggest

# How many candidates are drawn at most for each problem. One in twenty is for validation, and small generators repeat.
MAX_DRAWS_PER_PROBLEM = 200


@dataclass(frozen=True)
class Problem:
    """One question with its expected answer.

    Attributes:
        entry: the generator's own record of the problem, which its scorer needs.
        solution: the answer with its working, where the source has it.
        copy: how many earlier problems of its file ask the same question.
    """

    task: str
    question: str
    answer: str
    entry: dict[str, Any] = field(default_factory=dict)
    solution: str = ""
    copy: int = 0

    @property
    def key(self) -> str:
        """The hash by which the same problem is recognised in another stage's results."""
        return content_hash(f"{self.task}\n{self.question}" + (f"\n{self.copy}" if self.copy else ""))

    @property
    def difficulty(self) -> str | None:
        """The task and the first number that the generator calls its difficulty, such as `chain_sum, num_terms 3`."""
        metadata = self.entry.get("metadata") or {}
        for name, value in (metadata.get("difficulty") or {}).items():
            stated = metadata.get(name, value)  # if it was drawn from a range, `difficulty` holds the range
            if isinstance(stated, int) and not isinstance(stated, bool):
                return f"{self.task.partition(':')[0]}, {name} {stated}"
        return None

    @property
    def target(self) -> str:
        """What a model is shown as the answer: in training and in solved examples."""
        return self.solution or self.answer


class Task:
    """A reasoning-gym generator with fixed options.

    Raises:
        UsageError: unknown generator, unknown option, or a value that the generator refuses.
    """

    def __init__(self, spec: str) -> None:
        self.spec = spec.strip()
        self.name, options = parse_spec(self.spec)
        datasets = _generators()
        if self.name not in datasets:
            raise UsageError(f"unknown task '{self.name}' in '{spec}'", suggest(self.name, datasets))
        fields = {field.name: field for field in dataclasses.fields(datasets[self.name][1])}
        for key in options:
            if key not in fields or key in ("seed", "size"):
                known = [name for name in fields if name not in ("seed", "size")]
                raise UsageError(f"task '{self.name}' has no option '{key}'", suggest(key, known))
        self.options = options
        self._scorer = self._create(seed=0, size=1)

    def problems(self, count: int, seed: int, *, side: Side) -> list[Problem]:
        """Return `count` distinct problems of one side of the split, the same for the same seed.

        Validation gets fewer where there are fewer.

        Raises:
            UsageError: the generator has too few distinct problems on that side.
        """
        found: dict[str, Problem] = {}
        for problem in self.stream(seed, limit=count * MAX_DRAWS_PER_PROBLEM, side=side):
            found.setdefault(problem.question, problem)
            if len(found) == count:
                return list(found.values())
        if side == "validation" and found:
            return list(found.values())
        raise UsageError(
            f"task '{self.spec}' yields only {len(found)} distinct {SIDE_NAMES[side]} problems, {count} were asked for",
            "Ask for fewer problems, or widen the task's options.",
        )

    def stream(self, seed: int, limit: int, *, side: Side) -> Iterator[Problem]:
        """Yield those of `limit` candidates, drawn from `seed`, that are on one side of the split; they may repeat."""
        dataset = self._create(seed=seed, size=limit)
        for index in range(limit):
            entry = dataset[index]
            if side_of(entry["question"]) == side and isinstance(entry["answer"], str):
                yield Problem(self.spec, entry["question"], entry["answer"], entry)

    def examples(self, count: int, seed: int) -> list[Problem]:
        """Return `count` problems to show as solved examples, none of which is evaluated."""
        return self.problems(count, seed, side="train")

    def score(self, answer: str, problem: Problem) -> float:
        """Return the generator's own score of `answer`, in [0, 1]; 1 is a correct answer."""
        try:
            return float(self._scorer.score_answer(answer, entry=problem.entry))
        except Exception:  # some scorers parse the answer, and raise on one that cannot be parsed
            return 0.0

    def extract(self, output: str) -> str:
        """Return the part of an output that is the answer: the text between answer tags, or all of it."""
        return tagged(output)

    def _create(self, seed: int, size: int) -> Any:
        from reasoning_gym.factory import create_dataset

        try:
            return create_dataset(self.name, seed=seed, size=size, **self.options)
        except (AssertionError, TypeError, ValueError) as error:
            raise UsageError(f"task '{self.spec}' refused its options: {error}") from error


def parse_spec(spec: str) -> tuple[str, dict[str, Any]]:
    """Split `NAME:key=value,...` into the name and its options; values are Python literals, else strings.

    Raises:
        UsageError: an option without `=`.
    """
    name, _, rest = spec.partition(":")
    options: dict[str, Any] = {}
    # Commas inside brackets belong to the value: operators=['+','-'].
    for item in filter(None, (part.strip() for part in re.split(r",(?![^\[(]*[\])])", rest))):
        key, equals, value = item.partition("=")
        if not equals:
            raise UsageError(f"task option '{item}' in '{spec}' has no value", "Write NAME:key=value,key=value.")
        try:
            options[key.strip()] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            options[key.strip()] = value.strip()
    return name.strip(), options


def tagged(output: str) -> str:
    """Return the text between `<answer>` tags, or the whole output, without white space around it."""
    found = re.search(r"<answer>(.*?)</answer>", output, re.DOTALL)
    return (found.group(1) if found else output).strip()


def _generators() -> dict[str, Any]:
    """Return reasoning-gym's registry with our own task in it: name -> (dataset class, configuration class)."""
    import reasoning_gym  # noqa: F401  registers the generators
    from reasoning_gym.factory import DATASETS

    from rrcli.demo import row_steps  # noqa: F401  registers itself

    return dict(DATASETS)


def prompt_of(question: str) -> str:
    """Return the prompt of a question for models without a chat template; the answer follows after a space."""
    return f"Question: {question}\nAnswer:"
