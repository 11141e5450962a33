"""Perplexity: the log-probability of every token of every document, at every depth."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rrcli.data.batching import affordable, batches, halving, padded
from rrcli.data.dealing import ALONE, Team, deal
from rrcli.data.splits import content_hash
from rrcli.data.tokens import scored_after, text_ids
from rrcli.errors import CheckFailed, RRError
from rrcli.evaluation.exit_answers import signals_of
from rrcli.evaluation.samples import SampleLog
from rrcli.evaluation.windows import Window, windows_of
from rrcli.recursion.calibration import BIN_SUMS, BINS, reliability
from rrcli.recursion.chunk_metrics import ChunkTotals, teacher_forced_chunks
from rrcli.recursion.exits import ExitRule
from rrcli.recursion.facts import refuse_unknown_tokens, vocabulary
from rrcli.recursion.families import input_device
from rrcli.recursion.readout import Readout, Scores
from rrcli.recursion.signals import draws, exit_passes
from rrcli.reporting import Reporter
from rrcli.settings import EvalSettings

# The name of this part of an evaluation in its log.
PART = "documents"


def score_documents(
    model: Any,
    tokenizer: Any,
    documents: Sequence[str],
    *,
    depth: int,
    settings: EvalSettings,
    reporter: Reporter,
    log: SampleLog | None = None,
    exit: ExitRule | None = None,
    team: Team = ALONE,
) -> tuple[list[dict[str, Any]], ChunkTotals]:
    """Score every token of every document once, at every depth up to `depth`, and return per-document records.

    Windows of all documents are sorted by length together and run without a cache; the head sees scored rows only.
    Log-probabilities are reduced in fp32 and summed in fp64. Batches are cut and summed in a fixed order, and each is
    logged as one entry. So a scoring that was interrupted and goes on with its log ends with the same bytes as one that
    was not.

    Args:
        depth: the last depth that is scored; a model without a recursion has depth 0 alone.
        exit: a rule that is scored too, as if it were one more depth: each token by the pass with which it leaves.
        team: the processes among which the batches are dealt out.

    Returns:
        Records with `key`, `tokens` (scored ones), `words`, `bytes`, and per depth `nll` (nats) and `correct` (top-1
        hits), with a rule also `passes`; and the totals of the chunk metrics. A document without tokens to score has no
        record; a warning names it.

    Raises:
        RRError: a log-probability is not finite, or the model has no embedding for a token; names the document.
        CheckFailed: all log-probabilities are equal, or no document has a token.
    """
    log = log or SampleLog()
    encoded = [scored_after(tokenizer, text_ids(tokenizer, text)) for text in documents]
    for number, (start, ids) in enumerate(encoded):
        what = f"document {number + 1} ({documents[number][:40]!r})"
        refuse_unknown_tokens(vocabulary(model), tokenizer, [*start, *ids], what)
    empty = [f"{number + 1} ({documents[number][:40]!r})" for number, (_, ids) in enumerate(encoded) if not ids]
    if len(empty) == len(encoded):
        raise CheckFailed("the tokenizer makes no token of any document", "Does it belong to this model and this text?")
    if empty:
        reporter.warn(f"left out, without a single token to score: document {', '.join(empty)}")
    windows = windows_of(model, encoded, settings=settings, reporter=reporter)
    expected = iter([[window.document, len(window.targets)] for window in windows])
    entries = log.done(PART, lambda _, entry: _fits(entry, expected, depth, exit=exit))
    done = sum(len(entry["windows"]) for entry in entries)
    readout = Readout(model)
    total = sum(len(window.targets) for window in windows)
    with reporter.progress("perplexity", total, "tokens") as progress:
        progress.advance(sum(len(window.targets) for window in windows[:done]))
        budget = 1
        if done < len(windows):
            budget = _budget(readout, windows, entries, depth=depth, settings=settings, reporter=reporter, team=team)
        score = partial(_score, readout, depth=depth, exit=exit)
        cut = batches(windows[done:], budget, lambda window: len(window.ids))
        for batch, parts in deal(cut, lambda batch: halving(score, batch, _too_large), team):
            entry = {"batch_tokens": budget, **_joined(parts)}
            for (number, _), nll in zip(entry["windows"], entry["nll"], strict=True):
                if not all(map(math.isfinite, nll)):
                    raise RRError(
                        f"the model gives no finite probability to document {number + 1} ({documents[number][:40]!r})",
                        "Its weights or its dtype are broken; try --dtype float32.",
                    )
            log.append(PART, [entry])
            entries.append(entry)
            progress.advance(sum(len(window.targets) for window in batch))
    _refuse_flat(entries)
    return _records(documents, [ids for _, ids in encoded], entries), _chunk_totals(entries)


def _fits(entry: dict[str, Any], expected: Iterator[list[int]], depth: int, *, exit: ExitRule | None) -> bool:
    """Tell whether a logged batch holds the next windows, with as many numbers for each as there are depths."""
    columns = depth + 1 + (exit is not None)
    rows, bins = len(entry["windows"]), entry["chunks"]["reliability"]
    return (
        all(window == next(expected, None) for window in entry["windows"])
        and len(entry["nll"]) == len(entry["correct"]) == rows > 0
        and {len(row) for name in ("nll", "correct") for row in entry[name]} == {columns}
        and len(entry["range"]) == columns
        and len(entry.get("left", ())) == (0 if exit is None else rows)
        and len(entry["chunks"]["stable"]) <= depth
        and {len(row) for row in bins} <= {BIN_SUMS}
        and len(bins) in (0, BINS)
    )


def _budget(
    readout: Readout,
    windows: list[Window],
    entries: list[dict[str, Any]],
    *,
    depth: int,
    settings: EvalSettings,
    reporter: Reporter,
    team: Team,
) -> int:
    """Check the first batch against the model's plain forward, and return the tokens of a batch that memory allows."""
    first = next(batches(windows, settings.batch_tokens, lambda window: len(window.ids)))
    warning = readout.choose_way(*padded([window.ids for window in first], input_device(readout.model)), depth=depth)
    if warning is not None:
        reporter.warn(warning)
    if entries:  # other cuts would round otherwise
        return int(entries[0]["batch_tokens"])
    token_bytes = readout.bytes_per_token(len(first[0].ids), depth=depth)
    return affordable(readout.model, settings.batch_tokens, token_bytes, reporter, team=team)


