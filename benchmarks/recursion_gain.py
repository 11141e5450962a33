"""What recursion gains over fine-tuning alone, what it costs, and which of its parts matter.

    python benchmarks/recursion_gain.py [--output DIR] [--seeds 0 1 2] [--ablations] [--shrunken]
                                        [--model NAME --task TASK ... --set train.lr=2e-5 ...]

For every seed `rr run` makes the four stages in a folder of their own; beside them

    vanilla, equal FLOPs   fine-tuned until it has spent what the recursive training spent
    random feedback        the trained recursion at every depth, but what a pass is fed is a random projection of the
                           state before, as large as what the trained cell would have fed it
    exit head, probability tokens leave by the boundary head (0.5), or where pass k is sure (0.99)
    random exit            each problem at a depth drawn at random, as often at each depth, 0 included, as tokens leave
                           there with the exit by probability

Every row is paired with vanilla at equal tokens on the same held-out problems, per seed: difference in points and
McNemar's exact test. `--ablations` trains the recursion again with one thing changed, on the first seed. What is
done already is not done again, so an interrupted benchmark goes on where it stopped. Writes `recursion_gain.md` and,
with matplotlib, `recursion_gain.png`.

`--shrunken` is the whole of it in about two minutes on a CPU, to see that it works: its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import mean
from typing import Any

from torch import Tensor

from rrcli.evaluation.paired import PairedAnswers
from rrcli.evaluation.stats import wilson
from rrcli.files import checkpoints
from rrcli.recursion.feedback_cell import FeedbackCell

VANILLA, RECURSIVE, MATCHED = "finetuned_vanilla", "finetuned_recursive", "vanilla_equal_flops"
LEAN = ("--skip-perplexity", "--skip-generation", "--skip-performance")
# name -> what differs from the run; {middle} is the model's layers but the first and the last quarter.
ABLATIONS: dict[str, dict[str, str]] = {
    "span: middle": {"surgery.span": "{middle}"},
    "max_steps 1": {"surgery.max_steps": "1"},
    "max_steps 4": {"surgery.max_steps": "4"},
    "no deep supervision": {"train.masked_weight": "0"},
    "cell of half the width": {"surgery.cell_width": "{half}"},
    "cell of twice the width": {"surgery.cell_width": "{double}"},
    "cell without its nonlinearity": {"cell": "linear"},
    "cell that adds the state alone": {"cell": "direct"},
    "sidecar alone (phase a)": {"train.phase": "a"},
    "LoRA (phase b)": {"train.phase": "b", "train.lr": "1e-3"},
}
# What pass k is fed in the other forms of the cell, from h(k-1); its parameters stay the same.
CELLS: dict[str, Callable[[FeedbackCell, Tensor, int], Tensor]] = {
    "linear": lambda cell, hidden, step: cell.w_out(cell.w_in(cell.norm(hidden)) + cell.step.weight[step - 1]),
    "direct": lambda cell, hidden, step: cell.w_out(cell.norm(hidden)),
    "random": lambda cell, hidden, step: random_feedback(cell, hidden, step),
}
TRAINED_CELL = FeedbackCell.forward
# Controls and exits that are measured on the trained recursion: folder -> how rr eval is called, and with which cell.
VARIANTS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "random-feedback": ((), {"cell": "random"}),
    "exit-head": (("--exit", "head:0.5"), {}),
    "exit-probability": (("--exit", "probability:0.99"), {}),
}
SHRUNKEN = {
    "train.steps": "4", "train.batch_size": "8", "train.eval_interval": "0", "eval.problems": "6",
    "eval.max_samples": "8", "eval.skip_performance": "true", "eval.skip_generation": "true",
}  # fmt: skip


def random_feedback(cell: FeedbackCell, hidden: Tensor, step: int) -> Tensor:
    """Return a fixed random projection of the state at each position, as long as the trained cell's feedback there."""
    import torch

    trained = TRAINED_CELL(cell, hidden, step)
    generator = torch.Generator().manual_seed(0)
    projection = torch.randn(hidden.shape[-1], hidden.shape[-1], generator=generator).to(hidden)
    fed = cell.norm(hidden) @ projection
    return fed * (trained.norm(dim=-1, keepdim=True) / fed.norm(dim=-1, keepdim=True).clamp_min(1e-12))


