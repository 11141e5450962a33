"""Computes metrics, with their intervals, from records; and describes each metric as a value.

There is a record for each document, problem and prompt. Lists in a record have one entry for each depth, pass 0 first;
the last entry is at the depth of the stage. This module needs no torch, so `rr compare` computes the same numbers.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, Literal

from rrcli.evaluation import stats

# What was measured on one document, problem or prompt; and all records of a stage: part -> records.
Record = Mapping[str, Any]
Records = Mapping[str, Sequence[Record]]

PartName = Literal["documents", "problems", "generations", "harness", ""]
Test = Literal["ratio", "mcnemar", "mcnemar_or_mean", ""]
Scale = Literal["exp", "bits", "percent", ""]


@dataclass(frozen=True)
class Metric:
    """A metric: its name, how it is computed from records, and how two stages are compared by it.

    Attributes:
        name: its key in a results file. label, unit: for people.
        better: 'lower', 'higher' or '' (neither is).
        part: the kind of records that stages are compared on; '' if there is none.
        field: the field of a record that holds its score. size: the field that a document's total is divided by.
        scale: how an estimate becomes the metric's value: 'exp' (perplexity from nats per token), 'bits' (from nats),
            'percent' (from a share) or '' (it is the value).
        test: how the difference of two stages is tested: 'ratio' (of totals over documents), 'mcnemar',
            'mcnemar_or_mean' (McNemar if every score is 0 or 1, else the mean) or '' (it is not tested).
        same_test: the metric with which this one shares its test, because both are computed from the same nats.
        relative: whether a difference is shown in percent of the other stage's value. Metrics that are relative but not
            tested are costs.
        task: the reasoning task, or the task of lm-eval; '' if the metric is not about a single task.
        samples: how many sampled answers a problem must have; 0 for a metric of other records. draws: of how many of
            these one has to be right (k of pass@k; 1 for avg@k).
        compared: whether `rr compare` has a row for it.
    """

    name: str
    label: str
    unit: str = ""
    _: KW_ONLY
    better: str = ""
    part: PartName = ""
    field: str = ""
    size: str = ""
    scale: Scale = ""
    test: Test = ""
    same_test: str = ""
    relative: bool = False
    task: str = ""
    samples: int = 0
    draws: int = 0
    compared: bool = True

    @property
    def per_token(self) -> bool:
        """Whether stages can be compared only if they have the same tokenizer."""
        return self.size == "tokens"

    def records(self, measured: Records) -> dict[str, Record]:
        """Return key -> record, for the records that the metric is computed from."""
        found = measured.get(self.part, ())
        if self.samples:
            found = [r for r in found if len(r.get("sampled", ())) >= self.samples]
        if self.part == "harness":
            found = [r for r in found if self.name == f"harness/{r['task']}/{r['metric']}"]
        elif self.part == "problems" and self.task:
            labels = task_labels(r["task"] for r in found)
            found = [r for r in found if labels[r["task"]] == self.task]
        elif self.part == "problems":
            found = distinct_problems(found)
        if self.part in ("generations", "harness"):  # a score may be missing in an older record, or not be a number
            found = [r for r in found if r.get(self.field) is not None]
        return {r["key"]: r for r in found}

    def score(self, record: Record, depth: int = -1) -> float:
        """Return the score of a record: a document's total (nats or hits), or that of answers, a text or a sample."""
        if self.samples:
            right = sum(answer["correct"] for answer in record["sampled"])
            return stats.pass_at_k(len(record["sampled"]), right, self.draws)
        by_depth = self.part in ("documents", "problems")
        return float(record[self.field][depth] if by_depth else record[self.field])

    def totals(self, measured: Records, depth: int = -1) -> dict[str, tuple[float, float]]:
        """Return key -> (total, size) of each document: nats or hits, and tokens or bytes."""
        return {key: (self.score(r, depth), r[self.size]) for key, r in self.records(measured).items()}

    def in_unit(self, value: float) -> float:
        """Convert an estimate (nats per token or byte, a share) to the metric's unit."""
        match self.scale:
            case "exp":
                return math.exp(value) if value < 700 else math.inf
            case "bits":
                return value / math.log(2)
            case "percent":
                return 100 * value
            case _:
                return value

    def middle(self, values: Sequence[float | None]) -> float | None:
        """Return one value for several trainings; None if one is missing.

        It is the geometric mean of perplexities, whose logarithms are compared, the median of costs, else the mean.
        """
        known = [value for value in values if value is not None]
        if not known or len(known) < len(values):
            return None
        if self.scale == "exp":
            return math.exp(math.fsum(map(math.log, known)) / len(known))
        return statistics.median(known) if self.relative else math.fsum(known) / len(known)

    def entry(self, estimate: stats.Estimate) -> dict[str, Any]:
        """Return an estimate as it stands in a results file; bounds that are not known are None."""
        bounds = [None if x is None else self.in_unit(x) for x in (estimate.low, estimate.high)]
        if self.scale == "percent":
            bounds = [None if x is None else min(100.0, max(0.0, x)) for x in bounds]
        return {"value": self.in_unit(estimate.value), "low": bounds[0], "high": bounds[1], "n": estimate.n}

    def shown_difference(self, value: float) -> float:
        """Convert an estimated difference to what is shown: percent for perplexity, else the metric's unit."""
        return 100 * math.expm1(min(value, 700)) if self.scale == "exp" else self.in_unit(value)

    def tested_difference(self, shown: float) -> float:
        """Convert a difference that is shown to the scale of the test; the inverse of `shown_difference`.

        Raises:
            ValueError: a perplexity cannot be lower by 100 % or more.
        """
        match self.scale:
            case "exp":
                return math.log1p(shown / 100)
            case "bits":
                return shown * math.log(2)
            case "percent":
                return shown / 100
            case _:
                return shown

    @property
    def difference_unit(self) -> str:
        """The unit of a difference that is shown: '%', 'points' (of shares), or the metric's own."""
        return "%" if self.relative else "points" if self.unit == "%" else self.unit