def _score(readout: Readout, batch: list[Window], *, depth: int, exit: ExitRule | None) -> dict[str, Any]:
    """Score one batch: for each window its document and number of tokens, and per depth its nats and its hits."""
    ids, mask = padded([window.ids for window in batch], input_device(readout.model))
    scored = torch.zeros_like(mask, dtype=torch.bool)
    for row, window in enumerate(batch):
        scored[row, len(window.ids) - len(window.targets) : len(window.ids)] = True
    targets = torch.tensor([token for window in batch for token in window.targets], device=ids.device)
    scores = readout.score(ids, mask, scored, targets=targets, depth=depth)
    lengths = [len(window.targets) for window in batch]
    losses, hits = scores.losses.cpu(), scores.predictions.eq(targets).long().cpu()
    more = {}
    if exit is not None:
        numbers = [(window.document, place) for window in batch for place in range(len(window.targets))]
        draw = draws(*torch.tensor(numbers).T)
        left = exit_passes(exit, signals_of(readout.recursion, scores, draw, targets))[None]
        losses, hits = (torch.cat([values, values.gather(0, left)]) for values in (losses, hits))
        more = {"left": [total for (total,) in _sums(left, lengths)]}
    return {
        "windows": [[window.document, len(window.targets)] for window in batch],
        "nll": _sums(losses.double(), lengths),
        "correct": _sums(hits, lengths),
        "range": [[float(one.min()), float(one.max())] for one in losses],
        "chunks": asdict(_chunks(readout, scores, targets, lengths)),
        **more,
    }


