"""Two machines, made of network namespaces on this one: a training and an evaluation through the launcher of a job."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from string import Template
from typing import Any

import pytest

from families import NO_DRIVER
from rrcli.files import checkpoints
from rrcli.reporting import Silent
from rrcli.services import train as training
from rrcli.services.eval import evaluate
from rrcli.services.surgery import surgery
from rrcli.settings import EvalSettings, SurgerySettings, TrainSettings, with_changes
from rrcli.training.launching import launch_elsewhere
from rrcli.training.slurm import Job
from training_runs import assert_same_weights, curve

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NO_DRIVER, reason="a torch for CUDA does not shard on a CPU"),
]

HOSTS = {"rr-host-1": "10.77.0.1", "rr-host-2": "10.77.0.2"}
STAGE = "finetuned_recursive"
TRAIN = TrainSettings(
    steps=3, batch_size=4, warmup_steps=1, save_interval=1, eval_interval=0, max_length=64, device="cpu", phase="a"
)
EVAL = EvalSettings(device="cpu", problems=1, max_samples=3, max_new_tokens=6, batch_tokens=100, skip_performance=True)
# Of SLURM, what the launcher needs: the command is run once on each host, under its name.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
run() { ip netns exec "$1" unshare --uts bash -c 'hostname "$0"; exec "$@"' "$@"; }
run rr-host-1 "$@" & one=$!
run rr-host-2 "$@" & two=$!
wait $one; code=$?
wait $two && exit $code
"""


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two hosts that reach each other and nothing else; the folder holds their `srun`."""
    tools = tmp_path_factory.mktemp("cluster")
    folders = [Path("/etc/netns") / host for host in HOSTS]
    try:
        for host, folder in zip(HOSTS, folders, strict=True):
            ip("netns", "add", host)
            folder.mkdir(parents=True)
            names = "".join(f"{address} {name}\n" for name, address in HOSTS.items())
            (folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        ip("link", "add", "rr-1", "netns", "rr-host-1", "type", "veth", "peer", "name", "rr-2", "netns", "rr-host-2")
        for number, (host, address) in enumerate(HOSTS.items(), start=1):
            ip("-n", host, "addr", "add", f"{address}/24", "dev", f"rr-{number}")
            for device in (f"rr-{number}", "lo"):
                ip("-n", host, "link", "set", device, "up")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"this machine makes no network namespaces: {error}")
    try:
        (tools / "srun").write_text(SRUN)
        (tools / "srun").chmod(0o755)
        yield tools
    finally:
        for host, folder in zip(HOSTS, folders, strict=True):
            subprocess.run(["ip", "netns", "delete", host], check=False)
            (folder / "hosts").unlink(missing_ok=True)
            folder.rmdir()


def options_of(settings: Any) -> list[str]:
    """Return what differs from the defaults, as it is written on the command line."""
    given = {name: value for name, value in vars(settings).items() if value != getattr(type(settings)(), name)}
    return [f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}") for name, value in given.items()]


def test_two_hosts_do_what_one_process_does(cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{cluster}:{os.environ['PATH']}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    surgery(SurgerySettings(device="cpu"), tmp_path, Silent(), verify=False)
    job = Job(nodes=2, processes=1)
    launcher = Template(job.launcher).substitute(SLURM_JOB_ID="7", first="rr-host-1", port="20007")
    parts = {"parallel": "fsdp=2"}
    two = with_changes(TRAIN, run_name="two", **parts)
    assert launch_elsewhere(launcher, ["train", "--mode", "recursive", *options_of(two)], tmp_path) == 0
    training.train(with_changes(TRAIN, gradient_accumulation=2), "recursive", tmp_path, Silent())
    assert curve(tmp_path, "two") == pytest.approx(curve(tmp_path, STAGE), rel=1e-6)
    last = [checkpoints(tmp_path / "checkpoints" / run)[-1] for run in ("two", STAGE)]
    assert_same_weights(*last, tolerance=1e-6)
    shared = with_changes(EVAL, output_dir="two")
    assert launch_elsewhere(launcher, ["eval", "--stage", STAGE, *options_of(shared)], tmp_path) == 0
    evaluate(EVAL, STAGE, tmp_path, Silent())
    one, other = (
        json.loads((tmp_path / folder / f"{STAGE}_results.json").read_text())["records"]
        for folder in ("eval_results", "two")
    )
    assert other == one