PERPLEXITY = Metric(
    "perplexity", "Perplexity", better="lower",
    part="documents", field="nll", size="tokens", scale="exp", test="ratio", relative=True,
)  # fmt: skip
BITS_PER_BYTE = Metric(
    "bits_per_byte", "Bits per byte", "bits", better="lower",
    part="documents", field="nll", size="bytes", scale="bits", test="ratio", same_test="perplexity",
)  # fmt: skip
TOKEN_ACCURACY = Metric(
    "token_accuracy", "Token accuracy", "%", better="higher",
    part="documents", field="correct", size="tokens", scale="percent", test="ratio",
)  # fmt: skip
REASONING_ACCURACY = Metric(
    "reasoning_accuracy", "Reasoning accuracy", "%", better="higher",
    part="problems", field="correct", scale="percent", test="mcnemar",
)  # fmt: skip


# What the nearest training problem's answer gets right: no metric of a model, but what its accuracy has to be above.
LOOKUP_ACCURACY = Metric("reasoning_accuracy_lookup", "Lookup of training answers", "%")


def _of_text(name: str, label: str, unit: str = "", *, better: str = "") -> Metric:
    return Metric(name, label, unit, better=better, part="generations", field=name)


def _cost(name: str, label: str, unit: str, *, better: str = "lower", compared: bool = True) -> Metric:
    return Metric(name, label, unit, better=better, relative=True, compared=compared)


