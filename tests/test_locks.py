"""Two commands at once: who writes is alone, the second is told by whom; who reads neither waits nor fails."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from commands import RR, rr
from rrcli import locks
from rrcli.errors import RRError
from rrcli.experiment.workspace import Workspace
from rrcli.files import checkpoints, remove_folder
from rrcli.locks import Holder, lock, reading
from rrcli.reporting import Silent
from rrcli.services import eval as evaluating
from rrcli.services.train import train
from rrcli.settings import EvalSettings, TrainSettings

EVAL = ("eval", "--stage", "baseline", "--problems", "1", "--max-samples", "2", "--skip-performance")
WRITERS = {
    EVAL: "eval_results/baseline_results.json",
    ("surgery", "--overwrite"): "checkpoints/after_surgery",
    ("train", "--mode", "vanilla", "--steps", "1", "--run-name", "x"): "checkpoints/x",
    ("train", "--mode", "vanilla", "--steps", "1", "--run-name", "x", "--restart"): "checkpoints/x",
    ("train", "--mode", "vanilla", "--steps", "1", "--run-name", "x", "--num-processes", "2", "--device", "cpu",
     "--batch-size", "2"): "checkpoints/x",
    ("costs",): "eval_results/costs.json",
    ("setup",): "rr.toml",
    ("run",): "experiment",
}  # fmt: skip
SMALL = {"batch_size": 2, "max_length": 64, "save_interval": 1, "eval_interval": 0, "keep": 1, "device": "cpu"}


def small(steps: int) -> TrainSettings:
    return TrainSettings(steps=steps, **SMALL)  # type: ignore[arg-type]


def lock_files(folder: Path) -> list[Path]:
    return list(folder.rglob(".*.lock"))


@pytest.mark.parametrize("command", WRITERS, ids=" ".join)
def test_who_would_write_the_same_is_refused_and_told_by_whom(command, tmp_path):
    with lock(tmp_path / WRITERS[command], "it"):
        before = sorted(tmp_path.rglob("*"))
        refused = rr(*command, folder=tmp_path)
        assert sorted(tmp_path.rglob("*")) == before
    assert refused.returncode == 1
    error, hint = refused.stderr.replace("\n", " ").strip().split("hint: ")
    assert f"is being written by process {os.getpid()} on {socket.gethostname()}" in error
    assert f"(since {time.strftime('%Y-%m-%d %H:')}" in error
    assert "Wait until it has ended" in hint
    assert not lock_files(tmp_path)


def test_of_two_evaluations_the_first_goes_on_and_readers_do_not_wait(tmp_path):
    assert rr(*EVAL, folder=tmp_path).returncode == 0
    rows = [json.dumps({"question": f"{n} and 1?", "answer": str(n)}) for n in range(20_000)]
    (tmp_path / "many.jsonl").write_text("\n".join(rows))
    first = subprocess.Popen(
        [RR, "eval", "--task", "many.jsonl:held_out=all", "--problems", "20000", "--skip-perplexity",
         "--batch-tokens", "256"],
        cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        while not lock_files(tmp_path):
            assert first.poll() is None
            time.sleep(0.01)
        samples = (tmp_path / "eval_results" / "baseline_samples.jsonl").read_bytes()
        second = rr(*EVAL, folder=tmp_path)
        assert second.returncode == 1
        assert f"process {first.pid}" in second.stderr
        assert "rr eval --task" in second.stderr
        assert "going on with an earlier evaluation" not in second.stderr
        for command in (["compare"], ["status"], ["generate", "3 and"], ["run", "--dry-run"], ["surgery", "--dry-run"]):
            assert rr(*command, folder=tmp_path).returncode == 0, command
        assert first.poll() is None
        assert (tmp_path / "eval_results" / "baseline_samples.jsonl").read_bytes().startswith(samples[:10])
    finally:
        first.send_signal(signal.SIGINT)
        assert first.wait() == 130
    assert not lock_files(tmp_path)


def test_a_killed_process_leaves_nothing_that_blocks(tmp_path):
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom rrcli.locks import lock\n"
        "with lock(Path(sys.argv[1]), 'it'):\n    print('locked', flush=True)\n    time.sleep(60)\n"
    )
    path = tmp_path / "results.json"
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(RRError, match=f"^it is being written by process {process.pid} on"), lock(path, "it"):
            pass
        process.kill()
    assert lock_files(tmp_path)
    with lock(path, "it"), pytest.raises(RRError, match=f"process {os.getpid()}"), lock(path, "it"):
        pass
    assert not lock_files(tmp_path)


def test_a_torn_lock_file_is_nobodys(tmp_path):
    (tmp_path / ".x.lock").write_text('{"pid": 1')
    with lock(tmp_path / "x", "it"):
        pass


def test_a_lock_of_another_machine_says_which_file_to_remove(tmp_path):
    file = tmp_path / ".x.lock"
    file.write_text(json.dumps(asdict(replace(Holder.this(), host="elsewhere", boot="other"))))
    with pytest.raises(RRError, match="on elsewhere") as refused, lock(tmp_path / "x", "it"):
        pass
    assert f"remove {file}" in refused.value.hint
    file.write_text(json.dumps(asdict(replace(Holder.this(), host="other-container"))))
    with lock(tmp_path / "x", "it"):  # the same start of the same machine: its lock would be seen
        pass


def test_without_locks_of_the_system_processes_are_looked_up(tmp_path, monkeypatch):
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    file, this = tmp_path / ".x.lock", Holder.this()
    for gone in (replace(this, pid=2**22 + 1), replace(this, began=this.began - 100)):  # the number was used again
        file.write_text(json.dumps(asdict(gone)))
        with lock(tmp_path / "x", "it"):
            pass
    for there in (this, replace(this, pid=os.getppid(), began=locks._began(os.getppid()))):
        file.write_text(json.dumps(asdict(there)))
        with pytest.raises(RRError, match=f"process {there.pid}"), lock(tmp_path / "x", "it"):
            pass


# -- checkpoints that are being evaluated ------------------------------------------------------------------------------


READER = """
from contextlib import ExitStack
from pathlib import Path
from rrcli.locks import reading
from rrcli.models.source import ModelSource
held = ExitStack()
def step(context):
    first = Path("checkpoints/read/step-000001").resolve()
    if context.step == 2:
        held.enter_context(reading(lambda: ModelSource("it", first)))
    if context.step == 4:
        assert first.is_dir()
        assert not Path("checkpoints/read/step-000002").exists()
        held.close()
