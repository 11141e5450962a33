"""What recursion gains over fine-tuning alone, what it costs, and which of its parts matter, as one report.

    python benchmarks/recursion_gain.py [--output DIR] [--ablations] [--shrunken] [options of rr run]

`DIR/experiment` is made by `rr run --seeds 6,7,8,9,10` with the options given, and reported with the functions of
`rr compare`. An experiment that is there goes on with its own options; one that is done is only reported. Folders
beside it hold what is measured of its first seed alone:

    exits              `rr eval --exits`, of a copy of the checkpoint, so that the experiment's own stays as it is
    random-feedback    the trained recursion at every depth, but what a pass is fed is a random projection of the state
                       before, as large as what the trained cell would have fed it; without an exit
    one per ablation   with `--ablations`: the recursion trained again with one thing changed

What is done is not done again, so an interrupted benchmark goes on where it stopped. Writes `DIR/recursion_gain.md`
and, with matplotlib, `DIR/recursion_gain.png`, `DIR/recursion_gain_cost.png` and `DIR/exits.png`.

`--shrunken` is the whole of it with two seeds and one ablation, in about two minutes on a CPU, to see that it works:
its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from recursion_gain_report import RECURSIVE, STAGES, by_difficulty, plot, plot_costs, plot_exits, report
from torch import Tensor

from rrcli.comparison.frontier import read_frontier
from rrcli.comparison.results import Results, read_results
from rrcli.configuration import SETTINGS_FILE, load
from rrcli.experiment.workspace import Workspace, used_checkpoint
from rrcli.models.config import load_config
from rrcli.recursion.feedback_cell import FeedbackCell
from rrcli.services.compare import compare
from rrcli.settings import CommonSettings, CompareSettings

ANSWERS_ALONE = ("--skip-perplexity", "--skip-generation", "--skip-performance", "--exit", "none")
# name -> what differs from the run; {half} and {double} are of the cell's width.
ABLATIONS: dict[str, dict[str, str]] = {
    "max_steps 2": {"surgery.max_steps": "2"},
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
SHRUNKEN = (
    *("--steps", "4", "--batch-size", "8", "--eval-interval", "0", "--problems", "6", "--max-samples", "8"),
    "--skip-generation",
)


def random_feedback(cell: FeedbackCell, hidden: Tensor, step: int) -> Tensor:
    """Return a fixed random projection of the state at each position, as long as the trained cell's feedback there."""
    trained = TRAINED_CELL(cell, hidden, step)
    generator = torch.Generator().manual_seed(0)
    projection = torch.randn(hidden.shape[-1], hidden.shape[-1], generator=generator).to(hidden)
    fed = cell.norm(hidden) @ projection
    return fed * (trained.norm(dim=-1, keepdim=True) / fed.norm(dim=-1, keepdim=True).clamp_min(1e-12))


def rr(folder: Path, *arguments: str, changes: Mapping[str, str] | None = None) -> None:
    """Run a command of `rr` in a folder.

    Args:
        changes: `section.option` -> value, given in the environment; `cell` is the form of the feedback cell.
    """
    changes = changes or {}
    environment = {f"RR_{key.replace('.', '_').upper()}": value for key, value in changes.items() if key != "cell"}
    print(f"{folder.name}: rr {' '.join(arguments)}", file=sys.stderr, flush=True)
    program = [__file__, "--with-cell", changes["cell"]] if "cell" in changes else ["-m", "rrcli"]
    command = [sys.executable, *program, *arguments, "--dir", str(folder)]
    subprocess.run(command, env=os.environ | environment, check=True, stdout=subprocess.DEVNULL)


def random_control(experiment: Path, output: Path) -> Results:
    """Return the results of the first seed with random feedback; make what is missing."""
    folder = output / "random-feedback"
    if not _results_file(folder).exists():
        rr(experiment, "eval", "--stage", RECURSIVE, *_into(folder), *ANSWERS_ALONE, changes={"cell": "random"})
    return read_results(_results_file(folder), "rr eval")


def measured_exits(experiment: Path, output: Path) -> dict[str, Any]:
    """Return the frontier of exits of the first seed; make what is missing."""
    exits = output / "exits"
    file = exits / f"{RECURSIVE}_exits.json"
    if not file.exists():
        model = exits / "model"
        shutil.copytree(used_checkpoint(experiment / "checkpoints" / RECURSIVE), model, dirs_exist_ok=True)
        rr(experiment, "eval", "--stage", RECURSIVE, "--exits", "--model", str(model), *_into(exits))
    found = read_frontier(file, RECURSIVE)
    assert found is not None
    return found


def ablate(experiment: Path, folder: Path, changes: Mapping[str, str]) -> Results:
    """Return the results of the first seed's recursion, trained again with changes; make what is missing."""
    evaluated = folder / "eval_results"
    if not _results_file(evaluated).exists():
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(experiment / SETTINGS_FILE, folder)
        if not (folder / "checkpoints" / "after_surgery").exists():
            rr(folder, "surgery", changes=changes)
        rr(folder, "train", "--mode", "recursive", changes=changes)
        rr(folder, "eval", "--stage", RECURSIVE, *ANSWERS_ALONE, changes=changes)
    return read_results(_results_file(evaluated), "rr eval")


def shape_of(experiment: Path) -> dict[str, str]:
    """Return what the ablations need to know of the model's shape."""
    config = load_config(Workspace(experiment, load(CommonSettings, experiment)).base()).get_text_config()
    return {"half": str(config.hidden_size // 2), "double": str(2 * config.hidden_size)}


def _results_file(folder: Path) -> Path:
    return folder / f"{RECURSIVE}_results.json"


def _into(folder: Path) -> tuple[str, ...]:
    return "--output-dir", str(folder), "--log-dir", str(folder / "logs")


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing, then write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("recursion_gain"))
    parser.add_argument("--ablations", action="store_true")
    parser.add_argument("--shrunken", action="store_true")
    options, given = parser.parse_known_args(arguments)
    output = options.output.resolve()
    experiment = output / "experiment"
    if not (experiment / SETTINGS_FILE).exists():
        defaults = ("--seeds", "0,1", *SHRUNKEN) if options.shrunken else ("--seeds", "6,7,8,9,10")
        given = [*defaults, *given]
    rr(experiment, "run", *given, changes={"costs.rounds": "1"} if options.shrunken else {})
    comparison = compare(load(CompareSettings, experiment), list(STAGES), experiment)
    control, frontier = random_control(experiment, output), measured_exits(experiment, output)
    names = list(ABLATIONS)[:1] if options.shrunken else list(ABLATIONS) if options.ablations else []
    shape, ablated = shape_of(experiment), {}
    for name in names:
        changes = {key: value.format(**shape) for key, value in ABLATIONS[name].items()}
        ablated[name] = ablate(experiment, output / re.sub(r"\W+", "-", name).strip("-"), changes)
    text = report(comparison, control, frontier, ablated)
    (output / "recursion_gain.md").write_text(text, encoding="utf-8")
    print(text, end="")
    plot(by_difficulty(comparison.stages), output / "recursion_gain.png")
    plot_costs(comparison, output / "recursion_gain_cost.png")
    plot_exits(frontier, output / "exits.png")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--with-cell"]:
        _, _, form, *sys.argv[1:] = sys.argv
        FeedbackCell.forward = CELLS[form]  # type: ignore[method-assign]
        runpy.run_module("rrcli", run_name="__main__")
    else:
        main()
