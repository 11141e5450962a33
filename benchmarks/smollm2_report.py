"""The report of `smollm2_recursion.py`: tables in Markdown and a picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from recursion_gain_report import (
    MATCHED,
    RECURSIVE,
    STAGES,
    VANILLA,
    accuracies,
    by_depth,
    by_difficulty,
    costs_table,
    differences,
    difficulty_table,
    every_pass,
    exits_table,
    picture,
    table,
)

from rrcli.comparison.comparison import Comparison
from rrcli.comparison.curves import Curves, read_curves
from rrcli.comparison.flips import KINDS, Flips, flips_of
from rrcli.comparison.results import Results

# How many flipped problems are shown, half of each kind.
FLIPPED = 10
CURVE = "evaluation/during_training/reasoning_accuracy"
REPORT = """# What recursion gains on SmolLM2-135M

Written by `python benchmarks/smollm2_recursion.py`. Model {model}, {options},
{steps} steps. Seeds {seeds}; for each {problems} test problems: those of generators are each seed's own, those of files
are the same for all.

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

The problems of all seeds together.

{difficulty}

## By depth

Single checkpoints, the deepest pass for every token, without an exit, against vanilla of the same seed, with McNemar's
exact test, not corrected. Random feedback is of seed {first}.

{single}

## What the passes fix and break

Of the answers that pass 0 of the recursive model gets wrong, the share that its last pass gets right, and of those that
it gets right the share that the last pass gets wrong. All seeds together.

{repairs}

## During training

Accuracy on the validation problems of `rr train`, means over seeds; at equal FLOPs they end some steps apart.

![accuracy during training](smollm2_curves.png)

{curves}

## Exits

{exits}

## Costs

Trainings: medians over seeds. Speed, memory and FLOPs of decoding: `rr costs`, the stages of seed {first} in turns.

{costs}

![accuracy against the cost of a new token](smollm2_costs.png)

## Ten problems on which the stages differ

{flips} The first five of each kind:

{flipped}
"""
EXITS = """![frontier of exits](smollm2_exits.png)

The test side of `rr eval --exits`, seed {first}: {n[problems]} problems, {n[documents]} documents with {n[tokens]}
tokens. The chosen rule is the cheapest that loses at most {loss:g} points on the validation side.

