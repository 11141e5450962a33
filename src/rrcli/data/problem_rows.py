"""Problems from rows: which task a spec names, which fields of a row are its question and its answer.

A task of a file is written `FILE[:OPTION=VALUE,...]`, one of a data set of the hub
`hf://NAME[@REVISION][:CONFIG[:SPLIT]][:OPTION=VALUE,...]`. Options:

- `question`, `answer`: the fields that hold them; `solution`: one with the worked solution, which training and solved
  examples show. A field inside of another one is written `outer.inner`.
- `choices`: a field with answers to choose from, which are written below the question, each with its letter. The answer
  is a letter, the number of a choice from 0, or the choice itself.
- `grade`: how answers are judged, see `graders`. `grade=regex:PATTERN` takes all that follows, so it comes last.
- `held_out=all`, `examples=OTHER`: a test set, and where its solved examples come from.
- `train`, `validation`, `test`: splits of a data set, where they have other names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

from rrcli.data.final_answers import MARK
from rrcli.data.graders import LETTERS, REGEX, Grader
from rrcli.data.hub import HUB
from rrcli.data.lines import refuse
from rrcli.data.rows import TABLES, Rows, listed
from rrcli.data.tasks import Problem
from rrcli.errors import RRError, UsageError, suggest

FIELDS = ("question", "answer", "solution", "choices")
SPLITS = ("train", "validation", "test")
OPTIONS = ("held_out", "examples", "grade", *FIELDS)

_FIRST_OPTION = re.compile(r":(?=\s*\w+\s*=)")


@dataclass(frozen=True)
class ProblemSource:
    """What a task of a file or of a data set names.

    Attributes:
        spec: as it was written. place: the file, or the name of the data set. options: by name.
    """

    spec: str
    place: str
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def on_hub(self) -> bool:
        """Whether it is a data set of the hub."""
        return self.place.startswith(HUB)

    @property
    def label(self) -> str:
        """The name of the file, or of the data set."""
        return self.place if self.on_hub else Path(self.place).name


def is_file_task(spec: str) -> bool:
    """Tell whether a task names a file of problems, or a data set, rather than a generator."""
    return spec.strip().startswith(HUB) or spec.partition(":")[0].strip().endswith(TABLES)


def problem_source(spec: str) -> ProblemSource:
    """Return the parts of a task.

    Raises:
        UsageError: an option without a value, or one that there is not.
    """
    spec = spec.strip()
    if spec.startswith(HUB):
        place, *rest = _FIRST_OPTION.split(spec, maxsplit=1)
    else:
        place, *rest = spec.split(":", maxsplit=1)
    source = ProblemSource(spec, place.strip(), dict(_options("".join(rest), spec)))
    known = (*OPTIONS, *SPLITS) if source.on_hub else OPTIONS
    for key in source.options:
        if key not in known:
            raise UsageError(f"task '{source.label}' has no option '{key}'", suggest(key, known))
    if source.options.get("held_out", "all") != "all":
        raise UsageError(
            f"held_out is '{source.options['held_out']}' in '{spec}'",
            "Write held_out=all to evaluate all of it, or leave it out to evaluate a tenth.",
        )
    return source


def problems_in(rows: Rows, source: ProblemSource, grader: Grader) -> Iterator[Problem]:
    """Yield the problem of each row, also of those that ask the same question.

    Raises:
        RRError: a row is not a problem; names its place and the fields that there are.
    """
    names = {name: source.options.get(name, name) for name in FIELDS[:2]}
    names |= {name: source.options[name] for name in FIELDS[2:] if name in source.options}
    for name, column in names.items():
        rows.require(column.partition(".")[0] if column not in (rows.fields or ()) else column, _hint(source, name))
    for place, row in rows.read(None if grader.needs_row else _columns(rows, names), refuse):
        yield _problem(row, names, source, place=place, grader=grader)


def _columns(rows: Rows, names: Mapping[str, str]) -> list[str] | None:
    """Return the columns that are read; None for all."""
    if rows.fields is None:
        return None
    return list(dict.fromkeys(name if name in rows.fields else name.partition(".")[0] for name in names.values()))


def _problem(
    row: dict[str, Any], names: Mapping[str, str], source: ProblemSource, *, place: str, grader: Grader
) -> Problem:
    question = _found(row, names["question"])
    if not isinstance(question, str) or not question.strip():
        raise RRError(f"{place}: no '{names['question']}' (it has {listed(row)})", _hint(source, "question"))
    question = question.strip()
    entry: dict[str, Any] = {"row": row} if grader.needs_row else {}
    answer: Any = _found(row, names["answer"])
    if "choices" in names:
        entry["choices"], labels = _choices(_found(row, names["choices"]), names["choices"], place)
        answer = _letter(answer, entry["choices"], labels, place)
        offered = (f"{letter}. {text}" for letter, text in zip(LETTERS, entry["choices"], strict=False))
        question = "\n".join([question, *offered])
    answer, solution = _answer(answer, names["answer"], source, place)
    try:
        expected = grader.expected(answer)
    except ValueError as error:
        raise RRError(f"{place}: {error}", f"grade={source.options.get('grade')} cannot compare with it.") from None
    if "solution" in names:
        stated = _found(row, names["solution"])
        if not isinstance(stated, str) or not stated.strip():
            raise RRError(f"{place}: no '{names['solution']}' that is text", _hint(source, "solution"))
        solution = stated.strip()
    elif not solution and expected != answer and "choices" not in names:
        solution = answer
    return Problem(source.spec, question, expected, entry, solution)


def _found(row: Mapping[str, Any], name: str) -> Any:
    """Return the value of a field; `outer.inner` is one inside of another, unless a field has this name."""
    if name in row or "." not in name:
        return row.get(name)
    outer, _, inner = name.partition(".")
    inside = row.get(outer)
    return _found(inside, inner) if isinstance(inside, Mapping) else None


def _answer(value: Any, name: str, source: ProblemSource, place: str) -> tuple[str, str]:
    """Return (answer, solution); the solution is empty where it is the answer itself."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return format(Decimal(repr(value)), "f"), ""
    if isinstance(value, str) and value.strip():
        solution = value.strip()
        answer = solution.rpartition(MARK)[2].strip()
        if answer:
            return answer, solution if MARK in solution else ""
        raise RRError(f"{place}: no answer after '{MARK}'", _hint(source, "answer"))
    raise RRError(f"{place}: no '{name}' that is a text or a number", _hint(source, "answer"))


