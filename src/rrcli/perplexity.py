"""Scoring text: every token of every document once, at every depth, in one streaming pass."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rrcli.batching import batches, context_length, padded
from rrcli.data import start_token
from rrcli.errors import RRError
from rrcli.recursion.chunks import ChunkTotals, teacher_forced_chunks
from rrcli.recursion.readout import Readout
from rrcli.reporting import Reporter
from rrcli.settings import EvalSettings
from rrcli.splits import content_hash

DEFAULT_WINDOW = 1024


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
    length = settings.max_length or min(DEFAULT_WINDOW, context_length(model))
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
        for index, batch in enumerate(batches(jobs, settings.batch_tokens, lambda job: len(job[0]))):
            ids, mask = padded([job[0] for job in batch], model.device)
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