{table}"""


def report(comparison: Comparison, control: Results, frontier: Mapping[str, Any] | None, logs: Path) -> str:
    """Return the whole report in Markdown.

    Args:
        control: the first seed with random feedback. frontier: None where the span does not reach the last layer.
        logs: the folder of the experiment's TensorBoard logs.
    """
    stages = {stage.label: stage for stage in comparison.stages}
    vanilla, recursive = stages[VANILLA], stages[RECURSIVE]
    first = next(iter(recursive.by_seed))
    trained = {seed: every_pass(run) for seed, run in recursive.by_seed.items()}
    single = {f"as it is, seed {seed}": (run, vanilla.by_seed[seed]) for seed, run in trained.items()}
    single["random feedback"] = (control, vanilla.first)
    training, flips = recursive.first["training"], flips_of([vanilla, recursive])
    said = [*comparison.sentences, *(f"**Warning:** {warning}" for warning in comparison.warnings)]
    shown = "A span that ends before the last layer has no exits."
    if frontier is not None:
        shown = EXITS.format(first=first, n=frontier["n"]["test"], loss=frontier["loss"], table=exits_table(frontier))
    shape = recursive.first["model"]["recursion"]
    options = f"span {shape['span'] or 'all'}, {shape['max_steps']} passes, phase {training['phase']}"
    return REPORT.format(
        model=Path(vanilla.first["settings"]["model"]).name,
        options=options,
        steps=training["steps"],
        seeds=", ".join(map(str, recursive.by_seed)),
        problems=len(vanilla.first["records"]["problems"]),
        said="\n".join(f"- {sentence}" for sentence in said),
        accuracies=accuracies(comparison),
        differences=differences(comparison, [(RECURSIVE, VANILLA), (RECURSIVE, MATCHED), (VANILLA, "baseline")]),
        difficulty=difficulty_table(by_difficulty(comparison.stages)),
        single=by_depth(single),
        first=first,
        repairs=repairs_table(list(trained.values())),
        curves=curves_table(curves_of(comparison, logs)),
        exits=shown,
        costs=costs_table(comparison),
        flips=flips.sentence(),
        flipped=flipped_table(flips),
    )


def repairs_table(runs: Sequence[Results]) -> str:
    """Return the table of fixes and breaks of the last pass, by task and overall."""
    by_task: dict[str, list[list[bool]]] = {}
    for record in (record for run in runs for record in run["records"]["problems"]):
        for name in (_task(record["task"]), "all"):
            by_task.setdefault(name, []).append(record["correct"])
    rows = []
    for name, answers in sorted(by_task.items(), key=lambda item: item[0] == "all"):  # which comes last
        wrong, right = ([one[-1] for one in answers if one[0] == first] for first in (False, True))
        fixed = f"{100 * fmean(wrong):.1f} ({sum(wrong)} of {len(wrong)})" if wrong else "-"
        lost = len(right) - sum(right)
        broken = f"{100 * lost / len(right):.1f} ({lost} of {len(right)})" if right else "-"
        rows.append([name, fixed, broken])
    return table(["problems, all seeds", "fixed, % of pass 0's errors", "broken, % of pass 0's hits"], rows)


def curves_of(comparison: Comparison, logs: Path) -> dict[str, Curves]:
    """Return stage -> run -> points of the validation accuracy in training."""
    found = {}
    for stage in comparison.stages:
        runs = [stage.label if place == 0 else f"{stage.label}-seed{seed}" for place, seed in enumerate(stage.by_seed)]
        if curves := read_curves(logs, runs, [CURVE]).get(CURVE):
            found[stage.label] = curves
    return found


def curves_table(curves: Mapping[str, Curves]) -> str:
    """Return the table of validation accuracy by step, means over the runs that were measured there."""
    rows = [[stage, str(step), f"{value:.1f}"] for stage, runs in curves.items() for step, value in _means(runs)]
    return table(["stage", "step", "accuracy, %"], rows)


def plot_curves(curves: Mapping[str, Curves], file: Path) -> None:
    """Draw validation accuracy by step, means over seeds."""
    with picture(file, "validation problems answered correctly, %", columns=len(curves)) as axes:
        for stage, runs in curves.items():
            axes.plot(*zip(*_means(runs), strict=True), color=STAGES[stage], marker="o", markersize=3, label=stage)
        axes.set_xlabel("optimiser steps")


def flipped_table(flips: Flips) -> str:
    """Return the table of problems that one of two stages alone answers right, the first ones of each kind."""
    rows = []
    for kind in KINDS:
        for problem, before, after in flips.of(kind)[: FLIPPED // 2]:
            texts = (problem.prompt, problem.expected, before.output, after.output)
            rows.append([kind, str(problem.seed), *(" ".join(text.split()) for text in texts)])
    return table(["recursion", "seed", "problem", "right answer", "vanilla", "recursive"], rows)


def recipes_table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the table of recipes: answers right and nats of an answer at each depth, by task, and costs."""
    tasks = list(next(iter(found.values()))["right"])
    head = ["recipe", *(f"{_task(task)}, %" for task in tasks), "all, %", "nats an answer", "nats a token of text"]
    head += ["PFLOP", "seconds", "feedback"]
    rows = []
    for name, one in found.items():
        right = [np.mean(one["right"][task], axis=0) for task in tasks]
        nats = np.mean([np.mean(one["nats"][task], axis=0) for task in tasks], axis=0)
        cells = [_each_depth(100 * each, ".0f") for each in (*right, np.mean(right, axis=0))]
        cells += [_each_depth(nats, ".3f"), _each_depth(one["text_nats"], ".3f")]
        spent, feedback = one["training"], one["scalars"].get("train/feedback_norm")
        cells += [f"{spent['flops'] / 1e15:.3f}", f"{spent['seconds']:.0f}"]
        rows.append([name, *cells, "-" if feedback is None else f"{feedback['value']:.3f}"])
    return table(head, rows) + "\n"


def _task(spec: str) -> str:
    return spec.partition(":")[0].removesuffix(".jsonl")


def _means(runs: Curves) -> Iterator[tuple[int, float]]:
    """Yield step and mean over runs; at equal FLOPs they end some steps apart, and their last points go together."""
    by_step: dict[int, list[tuple[int, float]]] = {}
    together = len({len(line) for line in runs.values()}) == 1
    for line in runs.values():
        for place, (step, value) in enumerate(line):
            by_step.setdefault(place if together else step, []).append((step, value))
    for _, points in sorted(by_step.items()):
        yield round(fmean(step for step, _ in points)), fmean(value for _, value in points)


def _each_depth(values: Sequence[float], form: str) -> str:
    return " / ".join(format(value, form) for value in values)
