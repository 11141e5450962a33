"""Problems that flipped: those that one stage, or one depth of a stage, answers right and another one wrong.

A *view* is a stage at a depth, or with its exit. The report's browser compares any two views; the terminal, Markdown
and JSON compare two of them: recursion with vanilla fine-tuning if both are there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rrcli.comparison.records import difficulty_text
from rrcli.comparison.results import Results, Stage, seed_of
from rrcli.recursion.exits import ExitRule

Kind = Literal["fixed", "broken"]
KINDS: tuple[Kind, ...] = ("fixed", "broken")
# How many problems of a kind the terminal and Markdown show.
SHOWN = 10


@dataclass(frozen=True)
class View:
    """A stage at a depth.

    Attributes:
        stage: the place of the stage among those that are compared. label: its name.
        place: of its entry in the lists of a record, which have one for each depth.
        passes: how many passes after pass 0 every token took; None where tokens leave by an exit rule.
        exit: that rule, or ''. alone: whether the stage has no other view.
    """

    stage: int
    label: str
    place: int
    passes: int | None
    exit: str = ""
    alone: bool = False

    @property
    def name(self) -> str:
        """The view in words."""
        if self.alone:
            return self.label
        return f"{self.label}, {f'exit {self.exit}' if self.exit else f'depth {self.passes}'}"


@dataclass(frozen=True)
class ViewedAnswer:
    """The answer of a view to a problem.

    Attributes:
        pieces: the output in pieces, each with the passes of its token; empty where all tokens took as many, or where
            they were not recorded.
    """

    output: str
    right: bool
    pieces: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class FlippedProblem:
    """A problem that some views answer right and others wrong.

    Attributes:
        seed: of the trainings that were asked it; None where all stages have one. difficulty: as text; '' if it has
            none. expected: the right answer. answers: one for each view; None where a view was not asked.
    """

    task: str
    difficulty: str
    seed: int | None
    prompt: str
    expected: str
    answers: tuple[ViewedAnswer | None, ...]


@dataclass(frozen=True)
class Alike:
    """What problems that did not flip have in common; they are only counted.

    Attributes:
        asked: for each view, whether it was asked. right: whether all views that were asked are right.
    """

    task: str
    difficulty: str
    seed: int | None
    asked: tuple[bool, ...]
    right: bool


@dataclass
class Flips:
    """All problems of a comparison, as far as they flipped.

    Attributes:
        before, after: the places of the two views that are compared where there is no choice.
        alike: how many problems did not flip.
    """

    views: list[View]
    before: int = 0
    after: int = 0
    problems: list[FlippedProblem] = field(default_factory=list)
    alike: Counter[Alike] = field(default_factory=Counter)

    @property
    def compared(self) -> int:
        """How many problems both `before` and `after` were asked; 0 if these are one and the same view."""
        if self.before == self.after:
            return 0
        pairs = sum(p.answers[self.before] is not None and p.answers[self.after] is not None for p in self.problems)
        return pairs + sum(n for a, n in self.alike.items() if a.asked[self.before] and a.asked[self.after])

    def of(self, kind: Kind) -> list[tuple[FlippedProblem, ViewedAnswer, ViewedAnswer]]:
        """Return the problems that were fixed, or broken, with the answers before and after."""
        found = [(p, p.answers[self.before], p.answers[self.after]) for p in self.problems]
        wanted = kind == "fixed"
        return [(p, a, b) for p, a, b in found if a and b and (a.right, b.right) == (not wanted, wanted)]

    def sentence(self) -> str:
        """Return how many problems flipped between `before` and `after`."""
        fixed, broken = len(self.of("fixed")), len(self.of("broken"))
        return (
            f"Of {self.compared:,} problems, {self.views[self.after].name} answers {fixed:,} right that "
            f"{self.views[self.before].name} answers wrong, and {broken:,} wrong that it answers right."
        )

    def more(self, kind: Kind) -> str:
        """Return a sentence about the problems that are not shown, or ''."""
        left = len(self.of(kind)) - SHOWN
        return f"{left:,} more are {kind}: --report FILE.html or --json has all of them." if left > 0 else ""

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, of the two views that are compared."""
        return {
            "before": self.views[self.before].name,
            "after": self.views[self.after].name,
            "compared": self.compared,
            "fixed": [_flip(*found) for found in self.of("fixed")],
            "broken": [_flip(*found) for found in self.of("broken")],
        }


