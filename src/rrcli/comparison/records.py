"""The kinds of records in a results file: their names, their identity, and their outcome.

A record is what was measured on one document, problem, prompt or sample of lm-eval.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rrcli.evaluation.metrics import Record


@dataclass(frozen=True)
class Part:
    """A kind of record.

    Attributes:
        noun: the word for its records. outcomes: the words for what a stage made of them.
        identity: two records with the same key are about the same document, problem, ... if these fields are equal too.
        held: these fields in words.
        outcome: returns what a stage made of a record: one value for each depth, pass 0 first.
        key_fields: the fields of its key. A sample of lm-eval has a record for each metric, all with the same `key`.
    """

    noun: str
    outcomes: str
    identity: tuple[str, ...]
    held: str
    outcome: Callable[[Record], list[Any]]
    key_fields: tuple[str, ...] = ("key",)

    def key(self, record: Record) -> tuple[Any, ...]:
        """Return what tells a record from all others of a stage."""
        return tuple(record[field] for field in self.key_fields)


PARTS = {
    "documents": Part(
        "documents",
        "documents' log-probabilities",
        ("bytes", "tokens"),
        "tokens or bytes",
        lambda record: list(record["nll"]),
    ),
    "problems": Part(
        "problems",
        "problems' answers",
        ("question", "answer"),
        "question or answer",
        lambda record: list(record["outputs"]),
    ),
    "generations": Part("prompts", "generations", ("prompt",), "prompt", lambda record: [record["text"]]),
    "harness": Part(
        "samples",
        "samples of lm-eval",
        ("target",),
        "target",
        lambda record: [record["score"]],
        key_fields=("task", "metric", "key"),
    ),
}


def difficulty_text(level: str | float | None) -> str:
    """Return the difficulty of a problem as text; '' if it has none."""
    return "" if level is None else f"{level:g}" if isinstance(level, float) else str(level)
