"""A job of SLURM that runs an experiment on one machine or several, and goes on when it is queued again.

`rr run` itself runs once, on the first machine of the job: it looks for what is missing, and starts each training and
evaluation on all machines, by `srun` and torch's launcher. Before its time is over SLURM sends SIGTERM: the step of a
training that is running is finished and saved, and the job asks to be queued again. So does a machine that is taken
away or fails, with `--requeue`. What was finished is not done again. The script is plain text, to be read and changed.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rrcli.errors import RRError, UsageError, suggest

# How long before its end a job is told, in seconds: a step of training and a checkpoint have to fit.
NOTICE = 300
# What `--slurm` takes besides sizes and time, and hands on to sbatch as it is.
HANDED_ON = ("partition", "account", "qos", "constraint", "reservation", "mem", "cpus-per-task", "gres")
SIZES = ("nodes", "gpus", "processes")
HINT = "Write names and values, such as partition=gpu,nodes=2,gpus=8,time=4h."
# Letters that mean the same to a shell and to sbatch.
PLAIN = re.compile(r"[\w.:/@%&|*\[\]-]+")


@dataclass(frozen=True)
class Job:
    """What is asked of SLURM.

    Attributes:
        nodes: how many machines. gpus: of each; 0 for none. processes: on each, where there are no GPUs.
        minutes: after which it is ended. options: further ones of sbatch, by name.
    """

    nodes: int = 1
    gpus: int = 0
    processes: int = 1
    minutes: int = 0
    options: tuple[tuple[str, str], ...] = ()

    @property
    def on_each(self) -> int:
        """How many processes work on each machine: one for each GPU."""
        return self.gpus or self.processes

    @property
    def count(self) -> int:
        """How many processes work together."""
        return self.nodes * self.on_each

    @property
    def launcher(self) -> str:
        """What starts a command of rr on all machines, as text of a shell with variables of the script."""
        python = shlex.quote(sys.executable)
        return (
            f"srun --kill-on-bad-exit=1 {python} -m torch.distributed.run --nnodes={self.nodes} "
            f"--nproc-per-node={self.on_each} --rdzv-backend=c10d --rdzv-id=$SLURM_JOB_ID "
            "--rdzv-endpoint=$first:$port -m rrcli"
        )

    def script(self, arguments: Sequence[str], directory: Path) -> str:
        """Return the script of a job that performs `rr run`.

        Args:
            arguments: those of `rr run`. directory: the experiment's, which all machines see.
        """
        about = {
            "job-name": "rr",
            "nodes": self.nodes,
            "ntasks-per-node": 1,
            **({"gpus-per-node": self.gpus} if self.gpus else {}),
            **({"time": self.minutes} if self.minutes else {}),
            **dict(self.options),
            "chdir": directory,
            "output": directory / "slurm-%j.out",
            "open-mode": "append",
            "signal": f"B:TERM@{NOTICE}",
        }
        head = "".join(f"#SBATCH --{name}={shlex.quote(str(value))}\n" for name, value in about.items())
        python = shlex.quote(sys.executable)
        # srun does not take it from sbatch.
        cores = "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK\n" if "cpus-per-task" in about else ""
        command = shlex.join(["run", *arguments, "--dir", str(directory)])
        return f"""#!/bin/bash
{head}#SBATCH --requeue

{cores}first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000))
{python} -m rrcli {command} --launcher \\
  "{self.launcher}" &
run=$!
trap 'kill -TERM "$run"' TERM
wait "$run"
# A signal ends that, but not the command that it is passed on to.
while kill -0 "$run" 2> /dev/null; do wait "$run"; done
wait "$run"; status=$?
# 130: stopped before its end, and saved.
if [ "$status" -eq 130 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$status"
"""


def read_job(text: str) -> Job:
    """Read `partition=gpu,nodes=2,gpus=8,time=4h`.

    Raises:
        UsageError: an unknown name, one that occurs twice, or a value that cannot be understood.
    """
    known = (*SIZES, "time", *HANDED_ON)
    found: dict[str, str] = {}
    for item in text.split(","):
        name, equal, value = (part.strip() for part in item.partition("="))
        if not name or not equal or not value:
            raise UsageError(f"--slurm is '{text}'", HINT)
        if name not in known:
            raise UsageError(f"--slurm names '{name}'", suggest(name, known))
        if name in found:
            raise UsageError(f"--slurm names '{name}' twice", HINT)
        if not PLAIN.fullmatch(value):
            raise UsageError(f"--slurm {name} is '{value}'", HINT)
        found[name] = value
    sizes = {name: _size(name, found[name]) for name in SIZES if name in found}
    if "gpus" in sizes and "processes" in sizes:
        raise UsageError("--slurm gpus and processes contradict each other", "There is one process for each GPU.")
    options = tuple((name, found[name]) for name in HANDED_ON if name in found)
    return Job(**sizes, minutes=_minutes(found["time"]) if "time" in found else 0, options=options)


def submit(script: str, directory: Path) -> str:
    """Hand a script to sbatch, and return the number of the job.

    Raises:
        RRError: there is no sbatch, or it refuses the job.
    """
    if shutil.which("sbatch") is None:
        raise RRError("there is no sbatch here", "Run it on a machine of the cluster; --dry-run prints the script.")
    done = subprocess.run(
        ["sbatch", "--parsable"], input=script, cwd=directory, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RRError(f"sbatch refuses the job: {done.stderr.strip()}", "--dry-run prints the script.")
    return done.stdout.strip().partition(";")[0]


def _size(name: str, value: str) -> int:
    if not (value.isascii() and value.isdigit() and int(value)):
        raise UsageError(f"--slurm {name} is '{value}', which is no whole number from 1 on", HINT)
    return int(value)


def _minutes(text: str) -> int:
    """Return a time such as 4h, 90m, 2d or 1:30:00, in minutes."""
    if found := re.fullmatch(r"(\d+)([mhd])", text):
        return int(found[1]) * {"m": 1, "h": 60, "d": 24 * 60}[found[2]]
    if found := re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):\d\d", text):
        return (int(found[1] or 0) * 24 + int(found[2])) * 60 + int(found[3])
    raise UsageError(f"--slurm time is '{text}'", "Write 90m, 4h, 2d, or hours:minutes:seconds.")
