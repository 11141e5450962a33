"""Run every command under every placement, compare its results with one device's, and write docs/placements.md.

    python benchmarks/placement_matrix.py [--placement TEXT] [--folder DIR] [--out FILE] [FAMILY ...]

The models are tiny and random; see tests/placements.py. With families or placements named, the table is printed only.
With --folder the experiments stay, and the same command goes on with the cells that are missing. Exits with 1 if a cell
gives a wrong number, a traceback, an error that is no refusal, or does not end.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
from transformers.utils import logging

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from placements import (  # noqa: E402
    COMMANDS,
    FAMILIES,
    PLACEMENTS,
    STEPS,
    TOLERANCE,
    Cell,
    Done,
    Outcome,
    clear,
    ended,
    folder_of,
    judge,
    perform,
    prepare,
)
from rrcli.cli import options as command_line  # noqa: E402
from rrcli.files import write_text  # noqa: E402
from rrcli.training.launching import launch  # noqa: E402

# A cell that takes longer hangs, in seconds.
LIMIT = 600


def work(cells: Sequence[Cell], root: Path) -> None:
    """Run cells as one of two processes, and keep what each ended with; one launch for all, as starting takes longer.

    A process that does not end in time, or dies, ends the launch in the middle of its cell. One that shows a traceback
    ends it at the end of its cell, as what it leaves in memory would reach the next one.
    """
    from torch import distributed

    from rrcli.upstream import leave_process_group

    quiet()
    command_line.PATIENCE = 0.0  # no launcher ends a process that is to run the next cell
    for cell in cells:
        faulthandler.dump_traceback_later(LIMIT, exit=True)
        done, files = perform(cell, root), files_of(cell, root)
        write_text(files[int(os.environ["RANK"])], json.dumps([asdict(one) for one in done]))
        while not all(file.exists() for file in files):
            time.sleep(0.02)
        if any("Traceback" in file.read_text() for file in files):
            os._exit(1)
        if distributed.is_initialized():  # after an error
            leave_process_group()
    faulthandler.cancel_dump_traceback_later()


def files_of(cell: Cell, root: Path) -> list[Path]:
    """Return the files in which the processes keep what their command lines ended with."""
    return [folder_of(cell, root) / f"{cell.command}.{rank}.json" for rank in range(cell.processes)]


def together(cells: Sequence[Cell], root: Path) -> dict[Cell, Outcome]:
    """Run cells in two processes, from where they stop again, and return what they show."""
    found: dict[Cell, Outcome] = {}
    while left := [cell for cell in cells if cell not in found]:
        said = ""
        for cell in left:
            clear(cell, root)
            for file in files_of(cell, root):
                file.unlink(missing_ok=True)
        try:
            launch(2, work, left, root)
        except Exception as error:
            said = str(error)
        for cell in left:
            files = [file for file in files_of(cell, root) if file.exists()]
            ends = [[Done(**one) for one in json.loads(file.read_text())] for file in files]
            if len(ends) < cell.processes:
                found[cell] = Outcome("fault", f"not every process came to its end: {said}")
                break
            if len({one[-1].code for one in ends}) > 1:
                found[cell] = Outcome("fault", f"the processes ended differently: {[one[-1] for one in ends]}")
            else:
                found[cell] = judge(cell, ends[0], root)
    refused = {(cell.placement, outcome): cell for cell, outcome in found.items() if outcome.kind == "refused"}
    for (_, outcome), cell in refused.items():  # the same, where the command is to start the processes itself
        if (typed := alone(cell, root)) != outcome:
            found[cell] = Outcome("fault", f"{outcome.said}; without a launcher: {typed}")
    return found


def alone(cell: Cell, root: Path) -> Outcome:
    """Run a cell as it is typed, by the command that is to start its processes itself."""
    if cell.placement == cell.reference:
        return judge(cell, ended(cell, root), root)
    clear(cell, root)
    return judge(cell, perform(cell, root), root)


def examine(cells: Sequence[Cell], root: Path) -> dict[Cell, Outcome]:
    """Return what all cells show; what was found before is read from the folder, and what is found is added to it."""
    file = root / "outcomes.jsonl"
    found = {}
    if file.exists():
        for line in file.read_text().splitlines():
            key, outcome = json.loads(line)
            found[Cell(**key)] = Outcome(**outcome)
    for family in dict.fromkeys(cell.family for cell in cells if cell not in found):
        placements = [p for p in PLACEMENTS if any((c.family, c.placement) == (family, p) for c in cells)]
        ready = root / family / "ready.json"
        if not ready.exists() or set(placements) - set(json.loads(ready.read_text())):
            shutil.rmtree(root / family, ignore_errors=True)
            tell(f"{family}: one device")
            prepare(family, placements, root)
            ready.write_text(json.dumps(placements))

    def note(outcomes: dict[Cell, Outcome]) -> None:
        with file.open("a") as lines:
            for cell, outcome in outcomes.items():
                found[cell] = outcome
                tell(f"{cell.family}, {cell.placement}, {cell.command}: {outcome}")
                lines.write(json.dumps([asdict(cell), asdict(outcome)]) + "\n")

    left = [cell for cell in cells if cell not in found]
    for cell in left:
        if cell.processes == 1:
            note({cell: alone(cell, root)})
    if pairs := [cell for cell in left if cell.processes > 1]:
        note(together(pairs, root))
    return {cell: found[cell] for cell in cells}


# -- the table ---------------------------------------------------------------------------------------------------------

INTRO = """# Placements: which command works where

