"""The report of `recursion_gain.py`: tables in Markdown and two pictures, from what `rr compare` found."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from rrcli.comparison.comparison import Comparison
from rrcli.comparison.formats import number, p_text, row_label, signed
from rrcli.comparison.pairing import Cells
from rrcli.comparison.results import Cell, Results, Stage
from rrcli.evaluation.metrics import LOOKUP_ACCURACY, PERPLEXITY, REASONING_ACCURACY
from rrcli.evaluation.stats import wilson
from rrcli.recursion.exits import ExitRule, Kind

VANILLA, RECURSIVE, MATCHED = "finetuned_vanilla", "finetuned_recursive", "vanilla_equal_flops"
# The stages of the report, and their colours in the picture.
STAGES = {"baseline": "#909090", VANILLA: "#4c8fd6", MATCHED: "#1f4e8c", RECURSIVE: "#e8762c"}
GREY = "#808080"
# What a new token costs, as the picture of costs names it.
CURVE_COSTS = {"decode_flops_per_token": "MFLOP per new token", "time_per_output_token": "ms per new token"}
# Colour and marker of each rule in the picture of exits.
EXIT_STYLES = [
    ("#1f4e8c", "D"), ("#e8762c", "o"), ("#2ca02c", "s"), ("#9467bd", "^"), ("#d62728", "*"), ("#8c564b", "v"),
    ("#909090", "x"),
]  # fmt: skip
# Of the exit rules with many thresholds, those that the report shows.
WITH_THRESHOLD: tuple[Kind, ...] = ("head", "probability", "margin")
SHOWN_EXITS = [str(ExitRule(rule, threshold)) for rule in WITH_THRESHOLD for threshold in (0.5, 0.9, 0.99)]
COSTS = (
    *("training_tokens", "training_flops", "training_seconds", "prefill_flops_per_token", "decode_flops_per_token"),
    *("time_per_output_token", "decode/avg_passes", "memory_mb"),
)
REPORT = """# What the recursion gains

![accuracy by difficulty](recursion_gain.png)

Written by `python benchmarks/recursion_gain.py`. Model {model}, seeds {seeds}, for each seed {problems} test
problems of its own.

{said}

## Accuracy

Means over seeds with 95 % intervals in which seeds count as random. Lookup answers as the nearest training problem
does.

{accuracies}

## Differences

On the same problems and documents, with seeds as a random factor. These p-values are not corrected: what is claimed
stands above.

{differences}

## By difficulty

The problems of all seeds together. The picture has Wilson's intervals, which are about these checkpoints and not about
further seeds.

{difficulty}

## By depth, controls and ablations

Single checkpoints, the deepest pass for every token, without an exit, against vanilla of the same seed, with McNemar's
exact test, not corrected. Rows without a seed are of seed {first}.

{single}

## Exits

![frontier of exits](exits.png)

The test side of `rr eval --exits`, seed {first}: {n[problems]} problems, {n[documents]} documents with {n[tokens]}
tokens. The chosen rule is the cheapest that loses at most {loss:g} points on the validation side.

{exits}

## Costs

Trainings: medians over seeds. Speed, memory and FLOPs of decoding: `rr costs`, the stages of seed {first} in turns.

{costs}

![accuracy against the cost of a new token](recursion_gain_cost.png)
"""


def accuracies(comparison: Comparison) -> str:
    """Return the table of stages: mean over seeds with its interval, overall and by task, and the seeds' own values."""
    found = [row for row in comparison.rows if row.metric.part == "problems"]
    looked_up = [row for row in comparison.rows if row.metric.name.startswith(LOOKUP_ACCURACY.name)]
    rows = []
    for column, stage in enumerate(comparison.stages):
        cells = [row.cells[column] for row in found]
        rows.append([stage.label, *(_with_interval(vars(cell)) for cell in cells)])
        for place, seed in enumerate(stage.by_seed if len(stage.runs) > 1 else ()):
            rows.append([f"&nbsp;&nbsp;seed {seed}", *(_percent(cell.by_seed[place]) for cell in cells)])
    if looked_up:
        rows.append(["lookup of training answers", *(_percent(row.cells[0].value) for row in looked_up)])
    return table(["accuracy, %", *(row.metric.label.strip() for row in found)], rows)


def differences(comparison: Comparison, pairs: Sequence[tuple[str, str]]) -> str:
    """Return the table of differences of pairs of stages, in points; of perplexity, in percent."""
    cells = Cells({stage.label: stage for stage in comparison.stages})
    metrics = [row.metric for row in comparison.rows if row.metric.part == "problems" or row.metric == PERPLEXITY]
    rows = []
    for (stage, reference), metric in product(pairs, metrics):
        cell = cells.of(metric, stage, reference)
        by_seed = getattr(cell.pair and cell.pair.evidence, "by_seed", ())
        each = " ".join(_signed(metric.shown_difference(value)) for value in by_seed)
        rows.append([f"{stage} − {reference}", metric.label.strip(), *_difference(cell), each or "-"])
    return table(["difference", "of", "points or %", "95 % interval", "p", "by seed"], rows)


