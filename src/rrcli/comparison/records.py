"""The parts of a results file: what a record is called, when two of them are the same one, and what came out of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rrcli.evaluation.metrics import Record


@dataclass(frozen=True)
class Part:
    """A kind of record.

    Attributes:
        noun: what its records are called. outcomes: what the outcomes of its records are called.
        identity: fields on which two records of one key agree if they are the same one.
        held: what these fields hold, in words.
        outcome: what a stage did with the record: one value for each depth, pass 0 first.
    """

    noun: str
    outcomes: str
    identity: tuple[str, ...]
    held: str
    outcome: Callable[[Record], list[Any]]


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
    "generations": Part("prompts", "generations", ("prompt",), "prompt or target", lambda record: [record["text"]]),
    "harness": Part("samples", "samples of lm-eval", ("target",), "prompt or target", lambda record: [record["score"]]),
}