@dataclass(frozen=True)
class Answers:
    """Which problems were answered correctly (problem key -> right or wrong), and the mean passes after pass 0.

    Attributes:
        shares: with an exit rule, the share of tokens that left at pass 0, 1, ...
    """

    correct: dict[str, bool]
    passes: float = 0.0
    shares: tuple[float, ...] = ()

    @property
    def accuracy(self) -> float:
        """In percent."""
        return 100 * mean(self.correct.values())


def rr(folder: Path, settings: dict[str, str], *arguments: str) -> None:
    """Run a command of `rr` in a folder, with settings `section.key` from its environment, and the form of its cell."""
    changed = {"RR_" + key.replace(".", "_").upper(): value for key, value in settings.items() if key != "cell"}
    print(f"{folder.name}: rr {' '.join(arguments)}", file=sys.stderr, flush=True)
    program = [__file__, "--with-cell", settings["cell"]] if "cell" in settings else ["-m", "rrcli"]
    command = [sys.executable, *program, *arguments, "--dir", str(folder)]
    subprocess.run(command, env=os.environ | changed, check=True, stdout=subprocess.DEVNULL)


def experiment(folder: Path, seed: int, settings: dict[str, str], given: list[str]) -> None:
    """Make the four stages and vanilla at equal FLOPs."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = settings | {"common.seed": str(seed)}
    rr(folder, settings, "setup", *given)
    rr(folder, settings, "run")
    rr(folder, settings, "train", "--mode", "vanilla", "--match-flops", RECURSIVE)
    if not (folder / MATCHED / f"{VANILLA}_results.json").exists():
        last = str(checkpoints(folder / "checkpoints" / MATCHED)[-1].resolve())
        place = ("--output-dir", MATCHED, "--log-dir", f"logs/{MATCHED}-eval")
        rr(folder, settings, "eval", "--stage", VANILLA, "--model", last, *place, *LEAN)
    for name, (arguments, changes) in VARIANTS.items():
        if not (folder / name / f"{RECURSIVE}_results.json").exists():
            place = ("--output-dir", name, "--log-dir", f"logs/{name}")
            rr(folder, settings | changes, "eval", "--stage", RECURSIVE, *arguments, *place, *LEAN)


def ablate(folder: Path, seed: int, settings: dict[str, str], given: list[str]) -> None:
    """Train and measure one changed recursion."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = settings | {"common.seed": str(seed)}
    rr(folder, settings, "setup", *given)
    if not (folder / "checkpoints" / "after_surgery").exists():
        rr(folder, settings, "surgery")
    rr(folder, settings, "train", "--mode", "recursive")
    if not (folder / "eval_results" / f"{RECURSIVE}_results.json").exists():
        rr(folder, settings, "eval", "--stage", RECURSIVE, *LEAN)


def read(folder: Path, stage: str) -> dict[str, Any]:
    """Return the results of a stage."""
    return json.loads((folder / f"{stage}_results.json").read_text(encoding="utf-8"))


def at_depth(results: dict[str, Any], depth: int) -> Answers:
    """Return the answers of one depth."""
    return Answers({r["key"]: r["correct"][depth] for r in results["records"]["problems"]}, depth)


def with_exit(results: dict[str, Any]) -> Answers:
    """Return the answers with an exit rule, which are the last ones of each record."""
    records = results["records"]["problems"]
    left = [k for r in records for k in r["passes"]]
    shares = tuple(left.count(k) / len(left) for k in range(max(left) + 1))
    return Answers({r["key"]: r["correct"][-1] for r in records}, mean(left), shares)