Written by `python benchmarks/placement_matrix.py` (transformers {transformers}, torch {torch}, accelerate {accelerate},
bitsandbytes {bitsandbytes}; fp32, CPU, two processes over gloo) on tiny random models: two layers, and four experts
where the family has experts. Every cell runs the real command, and compares what it wrote with one device's:

- **surgery**: `rr surgery`, which compares the logits before and after it at every depth; and the sidecar it wrote.
- **eval**: `rr eval` of a stage with adapters: the nats of every document, and the perplexity, at every depth. Answers
  and texts have to be the same.
- **train a, b, c**: `rr train --phase`: the losses of {steps} steps, and all weights after them.
- **generate**: `rr generate` with recursion and adapters: the text has to be the same.

`exact` means no difference. A number is the largest difference, in the norm of each tensor and relative to it; the
limits are {eval:.0e} for eval and {train:.0e} for train. Where parts of a product are summed over processes, the last
digits differ.

With `--device-map FILE` the second layer lies on disk. `--quantize 4bit` is compared with one device that has the
rounded weights as ordinary ones. `rr surgery` and `rr generate` have no `--num-processes`: one process does them.
"""


def table(found: dict[Cell, Outcome], family: str, reasons: list[str]) -> str:
    """Return the table of a family; the reasons of refusals are numbered, and added to those of other families."""
    lines = [f"| {' | '.join(('', *COMMANDS))} |", "|---" * (len(COMMANDS) + 1) + "|"]
    for placement in PLACEMENTS:
        cells = [found.get(Cell(family, placement, command)) for command in COMMANDS]
        if not any(cells):
            continue
        shown = []
        for outcome in cells:
            if outcome is not None and outcome.kind == "refused":
                if outcome.said not in reasons:
                    reasons.append(outcome.said)
                shown.append(f"refused ({reasons.index(outcome.said) + 1})")
            else:
                shown.append("**fault**" if outcome is None or outcome.kind == "fault" else str(outcome))
        lines.append(f"| `{placement}` | {' | '.join(shown)} |")
    return "\n".join(lines)


def page(found: dict[Cell, Outcome], families: Sequence[str]) -> str:
    """Return the tables of families, and the reasons of refusals."""
    reasons: list[str] = []
    parts = [f"## {family}\n\n{table(found, family, reasons)}" for family in families]
    numbered = "\n".join(f"{number}. {said}" for number, said in enumerate(reasons, 1))
    return "\n\n".join([*parts, f"## Refused\n\nExit code 2, with this message and next step:\n\n{numbered}"]) + "\n"


def tell(text: str) -> None:
    """Show progress."""
    print(text, file=sys.stderr, flush=True)


def quiet() -> None:
    """Use one thread, as more only wait for each other on tiny models, and show no bars."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)


def main() -> int:
    """Examine, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help=f"only these, and write nothing: {', '.join(FAMILIES)}")
    parser.add_argument("--placement", action="append", default=[], help="only placements with this text in their name")
    parser.add_argument("--folder", type=Path, help="folder for the experiments, which stays")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "placements.md")
    options = parser.parse_args()
    quiet()
    families = options.families or FAMILIES
    placements = [p for p in PLACEMENTS if not options.placement or any(text in p for text in options.placement)]
    cells = [Cell(f, p, c) for f in families for p in placements for c in COMMANDS]
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="rr-placements-") as temporary:
        root = options.folder.resolve() if options.folder else Path(temporary)
        root.mkdir(parents=True, exist_ok=True)
        found = examine(cells, root)
    shown = page(found, families)
    print(shown)
    tell(f"{len(cells)} cells in {time.perf_counter() - begin:.0f} s")
    if not options.families and not options.placement:
        versions = {name: version(name) for name in ("transformers", "torch", "accelerate", "bitsandbytes")}
        options.out.write_text(f"{INTRO.format(**versions, **TOLERANCE, steps=STEPS)}\n{shown}", encoding="utf-8")
    return 1 if any(outcome.kind == "fault" for outcome in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
