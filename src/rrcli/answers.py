"""Greedy decoding of questions and prompts, and the judging of answers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from rrcli import metrics
from rrcli.batching import batches, padded
from rrcli.data import EvalData, encode_prompt
from rrcli.reporting import Reporter
from rrcli.settings import EvalSettings
from rrcli.splits import content_hash
from rrcli.tasks import Problem, Task, prompt_of

GENERATED_TOKENS = 48


def solve_problems(
    model: Any, tokenizer: Any, data: EvalData, settings: EvalSettings, depth: int, reporter: Reporter
) -> list[dict[str, Any]]:
    """Answer every problem greedily at every depth and let its generator score the answer.

    Returns:
        Records with the problem, and per depth `outputs`, `strict` (the whole answer is right) and `correct` (it is
        right, or for numeric answers the last number in it is).
    """
    tasks = {task.spec: task for task in data.tasks}
    prompts = [question_ids(tokenizer, problem.question, settings) for problem in data.problems]
    records = [
        {
            "key": problem.key,
            "task": problem.task,
            "question": problem.question,
            "answer": problem.answer,
            **{name: [] for name in ("outputs", "strict", "correct")},
        }
        for problem in data.problems
    ]
    recursion = getattr(model, "recursion", None)
    depths = range(depth + 1) if recursion is not None else (0,)
    with reporter.progress("reasoning", len(prompts) * len(depths), "problems") as progress:
        for current in depths:
            if recursion is not None:
                recursion.depth = current
            for number, tokens, _ in generate(
                model, tokenizer, prompts, settings.max_new_tokens, settings.batch_tokens
            ):
                problem = data.problems[number]
                output = tokenizer.decode(tokens, skip_special_tokens=True)
                strict, correct = judge(tasks[problem.task], problem, output)
                for name, value in (("outputs", output), ("strict", strict), ("correct", correct)):
                    records[number][name].append(value)
                progress.advance()
    return records


def question_ids(tokenizer: Any, question: str, settings: EvalSettings) -> list[int]:
    """Return the ids of a question: through the chat template where there is one, else as a plain prompt."""
    if settings.chat_template and getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    return encode_prompt(tokenizer, prompt_of(question))


def judge(task: Task, problem: Problem, output: str) -> tuple[bool, bool]:
    """Return (strictly right, right with flexible extraction of a number)."""
    answer = output.split("\nQuestion:")[0].strip()
    tagged = re.search(r"<answer>(.*?)</answer>", answer, re.DOTALL)
    answer = tagged.group(1).strip() if tagged else answer
    if task.score(answer, problem) >= 1:
        return True, True
    if re.fullmatch(r"[-+]?[\d,]*\.?\d+", problem.answer):
        numbers = re.findall(r"[-+]?\d[\d,]*(?:\.\d+)?", answer)
        if numbers and task.score(numbers[-1].replace(",", ""), problem) >= 1:
            return False, True
    return False, False


def continue_prompts(
    model: Any, tokenizer: Any, prompts: Sequence[str], settings: EvalSettings, reporter: Reporter
) -> list[dict[str, Any]]:
    """Continue each prompt greedily; return texts with length, whether they ended by themselves, distinct-2, rep-4."""
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    records: list[dict[str, Any]] = [{} for _ in prompts]
    with reporter.progress("generation", len(prompts), "prompts") as progress:
        for number, tokens, finished in generate(model, tokenizer, encoded, GENERATED_TOKENS, settings.batch_tokens):
            records[number] = {
                "key": content_hash(prompts[number]),
                "prompt": prompts[number],
                "text": tokenizer.decode(tokens, skip_special_tokens=True),
                "length": len(tokens),
                "finished": finished,
                "distinct_2": metrics.distinct_n(tokens, 2),
                "rep_4": metrics.rep_n(tokens, 4),
            }
            progress.advance()
    return records


def generate(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], new_tokens: int, batch_tokens: int
) -> Iterator[tuple[int, list[int], bool]]:
    """Decode greedily in batches of similar length; yield (prompt's number, new ids without EOS, ended by itself)."""
    stops = _stop_ids(model, tokenizer)
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    for batch in batches(order, batch_tokens, lambda number: len(prompts[number]) + new_tokens):
        ids, mask = padded([prompts[number] for number in batch], model.device, left=True)
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=new_tokens,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            eos_token_id=sorted(stops) or None,
            pad_token_id=min(stops, default=0),
        )
        for number, row in zip(batch, output[:, ids.shape[1] :].tolist(), strict=True):
            end = next((i for i, token in enumerate(row) if token in stops), None)
            yield number, row[:end], end is not None


def _stop_ids(model: Any, tokenizer: Any) -> set[int]:
    configured = model.generation_config.eos_token_id
    configured = configured if isinstance(configured, list) else [configured]
    return {token for token in (*configured, tokenizer.eos_token_id) if token is not None}
