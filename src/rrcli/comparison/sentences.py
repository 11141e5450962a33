"""A comparison in words: the primary claims, what else was seen, what it cost, and what to be careful about.

The sentences answer the four questions of an experiment: did surgery preserve the baseline, did fine-tuning help, did
recursion help beyond it, at what cost. Only a declared claim is called shown; all else is told with its uncorrected
p-value and called exploratory. The warnings name what differs between two stages beside the model, and how many records
they have in common.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from rrcli.comparison.claims import with_unit
from rrcli.comparison.judging import smallest_differences
from rrcli.comparison.pairing import Cells
from rrcli.comparison.preservation import MEASURING_SETTINGS, Preservation
from rrcli.comparison.records import PARTS
from rrcli.comparison.results import Cell, Judgement, MetricRow, Pair, Results, Stage, Stages, speakers
from rrcli.evaluation.metrics import BITS_PER_BYTE, PERPLEXITY, REASONING_ACCURACY, Metric
from rrcli.evaluation.seeds import AcrossSeeds
from rrcli.recursion.exits import ExitRule

PROVENANCE = ("seed", "dtype", "device", "machine", "hardware", "rr", "python")


# -- warnings ------------------------------------------------------------------------------------------


def warnings(stages: Stages, rows: Sequence[MetricRow]) -> list[str]:
    """Return what the reader should know about how the stages were measured and paired with the first one."""
    (first, reference), *others = stages.items()
    told = _sampled(stages)
    for stage in stages.values():
        for seed, run in [*stage.by_seed.items()][1:]:
            told += _measured_differently(
                f"{stage.label} of seed {seed}", stage.label, result=run, reference=stage.first, own_data=True
            )
    for column, (label, stage) in enumerate(others, start=1):
        same_data = _within(stage, reference)
        told += _measured_differently(
            label,
            first,
            result=stage.first,
            reference=reference.first,
            own_data=same_data,
            own_seed=len(stage.runs) > 1,
        )
        told += _seeds_apart(stage, reference)
        pairs = [(row.metric, found) for row in rows if (found := row.cells[column].pair) is not None]
        same_tokenizer = stage.first["model"]["tokenizer"] == reference.first["model"]["tokenizer"]
        told += _shared_in_part(label, first, pairs, same_tokenizer=same_tokenizer)
    return told


def _within(stage: Stage, reference: Stage) -> bool:
    """Tell whether the reference has every record of a stage with several seeds: it was measured on all their data."""
    if len(stage.runs) == 1 and len(reference.runs) == 1:
        return False
    keys = [
        {(name, part.key(r)) for run in each.runs for name, part in PARTS.items() for r in run["records"].get(name, ())}
        for each in (stage, reference)
    ]
    return keys[0] <= keys[1]


def _seeds_apart(stage: Stage, reference: Stage) -> list[str]:
    """Return a warning if two trained stages do not have the same seeds."""
    seeds = [sorted(each.by_seed) for each in (reference, stage)]
    if seeds[0] == seeds[1] or min(map(len, seeds)) == 1:
        return []
    listed = [", ".join(map(str, each)) for each in seeds]
    return [f"{reference.label} has the seeds {listed[0]} and {stage.label} {listed[1]}: only common ones are compared"]


def _measured_differently(
    label: str, first: str, *, result: Results, reference: Results, own_data: bool = False, own_seed: bool = False
) -> list[str]:
    """Return a warning that names all differences of two measurements beside the model, if there are any.

    Args:
        own_data: whether their data may differ (each seed has its own problems), so that only its source is looked at.
            own_seed: whether their seeds may differ.
    """
    a, b = reference, result
    sources = [r["data"].get("source", "data") if own_data else _data(r) for r in (a, b)]
    found = [f"data ({sources[0]} and {sources[1]})"] if sources[0] != sources[1] else []
    sampled = all(run.get("settings", {}).get("samples") for run in (a, b))
    measuring = (*MEASURING_SETTINGS, *(("samples", "temperature") if sampled else ()))
    for place, names in (("provenance", PROVENANCE), ("settings", measuring), ("model", ("commit",))):
        for name in names:
            before, after = (r.get(place, {}).get(name) for r in (a, b))
            if name == "seed" and (own_data or own_seed):
                continue
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


def _sampled(stages: Stages) -> list[str]:
    """Return a warning if a stage was measured on a sample of its documents."""
    data = [(label, stage.first["data"]) for label, stage in stages.items()]
    counts = [(label, found.get("documents"), found.get("held_out")) for label, found in data]
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


def sentences(
    cells: Cells,
    judged: Sequence[Judgement],
    metrics: Sequence[Metric],
    *,
    alpha: float,
    preserved: Preservation | None = None,
) -> list[str]:
    """Answer: did surgery preserve the baseline, did fine-tuning help, did recursion help beyond it, at what cost.

    Args:
        judged: the primary claims. metrics: those of the table. alpha: the level of all primary claims together.
    """
    known = {stage: cells.stages[label] for stage, label in speakers(cells.stages).items()}
    broken = preserved is not None and preserved.broken
    said = [preserved.sentence()] if preserved is not None else []
    told = [each for each in judged if not each.why]
    said += [_claim(each, alpha, len(judged)) for each in told]
    begun = [
        each
        for each in judged
        if each.why and len(known) > 1 and {each.claim.stage, each.claim.reference} & known.keys()
    ]
    untold = [f"'{each.claim.text}' ({each.why})" for each in begun]
    said += (
        [f"Primary claims without a test, which still count in the correction: {', '.join(untold)}."] if untold else []
    )
    said += _smallest(told, alpha, len(judged))
    said += _explored(cells, metrics, judged, sound=not broken)
    said += [sentence for stage in known.values() for sentence in _exits(stage)]
    said += _of_seeds(list(known.values()))
    if broken:
        return [*said, "Nothing is said about recursion, because surgery changed the model."]
    if {"finetuned_vanilla", "finetuned_recursive"} <= known.keys():
        said += _cost(known["finetuned_recursive"], known["finetuned_vanilla"])
    elif {"baseline", "finetuned_recursive"} <= known.keys():
        said.append("To see what recursion adds to fine-tuning, measure stage finetuned_vanilla too.")
    return said


def _claim(judged: Judgement, alpha: float, claims: int) -> str:
    """Say what was found about a primary claim, with the interval that agrees with its corrected test."""
    cell, metric = judged.cell, judged.claim.metric
    interval = _interval(judged.low, judged.high, judged.confidence, metric)
    correction = f" (Holm's correction for {claims} claims)" if claims > 1 else ""
    facts = f"{_values(cell, judged.before, metric, interval)}, {_p(judged.p_adjusted)}{correction}, {_n(cell, metric)}"
    if judged.late:
        return f"Claim that came after its numbers (exploratory) '{judged.claim.text}': {judged.verdict} ({facts})."
    result = "shown" if judged.shown else "NOT shown"
    text = f"Primary claim '{judged.claim.text}' is {result}: {judged.verdict} ({facts})."
    if judged.needed is not None and not judged.shown:
        noun = "seeds" if judged.needed.what == "seeds" else PARTS[metric.part].noun
        text += f" About {judged.needed.count:,} {noun} would show it with 80 % power if this is the true difference."
    return text


def _smallest(judged: Sequence[Judgement], alpha: float, claims: int) -> list[str]:
    """Say how small a difference this experiment could show: known from the spread, whatever the difference is."""
    found = [_smallest_of(each, smallest) for each, smallest in smallest_differences(judged)]
    if not found:
        return []
    level = f"{alpha:g}" if claims == 1 else f"{alpha / claims:.3g}, the level of the first of {claims} claims"
    return [f"Smallest differences that data like these show with 80 % power (alpha {level}): {'; '.join(found)}."]


def _smallest_of(judged: Judgement, smallest: float) -> str:
    metric, digits = judged.claim.metric, 3 if judged.claim.metric.difference_unit not in ("%", "points") else 2
    margin = " as a margin" if judged.claim.shift else ""
    return f"{metric.label.strip().lower()} {with_unit(round(smallest, digits), metric)}{margin}"


def _explored(cells: Cells, metrics: Sequence[Metric], judged: Sequence[Judgement], *, sound: bool) -> list[str]:
    """Tell the differences that fine-tuning, and recursion beyond it, made where no primary claim is about them."""
    labels = speakers(cells.stages)
    questions = [FINE_TUNING]
    if sound:
        questions.append(RECURSION if {"finetuned_vanilla", "finetuned_recursive"} <= labels.keys() else BOTH)
    claimed = [each.cell for each in judged if not each.why]
    said = []
    for question in questions:
        if not {question.stage, question.reference} <= labels.keys():
            continue
        stage, reference = cells.stages[labels[question.stage]], cells.stages[labels[question.reference]]
        found = []
        for metric in _spoken(metrics, stage, reference):
            cell = cells.of(metric, stage.label, reference.label)
            if cell.pair is not None and cell.pair.evidence is not None and not any(cell is one for one in claimed):
                found.append(_difference(cell, reference.value(metric), metric))
        if found:
            said.append(f"{question.what}, compared with {question.against} (exploratory): {'; '.join(found)}.")
    return said


def _spoken(metrics: Sequence[Metric], stage: Stage, reference: Stage) -> list[Metric]:
    """Return the metrics that sentences are about: accuracies, then perplexity, or bits where tokenizers differ."""
    same_tokens = stage.first["model"]["tokenizer"] == reference.first["model"]["tokenizer"]
    text = PERPLEXITY if same_tokens else BITS_PER_BYTE
    found = [metric for metric in metrics if metric in (REASONING_ACCURACY, text) or metric.part == "harness"]
    return sorted(found, key=lambda metric: metric.part == "documents")


def _difference(cell: Cell, before: float | None, metric: Metric) -> str:
    interval = _interval(cell.difference_low, cell.difference_high, cell.confidence, metric)
    tested = "identical records" if cell.verdict == "same" else "too few for a test" if cell.p_value is None else ""
    label = metric.label if metric.part == "harness" else metric.label.lower()
    p = tested or f"uncorrected {_p(cell.p_value or 0.0)}"
    return f"{label} {_values(cell, before, metric, interval)}, {p}, {_n(cell, metric)}"


def _values(cell: Cell, before: float | None, metric: Metric, interval: str) -> str:
    unit = f" {metric.unit}" if metric.unit else ""
    shown = f" {metric.difference_unit}" if metric.difference_unit else ""
    known = "?" if before is None else f"{before:.4g}"
    return f"{known} -> {cell.value:.4g}{unit}, a difference of {_signed(cell.difference, metric)}{shown} {interval}"


def _interval(low: float | None, high: float | None, confidence: float, metric: Metric) -> str:
    if low is None or high is None:
        return "[interval unknown]"
    return f"[{100 * confidence:.4g} % interval {_signed(low, metric)} to {_signed(high, metric)}]"


def _signed(value: float | None, metric: Metric) -> str:
    digits = 1 if metric.difference_unit in ("%", "points") else 3
    return "?" if value is None else f"{value:+.{digits}f}"


def _n(cell: Cell, metric: Metric) -> str:
    noun = PARTS[metric.part].noun
    evidence = cell.pair.evidence if cell.pair is not None else None
    if not isinstance(evidence, AcrossSeeds):
        return f"n = {cell.n} {noun}"
    seeds = ", ".join(_signed(metric.shown_difference(value), metric) for value in evidence.by_seed)
    units = f"the same {cell.n} {noun}" if evidence.common == evidence.n else f"{cell.n} {noun} in all"
    if 0 < evidence.common < evidence.n:
        units += f", {evidence.common} of them the same for every seed"
    return f"n = {len(evidence.by_seed)} seeds ({seeds}) with {units}, {evidence.df:.1f} degrees of freedom"


def _of_seeds(stages: Sequence[Stage]) -> list[str]:
    """Say what the p-values are about if no stage was trained more than once."""
    trained = [stage for stage in stages if stage.first.get("training")]
    if not trained or len(stages) < 2 or any(len(stage.runs) > 1 for stage in trained):
        return []
    return [
        "Each training was done with one seed: p-values and intervals hold for these checkpoints, not for the method. "
        "'rr run --seeds 3' trains more seeds."
    ]


def _exits(stage: Stage) -> list[str]:
    """Say that the numbers of a stage are those with its exit, and what every pass for every token would give."""
    rules = {seed: run["model"]["exit"] for seed, run in stage.by_seed.items() if run["model"].get("exit")}
    if not rules:
        return []
    names = {seed: str(ExitRule.from_dict(rule)) for seed, rule in rules.items()}
    listed = ", ".join(f"seed {seed} {name}" for seed, name in names.items())
    shown = next(iter(names.values())) if len(stage.runs) == 1 else listed
    given = any((run.get("settings") or {}).get("exit") for run in stage.runs)
    how = "" if given else ", chosen on the validation side"
    every = []
    for metric in (REASONING_ACCURACY, PERPLEXITY):
        depths = [run.get("by_depth", {}).get(metric.name, ()) for run in stage.runs]
        value = metric.middle([entries[-1]["value"] if entries else None for entries in depths])
        every += [] if value is None else [f"{metric.label.lower()} {value:.4g} {metric.unit}".rstrip()]
    beside = f"; with every pass for every token: {', '.join(every)}" if every else ""
    return [f"{stage.label} is measured with its exit ({shown}){how}{beside}."]


def _cost(stage: Stage, reference: Stage) -> list[str]:
    factors = []
    for name, label in (
        ("decode_flops_per_token", "FLOPs per new token"),
        ("prefill_flops_per_token", "FLOPs per prompt token"),
        ("time_per_output_token", "time per output token"),
        ("memory_mb", "peak memory"),
    ):
        before, after = (
            _middle([(run["metrics"].get(name) or {}).get("value") for run in s.runs]) for s in (reference, stage)
        )
        if before and after is not None:
            factors.append(f"{after / before:.2f} x the {label}")
    for key, label in (("flops", "training FLOPs"), ("seconds", "training time")):
        before, after = (_middle([(run.get("training") or {}).get(key) for run in s.runs]) for s in (reference, stage))
        if before and after is not None:
            factors.append(f"{after / before:.2f} x the {label}")
    return [f"Cost of recursion compared with vanilla fine-tuning: {', '.join(factors)}."] if factors else []


def _middle(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if len(known) == len(values) else None


def _p(p: float) -> str:
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.4f}"