def by_difficulty(stages: Sequence[Stage]) -> dict[str, dict[str, list[bool]]]:
    """Return group -> stage -> answers of all seeds; a group is a problem's difficulty, or the name of its task."""
    groups: dict[str, dict[str, list[bool]]] = {}
    for stage in stages:
        for record in (r for run in stage.runs for r in run["records"]["problems"]):
            group = record.get("difficulty") or record["task"].partition(":")[0]
            groups.setdefault(group, {each.label: [] for each in stages})[stage.label].append(record["correct"][-1])
    return dict(sorted(groups.items()))


def difficulty_table(groups: Mapping[str, Mapping[str, Sequence[bool]]]) -> str:
    """Return the table of accuracy by difficulty."""
    rows = [
        [name, str(len(group["baseline"])), *(_percent(100 * fmean(answers)) for answers in group.values())]
        for name, group in groups.items()
    ]
    return table(["problems, all seeds", "n", *(f"{stage}, %" for stage in STAGES)], rows)


def by_depth(runs: Mapping[str, tuple[Results, Results]]) -> str:
    """Return the table of single recursions: label -> results, and those of vanilla that they are paired with."""
    rows = []
    for label, (run, vanilla) in runs.items():
        cells = Cells({label: Stage(label, (run,)), VANILLA: Stage(VANILLA, (vanilla,))})
        depths = ", ".join(_percent(entry["value"]) for entry in run["by_depth"][REASONING_ACCURACY.name])
        compared = _difference(cells.of(REASONING_ACCURACY, label, VANILLA))
        rows.append([label, depths, *compared, f"{run['training']['flops']:.3g}"])
    head = [
        "recursion",
        "accuracy at depth 0, 1, ..., %",
        "points over vanilla",
        "95 % interval",
        "p",
        "training FLOPs",
    ]
    return table(head, rows)


def every_pass(run: Results) -> Results:
    """Return results with the answers of every pass for every token as the last ones, if there are those of an exit."""
    if not run["model"].get("exit"):
        return run
    problems = [record | {"correct": record["correct"][:-1]} for record in run["records"]["problems"]]
    return run | {"records": run["records"] | {"problems": problems}}


def exits_table(frontier: Mapping[str, Any]) -> str:
    """Return the test side of the frontier: fixed depths, some thresholds, their random controls, and the oracle."""
    chosen = str(ExitRule.from_dict(frontier["chosen"])) if frontier["chosen"] else ""
    rows = []
    for point in frontier["test"]:
        name, like = point["name"], point.get("like")
        if point["rule"] in (*WITH_THRESHOLD, "random") and (like or name) not in {*SHOWN_EXITS, chosen}:
            continue
        label = f"random, as often as {like}" if like else f"**{name}** (chosen)" if name == chosen else name
        costs = (number(point[key]) for key in ("passes", "mflop", "nats", "text_passes"))
        rows.append([label, _with_interval(point["accuracy"] or {"value": None}), *costs])
    return table(["exit", "accuracy, %", "passes", "MFLOP an answer", "nats a token", "passes, text"], rows)


def costs_table(comparison: Comparison) -> str:
    """Return what trainings and decoding cost."""
    found = [row for row in comparison.rows if row.metric.name in COSTS]
    rows = [[row_label(row).strip(), *(number(cell.value) for cell in row.cells)] for row in found]
    return table(["cost", *comparison.labels], rows)