# Every metric with a fixed name, in the order in which they are shown.
KNOWN: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        PERPLEXITY,
        BITS_PER_BYTE,
        TOKEN_ACCURACY,
        Metric("word_perplexity", "Word perplexity", compared=False),
        Metric("byte_perplexity", "Byte perplexity", compared=False),
        Metric("tokens", "Tokens", compared=False),
        REASONING_ACCURACY,
        Metric("reasoning_accuracy_strict", "Reasoning accuracy strict", "%", compared=False),
        LOOKUP_ACCURACY,
        _of_text("relevance", "Relevance", "nats/token", better="higher"),
        _of_text("distinct_2", "Distinct-2", better="higher"),
        _of_text("rep_4", "Rep-4", better="lower"),
        _of_text("length", "Length", "tokens"),
        _of_text("finished", "Ended by itself"),
        _cost("prefill_tokens_per_sec", "Prefill", "tokens/s", better="higher"),
        _cost("decode_tokens_per_sec", "Decode", "tokens/s", better="higher"),
        _cost("time_per_output_token", "Time per token", "ms"),
        _cost("time_per_output_token/sequential", "  all passes for each token", "ms"),
        _cost("time_per_output_token/pass_0", "  pass 0 alone", "ms"),
        _cost("memory_mb", "Peak memory", "MB"),
        _cost("cache_bytes_per_token", "Cache per token", "bytes"),
        _cost("prefill_flops_per_token", "FLOPs per prompt token", "MFLOP"),
        _cost("prefill_flops_per_token/sequential", "  all passes for each token", "MFLOP", compared=False),
        _cost("prefill_flops_per_token/pass_0", "  pass 0 alone", "MFLOP"),
        _cost("decode_flops_per_token", "FLOPs per new token", "MFLOP"),
        _cost("decode_flops_per_token/sequential", "  all passes for each token", "MFLOP"),
        _cost("decode_flops_per_token/pass_0", "  pass 0 alone", "MFLOP"),
        Metric("decode/avg_refine_steps", "Refine steps per chunk"),
        Metric("decode/avg_chunk_length", "Tokens per chunk"),
        Metric("decode/avg_passes", "Passes per token"),
        Metric("decode/commit_rate", "Commit rate"),
        Metric("passes_per_token", "Passes per token of text"),
        Metric("passes_per_answer_token", "Passes per token of answers"),
        Metric("avg_refine_steps", "Refine steps per chunk, teacher-forced"),
        Metric("avg_chunk_length", "Tokens per chunk, teacher-forced"),
        Metric("commit_rate", "Commit rate, teacher-forced"),
        Metric("fix_rate", "Fix rate"),
        Metric("break_rate", "Break rate"),
        Metric("commit_ece", "Calibration error of committing"),
        Metric("commit_ece_weighted", "  tokens weighed as in training"),
    )
}


def tested_metric(name: str) -> Metric | None:
    """Return the metric with this name if differences in it can be tested; None for all others."""
    kind, _, rest = name.partition("/")
    metric = KNOWN.get(name) or _of_samples(name)
    if metric is None and kind == "reasoning_accuracy" and rest:
        metric = replace(REASONING_ACCURACY, name=name, label=f"  {rest}", task=rest)
    if metric is None and kind == "harness" and "/" in rest:
        metric = _of_harness(name, rest, {})
    return metric if metric is not None and metric.test else None


def is_cost(name: str) -> bool:
    """Tell whether a metric is one of those that `rr costs` measures: speed, memory, FLOPs, and decoded chunks."""
    known = KNOWN.get(name)
    return name.startswith("decode/") or (known is not None and known.relative and not known.test)


def metrics_of(*measured: Mapping[str, Mapping[str, Any]]) -> list[Metric]:
    """Return the metrics of one or more stages, in the order in which they are shown.

    This is the only place that reads the names of metrics. The order is that of `KNOWN`; the accuracy of each reasoning
    task, those of the lookup baseline and lm-eval's metrics follow the overall accuracy, and the stability at each pass
    follows the commit rate. Metrics with unknown names come last and are not compared.

    Args:
        measured: for each stage, the `metrics` of its results file: name -> value, low, high, n, better.
    """
    entries: dict[str, Mapping[str, Any]] = {}
    for values in measured:
        entries |= {name: entry for name, entry in values.items() if name not in entries}
    tasks = [name for name in entries if name.startswith("reasoning_accuracy/")]
    places = {name: place for place, name in enumerate(KNOWN)}
    after_accuracy = places["reasoning_accuracy_strict"]
    found: list[tuple[int, int, Metric]] = []  # place of a known metric, steps after it, metric
    for name, entry in entries.items():
        kind, _, rest = name.partition("/")
        where, stability, step = name.partition("stability@")
        if name in KNOWN:
            found.append((places[name], 0, KNOWN[name]))
        elif (sampled := _of_samples(name)) is not None:
            found.append((after_accuracy, 2, replace(sampled, compared=not sampled.task or len(tasks) > 1)))
        elif kind == "reasoning_accuracy":
            metric = replace(REASONING_ACCURACY, name=name, label=f"  {rest}", task=rest, compared=len(tasks) > 1)
            found.append((after_accuracy, 1, metric))
        elif kind == LOOKUP_ACCURACY.name:
            metric = replace(LOOKUP_ACCURACY, name=name, label=f"  {rest}", task=rest, compared=len(tasks) > 1)
            found.append((places[kind], 1, metric))
        elif kind == "harness":
            found.append((places[LOOKUP_ACCURACY.name], 2, _of_harness(name, rest, entry)))
        elif stability and where in ("", "decode/"):
            label = f"Stability at pass {step}{'' if where else ', teacher-forced'}"
            found.append((places[f"{where}commit_rate"], 1, Metric(name, label)))
        else:
            found.append((len(KNOWN), 0, Metric(name, name.replace("_", " ").capitalize(), compared=False)))
    return [metric for *_, metric in sorted(found, key=lambda item: item[:2])]


