"""Kills one of two processes of a training at random moments: does the same command end with the same weights?

Each trial trains the embedded model in two processes (`--num-processes 2`, or `--parallel fsdp=2`), sends SIGKILL to
one of them (the one that writes, or the other) after a random time, and gives the same command again. The last
checkpoint has to hold the weights of a training that was never interrupted, bit for bit; no process may be left, and no
lock.

    python benchmarks/killed_training.py --trials 10

The two processes are forks of this one, which has loaded torch already; `rr` starts fresh ones. All else is as in `rr`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch.multiprocessing
from torch.multiprocessing import start_processes

from rrcli.errors import RRError
from rrcli.files import checkpoints
from rrcli.reporting import Silent
from rrcli.services.surgery import surgery
from rrcli.services.train import train
from rrcli.settings import SurgerySettings, TrainSettings, with_changes

TEXT = "text.txt"
SETTINGS = TrainSettings(
    device="cpu", steps=6, batch_size=2, max_length=64, warmup_steps=0, save_interval=1, eval_interval=0, keep=2,
    ema=0.9, lora_rank=2, task_share=0.0, data=TEXT,
)  # fmt: skip
# Name -> how two processes train: each with all weights, or with half of them and adapters.
WAYS: dict[str, dict[str, Any]] = {
    "--num-processes 2": {"num_processes": 2, "phase": "c"},
    "--parallel fsdp=2": {"parallel": "fsdp=2", "phase": "b"},
}


class Started:
    """The processes of the training that runs, as `rr` starts them."""

    def __init__(self) -> None:
        self.processes: list[Any] = []
        self.began = threading.Event()

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        context = start_processes(*arguments, **options | {"start_method": "fork"})
        self.processes = context.processes
        self.began.set()
        return context


def run(settings: TrainSettings, folder: Path, *, rank: int = 0, after: float | None = None) -> tuple[float, str]:
    """Train in two processes, of which one is killed after some seconds; return how long it took and what was said."""
    started = Started()
    torch.multiprocessing.start_processes = started  # type: ignore[attr-defined]
    ended = threading.Event()

    def kill(seconds: float) -> None:
        started.began.wait()
        if not ended.wait(seconds):
            started.processes[rank].kill()

    if after is not None:
        threading.Thread(target=partial(kill, after), daemon=True).start()
    begin = time.monotonic()
    try:
        train(settings, "recursive", folder, Silent())
        said = ""
    except RRError as error:
        said = error.message
    ended.set()
    left = [process for process in started.processes if process.is_alive()]
    left += [child for child in psutil.Process().children(recursive=True) if "tracker" not in " ".join(child.cmdline())]
    if left:
        raise SystemExit(f"processes are left: {left}")
    return time.monotonic() - begin, said


def weights(run_folder: Path) -> str:
    """Return the hash of all weights in the last checkpoint of a run, with the optimiser's."""
    last = checkpoints(run_folder)[-1]
    digest = hashlib.sha256(last.name.encode())
    for file in sorted(last.rglob("*.safetensors")):
        digest.update(f"{file.relative_to(last)}".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def main() -> None:
    """Run the trials, and print what each left and whether it ended alike."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--way", choices=list(WAYS), help="one of the two; both if not given")
    options = parser.parse_args()
    draw = random.Random(options.seed)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(prefix="rr-killed-") as name:
        folder = Path(name)
        (folder / TEXT).write_text("\n\n".join(f"Tom has {n} red balls, and Ann has {n + 3}." for n in range(100)))
        surgery(SurgerySettings(device="cpu"), folder, Silent(), verify=False)
        for way, changes in WAYS.items():
            if options.way in (None, way):
                same = trials(way, with_changes(SETTINGS, **changes), folder, options.trials, draw)
                print(f"{way}: {same} of {options.trials} ended with the same weights", flush=True)


def trials(way: str, settings: TrainSettings, folder: Path, count: int, draw: random.Random) -> int:
    """Train once without being killed, then kill and go on `count` times; return how often the end was the same."""
    runs = folder / settings.checkpoint_dir
    label = "".join(filter(str.isalnum, way))
    seconds, said = run(with_changes(settings, run_name=f"{label}-whole"), folder)
    if said:
        raise SystemExit(said)
    whole, done, same, number = weights(runs / f"{label}-whole"), 0, 0, 0
    while done < count:
        number += 1
        own = with_changes(settings, run_name=f"{label}-{number}")
        rank, after = draw.randrange(2), draw.uniform(0, seconds)
        took, said = run(own, folder, rank=rank, after=after)
        if not said:  # it had ended before
            continue
        left = [path.name for path in checkpoints(runs / own.run_name)] if (runs / own.run_name).is_dir() else []
        _, again = run(own, folder)
        locks = [str(path.relative_to(folder)) for path in folder.rglob("*.lock")]
        alike = not again and not locks and weights(runs / own.run_name) == whole
        done, same = done + 1, same + alike
        found = {"way": way, "trial": done, "rank": rank, "after": round(after, 2), "of": round(seconds, 2)}
        print(json.dumps(found | {"left": left[-1:], "same": alike, "locks": locks, "ended": said}), flush=True)
        seconds = max(seconds, took)
    return same


if __name__ == "__main__":
    main()
