"""Judges answers: strictly (the answer and nothing else) and flexibly (the final answer in a longer text).

The part of an output that is the answer is what stands after `####` or between <answer> tags, if there is one of these;
else all of it. A task may have a grader that looks for it in another way (see `rrcli.data.graders`).

- *Strict*: that part is right as a whole.
- *Flexible*: it is right, or else its final answer is. That is the content of the last `\\boxed{}`; without one, what
  follows the last "answer is" or "answer:" (a number: the first one after it); without one, and where a number is
  expected, the last number.

On ordinary outputs of GSM8K both agree with lm-eval's filters `strict-match` and `flexible-extract`; see
docs/evaluation.md for where they do not.
"""

from __future__ import annotations

from dataclasses import dataclass

from rrcli.data.numbers import number
from rrcli.data.problem_files import FileTask
from rrcli.data.tasks import Problem, Task


@dataclass(frozen=True)
class Judgement:
    """How an output was judged.

    Attributes:
        extracted: the text that was scored. strict: whether the whole answer is right.
        correct: whether the whole answer or, in a longer text, the final answer is right.
        score: the scorer's own, in [0, 1].
    """

    extracted: str
    strict: bool
    correct: bool
    score: float


def judge(task: Task | FileTask, problem: Problem, output: str) -> Judgement:
    """Judge one output, which has already been cut at its stop string."""
    answer = task.extract(output)
    score = _score(task, problem, answer)
    if score >= 1:
        return Judgement(answer, True, True, score)
    final = task.final(answer, problem)
    if final is not None and (flexible := _score(task, problem, final)) >= 1:
        return Judgement(final, False, True, flexible)
    return Judgement(answer, False, False, score)


def _score(task: Task | FileTask, problem: Problem, answer: str) -> float:
    """Return the task's score of an answer; the same number in another form counts as the expected one."""
    expected = number(problem.answer)
    if expected is None or isinstance(task, FileTask):
        return task.score(answer, problem)
    found = number(answer)
    return task.score(problem.answer if found == expected else answer, problem)