"""


def test_training_keeps_a_checkpoint_that_is_being_read_and_drops_it_later(tmp_path):
    (tmp_path / "reader.py").write_text(READER)
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    command = ("train", "--mode", "vanilla", "--run-name", "read", "--callback", "reader:step", *options)
    done = rr(*command, "--steps", "5", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in checkpoints(tmp_path / "checkpoints" / "read")] == ["step-000005"]


def test_a_run_is_not_restarted_while_one_of_its_checkpoints_is_read(tmp_path):
    train(small(2), "vanilla", tmp_path, Silent())
    workspace = Workspace(tmp_path, EvalSettings())
    with reading(lambda: workspace.stage_model("finetuned_vanilla")) as source:
        with pytest.raises(RRError, match="step-000002 is being read by another command"):
            train(small(1), "vanilla", tmp_path, Silent(), restart=True)
        assert source.path.is_dir()
    train(small(1), "vanilla", tmp_path, Silent(), restart=True)
    assert not source.path.exists()


def test_an_evaluation_ends_well_even_if_its_checkpoint_goes(tmp_path, monkeypatch):
    train(small(2), "vanilla", tmp_path, Silent())
    run = tmp_path / "checkpoints" / "finetuned_vanilla"
    settings = EvalSettings(problems=1, max_samples=2, max_new_tokens=4, skip_performance=True)
    measure = evaluating.MetricsTracker.log_scalar

    def drop_it(*arguments: object) -> None:
        if checkpoints(run):
            remove_folder(checkpoints(run)[-1])
        measure(*arguments)

    monkeypatch.setattr(evaluating.MetricsTracker, "log_scalar", drop_it)
    result = evaluating.evaluate(settings, "finetuned_vanilla", tmp_path, Silent())
    assert not checkpoints(run)
    assert result.results["training"]["steps"] == 2
    assert len(result.results["model"]["fingerprint"]) == 16


def test_a_checkpoint_that_goes_before_it_is_held_is_looked_for_again(tmp_path):
    train(replace(small(2), keep=2), "vanilla", tmp_path, Silent())
    workspace = Workspace(tmp_path, EvalSettings())
    found = []

    def find():
        found.append(workspace.stage_model("finetuned_vanilla"))
        if len(found) == 1:
            remove_folder(found[0].path)
        return found[-1]

    with reading(find) as source:
        assert source.path.name == "step-000001"