def at_random(results: dict[str, Any], like: Answers) -> Answers:
    """Return the answers at depths drawn for each problem, as often at each depth as tokens of `like` leave there."""
    random, correct, drawn = Random("random exit"), {}, []
    for r in results["records"]["problems"]:
        depth = random.choices(range(len(like.shares)), like.shares)[0]
        if r["key"] in like.correct:
            correct[r["key"]] = r["correct"][depth]
            drawn.append(depth)
    return Answers(correct, mean(drawn))


def rows_of(folder: Path) -> dict[str, Answers]:
    """Return every row of the table for one seed's folder; the first is what the others are compared with."""
    evaluated = folder / "eval_results"
    recursive = read(evaluated, RECURSIVE)
    deepest = recursive["model"]["depth"]
    rows = {
        "vanilla, equal tokens": at_depth(read(evaluated, VANILLA), 0),
        "baseline, not fine-tuned": at_depth(read(evaluated, "baseline"), 0),
        "vanilla, equal FLOPs": at_depth(read(folder / MATCHED, VANILLA), 0),
    }
    rows |= {f"recursive, depth {k}": at_depth(recursive, k) for k in range(deepest + 1)}
    control = read(folder / "random-feedback", RECURSIVE)
    rows |= {f"recursive, random feedback, depth {k}": at_depth(control, k) for k in range(1, deepest + 1)}
    rows["recursive, exit head"] = with_exit(read(folder / "exit-head", RECURSIVE))
    rows["recursive, exit probability"] = with_exit(read(folder / "exit-probability", RECURSIVE))
    rows["recursive, random exit"] = at_random(recursive, rows["recursive, exit probability"])
    return rows


def difficulty(record: dict[str, Any]) -> str:
    """Return the group of a problem: what it says of its difficulty, or its task's name."""
    return record.get("difficulty") or record["task"].partition(":")[0]


def p_text(found: PairedAnswers) -> str:
    """Return the p-value of no difference for a table; "-" where so few problems allow no test."""
    p_value = found.p_value()
    return "-" if p_value is None else f"{p_value:.1g}"


def table(title: str, by_row: dict[str, list[Answers]], reference: list[Answers]) -> list[str]:
    """Return a Markdown table: a line for each row, its seeds side by side."""
    lines = [f"| {title} | accuracy, % | passes | points over vanilla, by seed | p, by seed |", "|---|---|---|---|---|"]
    for name, seeds in by_row.items():
        differences, p_values = [], []
        for answers, base in zip(seeds, reference, strict=False):
            keys = sorted(answers.correct.keys() & base.correct.keys())
            found = PairedAnswers.of([answers.correct[k] for k in keys], [base.correct[k] for k in keys])
            differences.append(f"{100 * found.value:+.1f}")
            p_values.append(p_text(found))
        accuracy, passes = mean(a.accuracy for a in seeds), mean(a.passes for a in seeds)
        paired = "| | |" if seeds is reference else f"| {' '.join(differences)} | {' '.join(p_values)} |"
        lines.append(f"| {name} | {accuracy:.1f} | {passes:.2f} {paired}")
    return lines


def ablation_table(title: str, folders: dict[str, Path], reference: Answers) -> list[str]:
    """Return a Markdown table of recursions trained in other ways, at every depth, with what their training cost."""
    lines = [
        f"| {title} | accuracy at depth 0, 1, ..., % | points over vanilla | p | training FLOPs |",
        "|---|---|---|---|---|",
    ]
    for name, folder in folders.items():
        results = read(folder / "eval_results", RECURSIVE)
        depths = [at_depth(results, depth) for depth in range(results["model"]["depth"] + 1)]
        keys = sorted(reference.correct)
        found = PairedAnswers.of([depths[-1].correct[k] for k in keys], [reference.correct[k] for k in keys])
        (spent,) = spent_by([folder], RECURSIVE)
        accuracies = ", ".join(f"{answers.accuracy:.1f}" for answers in depths)
        lines.append(f"| {name} | {accuracies} | {100 * found.value:+.1f} | {p_text(found)} | {spent['flops']:.3g} |")
    return lines