def report(
    comparison: Comparison, control: Results, frontier: Mapping[str, Any], ablated: Mapping[str, Results]
) -> str:
    """Return the whole report in Markdown."""
    stages = {stage.label: stage for stage in comparison.stages}
    vanilla, recursive = stages[VANILLA], stages[RECURSIVE]
    trained = {seed: every_pass(run) for seed, run in recursive.by_seed.items()}
    single = {f"as it is, seed {seed}": (run, vanilla.by_seed[seed]) for seed, run in trained.items()}
    single |= {name: (run, vanilla.first) for name, run in {"random feedback": control, **ablated}.items()}
    said = [*comparison.sentences, *(f"**Warning:** {warning}" for warning in comparison.warnings)]
    return REPORT.format(
        model=vanilla.first["settings"]["model"],
        seeds=", ".join(map(str, recursive.by_seed)),
        problems=len(vanilla.first["records"]["problems"]),
        said="\n".join(f"- {sentence}" for sentence in said),
        accuracies=accuracies(comparison),
        differences=differences(comparison, [(RECURSIVE, VANILLA), (RECURSIVE, MATCHED), (VANILLA, "baseline")]),
        difficulty=difficulty_table(by_difficulty(comparison.stages)),
        single=by_depth(single),
        first=next(iter(recursive.by_seed)),
        n=frontier["n"]["test"],
        loss=frontier["loss"],
        exits=exits_table(frontier),
        costs=costs_table(comparison),
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def _percent(value: float | None) -> str:
    return number(value, percent=True)


def _signed(value: float | None) -> str:
    return "-" if value is None else signed(value, percent=True)


def _with_interval(entry: Mapping[str, Any]) -> str:
    value, low, high = (entry.get(name) for name in ("value", "low", "high"))
    return _percent(value) + ("" if None in (low, high) else f" [{_percent(low)}, {_percent(high)}]")


def _difference(cell: Cell) -> tuple[str, str, str]:
    """Return a difference, its interval and its uncorrected p-value; "-" for what is not known."""
    low, high = cell.difference_low, cell.difference_high
    interval = "-" if None in (low, high) else f"{_signed(low)} to {_signed(high)}"
    p = "-" if cell.p_value is None else p_text(cell.p_value).removeprefix("p ").removeprefix("= ")
    return _signed(cell.difference), interval, p


def plot(groups: Mapping[str, Mapping[str, Sequence[bool]]], file: Path) -> None:
    """Draw accuracy by difficulty with 95 % Wilson intervals."""
    with picture(file, "test problems answered correctly, %", columns=len(STAGES)) as axes:
        for offset, (stage, color) in enumerate(STAGES.items()):
            found = [wilson(sum(group[stage]), len(group[stage])) for group in groups.values()]
            # Rounding may leave a hair less than nothing.
            ends = [(e.value - (e.low or 0.0), (e.high or 0.0) - e.value) for e in found]
            reach = [[max(0.0, 100 * end[side]) for end in ends] for side in (0, 1)]
            places = [i + 0.21 * (offset - 1.5) for i in range(len(found))]
            heights = [100 * e.value for e in found]
            axes.bar(places, heights, 0.19, yerr=reach, color=color, ecolor=GREY, label=stage)
        axes.set_xticks(range(len(groups)), groups, rotation=20, ha="right")


def plot_exits(frontier: Mapping[str, Any], file: Path) -> None:
    """Draw the frontier of exits: accuracy of the test problems against the FLOPs of an answer."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for point in frontier["test"]:
        if point["accuracy"] is not None:
            lines.setdefault(point["rule"], []).append((point["mflop"], point["accuracy"]["value"]))
    with picture(file, f"accuracy, % (n = {frontier['n']['test']['problems']})", columns=len(lines)) as axes:
        for (rule, points), (color, marker) in zip(lines.items(), EXIT_STYLES, strict=False):
            fixed = rule == "depth"
            style = {"color": color, "marker": marker, "markersize": 9 if fixed else 4, "linewidth": 2 if fixed else 1}
            axes.plot(*zip(*sorted(points), strict=True), label="fixed depth" if fixed else rule, **style)
        axes.set_xlabel("MFLOP an answer, prompt included")


def cost_curves(comparison: Comparison) -> dict[str, dict[str, list[tuple[float, float, str]]]]:
    """Return cost -> stage -> (cost, accuracy, name) of its depths, and of its exit, where both are known."""
    found: dict[str, dict[str, list[tuple[float, float, str]]]] = {cost: {} for cost in CURVE_COSTS}
    for cost, (stage, points) in product(CURVE_COSTS, comparison.curves().items()):
        known = [point for point in points if cost in point and REASONING_ACCURACY.name in point]
        names = ["exit" if "exit" in point else str(point["depth"]) for point in known]
        found[cost][stage] = [
            (point[cost], point[REASONING_ACCURACY.name], name) for point, name in zip(known, names, strict=True)
        ]
    return found


def plot_costs(comparison: Comparison, file: Path) -> None:
    """Draw accuracy against what a new token costs: a point for each stage, and for the recursive one each depth."""
    curves = cost_curves(comparison)
    label = "test problems answered correctly, %"
    with picture(file, label, columns=len(STAGES), panels=len(curves)) as panels:
        for axes, (cost, stages) in zip(panels, curves.items(), strict=True):
            for (stage, points), marker in zip(stages.items(), "osDP", strict=True):
                depths = [point for point in points if point[2] != "exit"]
                style = {"color": STAGES[stage], "marker": marker, "markersize": 7}
                axes.plot([x for x, _, _ in depths], [y for _, y, _ in depths], label=stage, **style)
                for x, y, name in points if len(points) > 1 else ():
                    if name == "exit":
                        axes.plot([x], [y], marker="*", markersize=14, color=STAGES[stage])
                    text = "exit" if name == "exit" else f"depth {name}"
                    axes.annotate(text, (x, y), (0, -14), textcoords="offset points", color=GREY, fontsize=8)
            axes.set_xlabel(CURVE_COSTS[cost])
            axes.margins(x=0.2)
            axes.set_xlim(left=0)


@contextmanager
def picture(file: Path, label: str, *, columns: int, panels: int = 1) -> Iterator[Any]:
    """Give axes to draw on (a list of several), and save them; grey that can be read on white and on black."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), GREY)):
        figure, grid = pyplot.subplots(1, panels, figsize=(9, 4), layout="constrained", squeeze=False, sharey=True)
        drawn = list(grid[0])
        yield drawn if panels > 1 else drawn[0]
        drawn[0].set_ylabel(label)
        for axes in drawn:
            axes.spines[:].set_color(GREY)
        handles, labels = drawn[0].get_legend_handles_labels()
        figure.legend(handles, labels, frameon=False, ncols=columns, loc="outside upper center")
        figure.savefig(file, dpi=150, transparent=True)
        pyplot.close(figure)
