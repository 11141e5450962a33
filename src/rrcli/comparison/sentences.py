"""A comparison in words: what surgery, fine-tuning and recursion changed, and what the reader has to be careful about.

The sentences answer the four questions of an experiment, each with its values, the interval, and the number of records.
The warnings name what differs between two stages beside the model, and how many records they have in common.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rrcli.comparison.pairing import Cells
from rrcli.comparison.preservation import MEASURING_SETTINGS, Preservation
from rrcli.comparison.records import PARTS
from rrcli.comparison.results import Claim, MetricRow, Pair, Results, speakers
from rrcli.evaluation import stats
from rrcli.evaluation.metrics import BITS_PER_BYTE, PERPLEXITY, REASONING_ACCURACY, Metric

PROVENANCE = ("seed", "dtype", "device", "machine", "hardware", "rr", "python")


# -- warnings ------------------------------------------------------------------------------------------


def warnings(stages: Mapping[str, Results], rows: Sequence[MetricRow]) -> list[str]:
    """Return what the reader should know about how the stages were measured and paired with the first one."""
    (first, reference), *others = stages.items()
    told = _sampled(stages)
    for column, (label, result) in enumerate(others, start=1):
        told += _measured_differently(label, first, result=result, reference=reference)
        pairs = [(row.metric, found) for row in rows if (found := row.cells[column].pair) is not None]
        same_tokenizer = result["model"]["tokenizer"] == reference["model"]["tokenizer"]
        told += _shared_in_part(label, first, pairs, same_tokenizer=same_tokenizer)
    return told


def _measured_differently(label: str, first: str, *, result: Results, reference: Results) -> list[str]:
    """Return a warning that names all differences of two measurements beside the model, if there are any."""
    a, b = reference, result
    found = [f"{name} ({_data(a)} and {_data(b)})" for name in ("data",) if _data(a) != _data(b)]
    for place, names in (("provenance", PROVENANCE), ("settings", MEASURING_SETTINGS)):
        for name in names:
            before, after = (r.get(place, {}).get(name) for r in (a, b))
            # A value that an older version did not record is not known to differ.
            if before != after and None not in (before, after):
                found.append(f"{name} ({before} and {after})")
    if a["model"]["tokenizer"] != b["model"]["tokenizer"]:
        found.append("tokenizer (so only bits per byte can be compared, not metrics per token)")
    versions = [r["provenance"]["versions"] for r in (a, b)]
    for package in sorted(versions[0].keys() | versions[1].keys()):
        before, after = (v.get(package, "none") for v in versions)
        if before != after:
            found.append(f"{package} ({before} and {after})")
    return [f"{first} and {label} were measured with different {', '.join(found)}"] if found else []


def _sampled(stages: Mapping[str, Results]) -> list[str]:
    """Return a warning if a stage was measured on a sample of its documents."""
    counts = [(label, r["data"].get("documents"), r["data"].get("held_out")) for label, r in stages.items()]
    told = [f"{label} ({n:,} of {held_out:,})" for label, n, held_out in counts if held_out and n < held_out]
    if not told:
        return []
    return [
        "only a sample of the documents was scored (--max-samples), which is enough to try things out but not for "
        f"conclusions: {', '.join(told)}"
    ]


def _shared_in_part(label: str, first: str, pairs: Sequence[tuple[Metric, Pair]], *, same_tokenizer: bool) -> list[str]:
    """Return a warning for each kind of record that is not the same in both stages.

    Args:
        pairs: how each metric was paired.
    """
    told: dict[str, str] = {}
    for metric, found in pairs:
        part = PARTS[metric.part]
        noun = f"samples of {metric.task}" if metric.part == "harness" else part.noun
        if noun in told or (metric.part == "problems" and metric.task):  # the metric over all tasks has them all
            continue
        if not found.common:
            told[noun] = f"{first} and {label} have no {noun} in common ({found.of} and {found.others})"
        elif found.conflicts and (same_tokenizer or metric.part != "documents"):
            told[noun] = (
                f"{first} and {label}: {found.conflicts} of the {found.common} {noun} in both have different content "
                f"({part.held}), so {noun} are not compared"
            )
        elif found.common < max(found.of, found.others):
            told[noun] = (
                f"{first} and {label}: only the {found.common} {noun} in both are compared, of {found.of} and "
                f"{found.others}; the values in the table are over all {noun} of each stage"
            )
    return list(told.values())


def _data(result: Results) -> str:
    return f"{result['data'].get('source', 'data')} {result['data']['fingerprint']}"


# -- answers -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """A question that a sentence answers: does `what` make `stage` different from `reference`?

    Attributes:
        what: what was done to the model, in words. against: the reference stage, in words.
    """

    what: str
    stage: str
    reference: str
    against: str


FINE_TUNING = Question("Fine-tuning without recursion", "finetuned_vanilla", "baseline", "the baseline")
RECURSION = Question("Recursion, beyond fine-tuning", "finetuned_recursive", "finetuned_vanilla", "vanilla fine-tuning")
BOTH = Question("Recursive fine-tuning", "finetuned_recursive", "baseline", "the baseline")


def claims(cells: Cells, metrics: Sequence[Metric], *, sound: bool = True) -> list[Claim]:
    """Return the differences that the sentences speak about: that of fine-tuning, and that of recursion beyond it.

    Args:
        metrics: those of the table.
        sound: whether surgery preserved the baseline; if not, nothing is claimed about recursion.
    """
    labels = speakers(cells.stages)
    questions = [FINE_TUNING]
    if sound:
        questions.append(RECURSION if {"finetuned_vanilla", "finetuned_recursive"} <= labels.keys() else BOTH)
    told: list[Claim] = []
    for question in questions:
        if {question.stage, question.reference} <= labels.keys():
            stage, reference = labels[question.stage], labels[question.reference]
            found = [_claim(question, metric, cells, stage=stage, reference=reference) for metric in metrics]
            # Accuracies come first, then perplexity.
            told += sorted(filter(None, found), key=lambda claim: claim.metric.part == "documents")
    return told


def _claim(question: Question, metric: Metric, cells: Cells, *, stage: str, reference: str) -> Claim | None:
    """Return the difference in a metric; None if no sentence is about this metric, or if it cannot be paired."""
    result, other = cells.stages[stage], cells.stages[reference]
    same_tokens = result["model"]["tokenizer"] == other["model"]["tokenizer"]
    spoken = metric in (REASONING_ACCURACY, PERPLEXITY if same_tokens else BITS_PER_BYTE) or metric.part == "harness"
    # A value that was not finite is null in a results file.
    before = other["metrics"].get(metric.name, {}).get("value")
    if not spoken or before is None:
        return None
    cell = cells.of(metric, stage, reference)
    if cell.pair is None or cell.pair.estimate is None:
        return None
    return Claim(question.what, question.against, metric, before, cell, cell.pair, cell.pair.estimate)


def sentences(
    stages: Mapping[str, Results], told: list[Claim], alpha: float, *, preserved: Preservation | None = None
) -> list[str]:
    """Answer: did surgery preserve the baseline, did fine-tuning help, did recursion help beyond it, at what cost."""
    known = {stage: stages[label] for stage, label in speakers(stages).items()}
    said = [preserved.sentence()] if preserved is not None else []
    said += [_tell(claim, alpha) for claim in told]
    if preserved is not None and preserved.broken:
        return [*said, "Nothing is said about recursion, because surgery changed the model."]
    if {"finetuned_vanilla", "finetuned_recursive"} <= known.keys():
        said += _cost(known["finetuned_recursive"], known["finetuned_vanilla"])
    elif {"baseline", "finetuned_recursive"} <= known.keys():
        said.append("To see what recursion adds to fine-tuning, measure stage finetuned_vanilla too.")
    return said


def _tell(claim: Claim, alpha: float) -> str:
    metric, cell, n = claim.metric, claim.cell, claim.estimate.n
    label = metric.label if metric.part == "harness" else metric.label.lower()
    unit = "%" if metric.relative else "points" if metric.unit == "%" else metric.unit
    digits = 1 if unit in ("%", "points") else 3
    values = f"{claim.before:.4g} -> {cell.value:.4g}{f' {metric.unit}' if metric.unit else ''}"
    change, low, high = (
        "?" if x is None else f"{x:+.{digits}f}" for x in (cell.difference, cell.difference_low, cell.difference_high)
    )
    noun = PARTS[metric.part].noun
    difference = f"a difference of {change}{f' {unit}' if unit else ''} [95 % interval {low} to {high}]"
    facts = f"{values}, {difference}, {_p(claim.p_adjusted)}, n = {n} {noun}"
    if cell.verdict in ("better", "worse", "differs"):
        verb = "differs from" if cell.verdict == "differs" else f"is {cell.verdict} than"
        return f"{claim.what}: {label} {verb} {claim.against}'s ({facts})."
    text = f"{claim.what}: no effect on {label} is shown ({facts})."
    needed = _needed(claim, alpha)
    if needed is None or needed <= n:  # n is enough for this test alone, but not for all tests of the table together
        return text
    return f"{text} About {needed:,} {noun} would be needed to show a difference of this size."


def _needed(claim: Claim, alpha: float) -> int | None:
    if claim.pair.discordant:
        return stats.problems_needed(claim.estimate.value, claim.pair.discordant, alpha)
    return stats.units_needed(claim.estimate, alpha)


def _cost(result: Results, reference: Results) -> list[str]:
    factors = []
    for name, label in (
        ("flops_per_token", "FLOPs per token"),
        ("time_per_output_token", "time per output token"),
        ("memory_mb", "peak memory"),
    ):
        before, after = ((r["metrics"].get(name) or {}).get("value") for r in (reference, result))
        if before and after is not None:
            factors.append(f"{after / before:.2f} x the {label}")
    for key, label in (("flops", "training FLOPs"), ("seconds", "training time")):
        before, after = ((r.get("training") or {}).get(key) for r in (reference, result))
        if before and after is not None:
            factors.append(f"{after / before:.2f} x the {label}")
    return [f"Cost of recursion compared with vanilla fine-tuning: {', '.join(factors)}."] if factors else []


def _p(p: float) -> str:
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.4f}"
