"""`rr eval` and `rr train` by two processes with a thread each, against one process with two threads.

    python benchmarks/process_speed.py [--rounds N] [--documents N] [--problems N] [--steps N] [--batch N]

The embedded model on a CPU with two free cores, the real commands as processes of their own, with their results
compared: of the evaluation every record has to be equal, of the training all losses to 1e-5. A round runs both ways;
which one comes first turns from round to round. The best round of each way counts, as whatever else runs on the machine
only adds time. What is timed is the whole command, with Python's start and the loading of libraries, which two
processes do twice; and of the training also the steps alone, as the command itself reports them.

Exits with 3 if the results differ.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ONE, TWO = "one process, 2 threads", "two processes, 1 thread each"
WAYS = {ONE: (1, 2), TWO: (2, 1)}


@dataclass(frozen=True)
class Run:
    """One command that was run: its seconds, those of the training's steps (0 for an evaluation), and its results."""

    seconds: float
    steps: float
    results: Any


def rr(*arguments: str, folder: Path, threads: int) -> tuple[float, Any]:
    """Run `rr` and return its seconds and the object that it prints."""
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "rrcli", *arguments, "--device", "cpu", "--json", "--dir", str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": str(threads)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    seconds = time.perf_counter() - begin
    if done.returncode:
        raise SystemExit(f"rr {' '.join(arguments)} ended with {done.returncode}: {done.stderr}")
    return seconds, json.loads(done.stdout)


def evaluate(options: argparse.Namespace, folder: Path, way: str) -> Run:
    """Evaluate the stage after surgery."""
    processes, threads = WAYS[way]
    shutil.rmtree(folder / "eval_results", ignore_errors=True)
    seconds, results = rr(
        "eval", "--stage", "after_surgery", f"--num-processes={processes}", f"--max-samples={options.documents}",
        f"--problems={options.problems}", "--skip-performance", "--no-tensorboard", folder=folder, threads=threads,
    )  # fmt: skip
    return Run(seconds, 0.0, results["records"])


def train(options: argparse.Namespace, folder: Path, way: str) -> Run:
    """Train all weights with recursion."""
    processes, threads = WAYS[way]
    seconds, found = rr(
        "train", "--restart", f"--num-processes={processes}", f"--steps={options.steps}",
        f"--batch-size={options.batch}", "--eval-interval=0", "--save-interval=100000", folder=folder, threads=threads,
    )  # fmt: skip
    return Run(seconds, found["seconds"], found["losses"])


def same(command: str, one: Run, other: Run) -> bool:
    """Tell whether both ways have the same results."""
    if command == "eval":
        return bool(one.results == other.results)
    pairs = [(value, other.results[name]) for name, value in one.results.items()]
    return all(abs(a - b) <= 1e-5 * max(abs(a), 1e-3) for a, b in pairs)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--documents", type=int, default=400)
    parser.add_argument("--problems", type=int, default=100, help="of each task")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=32)
    options = parser.parse_args()
    commands = {"eval": evaluate, "train": train}
    found: dict[tuple[str, str], list[Run]] = defaultdict(list)
    differ = []
    with tempfile.TemporaryDirectory(prefix="rr-processes-") as temporary:
        folder = Path(temporary)
        rr("surgery", folder=folder, threads=2)
        for number in range(options.rounds):
            for command, perform in commands.items():
                for way in (ONE, TWO) if number % 2 == 0 else (TWO, ONE):
                    found[command, way].append(perform(options, folder, way))
                one, two = (found[command, way][-1] for way in WAYS)
                differ += [] if same(command, one, two) else [command]
                shown = ", ".join(f"{found[command, way][-1].seconds:.2f} s" for way in WAYS)
                print(f"round {number + 1}, {command}: {shown}", file=sys.stderr)
    print(f"| best of {options.rounds} | {ONE} | {TWO} | ratio |\n|---|---|---|---|")
    for command in commands:
        for what in ("seconds", "steps"):
            one, two = (min(getattr(run, what) for run in found[command, way]) for way in WAYS)
            if one:
                name = f"rr {command}" if what == "seconds" else f"rr {command}, its steps alone"
                print(f"| {name} | {one:.2f} s | {two:.2f} s | {two / one:.2f} |")
    for command in sorted(set(differ)):
        print(f"rr {command}: the results of both ways differ", file=sys.stderr)
    return 3 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