def _too_large(window: Window) -> RRError:
    return RRError(
        f"the device is out of memory for a single row of {len(window.ids)} tokens",
        "Take a shorter --max-length, or --device cpu.",
    )


def _sums(values: Tensor, lengths: list[int]) -> list[list[Any]]:
    """Sum `[passes, n]` values over each window's positions; one list per window."""
    return torch.stack([part.sum(1) for part in values.split(lengths, dim=1)]).tolist()


def _chunks(readout: Readout, scores: Scores, targets: Tensor, lengths: list[int]) -> ChunkTotals:
    recursion = readout.recursion
    if recursion is None or len(scores.predictions) < 2:
        return ChunkTotals()
    looked = list(zip(scores.states, scores.tops, strict=True))[:-1]
    commit = torch.stack([recursion.head(state, top).float().sigmoid() for state, top in looked])
    width, number, chunks = recursion.config.chunk_width, 0, []
    for length in lengths:
        chunks += [number + position // width for position in range(length)]
        number = chunks[-1] + 1
    totals = teacher_forced_chunks(scores.predictions, commit, targets, torch.tensor(chunks, device=targets.device))
    if recursion.config.commit_margin is not None:
        totals.reliability = reliability(commit, scores.losses, recursion.config.commit_margin)
    return totals


def _joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one entry for the parts that a batch had to be cut into."""
    names = [name for name in ("windows", "nll", "correct", "left") if name in parts[0]]
    lists: dict[str, Any] = {name: [row for part in parts for row in part[name]] for name in names}
    return {**lists, "range": _ranges(parts), "chunks": asdict(_chunk_totals(parts))}


def _ranges(parts: list[dict[str, Any]]) -> list[list[float]]:
    """Return the lowest and the highest nats of a token at every depth."""
    depths = zip(*(part["range"] for part in parts), strict=True)
    return [[min(low for low, _ in depth), max(high for _, high in depth)] for depth in map(list, depths)]


def _refuse_flat(entries: list[dict[str, Any]]) -> None:
    """Refuse scores that no working model has: the same log-probability for every token of every document.

    Raises:
        CheckFailed: all of them are equal at some depth.
    """
    if sum(scored for entry in entries for _, scored in entry["windows"]) < 2:
        return
    for depth, (low, high) in enumerate(_ranges(entries)):
        if low == high:
            raise CheckFailed(
                f"every token has the same log-probability at depth {depth}, -{low:.6g} nats: this is no score",
                "The model's weights are empty or its head is not what it seems; 'rr setup' checks the installation.",
            )


def _chunk_totals(entries: list[dict[str, Any]]) -> ChunkTotals:
    totals = ChunkTotals()
    for entry in entries:
        totals.add(ChunkTotals(**entry["chunks"]))
    return totals


def _records(documents: Sequence[str], encoded: list[list[int]], entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    nll: dict[int, list[list[float]]] = {}
    correct: dict[int, list[list[int]]] = {}
    left: dict[int, int] = {}
    for entry in entries:
        for (number, _), nats, hits in zip(entry["windows"], entry["nll"], entry["correct"], strict=True):
            nll.setdefault(number, []).append(nats)
            correct.setdefault(number, []).append(hits)
        for (number, _), count in zip(entry["windows"], entry.get("left", ()), strict=False):
            left[number] = left.get(number, 0) + count
    return [
        {
            "key": content_hash(text),
            "tokens": len(ids),
            "words": len(re.split(r"\s+", text)),  # as lm-eval counts them
            "bytes": len(text.encode()),
            "nll": [math.fsum(depth) for depth in zip(*nll[number], strict=True)],
            "correct": [sum(depth) for depth in zip(*correct[number], strict=True)],
        }
        | ({"passes": left[number]} if number in left else {})
        for number, (text, ids) in enumerate(zip(documents, encoded, strict=True))
        if ids
    ]