def by_generator(folders: list[Path], by_row: dict[str, list[Answers]]) -> list[str]:
    """Return a table as `table` does for each generator of problems, of the rows that matter most."""
    generators: dict[str, set[str]] = {}
    for folder in folders:
        for record in read(folder / "eval_results", "baseline")["records"]["problems"]:
            generators.setdefault(record["task"].partition(":")[0], set()).add(record["key"])
    chosen = ("vanilla, equal tokens", "vanilla, equal FLOPs", f"recursive, depth {max_depth(folders[0])}")
    lines = []
    for name, keys in generators.items():
        cut = {
            row: [Answers({k: right for k, right in a.correct.items() if k in keys}, a.passes) for a in by_row[row]]
            for row in chosen
        }
        count = len(cut[chosen[0]][0].correct)
        lines += ["", *table(f"{name}, {count} problems", cut, cut[chosen[0]])]
    return lines


def by_difficulty(folders: list[Path]) -> tuple[list[str], dict[str, dict[str, list[bool]]]]:
    """Return a table of accuracy by difficulty, all seeds together, and the answers behind it."""
    groups: dict[str, dict[str, list[bool]]] = {}
    evaluated = Path("eval_results")
    columns = {
        "baseline": (evaluated, "baseline"),
        "vanilla": (evaluated, VANILLA),
        "vanilla, equal FLOPs": (Path(MATCHED), VANILLA),
        "recursive": (evaluated, RECURSIVE),
    }
    for folder in folders:
        for column, (place, stage) in columns.items():
            for record in read(folder / place, stage)["records"]["problems"]:
                group = groups.setdefault(difficulty(record), {name: [] for name in columns})
                group[column].append(record["correct"][-1])
    groups = dict(sorted(groups.items()))
    lines = ["| problems | n | " + " | ".join(f"{name}, %" for name in columns) + " | p |", "|---" * 7 + "|"]
    for name, group in groups.items():
        shares = " | ".join(f"{100 * mean(group[column]):.1f}" for column in columns)
        p_value = p_text(PairedAnswers.of(group["recursive"], group["vanilla"]))
        lines.append(f"| {name} | {len(group['vanilla'])} | {shares} | {p_value} |")
    return lines, groups


def spent_by(folders: list[Path], name: str) -> list[dict[str, float]]:
    """Return what a training cost in each folder: steps, tokens, FLOPs, seconds."""
    files = [checkpoints(folder / "checkpoints" / name)[-1] / "metrics.json" for folder in folders]
    return [json.loads(file.read_text(encoding="utf-8"))["training"] for file in files]


def costs(folders: list[Path]) -> list[str]:
    """Return a table of what the trainings cost, means over the seeds."""
    lines = ["| training | steps | tokens | FLOPs | seconds |", "|---|---|---|---|---|"]
    for name in (VANILLA, MATCHED, RECURSIVE):
        spent = spent_by(folders, name)
        steps, tokens, flops, seconds = (mean(s[key] for s in spent) for key in ("steps", "tokens", "flops", "seconds"))
        lines.append(f"| {name} | {steps:.0f} | {tokens:,.0f} | {flops:.3g} | {seconds:.0f} |")
    return lines