def _choices(value: Any, name: str, place: str) -> tuple[list[str], list[str]]:
    """Return the answers to choose from, and their own labels, if they have any.

    Raises:
        RRError: it is no list of texts or numbers.
    """
    labels: Any = None
    if isinstance(value, Mapping):
        value, labels = value.get("text"), value.get("label")
    elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        value, labels = [item.get("text") for item in value], [item.get("label") for item in value]
    good = isinstance(value, list) and 1 < len(value) <= len(LETTERS)
    if not good or not all(isinstance(text, str | int | float) for text in value):
        hint = "Write a list of texts, or {text: [...], label: [...]}."
        raise RRError(f"{place}: '{name}' is no list of answers", hint)
    return [str(text).strip() for text in value], [str(label) for label in labels or ()]


def _letter(value: Any, choices: list[str], labels: list[str], place: str) -> str:
    """Return the letter of the right answer, which is given as a label, a letter, the answer, or a number from 0.

    Raises:
        RRError: it is none of these.
    """
    written = str(value).strip()
    counted = [int(written)] if re.fullmatch(r"\d{1,2}", written) and int(written) < len(choices) else []
    for places in (
        [n for n, label in enumerate(labels) if label == written],
        [n for n, letter in enumerate(LETTERS[: len(choices)]) if letter == written.upper()],
        counted if isinstance(value, int) else [],
        [n for n, choice in enumerate(choices) if choice == written],
        counted,
    ):
        if len(places) == 1:
            return LETTERS[places[0]]
    raise RRError(f"{place}: the answer {written[:40]!r} is none of the {len(choices)} choices")


def _options(text: str, spec: str) -> Iterator[tuple[str, str]]:
    """Yield the options of a task; a pattern takes all that follows it."""
    before, pattern, rest = text.partition(f"grade={REGEX}")
    for item in filter(None, (part.strip() for part in before.split(","))):
        key, equals, written = item.partition("=")
        if not equals:
            raise UsageError(f"task option '{item}' in '{spec}' has no value", "Write FILE:key=value,key=value.")
        yield key.strip(), written.strip()
    if pattern:
        yield "grade", REGEX + rest


def _hint(source: ProblemSource, name: str) -> str:
    example = f"{source.place}:{name}=FIELD"
    hint = f"Name the field that holds the {name}: --task {example}."
    return (
        hint
        if source.place.endswith((".csv", ".parquet")) or source.on_hub
        else (f'Write {{"question": "...", "answer": "..."}} on each line, or name other fields: --task {example}.')
    )