def _of_samples(name: str) -> Metric | None:
    """Return the metric `avg@K` or `pass@K` of sampled answers, `avg@K/TASK` of one task; None for other names.

    avg@K is the share of right ones among K answers; pass@K is the probability that one of K is right.
    """
    found = re.fullmatch(r"(avg|pass)@([1-9]\d*)(?:/(.+))?", name)
    if found is None:
        return None
    kind, count, task = found[1], int(found[2]), found[3] or ""
    label = f"  {task}" if task else f"Sampled answers, {kind}@{count}"
    return Metric(
        name, label, "%", better="higher", part="problems", scale="percent", test="mcnemar_or_mean",
        task=task, samples=count, draws=1 if kind == "avg" else count,
    )  # fmt: skip


def _of_harness(name: str, rest: str, entry: Mapping[str, Any]) -> Metric:
    """Return the metric `harness/TASK/METRIC`, in lm-eval's unit; the entry says which direction is better."""
    return Metric(
        name,
        rest.replace("/", " "),
        better=entry.get("better", ""),
        part="harness",
        field="score",
        test="mcnemar_or_mean",
        task=rest.partition("/")[0],
    )


def from_records(records: Records) -> dict[str, dict[str, Any]]:
    """Return every metric that can be computed from the records: name -> value, low, high, n."""
    return {
        **_document_metrics(records.get("documents", ()), -1),
        **_problem_metrics(records.get("problems", ())),
        **_sampled_metrics(records.get("problems", ())),
        **_generation_metrics(records.get("generations", ())),
        **_exit_metrics(records),
    }


def by_depth(records: Records, depths: int | None = None) -> dict[str, list[dict[str, Any]]]:
    """Return perplexity, token accuracy and reasoning accuracy at every depth, pass 0 first.

    Args:
        depths: how many entries of each record are depths, if not all: one more is that of an exit rule.
    """
    documents, problems = records.get("documents", ()), records.get("problems", ())
    measured = len((documents or problems)[0]["nll" if documents else "correct"]) if documents or problems else 0
    depths = measured if depths is None else min(depths, measured)
    table: dict[str, list[dict[str, Any]]] = {}
    for depth in range(depths):
        values = _document_metrics(documents, depth) | _problem_metrics(problems, depth)
        for name in ("perplexity", "token_accuracy", "reasoning_accuracy"):
            if name in values:
                table.setdefault(name, []).append(values[name])
    return table


def task_labels(specs: Iterable[str]) -> dict[str, str]:
    """Return a short name for each task: its generator, file or data set, or the whole spec where one occurs twice."""
    specs = list(dict.fromkeys(specs))
    names = [spec.removeprefix("hf://").partition(":")[0].partition("@")[0].rpartition("/")[2] for spec in specs]
    return {spec: name if names.count(name) == 1 else spec for spec, name in zip(specs, names, strict=True)}


def distinct_problems(problems: Iterable[Record]) -> list[Record]:
    """Return one record of each question with its answer: two tasks that share a question ask it once."""
    found: dict[Any, Record] = {}
    for record in problems:
        asked = (record["question"], record.get("answer")) if "question" in record else record["key"]
        found.setdefault(asked, record)
    return list(found.values())


