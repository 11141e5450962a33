"""Judges answers: strictly (the answer and nothing else) and flexibly (the last number in it)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from rrcli.data.problem_files import FileTask, number
from rrcli.data.tasks import Problem, Task

# A sign belongs to a number unless it stands between two numbers: '10-4' does not contain -4.
NUMBER = re.compile(r"(?:(?<![\w.])[-+])?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")


@dataclass(frozen=True)
class Judgement:
    """How an output was judged.

    Attributes:
        extracted: the text that was scored. strict: whether the whole answer is right.
        correct: whether the whole answer is right or, if a number is expected, the last number in it.
        score: the scorer's own, in [0, 1].
    """

    extracted: str
    strict: bool
    correct: bool
    score: float


def judge(task: Task | FileTask, problem: Problem, output: str) -> Judgement:
    """Judge one output, which has already been cut at its stop string."""
    answer = task.extract(output)
    score = task.score(answer, problem)
    if score >= 1:
        return Judgement(answer, True, True, score)
    if number(problem.answer) is not None:
        numbers = NUMBER.findall(answer)
        last = numbers[-1].replace(",", "") if numbers else ""
        if last and (flexible := task.score(last, problem)) >= 1:
            return Judgement(last, False, True, flexible)
    return Judgement(answer, False, False, score)
