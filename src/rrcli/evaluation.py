"""Measuring a model: the one evaluation path of `rr eval`, of evaluations during training, and of the public API.

Each part returns records (per document, problem, prompt); `metrics` turns records into numbers with intervals. A model
with a recursion is measured at every depth up to the one asked for.
"""

from __future__ import annotations

import re
import resource
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rrcli import metrics
from rrcli.data import EvalData, encode_prompt, held_out_data, start_token
from rrcli.errors import RRError, UsageError
from rrcli.recursion.chunks import ChunkTotals, teacher_forced_chunks
from rrcli.recursion.readout import Readout
from rrcli.reporting import Reporter, Silent
from rrcli.settings import EvalSettings, with_changes
from rrcli.splits import content_hash
from rrcli.tasks import Problem, Task, prompt_of
from rrcli.tracker import MetricsTracker

DEFAULT_WINDOW = 1024
GENERATED_TOKENS = 48
PREFILL_TOKENS = 128
DECODE_TOKENS = 32
REPEATS = 5


@torch.no_grad()
def evaluate_model(
    model: Any,
    tokenizer: Any,
    eval_data: EvalData | Sequence[str] | str | Path,
    metrics_tracker: MetricsTracker | None = None,
    step: int | None = None,
    *,
    stage: str = "model",
    settings: EvalSettings | None = None,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Measure a model and return its metrics and the records behind them.

    Args:
        model: a causal language model of transformers, with or without a recursion attached.
        eval_data: an `EvalData`, a list of texts, or the name of a text source (its held-out part is used).
        metrics_tracker: where scalars `evaluation/<stage>/<metric>` and generations are logged.
        step: the training step that they are logged at.
        settings: lengths, limits and what to leave out; the defaults of `rr eval` if not given.

    Returns:
        `metrics` (name -> value, low, high, n), `by_depth`, `records`, `warnings`.

    Raises:
        RRError: nothing to measure, or logits that are not finite.
    """
    settings = settings or EvalSettings()
    reporter = reporter or Silent()
    data = _eval_data(eval_data, settings)
    depth = _depth(model, settings)
    training = model.training
    model.eval()
    recursion = getattr(model, "recursion", None)
    before = recursion.depth if recursion is not None else 0
    torch.manual_seed(settings.seed)
    records: dict[str, list[dict[str, Any]]] = {}
    values: dict[str, dict[str, Any]] = {}
    try:
        if recursion is not None:
            recursion.depth = depth
        if data.documents and not settings.skip_perplexity:
            records["documents"], chunks = score_documents(model, tokenizer, data.documents, settings, reporter)
            values |= {name: {"value": value} for name, value in chunks.metrics().items()}
        if data.problems and not settings.skip_reasoning:
            records["problems"] = solve_problems(model, tokenizer, data, settings, depth, reporter)
        if data.prompts and not settings.skip_generation:
            records["generations"] = continue_prompts(model, tokenizer, data.prompts, settings, reporter)
        if data.documents and not settings.skip_performance:
            values |= measure_performance(model, tokenizer, data.documents, reporter)
    finally:
        if recursion is not None:
            recursion.depth = before
        model.train(training)
    if not records:
        raise RRError("there is nothing to evaluate", "Give documents or problems, and do not skip every part.")
    values = metrics.from_records(records) | values
    if metrics_tracker is not None:
        log_evaluation(metrics_tracker, values, records, stage, step or 0)
    return {"metrics": values, "by_depth": metrics.by_depth(records), "records": records, "depth": depth}


def log_evaluation(
    tracker: MetricsTracker, values: dict[str, Any], records: dict[str, Any], stage: str, step: int
) -> None:
    """Log metrics as scalars and generations as text, under `evaluation/<stage>/`."""
    for name, entry in values.items():
        tracker.log_scalar(f"evaluation/{stage}/{name}", entry["value"], step)
    lines = [f"**{r['prompt']}**{r['text']}" for r in records.get("generations", ())]
    if lines:
        tracker.log_text(f"evaluation/{stage}/generations", "\n\n---\n\n".join(lines), step)
    tracker.flush()


# -- text --------------------------------------------------------------------------------------------------------------


def rolling_windows(tokens: list[int], prefix: int, length: int, stride: int) -> list[tuple[list[int], int]]:
    """Cut a document into windows so that every token is scored exactly once.

    The first window scores up to `length` tokens from the prefix token on; each later one moves on by `stride` tokens,
    scores those, and sees the `length - stride` before them. The last one reaches back to a full window. These are the
    windows of lm-eval's `loglikelihood_rolling` when `stride == length`.

    Returns:
        (input ids, how many of the last positions are scored) for each window.
    """
    stream = [prefix, *tokens]
    first = min(length, len(tokens))
    windows = [(stream[:first], first)]
    done = first
    while done < len(tokens):
        scored = min(stride, len(tokens) - done)
        done += scored
        windows.append((stream[max(0, done - length) : done], scored))
    return windows


def score_documents(
    model: Any, tokenizer: Any, documents: Sequence[str], settings: EvalSettings, reporter: Reporter
) -> tuple[list[dict[str, Any]], ChunkTotals]:
    """Score every token of every document once, at every depth, and return per-document records.

    Windows of all documents are sorted by length together and run without a cache; the head sees scored rows only.
    Log-probabilities are reduced in fp32 and summed in fp64.

    Returns:
        Records with `key`, `tokens`, `words`, `bytes`, and per depth `nll` (nats) and `correct` (top-1 hits); and the
        totals of the chunk metrics.

    Raises:
        RRError: a log-probability is not finite; names the document.
    """
    readout = Readout(model)
    prefix = start_token(tokenizer)
    length = settings.max_length or min(DEFAULT_WINDOW, _context(model))
    stride = min(settings.stride or length, length)
    encoded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in documents]
    if prefix is None:
        prefix = next((ids[0] for ids in encoded if ids), 0)
    jobs = []
    for number, ids in enumerate(encoded):
        begin = 0
        for window, scored in rolling_windows(ids, prefix, length, stride) if ids else ():
            jobs.append((window, ids[begin : begin + scored], number))
            begin += scored
    jobs.sort(key=lambda job: -len(job[0]))
    depths = (readout.recursion.depth if readout.recursion is not None else 0) + 1
    nll = [[0.0] * depths for _ in documents]
    correct = [[0] * depths for _ in documents]
    totals = ChunkTotals()
    total = sum(len(target) for _, target, _ in jobs)
    with reporter.progress("perplexity", total, "tokens") as progress:
        for index, batch in enumerate(_batches(jobs, settings.batch_tokens, lambda job: len(job[0]))):
            ids, mask = _padded([job[0] for job in batch], model.device)
            if index == 0:
                readout.check(ids[:1], mask[:1])
            passes = readout.passes(ids, mask)
            scored = torch.zeros_like(mask, dtype=torch.bool)
            for row, (window, target, _) in enumerate(batch):
                scored[row, len(window) - len(target) : len(window)] = True
            targets = torch.tensor([token for _, target, _ in batch for token in target], device=model.device)
            owner = [number for _, target, number in batch for _ in target]
            predictions = []
            for depth, hidden in enumerate(passes.hidden):
                loss, prediction = readout.token_losses(hidden[scored], targets)
                predictions.append(prediction)
                _accumulate(nll, correct, owner, depth, loss, prediction.eq(targets))
            totals.add(_chunks(readout, passes, scored, torch.stack(predictions), targets, batch))
            progress.advance(len(targets))
    for number, row in enumerate(nll):
        if not all(value == value and value != float("inf") for value in row):
            raise RRError(
                f"the model gives no finite probability to document {number + 1} ({documents[number][:40]!r})",
                "Its weights or its dtype are broken; try --dtype float32.",
            )
    records = [
        {
            "key": content_hash(text),
            "tokens": len(ids),
            "words": len(re.split(r"\s+", text)),
            "bytes": len(text.encode()),
            "nll": nll[number],
            "correct": correct[number],
        }
        for number, (text, ids) in enumerate(zip(documents, encoded, strict=True))
        if ids
    ]
    return records, totals


def _accumulate(
    nll: list[list[float]], correct: list[list[int]], owner: list[int], depth: int, loss: Tensor, hit: Tensor
) -> None:
    index = torch.tensor(owner, device=loss.device)
    documents, inverse = index.unique(return_inverse=True)
    sums = torch.zeros(len(documents), dtype=torch.float64, device=loss.device).index_add_(0, inverse, loss.double())
    hits = torch.zeros(len(documents), dtype=torch.long, device=loss.device).index_add_(0, inverse, hit.long())
    for number, value, count in zip(documents.tolist(), sums.tolist(), hits.tolist(), strict=True):
        nll[number][depth] += value
        correct[number][depth] += count


def _chunks(
    readout: Readout, passes: Any, scored: Tensor, predictions: Tensor, targets: Tensor, batch: list[Any]
) -> ChunkTotals:
    recursion = readout.recursion
    if recursion is None or len(predictions) < 2:
        return ChunkTotals()
    commit = torch.stack([recursion.head(state[scored]).float().sigmoid() for state in passes.states[:-1]])
    width, number, windows = recursion.config.chunk_width, 0, []
    for _, target, _ in batch:
        windows += [number + position // width for position in range(len(target))]
        number = windows[-1] + 1
    return teacher_forced_chunks(predictions, commit, targets, torch.tensor(windows, device=targets.device))


# -- problems and prompts ----------------------------------------------------------------------------------------------


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
    for batch in _batches(order, batch_tokens, lambda number: len(prompts[number]) + new_tokens):
        ids, mask = _padded([prompts[number] for number in batch], model.device, left=True)
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


# -- performance -------------------------------------------------------------------------------------------------------


def measure_performance(
    model: Any, tokenizer: Any, documents: Sequence[str], reporter: Reporter
) -> dict[str, dict[str, Any]]:
    """Time prefill and decoding of real text, one row, after a warm-up; count memory and FLOPs.

    Returns:
        Medians with the range of `REPEATS` runs: `prefill_tokens_per_sec`, `decode_tokens_per_sec`,
        `time_per_output_token` (ms), `memory_mb` (peak: CUDA's counter on a GPU, the process's resident set on a CPU),
        `flops_per_token` (MFLOP, counted by torch over the prefill).
    """
    from torch.utils.flop_counter import FlopCounterMode

    tokens: list[int] = []
    for text in documents:
        tokens += tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(tokens) >= PREFILL_TOKENS:
            break
    room = _context(model) - DECODE_TOKENS
    ids = torch.tensor([tokens[: min(PREFILL_TOKENS, room)]], device=model.device)
    mask = torch.ones_like(ids)
    cuda = model.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()

    def run(new_tokens: int) -> float:
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=0,
        )
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    prefill, decode = [], []
    with reporter.progress("performance", REPEATS + 1, "runs") as progress:
        for repeat in range(REPEATS + 1):
            short, long = run(1), run(1 + DECODE_TOKENS)
            if repeat:
                prefill.append(short)
                decode.append(max(long - short, 1e-9) / DECODE_TOKENS)
            progress.advance()
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    if cuda:
        memory = torch.cuda.max_memory_allocated() / 2**20
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        memory = peak / 2**20 if sys.platform == "darwin" else peak / 2**10
    return {
        "prefill_tokens_per_sec": _median([ids.shape[1] / seconds for seconds in prefill]),
        "decode_tokens_per_sec": _median([1 / seconds for seconds in decode]),
        "time_per_output_token": _median([1000 * seconds for seconds in decode]),
        "memory_mb": {"value": memory},
        "flops_per_token": {"value": counter.get_total_flops() / ids.shape[1] / 1e6},
    }


# -- helpers -----------------------------------------------------------------------------------------------------------


def _eval_data(eval_data: EvalData | Sequence[str] | str | Path, settings: EvalSettings) -> EvalData:
    if isinstance(eval_data, EvalData):
        return eval_data
    if isinstance(eval_data, (str, Path)):
        return held_out_data(
            with_changes(settings, data=str(eval_data)), Path.cwd(), settings.problems, settings.max_samples
        )
    return EvalData(documents=tuple(eval_data))


def _depth(model: Any, settings: EvalSettings) -> int:
    recursion = getattr(model, "recursion", None)
    if recursion is None:
        if settings.depth > 0:
            raise UsageError(f"depth is {settings.depth}, but the model has no recursion", "Leave --depth out.")
        return 0
    if settings.depth > recursion.config.max_steps:
        raise UsageError(f"depth is {settings.depth}", f"This recursion has at most {recursion.config.max_steps}.")
    return recursion.config.max_steps if settings.depth < 0 else settings.depth


def _context(model: Any) -> int:
    """Return the longest input the model's configuration allows, in tokens."""
    config = model.config.get_text_config()
    return next((v for n in ("max_position_embeddings", "n_positions") if (v := getattr(config, n, None))), 2048)


def _stop_ids(model: Any, tokenizer: Any) -> set[int]:
    configured = model.generation_config.eos_token_id
    configured = configured if isinstance(configured, list) else [configured]
    return {token for token in (*configured, tokenizer.eos_token_id) if token is not None}


def _batches(items: Sequence[Any], budget: int, length: Any) -> Iterator[list[Any]]:
    """Cut items, longest first, into batches whose padded size stays within `budget` tokens (at least one item)."""
    begin = 0
    while begin < len(items):
        rows = max(1, budget // max(1, length(items[begin])))
        yield list(items[begin : begin + rows])
        begin += rows


def _padded(rows: Sequence[list[int]], device: Any, *, left: bool = False) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        gap = width - len(row)
        ids.append([0] * gap + row if left else row + [0] * gap)
        mask.append([0] * gap + [1] * len(row) if left else [1] * len(row) + [0] * gap)
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _median(values: list[float]) -> dict[str, Any]:
    return {"value": statistics.median(values), "low": min(values), "high": max(values), "n": len(values)}
