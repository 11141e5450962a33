"""Answers to reasoning problems and continuations of prompts, logged batch by batch, so that both can be resumed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rrcli.data.dealing import ALONE, Team
from rrcli.data.prompts import stop_strings
from rrcli.data.rendering import encode_question, question_text
from rrcli.data.splits import content_hash
from rrcli.data.tasks import Problem
from rrcli.data.tokens import encode_prompt
from rrcli.errors import CheckFailed, RRError, UsageError
from rrcli.evaluation import metrics
from rrcli.evaluation.decoding import Decoded, decode, room_for
from rrcli.evaluation.exit_answers import Answers
from rrcli.evaluation.held_out import EvalData
from rrcli.evaluation.judging import judge
from rrcli.evaluation.lookup import look_up
from rrcli.evaluation.samples import SampleLog
from rrcli.recursion.engine import at_depth
from rrcli.recursion.exits import ExitRule
from rrcli.recursion.facts import context_length, refuse_unknown_tokens, vocabulary
from rrcli.reporting import Reporter
from rrcli.settings import EvalSettings

GENERATED_TOKENS = 48
# What is recorded of an answer, for each depth.
ANSWER = ("output", "extracted", "strict", "correct", "score", "length", "ended")


def solve_problems(
    model: Any,
    tokenizer: Any,
    data: EvalData,
    *,
    depth: int,
    settings: EvalSettings,
    reporter: Reporter,
    log: SampleLog | None = None,
    exit: ExitRule | None = None,
    team: Team = ALONE,
) -> list[dict[str, Any]]:
    """Answer every problem greedily at every depth up to `depth` and let its task score the answer.

    Args:
        depth: the last depth that is measured; a model without a recursion has depth 0 alone.
        exit: a rule whose answers are judged too, as if it were one more depth.
        team: the processes among which the problems are dealt out.

    Returns:
        Records with the problem and its prompt, and lists with an entry per depth: `outputs`, `extracted` (what was
        scored), `strict` (the whole answer is right), `correct` (it is right, or for numeric answers the last number
        in it is), `score` (the task's own), `length` (new tokens) and `ended` (by itself, not at the cap). With an exit
        rule, `passes` (with which each new token left) and `pieces` (the answer's text in pieces, with their passes).
        On the test side also `lookup`: whether the answer of the nearest training problem is right, if there is one.

    Raises:
        UsageError: a stop string is empty, or solved examples are asked of a task that has none to give.
        RRError: the tokenizer makes no token of a prompt, or one that the model has no embedding for.
        CheckFailed: every answer is empty.
    """
    log = log or SampleLog()
    stop = stop_strings(settings.stop)
    texts, prompts = problem_prompts(model, tokenizer, data, settings=settings, reporter=reporter)
    count, seen = len(data.problems), set[tuple[int, int]]()
    # A set after the other, so that sets may be added to an evaluation; under an exit rule all are answered together.
    rounds = [(span, current) for span in data.spans for current in range(depth + 1)]
    last = [(range(count), depth + 1)] if exit is not None else []
    places = [(span, at_depth) for span, at_depth in rounds + last for _ in span]

    def fits(place: int, entry: dict[str, Any]) -> bool:
        number, at_depth = entry["number"], entry["depth"]
        new = (number, at_depth) not in seen
        seen.add((number, at_depth))
        in_order = place < len(places) and number in places[place][0] and at_depth == places[place][1]
        return new and in_order and bool(entry["key"] == data.problems[number].key)

    entries = log.done("problems", fits)
    tasks = {task.spec: task for task in data.tasks}
    columns = depth + 1 + (exit is not None)
    decoded: dict[int, dict[int, list[int]]] = {current: {} for current in range(depth + 1)}
    with reporter.progress("reasoning", len(prompts) * columns, "problems") as progress:
        progress.advance(len(entries))
        begin = 0
        for span, current in rounds:
            skip = min(len(span), max(0, len(entries) - begin))
            begin += len(span)

            def judged(answer: Decoded, first: int = span.start) -> dict[str, Any]:
                problem = data.problems[first + answer.number]
                return vars(judge(tasks[problem.task], problem, answer.text))

            for batch in decode(
                model,
                tokenizer,
                prompts[span.start : span.stop],
                depth=current,
                new_tokens=settings.max_new_tokens,
                batch_tokens=settings.batch_tokens,
                stop=stop,
                skip=skip,
                team=team,
                make=judged,
            ):
                new = []
                for answer in batch:
                    number = span.start + answer.number
                    decoded[current][number] = answer.tokens
                    key = data.problems[number].key
                    new.append(
                        {"number": number, "depth": current, "key": key, "output": answer.text}
                        | answer.made
                        | {"length": len(answer.tokens), "ended": answer.ended}
                    )
                log.append("problems", new)
                entries += new
                progress.advance(len(new))
        if exit is not None:
            answers = Answers(model, tokenizer, prompts, settings, stop, reporter, decoded, team)
            with at_depth(model, depth):
                found = answers.under([exit])[0][len(entries) - (depth + 1) * count :]
            new = []
            for number, one in enumerate(found, start=count - len(found)):
                problem, text = data.problems[number], answers.cut(number, one.tokens)
                new.append(
                    {"number": number, "depth": depth + 1, "key": problem.key, "output": text}
                    | vars(judge(tasks[problem.task], problem, text))
                    | {"length": len(one.tokens), "ended": one.ended, "passes": list(one.passes)}
                    | {"pieces": answers.pieces(number, one)}
                )
            log.append("problems", new)
            entries += new
            progress.advance(len(new))
    records = _problem_records(data.problems, texts, entries)
    _refuse_silence(records)
    if data.side == "test":
        for record, right in zip(records, look_up(data.tasks, data.problems), strict=True):
            if right is not None:
                record["lookup"] = right
    return records


def problem_prompts(
    model: Any, tokenizer: Any, data: EvalData, *, settings: EvalSettings, reporter: Reporter
) -> tuple[list[str], list[list[int]]]:
    """Return how every problem is asked: as text, and as the token ids that the model is given.

    Raises:
        UsageError: solved examples are asked of a task that has none to give.
        RRError: the tokenizer makes no token of a prompt, or one that the model has no embedding for.
    """
    examples = {
        task.spec: task.examples(settings.num_fewshot) if settings.num_fewshot > 0 else [] for task in data.tasks
    }
    texts = [question_text(tokenizer, p.question, examples[p.task], settings) for p in data.problems]
    prompts = [encode_question(tokenizer, text, settings) for text in texts]
    for problem, prompt in zip(data.problems, prompts, strict=True):
        what = f"a problem of '{problem.task}' ({problem.question[:40]!r})"
        if not prompt:
            raise RRError(
                f"the tokenizer makes no token of {what}", "Name other problems with --task, or --skip-reasoning."
            )
        refuse_unknown_tokens(vocabulary(model), tokenizer, prompt, what)
    return texts, _within_context(model, prompts, settings.max_new_tokens, reporter)


def _refuse_silence(records: Sequence[dict[str, Any]]) -> None:
    """Refuse to score answers that are all empty.

    Raises:
        CheckFailed: every answer is empty at some depth.
    """
    for depth, answers in enumerate(zip(*(record["outputs"] for record in records), strict=True)):
        if not any(answer.strip() for answer in answers):
            raise CheckFailed(
                f"all {len(answers)} answers are empty at depth {depth}: this is no score",
                "Look at one with 'rr generate'; a stop string or end token may come first. 'rr setup' checks the "
                "installation.",
            )


def _problem_records(
    problems: Sequence[Problem], texts: Sequence[str], entries: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = [
        {"key": p.key, "task": p.task, "question": p.question, "prompt": text, "answer": p.answer}
        | ({} if p.difficulty is None else {"difficulty": p.difficulty})
        | {name: [] for name in ("outputs", *ANSWER[1:])}
        for p, text in zip(problems, texts, strict=True)
    ]
    for entry in entries:
        for name in ANSWER:
            records[entry["number"]]["outputs" if name == "output" else name].append(entry[name])
        if "passes" in entry:
            records[entry["number"]] |= {"passes": entry["passes"], "pieces": entry.get("pieces", [])}
    return records


def _within_context(model: Any, prompts: list[list[int]], new_tokens: int, reporter: Reporter) -> list[list[int]]:
    """Cut prompts on the left, as lm-eval does, where they and the new tokens don't fit into the model's context.

    Raises:
        UsageError: not even the new tokens fit.
    """
    room = context_length(model) - new_tokens
    if room < 1:
        raise UsageError(
            f"{new_tokens} new tokens do not fit into the model's context of {context_length(model)}",
            "Take a smaller --max-new-tokens.",
        )
    long = sum(len(prompt) > room for prompt in prompts)
    if long:
        reporter.warn(f"{long} of {len(prompts)} prompts were cut on the left to {room} tokens, to fit the context")
    return [prompt[-room:] for prompt in prompts]


def _with_tokens(
    model: Any, tokenizer: Any, prompts: Sequence[str], reporter: Reporter
) -> tuple[list[str], list[list[int]]]:
    """Return the prompts that have tokens, and these; the others are named in a warning.

    Raises:
        RRError: the model has no embedding for a token.
    """
    encoded = []
    for prompt in prompts:
        try:
            encoded.append(encode_prompt(tokenizer, prompt))
        except Exception:  # some tokenizers refuse words that they have no token for
            encoded.append([])
    empty = [repr(prompt[:40]) for prompt, ids in zip(prompts, encoded, strict=True) if not ids]
    if empty:
        reporter.warn(f"left out, without a single token: prompt {', '.join(empty)}; --prompts FILE names others")
    for prompt, ids in zip(prompts, encoded, strict=True):
        refuse_unknown_tokens(vocabulary(model), tokenizer, ids, f"the prompt {prompt[:40]!r}")
    return [p for p, ids in zip(prompts, encoded, strict=True) if ids], [ids for ids in encoded if ids]


def continue_prompts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    depth: int,
    settings: EvalSettings,
    reporter: Reporter,
    log: SampleLog | None = None,
    exit: ExitRule | None = None,
    team: Team = ALONE,
) -> list[dict[str, Any]]:
    """Continue each prompt greedily at a depth, or with an exit rule, without stop strings.

    A prompt of which the tokenizer makes no token is left out, which is said.

    Returns:
        Records with `prompt`, `text`, `length` (tokens), `finished` (it ended by itself), `distinct_2` and `rep_4`.
    """
    log = log or SampleLog()
    prompts, encoded = _with_tokens(model, tokenizer, prompts, reporter)
    new_tokens = room_for(model, GENERATED_TOKENS)
    if new_tokens < GENERATED_TOKENS:
        reporter.warn(
            f"sample generations have {new_tokens} tokens, not {GENERATED_TOKENS}: the model's context is "
            f"{context_length(model)}"
        )
    encoded = _within_context(model, encoded, new_tokens, reporter)
    keys = [content_hash(prompt) for prompt in prompts]
    seen = set[int]()

    def fits(_: int, entry: dict[str, Any]) -> bool:
        number = entry["number"]
        new = number not in seen
        seen.add(number)
        return new and number < len(keys) and entry["key"] == keys[number]

    entries = log.done("generations", fits)
    with reporter.progress("generation", len(prompts), "prompts") as progress:
        progress.advance(len(entries))
        for batch in decode(
            model,
            tokenizer,
            encoded,
            depth=depth,
            new_tokens=new_tokens,
            batch_tokens=settings.batch_tokens,
            skip=len(entries),
            exit=exit,
            team=team,
        ):
            new = [
                {
                    "number": found.number,
                    "key": keys[found.number],
                    "prompt": prompts[found.number],
                    "text": found.text,
                    "length": len(found.tokens),
                    "finished": found.ended,
                    "distinct_2": metrics.distinct_n(found.tokens, 2),
                    "rep_4": metrics.rep_n(found.tokens, 4),
                }
                for found in batch
            ]
            log.append("generations", new)
            entries += new
            progress.advance(len(new))
    return [
        {key: value for key, value in entry.items() if key not in ("number", "part")}
        for entry in sorted(entries, key=lambda entry: entry["number"])
    ]
