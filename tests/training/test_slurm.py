"""Jobs of SLURM: what is asked for, the script, that it is handed in, and that a stopped job is queued again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from commands import rr
from rrcli.errors import Interrupted, UsageError
from rrcli.training.launching import launch_elsewhere
from rrcli.training.slurm import Job, read_job


def test_a_job_is_read_from_the_option() -> None:
    job = read_job("partition=gpu, nodes=2,gpus=8,time=4h,mem=100G")
    assert job == Job(2, 8, minutes=240, options=(("partition", "gpu"), ("mem", "100G")))
    assert (job.on_each, job.count) == (8, 16)
    assert read_job("nodes=3,processes=2").count == 6
    assert [read_job(f"time={text}").minutes for text in ("90m", "2d", "1:30:00", "1-02:00:00")] == [
        90, 2880, 90, 1560
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gpu=8", "names 'gpu'"),
        ("gpus", "--slurm is 'gpus'"),
        ("gpus=0", "gpus is '0'"),
        ("gpus=8,gpus=4", "names 'gpus' twice"),
        ("gpus=8,processes=4", "contradict each other"),
        ("time=soon", "time is 'soon'"),
        ("partition=a b", "partition is 'a b'"),
        ("partition=a;reboot", "partition is 'a;reboot'"),
    ],
)
def test_what_cannot_be_understood_is_a_wrong_usage(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        read_job(text)


def test_a_dry_run_prints_a_script_that_bash_can_read(tmp_path: Path) -> None:
    folder = tmp_path / "my experiment"
    folder.mkdir()
    options = ["--slurm", "partition=gpu,nodes=2,gpus=8,time=4h,cpus-per-task=16", "--parallel", "fsdp=16"]
    options += ["--steps", "7", "--task", "chain_sum:min_terms=2,max_terms=2", "--packing"]
    done = rr("run", *options, "--dry-run", folder=folder)
    assert done.returncode == 0, done.stderr
    assert not list(folder.iterdir())
    subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=True)
    for line in ("#SBATCH --nodes=2", "#SBATCH --gpus-per-node=8", "#SBATCH --time=240", "#SBATCH --requeue"):
        assert line in done.stdout.splitlines()
    assert f"#SBATCH --chdir='{folder}'" in done.stdout
    assert "--parallel=fsdp=16" in done.stdout
    assert "--steps=7 --packing --task=chain_sum:min_terms=2,max_terms=2 " in done.stdout.replace("  ", " ")
    assert "--nnodes=2 --nproc-per-node=8" in done.stdout
    assert "SRUN_CPUS_PER_TASK" in done.stdout
    assert "--slurm" not in done.stdout


def test_parts_that_are_no_process_each_are_a_wrong_usage(tmp_path: Path) -> None:
    done = rr("run", "--slurm", "nodes=2,gpus=8", "--parallel", "fsdp=8", "--dry-run", folder=tmp_path)
    assert done.returncode == 2
    assert "--parallel fsdp=8 needs 8 processes, --slurm has 16" in done.stderr


def program(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)
    return path


def test_a_job_is_handed_to_sbatch_with_its_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    monkeypatch.setenv("PATH", str(tools))
    done = rr("run", "--slurm", "gpus=1", folder=tmp_path)
    assert done.returncode == 1
    assert "there is no sbatch here" in done.stderr
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    program(tools / "sbatch", f"cat > {tmp_path}/script; echo '42;cluster'")
    done = rr("run", "--slurm", "gpus=1", "--json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["job"], said["log"]) == ("42", str(tmp_path / "slurm-42.out"))
    assert (tmp_path / "script").read_text() == said["script"]
    program(tools / "sbatch", "echo 'invalid partition' >&2; exit 1")
    done = rr("run", "--slurm", "gpus=1", folder=tmp_path)
    assert "sbatch refuses the job: invalid partition" in done.stderr


@pytest.mark.parametrize(("code", "stops"), [(0, False), (1, False), (130, True)])
def test_a_job_that_was_stopped_is_queued_again(
    code: int, stops: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for Python that takes a while to end when it is told to, as a training does."""
    tools = tmp_path / "bin"
    tools.mkdir()
    program(tools / "scontrol", f'echo "$*" >> {tmp_path}/scontrol; echo host-1; echo host-2')
    wait = "while true; do sleep 0.05; done" if stops else "sleep 0.1"
    python = program(
        tools / "python",
        f"trap 'sleep 0.3; echo saved > {tmp_path}/saved; exit {code}' TERM\n"
        f'echo "$*" > {tmp_path}/called; touch {tmp_path}/begun; {wait}; exit {code}',
    )
    monkeypatch.setattr(sys, "executable", str(python))
    script = Job(2, 4).script(["--steps=3"], tmp_path)
    about = {"SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "host-[1-2]", "PATH": f"{tools}:/usr/bin:/bin"}
    job = subprocess.Popen(["bash", "-c", script], env=os.environ | about)
    if stops:
        while not (tmp_path / "begun").exists():
            time.sleep(0.01)
        job.send_signal(signal.SIGTERM)
    assert job.wait(20) == code
    asked = (tmp_path / "scontrol").read_text().splitlines()
    assert asked == ["show hostnames host-[1-2]", *(["requeue 12345"] * stops)]
    assert (tmp_path / "saved").exists() is stops
    called = (tmp_path / "called").read_text()
    assert "--rdzv-id=12345 --rdzv-endpoint=host-1:22345 -m rrcli" in called


# -- launchers of others -----------------------------------------------------------------------------------------------


def test_a_launcher_is_given_the_command_and_its_code_comes_back(tmp_path: Path) -> None:
    stub = program(tmp_path / "stub", f'echo "$*" > {tmp_path}/called; exit 3')
    assert launch_elsewhere(f"{stub} -m rrcli", ["train", "--dir", "a b"], tmp_path) == 3
    assert (tmp_path / "called").read_text() == "-m rrcli train --dir a b\n"
    with pytest.raises(UsageError, match="is no program here"):
        launch_elsewhere("torchrunn -m rrcli", [], tmp_path)


def test_a_signal_is_passed_on_to_a_launcher_and_waited_for(tmp_path: Path) -> None:
    stub = program(
        tmp_path / "stub", f"trap 'sleep 0.2; touch {tmp_path}/saved; exit 0' TERM; kill -TERM $PPID; sleep 5 & wait"
    )
    with pytest.raises(Interrupted):
        launch_elsewhere(str(stub), [], tmp_path)
    assert (tmp_path / "saved").exists()


def test_run_starts_what_trains_and_measures_by_the_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stops at the first step that leaves no result, and says which."""
    stub = program(tmp_path / "stub", f'echo "$*" >> {tmp_path}/called; exit 7')
    done = rr("run", "--launcher", str(stub), "--steps", "3", folder=tmp_path)
    assert done.returncode == 1
    assert "'rr eval --stage baseline' ended with exit code 7" in done.stderr
    assert (tmp_path / "called").read_text() == f"eval --stage baseline --skip-performance --dir {tmp_path}\n"
    assert (tmp_path / "rr.toml").exists()