def distinct_n(tokens: Sequence[int], n: int = 2) -> float:
    """Return the share of n-grams that are distinct (Li et al. 2016); 1 for a text without any n-gram."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def rep_n(tokens: Sequence[int], n: int = 4) -> float:
    """Return the share of n-grams that repeat an earlier one (Welleck et al. 2020): 1 - distinct_n."""
    return 1.0 - distinct_n(tokens, n)


def _document_metrics(documents: Sequence[Record], depth: int) -> dict[str, dict[str, Any]]:
    if not documents:
        return {}
    metrics = {}
    for metric in (PERPLEXITY, BITS_PER_BYTE, TOKEN_ACCURACY):
        totals, sizes = zip(*metric.totals({"documents": documents}, depth).values(), strict=True)
        metrics[metric.name] = metric.entry(stats.ratio(totals, sizes))
    nats = math.fsum(r["nll"][depth] for r in documents)
    for name, size in (("word_perplexity", "words"), ("byte_perplexity", "bytes")):
        metrics[name] = {"value": PERPLEXITY.in_unit(nats / max(1, sum(r[size] for r in documents)))}
    metrics["tokens"] = {"value": sum(r["tokens"] for r in documents)}
    return metrics


def _problem_metrics(problems: Sequence[Record], depth: int = -1) -> dict[str, dict[str, Any]]:
    if not problems:
        return {}
    distinct = distinct_problems(problems)
    metrics = {"reasoning_accuracy": _share([r["correct"][depth] for r in distinct])}
    metrics["reasoning_accuracy_strict"] = _share([r["strict"][depth] for r in distinct])
    labels = task_labels(r["task"] for r in problems)
    for task, label in labels.items():
        metrics[f"reasoning_accuracy/{label}"] = _share([r["correct"][depth] for r in problems if r["task"] == task])
    if looked_up := [r for r in problems if "lookup" in r]:
        metrics[LOOKUP_ACCURACY.name] = _share([r["lookup"] for r in looked_up])
        for task in dict.fromkeys(r["task"] for r in looked_up):
            hits = [r["lookup"] for r in looked_up if r["task"] == task]
            metrics[f"{LOOKUP_ACCURACY.name}/{labels[task]}"] = _share(hits)
    return metrics


def _sampled_metrics(problems: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """Return avg@n of n sampled answers, overall and for each task, and pass@k for k = 2, 4, ... and n."""
    count = min((len(r["sampled"]) for r in problems if "sampled" in r), default=0)
    if not count:
        return {}
    powers = [2**n for n in range(1, count.bit_length()) if 2**n < count]
    labels = task_labels(r["task"] for r in problems).values()
    names = [f"avg@{count}", *(f"avg@{count}/{label}" for label in labels)]
    names += [f"pass@{k}" for k in [*powers, count] if k > 1]
    found = {}
    for metric in filter(None, map(_of_samples, names)):
        scores = [metric.score(r) for r in metric.records({"problems": problems}).values()]
        whole = all(score in (0, 1) for score in scores)
        share = stats.wilson(round(sum(scores)), len(scores)) if whole else stats.ratio(scores, [1.0] * len(scores))
        found[metric.name] = metric.entry(share)
    return found


def _exit_metrics(records: Records) -> dict[str, dict[str, Any]]:
    """Return with which pass tokens left on average, where an exit rule was measured."""
    documents = [r for r in records.get("documents", ()) if "passes" in r]
    problems = [r for r in records.get("problems", ()) if r.get("passes")]
    found = {}
    if documents:
        total = sum(r["passes"] for r in documents) / sum(r["tokens"] for r in documents)
        found["passes_per_token"] = {"value": total, "n": len(documents)}
    if problems:
        left = [k for r in problems for k in r["passes"]]
        found["passes_per_answer_token"] = {"value": sum(left) / len(left), "n": len(problems)}
    return found


def _generation_metrics(generations: Sequence[Record]) -> dict[str, dict[str, Any]]:
    if not generations:
        return {}
    n = len(generations)
    return {
        name: {"value": sum(r[name] for r in generations) / n, "n": n}
        for name in ("relevance", "distinct_2", "rep_4", "length", "finished")
        if all(name in r for r in generations)
    }


def _share(hits: Sequence[bool]) -> dict[str, Any]:
    return REASONING_ACCURACY.entry(stats.wilson(sum(map(bool, hits)), len(hits)))
