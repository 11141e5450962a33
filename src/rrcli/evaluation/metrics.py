"""From records to metrics: what each metric is called, which way is better, and how it is computed with its interval.

Records are per document, per problem and per prompt; lists in them have one entry per depth, pass 0 first, and the last
one is the stage's own depth. Nothing here needs torch, so `rr compare` and tests compute the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rrcli.evaluation import stats

Records = Mapping[str, Sequence[Mapping[str, Any]]]


@dataclass(frozen=True)
class Metric:
    """How a metric is shown and compared.

    Attributes:
        label, unit: for people. better: 'lower', 'higher' or '' (neither is).
        kind: how two stages are compared: 'documents' (paired ratio), 'problems' (McNemar), 'prompts' (paired
            bootstrap), 'harness' (McNemar where every score is 0 or 1, else paired bootstrap), 'cost' (the relative
            difference, never tested) or 'shown' (values only).
    """

    label: str
    unit: str
    better: str
    kind: str


METRICS: dict[str, Metric] = {
    "perplexity": Metric("Perplexity", "", "lower", "documents"),
    "bits_per_byte": Metric("Bits per byte", "bits", "lower", "documents"),
    "token_accuracy": Metric("Token accuracy", "%", "higher", "documents"),
    "reasoning_accuracy": Metric("Reasoning accuracy", "%", "higher", "problems"),
    "relevance": Metric("Relevance", "nats/token", "higher", "prompts"),
    "distinct_2": Metric("Distinct-2", "", "higher", "prompts"),
    "rep_4": Metric("Rep-4", "", "lower", "prompts"),
    "length": Metric("Length", "tokens", "", "prompts"),
    "finished": Metric("Ended by itself", "", "", "prompts"),
    "prefill_tokens_per_sec": Metric("Prefill", "tokens/s", "higher", "cost"),
    "decode_tokens_per_sec": Metric("Decode", "tokens/s", "higher", "cost"),
    "time_per_output_token": Metric("Time per token", "ms", "lower", "cost"),
    "time_per_output_token/sequential": Metric("  all passes for each token", "ms", "lower", "cost"),
    "time_per_output_token/pass_0": Metric("  pass 0 alone", "ms", "lower", "cost"),
    "memory_mb": Metric("Peak memory", "MB", "lower", "cost"),
    "cache_bytes_per_token": Metric("Cache per token", "bytes", "lower", "cost"),
    "flops_per_token": Metric("FLOPs per token", "MFLOP", "lower", "cost"),
    "avg_refine_steps": Metric("Refine steps per chunk", "", "", "shown"),
    "avg_chunk_length": Metric("Tokens per chunk", "", "", "shown"),
    "commit_rate": Metric("Commit rate", "", "", "shown"),
    "fix_rate": Metric("Fix rate", "", "", "shown"),
    "break_rate": Metric("Break rate", "", "", "shown"),
    "commit_ece": Metric("Calibration error of committing", "", "", "shown"),
    "commit_ece_weighted": Metric("  tokens weighed as in training", "", "", "shown"),
    "decode/avg_refine_steps": Metric("Refine steps per chunk, decoding", "", "", "shown"),
    "decode/avg_chunk_length": Metric("Tokens per chunk, decoding", "", "", "shown"),
    "decode/commit_rate": Metric("Commit rate, decoding", "", "", "shown"),
}


def from_records(records: Records) -> dict[str, dict[str, Any]]:
    """Return every metric that the records allow: name -> value, low, high, n."""
    return {
        **_document_metrics(records.get("documents", ()), -1),
        **_problem_metrics(records.get("problems", ())),
        **_generation_metrics(records.get("generations", ())),
    }


def by_depth(records: Records) -> dict[str, list[dict[str, Any]]]:
    """Return perplexity, token accuracy and reasoning accuracy at every depth, pass 0 first."""
    documents, problems = records.get("documents", ()), records.get("problems", ())
    depths = len((documents or problems)[0]["nll" if documents else "correct"]) if documents or problems else 0
    table: dict[str, list[dict[str, Any]]] = {}
    for depth in range(depths):
        values = _document_metrics(documents, depth) | _problem_metrics(problems, depth)
        for name in ("perplexity", "token_accuracy", "reasoning_accuracy"):
            if name in values:
                table.setdefault(name, []).append(values[name])
    return table


def document_totals(records: Records, name: str, depth: int = -1) -> dict[str, tuple[float, float]]:
    """Return for each document (total, size) of a document metric: nats or hits, over tokens or bytes.

    For perplexity and bits per byte the total is in nats, so that their ratio's exponential or its share of ln 2 is the
    metric.
    """
    field, size = {
        "perplexity": ("nll", "tokens"),
        "bits_per_byte": ("nll", "bytes"),
        "token_accuracy": ("correct", "tokens"),
    }[name]
    return {r["key"]: (r[field][depth], r[size]) for r in records.get("documents", ())}


def from_ratio(name: str, ratio: float) -> float:
    """Turn the estimated ratio of a document metric into the metric's own unit."""
    if name == "perplexity":
        return math.exp(ratio) if ratio < 700 else math.inf
    return ratio / math.log(2) if name == "bits_per_byte" else 100 * ratio


