"""How much an experiment has to compute: batches, texts and problems, counted in the data. Reads no weights.

A part of the data stands for all: some batches for every step, some texts for the test side. Data that only comes
through the network, or from standard input, is not read; then every example is taken to be as long as it may be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rrcli.data.corpus import reads_stdin
from rrcli.data.tokens import text_ids
from rrcli.data.training_data import TrainingData, task_specs
from rrcli.errors import RRError
from rrcli.evaluation.answers import problem_prompts
from rrcli.evaluation.held_out import EvalData, held_out_data
from rrcli.evaluation.windows import DEFAULT_LENGTH
from rrcli.recursion.facts import context_length, vocabulary
from rrcli.reporting import Silent
from rrcli.settings import EvalSettings, TrainSettings, with_changes

# How many batches stand for all steps, and how many texts and problems for all.
BATCHES, TEXTS, PROBLEMS = 8, 64, 32
# Tokens of the test side, and of a prompt, where the data is not read.
ASSUMED_TEXT, ASSUMED_PROMPT = 100_000, 64


@dataclass(frozen=True)
class Workload:
    """What an experiment computes.

    Attributes:
        rows, width: the positions of a step's batch, padding included: on average over steps.
        tokens: how many of them bear loss.
        text: tokens of the test side. problems: of each seed. prompt: the tokens of a problem, on average.
        validation_text, validation_problems: of each measurement during training.
        notices: what was assumed.
    """

    rows: float
    width: float
    tokens: float
    text: int
    problems: int
    prompt: float
    validation_text: int
    validation_problems: int
    notices: tuple[str, ...] = ()


def workload(
    training: TrainSettings, evaluation: EvalSettings, directory: Path, model: Any, tokenizer: Any | None
) -> Workload:
    """Count what an experiment computes.

    Args:
        model: its skeleton. tokenizer: None where it cannot be loaded.
    """
    width = min(training.max_length, context_length(model))
    tasks = 0 if evaluation.skip_reasoning else len(task_specs(evaluation))
    assumed = Workload(
        rows=training.batch_size,
        width=width,
        tokens=training.batch_size * width,
        text=0 if evaluation.skip_perplexity else evaluation.max_samples * DEFAULT_LENGTH or ASSUMED_TEXT,
        problems=evaluation.problems * tasks,
        prompt=min(ASSUMED_PROMPT, context_length(model) // 2),
        validation_text=training.eval_samples * width,
        validation_problems=training.eval_samples * tasks,
        notices=("the data is not read: every example is taken to be as long as it may be",),
    )
    read = [training.data, training.eval_data, *task_specs(training), *task_specs(evaluation)]
    if tokenizer is None or reads_stdin(training) or any("hf://" in spec for spec in read):
        return assumed
    try:
        return _counted(assumed, with_changes(training, max_length=width), evaluation, directory, model, tokenizer)
    except RRError as error:
        return replace(assumed, notices=(f"the data cannot be read ({error.message}); {assumed.notices[0][22:]}",))


def _counted(
    assumed: Workload,
    training: TrainSettings,
    evaluation: EvalSettings,
    directory: Path,
    model: Any,
    tokenizer: Any,
) -> Workload:
    data = TrainingData(training, directory, tokenizer, vocabulary=vocabulary(model))
    batches = [data.batch(step) for step in range(min(BATCHES, training.steps))]
    count = len(batches)
    test = held_out_data(
        evaluation, directory, min(PROBLEMS, evaluation.problems), evaluation.max_samples,
        reasoning=not evaluation.skip_reasoning,
    )  # fmt: skip
    prompt = assumed.prompt
    if test.problems:
        asked = problem_prompts(model, tokenizer, test, settings=evaluation, reporter=Silent())[1]
        prompt = sum(map(len, asked)) / len(asked)
    return replace(
        assumed,
        rows=sum(len(batch.input_ids) for batch in batches) / count,
        width=sum(batch.input_ids.shape[1] for batch in batches) / count,
        tokens=sum(batch.tokens for batch in batches) / count,
        text=0 if evaluation.skip_perplexity else _tokens_of(test, evaluation, tokenizer),
        prompt=prompt,
        validation_text=_tokens_of(test, evaluation, tokenizer, most=training.eval_samples),
        notices=(),
    )


def _tokens_of(data: EvalData, settings: EvalSettings, tokenizer: Any, most: int = 0) -> int:
    """Return about how many tokens the texts have: some of them are encoded, the others counted by characters."""
    texts: Sequence[str] = data.texts(tokenizer, settings)
    texts = texts[:most] if most else texts
    sample = texts[:TEXTS]
    characters = sum(map(len, sample))
    if not characters:
        return 0
    tokens = sum(len(text_ids(tokenizer, text)) for text in sample)
    return round(tokens * sum(map(len, texts)) / characters)
