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

from rrcli.data.final_answers import final_answer, tagged
from rrcli.data.numbers import number
from rrcli.data.splits import SIDE_NAMES, Side, content_hash, side_of
from rrcli.errors import UsageError, suggest

# Training draws problems from the seeds that begin here, evaluation and pretraining from those below.
TRAINING_SEEDS = 2**30
# So many seeds have a part of a generator in common; the next part begins so many candidates later.
SEEDS_APART, PART_STRIDE = 16, 10_000_019
# How many candidates are drawn at most for each problem (one in twenty is for validation, and small generators repeat);
# and after how many in a row that bring nothing new a generator is taken to have no more.
MAX_DRAWS_PER_PROBLEM, PATIENCE = 200, 5000


@dataclass(frozen=True)
class Problem:
    """One question with its expected answer.

    Attributes:
        entry: the generator's own record of the problem, which its scorer needs.
        solution: the answer with its working, where the source has it.
    """

    task: str
    question: str
    answer: str
    entry: dict[str, Any] = field(default_factory=dict)
    solution: str = ""

    @property
    def key(self) -> str:
        """The hash by which the same problem is recognised in another stage's results."""
        return content_hash(f"{self.task}\n{self.question}")

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
        self._dataset, self._config = _generator(self.name)
        fields = {field.name: field for field in dataclasses.fields(self._config)}
        for key in options:
            if key not in fields or key in ("seed", "size"):
                known = [name for name in fields if name not in ("seed", "size")]
                raise UsageError(f"task '{self.name}' has no option '{key}'", suggest(key, known))
        self.options = options
        self._scorer = self._create(seed=0, size=1)

    def problems(self, count: int, seed: int, *, side: Side) -> list[Problem]:
        """Return `count` distinct problems of one side of the split: the same for one seed, others for another seed.

        Validation gets fewer where there are fewer. See `draw`.

        Raises:
            UsageError: the generator has too few distinct problems on that side.
        """
        return self.draw(count, seed, side=side)[0]

    def draw(self, count: int, seed: int, *, side: Side) -> tuple[list[Problem], int]:
        """Return `count` distinct problems of one side, and the seed that they belong to.

        The distinct problems of a side, in the generator's order, are dealt out in blocks of `count`: the first block
        belongs to seed 0, the second to seed 1, and so on. So no two seeds share a problem. (Generators make item i
        from seed + i. Drawn from neighbouring seeds, the sets of two seeds would be almost the same.) Each further
        SEEDS_APART seeds draw from another part of the generator, so that a large seed takes no longer.

        If the generator ends before the block of a seed, the blocks that there are go round, and the seed that is
        returned is another one than was asked for.

        Raises:
            UsageError: there is not a single block. Validation gets what there is instead.
        """
        part, block = divmod(seed, SEEDS_APART)
        limit = (block + 1) * count * MAX_DRAWS_PER_PROBLEM
        if limit >= TRAINING_SEEDS:
            raise UsageError(f"{count} problems of '{self.spec}' are too many", "Ask for fewer problems.")
        found: list[Problem] = []
        seen, in_vain = set[str](), 0
        for entry in self._entries(part * PART_STRIDE % (TRAINING_SEEDS - limit), limit):
            problem = None if entry["question"] in seen else self._on(side, entry)
            seen.add(entry["question"])
            in_vain += 1
            if problem is not None:
                found.append(problem)
                in_vain = 0
            if len(found) == (block + 1) * count or in_vain == PATIENCE:
                break
        blocks = len(found) // count
        if not blocks and not (side == "validation" and found):
            raise UsageError(
                f"task '{self.spec}' yields only {len(found)} distinct {SIDE_NAMES[side]} problems, {count} were asked "
                "for",
                "Ask for fewer problems, or widen the task's options.",
            )
        block %= max(1, blocks)
        return found[block * count : (block + 1) * count], part * SEEDS_APART + block

    def stream(self, seed: int, limit: int, *, side: Side) -> Iterator[Problem]:
        """Yield those of `limit` candidates, drawn from `seed`, that are on one side of the split; they may repeat."""
        return filter(None, (self._on(side, entry) for entry in self._entries(seed, limit)))

    def examples(self, count: int) -> list[Problem]:
        """Return `count` problems to show as solved examples, none of which is evaluated."""
        return self.problems(count, 0, side="train")

    def score(self, answer: str, problem: Problem) -> float:
        """Return the generator's own score of `answer`, in [0, 1]; 1 is a correct answer."""
        try:
            return float(self._scorer.score_answer(answer, entry=problem.entry))
        except Exception:  # some scorers parse the answer, and raise on one that cannot be parsed
            return 0.0

    def extract(self, output: str) -> str:
        """Return the part of an output that is the answer: the text between answer tags, or all of it."""
        return tagged(output)

    def final(self, answer: str, problem: Problem) -> str | None:
        """Return the final answer in a longer text, or None where there is none."""
        return final_answer(answer, is_number=number(problem.answer) is not None)

    def _entries(self, seed: int, limit: int) -> Iterator[dict[str, Any]]:
        dataset = self._create(seed=seed, size=limit)
        return (dataset[index] for index in range(limit))

    def _on(self, side: Side, entry: dict[str, Any]) -> Problem | None:
        """Return the problem of an entry, or None if it is on another side or has no answer that is text."""
        if side_of(entry["question"]) != side or not isinstance(entry["answer"], str):
            return None
        return Problem(self.spec, entry["question"], entry["answer"], entry)

    def _create(self, seed: int, size: int) -> Any:
        try:
            config = self._config(seed=seed, size=size, **self.options)
            if hasattr(config, "validate"):  # two of reasoning-gym's have none
                config.validate()
            return self._dataset(config)
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


def _generator(name: str) -> tuple[Any, Any]:
    """Return the class of a generator, of ours or of reasoning-gym, and that of its configuration.

    Raises:
        UsageError: there is none of that name.
    """
    from rrcli.demo.row_steps import GENERATORS, RowConfig

    if name in GENERATORS:
        return GENERATORS[name], RowConfig
    import reasoning_gym  # noqa: F401  registers the generators
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        raise UsageError(f"unknown task '{name}'", suggest(name, [*GENERATORS, *DATASETS]))
    return DATASETS[name]


def prompt_of(question: str) -> str:
    """Return the prompt of a question for models without a chat template; the answer follows after a space."""
    return f"Question: {question}\nAnswer:"