def _bounded(name: str, value: float) -> float:
    return min(100.0, max(0.0, value)) if name == "token_accuracy" else value


def task_labels(specs: Iterable[str]) -> dict[str, str]:
    """Return a short name for each task: its generator or file, or the whole spec where one occurs twice."""
    specs = list(dict.fromkeys(specs))
    names = [spec.partition(":")[0].rpartition("/")[2] for spec in specs]
    return {spec: name if names.count(name) == 1 else spec for spec, name in zip(specs, names, strict=True)}


def stability_label(name: str) -> str:
    """Return what `stability@1`, or `decode/stability@1`, is called in tables."""
    where, _, step = name.rpartition("stability@")
    return f"Stability at pass {step}{', decoding' if where else ''}"


def distinct_n(tokens: Sequence[int], n: int = 2) -> float:
    """Return the share of n-grams that are distinct (Li et al. 2016); 1 for a text without any n-gram."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def rep_n(tokens: Sequence[int], n: int = 4) -> float:
    """Return the share of n-grams that repeat an earlier one (Welleck et al. 2020): 1 - distinct_n."""
    return 1.0 - distinct_n(tokens, n)


def _document_metrics(documents: Sequence[Mapping[str, Any]], depth: int) -> dict[str, dict[str, Any]]:
    if not documents:
        return {}
    metrics = {}
    for name in ("perplexity", "bits_per_byte", "token_accuracy"):
        pairs = list(document_totals({"documents": documents}, name, depth).values())
        estimate = stats.ratio([total for total, _ in pairs], [size for _, size in pairs])
        metrics[name] = {
            "value": from_ratio(name, estimate.value),
            "low": _bounded(name, from_ratio(name, estimate.low)),
            "high": _bounded(name, from_ratio(name, estimate.high)),
            "n": len(documents),
        }
    nats = math.fsum(r["nll"][depth] for r in documents)
    for name, size in (("word_perplexity", "words"), ("byte_perplexity", "bytes")):
        metrics[name] = {"value": from_ratio("perplexity", nats / max(1, sum(r[size] for r in documents)))}
    metrics["tokens"] = {"value": sum(r["tokens"] for r in documents)}
    return metrics


def _problem_metrics(problems: Sequence[Mapping[str, Any]], depth: int = -1) -> dict[str, dict[str, Any]]:
    if not problems:
        return {}
    metrics = {"reasoning_accuracy": _share([r["correct"][depth] for r in problems])}
    metrics["reasoning_accuracy_strict"] = _share([r["strict"][depth] for r in problems])
    for task, label in task_labels(r["task"] for r in problems).items():
        metrics[f"reasoning_accuracy/{label}"] = _share([r["correct"][depth] for r in problems if r["task"] == task])
    return metrics


def _generation_metrics(generations: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    if not generations:
        return {}
    n = len(generations)
    return {
        name: {"value": sum(r[name] for r in generations) / n, "n": n}
        for name in ("relevance", "distinct_2", "rep_4", "length", "finished")
        if all(name in r for r in generations)
    }


def _share(hits: Sequence[bool]) -> dict[str, Any]:
    estimate = stats.wilson(sum(map(bool, hits)), len(hits))
    return {"value": 100 * estimate.value, "low": 100 * estimate.low, "high": 100 * estimate.high, "n": len(hits)}