def flips_of(stages: Sequence[Stage]) -> Flips:
    """Return the problems that flipped between any two views of these stages.

    Problems are paired as in `pairing`: by key, within a seed; a stage of one training with every seed.
    """
    views = [view for place, stage in enumerate(stages) for view in _views(place, stage)]
    flips = Flips(views, *_pair(views, stages)) if views else Flips([])
    for seed, runs in _by_seed(stages):
        records = [{r["key"]: r for r in run["records"].get("problems", ())} if run else {} for run in runs]
        repeated = [part for part, stage in zip(records, stages, strict=True) if len(stage.runs) > 1]
        for key in dict.fromkeys(key for part in repeated or records for key in part):
            _add(flips, [part.get(key) for part in records], seed)
    return flips


def _add(flips: Flips, records: Sequence[Any], seed: int | None) -> None:
    """Add a problem: the record of each stage, or None."""
    first = next(record for record in records if record is not None)
    same = [r if r and _content(r) == _content(first) else None for r in records]
    answers = tuple(_answer(view, same[view.stage]) for view in flips.views)
    task, level = first["task"], difficulty_text(first.get("difficulty"))
    if len({answer.right for answer in answers if answer is not None}) > 1:
        prompt = first.get("prompt") or first.get("question") or ""
        flips.problems.append(FlippedProblem(task, level, seed, prompt, first.get("answer", ""), answers))
    else:
        right = any(answer.right for answer in answers if answer is not None)
        flips.alike[Alike(task, level, seed, tuple(answer is not None for answer in answers), right)] += 1


def _content(record: Any) -> tuple[Any, Any]:
    return record.get("question"), record.get("answer")


def _answer(view: View, record: Any) -> ViewedAnswer | None:
    if record is None or view.place >= len(record["correct"]):
        return None
    pieces = tuple((text, passes) for text, passes in record.get("pieces", ())) if view.exit else ()
    return ViewedAnswer(record["outputs"][view.place], record["correct"][view.place], pieces)


def _views(place: int, stage: Stage) -> Iterator[View]:
    """Yield the views of a stage: one for each depth, and one with its exit."""
    counts = [len(r["correct"]) for run in stage.runs for r in run["records"].get("problems", ())[:1]]
    count, rule = min(counts, default=0), stage.first["model"].get("exit")
    for depth in range(count - (rule is not None)):
        yield View(place, stage.label, depth, depth, alone=count == 1)
    if rule is not None and count:
        yield View(place, stage.label, count - 1, None, str(ExitRule.from_dict(rule)))


def _pair(views: Sequence[View], stages: Sequence[Stage]) -> tuple[int, int]:
    """Return the two views that answer the question of the experiment: what did recursion fix, and what did it break?

    That is recursion beside vanilla fine-tuning, else the last stage beside the first, each as it was measured itself;
    of a single stage, its last view beside its pass 0.
    """
    own = {view.label: place for place, view in enumerate(views)}  # the last view of each stage
    names = {stage.name: own[stage.label] for stage in reversed(stages) if stage.label in own}
    measured = list(own.values())
    after = names.get("finetuned_recursive", measured[-1])
    before = names.get("finetuned_vanilla", measured[0])
    return (before, after) if before != after else (0, measured[-1])


def _by_seed(stages: Sequence[Stage]) -> Iterator[tuple[int | None, list[Results | None]]]:
    """Yield each seed with the results of every stage under it; a stage of one training belongs to all seeds."""
    seeds = dict.fromkeys(seed_of(run) for stage in stages if len(stage.runs) > 1 for run in stage.runs)
    for seed in seeds:
        yield seed, [stage.by_seed.get(seed) if len(stage.runs) > 1 else stage.first for stage in stages]
    if not seeds:
        yield None, [stage.first for stage in stages]


def _flip(problem: FlippedProblem, before: ViewedAnswer, after: ViewedAnswer) -> dict[str, Any]:
    names = ("task", "difficulty", "seed", "prompt", "expected")
    found = {name: getattr(problem, name) for name in names} | {"before": before.output, "after": after.output}
    return found | ({"pieces": after.pieces} if after.pieces else {})
