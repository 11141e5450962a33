"""Kills one of two processes of an evaluation at random moments: does another number of them end with the same bytes?

Each trial evaluates the embedded model after surgery, with feedback that does something, in two processes, kills one of
them (the one that writes, or the other) when it has gathered results a random number of times, and goes on with one
process. The log and the records have to equal those of an evaluation that was never interrupted.

    python benchmarks/killed_evaluation.py --trials 10
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import tempfile
from pathlib import Path
from typing import Any

from rrcli.errors import RRError
from rrcli.files import SIDECAR
from rrcli.models.loading import load
from rrcli.reporting import Silent
from rrcli.services.eval import evaluate
from rrcli.services.surgery import surgery
from rrcli.settings import EvalSettings, SurgerySettings, with_changes
from rrcli.training.launching import launch
from rrcli.training.processes import Processes

STAGE = "after_surgery"
SETTINGS = EvalSettings(
    device="cpu", problems=2, max_samples=4, max_new_tokens=6, batch_tokens=100, samples=1, skip_performance=True,
    tensorboard=False,
)  # fmt: skip


def die(folder: Path, rank: int, moment: int) -> None:
    """Evaluate as one of two processes, of which one kills itself when it has gathered so often."""
    real, gathered = Processes.gather, []

    def counting(self: Processes, value: Any) -> list[Any]:
        gathered.append(1)
        if self.rank == rank and len(gathered) > moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, value)

    Processes.gather = counting  # type: ignore[method-assign]
    evaluate(with_changes(SETTINGS, output_dir="killed"), STAGE, folder, Silent())


def wake(folder: Path) -> None:
    """Give the fresh recursion in a folder random feedback, so that depths differ."""
    import torch
    from safetensors.torch import save_file

    recursion = load(folder, device="cpu")[0].recursion
    torch.manual_seed(0)
    with torch.no_grad():
        recursion.cell.w_out.weight.normal_(std=0.3)
    save_file(recursion.state_dict(), folder / SIDECAR)


def main() -> None:
    """Run the trials, and print what each left and whether it ended alike."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="rr-killed-") as name:
        folder = Path(name)
        made = surgery(SurgerySettings(device="cpu"), folder, Silent(), verify=False).folder
        assert made is not None
        wake(made)
        whole = evaluate(SETTINGS, STAGE, folder, Silent())
        log = whole.file.with_name(f"{STAGE}_samples.jsonl").read_text()
        same = 0
        for trial in range(options.trials):
            shutil.rmtree(folder / "killed", ignore_errors=True)
            rank, moment = draw.randrange(2), draw.randrange(1, 13)
            try:
                launch(2, die, folder, rank, moment)
                ended = "was not reached"
            except RRError as error:
                ended = error.message
            left = folder / "killed" / f"{STAGE}_samples.jsonl"
            lines = len(left.read_text().splitlines()) if left.is_file() else 0
            results = evaluate(with_changes(SETTINGS, output_dir="killed"), STAGE, folder, Silent()).results
            alike = left.read_text() == log and results["records"] == whole.results["records"]
            same += alike
            found = {"trial": trial, "rank": rank, "moment": moment, "lines_left": lines, "same": alike}
            print(json.dumps(found | {"ended": ended}), flush=True)
        print(f"{same} of {options.trials} ended with the same bytes")


if __name__ == "__main__":
    main()