def plot(groups: dict[str, dict[str, list[bool]]], file: Path) -> None:
    """Draw accuracy by difficulty with 95 % Wilson intervals; grey that can be read on white and on black."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), "#808080")):
        figure, axes = pyplot.subplots(figsize=(9, 4), layout="constrained")
        colors = {
            "baseline": "#909090",
            "vanilla": "#4c8fd6",
            "vanilla, equal FLOPs": "#1f4e8c",
            "recursive": "#e8762c",
        }
        for offset, (column, color) in enumerate(colors.items()):
            found = [wilson(sum(group[column]), len(group[column])) for group in groups.values()]
            heights = [100 * e.value for e in found]
            # Rounding may leave a hair less than nothing.
            reach = zip(*([max(0.0, 100 * d) for d in (e.value - e.low, e.high - e.value)] for e in found), strict=True)
            places = [i + 0.21 * (offset - 1.5) for i in range(len(found))]
            axes.bar(places, heights, 0.19, yerr=[*reach], color=color, ecolor="#808080", label=column)
        axes.set_xticks(range(len(groups)), groups, rotation=20, ha="right")
        axes.set_ylabel("held-out problems answered correctly, %")
        axes.spines[:].set_color("#808080")
        figure.legend(frameon=False, ncols=len(colors), loc="outside upper center")
        figure.savefig(file, dpi=150, transparent=True)


def layer_settings(model: str) -> dict[str, str]:
    """Return what the ablations need to know of the model's shape."""
    from transformers import AutoConfig

    from rrcli.demo import defaults

    config = AutoConfig.from_pretrained(defaults.MODEL_DIR if model == "default" else model).get_text_config()
    layers, hidden = config.num_hidden_layers, config.hidden_size
    edge = max(1, layers // 4)
    return {"middle": f"{edge}:{max(edge + 1, layers - edge)}", "half": str(hidden // 2), "double": str(2 * hidden)}


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing, then write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("recursion_gain"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--model", default="default")
    parser.add_argument("--task", action="append", default=[], help="as rr takes it; repeat for several")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="an option of rr")
    parser.add_argument("--ablations", action="store_true")
    parser.add_argument("--shrunken", action="store_true")
    options = parser.parse_args(arguments)
    settings = dict(item.split("=", 1) for item in options.set)
    names = list(ABLATIONS)
    if options.shrunken:
        settings = SHRUNKEN | settings
        options.seeds, names = options.seeds[:1], names[:1]
    given = [] if options.model == "default" else ["--model", options.model]
    given += [part for task in options.task for part in ("--task", task)]

    folders = [options.output / f"seed-{seed}" for seed in options.seeds]
    for seed, folder in zip(options.seeds, folders, strict=True):
        experiment(folder, seed, settings, given)
    rows = [rows_of(folder) for folder in folders]
    by_row = {name: [seed[name] for seed in rows] for name in rows[0]}
    reference = next(iter(by_row.values()))
    count = len(reference[0].correct)
    lines, groups = by_difficulty(folders)
    report = ["# What the recursion gains", "", "![accuracy by difficulty](recursion_gain.png)", ""]
    report += [
        "Written by `python benchmarks/recursion_gain.py`. Passes are those after pass 0; p is McNemar's, exact.",
        "",
    ]
    report += [f"{options.model}, seeds {options.seeds}, {count} held-out problems each.", ""]
    report += [*table("run", by_row, reference), *by_generator(folders, by_row), "", *lines, "", *costs(folders)]
    if options.ablations or options.shrunken:
        shape = layer_settings(options.model)
        ablated = {"as above": folders[0]}
        for name in names:
            folder = options.output / re.sub(r"\W+", "-", name).strip("-")
            changes = {key: value.format(**shape) for key, value in ABLATIONS[name].items()}
            ablate(folder, options.seeds[0], settings | changes, given)
            ablated[name] = folder
        report += ["", *ablation_table(f"ablation, seed {options.seeds[0]}", ablated, reference[0])]
    text = "\n".join(report) + "\n"
    (options.output / "recursion_gain.md").write_text(text, encoding="utf-8")
    print(text, end="")
    plot(groups, options.output / "recursion_gain.png")


def max_depth(folder: Path) -> int:
    """Return the depth that the recursive stage was measured at."""
    return int(read(folder / "eval_results", RECURSIVE)["model"]["depth"])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--with-cell"]:
        _, _, form, *sys.argv[1:] = sys.argv
        FeedbackCell.forward = CELLS[form]  # type: ignore[method-assign]
        runpy.run_module("rrcli", run_name="__main__")
    else:
        main()
