"""Two processes over gloo against one: the same batches, losses and weights, one writer, and ends that all agree on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rrcli
from families import NO_DRIVER
from rrcli.errors import RRError
from rrcli.files import checkpoints
from rrcli.reporting import Silent
from rrcli.services import train as service
from rrcli.services.surgery import surgery
from rrcli.settings import SurgerySettings, TrainSettings, with_changes
from rrcli.training import processes as processes_module
from rrcli.training import trainer as trainer_module
from rrcli.training.launching import launch
from rrcli.training.processes import Processes, join
from training_runs import assert_same_weights, curve, events, texts

SETTINGS = TrainSettings(
    steps=4,
    batch_size=4,
    warmup_steps=2,
    save_interval=2,
    eval_interval=2,
    eval_samples=1,
    max_length=96,
    device="cpu",
    histograms=2,
)
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def train_and_record(settings: TrainSettings, folder: Path) -> int:
    """Train, and note the token ids of every part that this process computed, in its order."""
    real, seen = trainer_module.compute_losses, []

    def recording(readout, batch, *, plan):
        seen.append(batch.input_ids)
        return real(readout, batch, plan=plan)

    trainer_module.compute_losses = recording
    try:
        service.train(settings, "recursive", folder, Silent(), restart=True)
    finally:
        trainer_module.compute_losses = real
    torch.save(seen, folder / f"{settings.run_name}-{os.environ.get('RANK', 'alone')}.ids")
    return len(seen)


def train_in_turn(folder: Path) -> int:
    """Train the run `two`, then `sharded` with `fully_shard`, then its second half again; return where that began.

    In one launch, as starting two processes takes far longer than their training.
    """
    train_and_record(with_changes(SETTINGS, run_name="two"), folder)
    if NO_DRIVER:
        return 2
    # As an accelerate configuration asks for it.
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    sharded = with_changes(SETTINGS, run_name="sharded", histograms=0)
    last = service.train(sharded, "recursive", folder, Silent()).checkpoint
    if os.environ["RANK"] == "0":  # the other one looks for checkpoints once both are there
        last.rename(folder / "finished")
    return service.train(sharded, "recursive", folder, Silent()).first_step


def train_without_memory_in_process_1(settings: TrainSettings, folder: Path) -> None:
    """Train where the second process has memory for one example at a time, and from its sixth try on for none."""
    real, tries = trainer_module.compute_losses, []

    def small(readout, batch, *, plan):
        tries.append(len(batch.labels))
        if os.environ["RANK"] == "1" and (len(batch.labels) > 1 or len(tries) > 5):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(readout, batch, plan=plan)

    trainer_module.compute_losses = small
    service.train(settings, "recursive", folder, Silent(), restart=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run `one`, by one process (in two parts, as the feedback's norm is a mean over parts), and those of two."""
    folder = tmp_path_factory.mktemp("processes")
    surgery(SurgerySettings(), folder, Silent())
    train_and_record(with_changes(SETTINGS, run_name="one", gradient_accumulation=2), folder)
    assert launch(2, train_in_turn, folder) == 2
    return folder


def test_two_processes_see_the_batches_of_one_bit_for_bit(trained):
    alone, first, second = (torch.load(trained / f"{name}.ids") for name in ("one-alone", "two-0", "two-1"))
    assert len(alone) == 2 * SETTINGS.steps
    for parts, others in ((alone[0::2], first), (alone[1::2], second)):
        for part, other in zip(parts, others, strict=True):
            assert torch.equal(part, other)


def test_two_processes_learn_what_one_learns(trained):
    one, two = events(trained, "one"), events(trained, "two")
    scalars = [tag for tag in one.Tags()["scalars"] if "performance" not in tag]
    assert scalars == [tag for tag in two.Tags()["scalars"] if "performance" not in tag]
    for tag in scalars:
        values, others = ([event.value for event in run.Scalars(tag)] for run in (one, two))
        assert others == pytest.approx(values, rel=1e-6, abs=1e-6), tag
    assert_same_weights(*(checkpoints(trained / "checkpoints" / run)[-1] for run in ("one", "two")), tolerance=1e-6)


def test_one_process_writes(trained):
    for run in ("one", "two"):
        assert len(list((trained / "logs" / run).glob("events.*"))) == 1
        assert [event.step for event in events(trained, run).Scalars("train/loss/total")] == [1, 2, 3, 4]
        names = sorted(path.name for path in (trained / "checkpoints" / run).iterdir())
        assert names == ["step-000002", "step-000004"]


def test_a_stopped_training_of_two_goes_on_under_torchrun(trained):
    """SIGTERM to the command alone: both finish the step, one saves; resumed, every bit is as if never stopped."""
    (trained / "stopping.py").write_text(
        "import os, signal, time\n"
        "def stop(context):\n"
        "    if context.step == 2:\n"
        "        arrived, handler = [], signal.getsignal(signal.SIGTERM)\n"
        "        signal.signal(signal.SIGTERM, lambda *a: (arrived.append(a), handler(*a)))\n"
        "        if os.environ['RANK'] == '0':\n"
        "            os.kill(os.getppid(), signal.SIGTERM)\n"
        "        while not arrived:\n"
        "            time.sleep(0.01)\n"
    )
    options = {"steps": 4, "batch-size": 4, "warmup-steps": 2, "save-interval": 2, "eval-interval": 2}
    options |= {"eval-samples": 1, "max-length": 96, "histograms": 2, "run-name": "stopped"}
    arguments = ["-m", "rrcli", "train", "--mode", "recursive", "--device", "cpu", "--json"]
    arguments += [text for name, value in options.items() for text in (f"--{name}", str(value))]
    stopped = subprocess.run(
        [sys.executable, *arguments, "--num-processes", "2", "--callback", "stopping:stop"],
        cwd=trained, env=ENVIRONMENT, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert stopped.returncode == 130, stopped.stderr
    assert stopped.stderr.count("stopped after step 3 of 4; it is saved") == 1
    assert checkpoints(trained / "checkpoints" / "stopped")[-1].name == "step-000003"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    resumed = subprocess.run(
        [*torchrun, *arguments], cwd=trained, env=ENVIRONMENT, capture_output=True, text=True, timeout=240
    )
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.count("rr.train/1") == 1
    assert_same_weights(*(checkpoints(trained / "checkpoints" / run)[-1] for run in ("two", "stopped")), tolerance=0)
    curves = [[(e.step, e.value) for e in events(trained, r).Scalars("train/loss/total")] for r in ("two", "stopped")]
    assert curves[0] == curves[1]


def test_memory_that_one_process_lacks_halves_the_parts_of_all_and_then_ends_all(trained):
    settings = with_changes(SETTINGS, run_name="tight", eval_interval=0)
    with pytest.raises(RRError, match="out of memory in step 3, even with one example at a time") as error:
        launch(2, train_without_memory_in_process_1, settings, trained)
    assert "step-000002" in error.value.hint
    [said] = texts(trained, "tight", "train/red_flags")
    assert said == "out of memory: going on with 1 examples at a time instead of 2"
    losses, others = (curve(trained, r) for r in ("one", "tight"))
    assert others == pytest.approx(losses[:2], rel=1e-5)


@pytest.mark.skipif(NO_DRIVER, reason="a torch for CUDA does not shard on a CPU")
def test_sharded_weights_learn_the_same_and_are_saved_whole(trained):
    """Also where they went on from a checkpoint: to the same bits."""
    finished = trained / "finished"
    one, last = (checkpoints(trained / "checkpoints" / run)[-1] for run in ("one", "sharded"))
    assert_same_weights(finished, last, tolerance=0)
    assert_same_weights(one, finished, tolerance=1e-5)
    losses, others = (curve(trained, r) for r in ("one", "sharded"))
    assert others == pytest.approx(losses, rel=1e-6)
    perplexities = [events(trained, r).Scalars("evaluation/during_training/perplexity") for r in ("one", "sharded")]
    assert [e.value for e in perplexities[1]] == pytest.approx([e.value for e in perplexities[0]], rel=1e-5)
    with torch.no_grad():
        ids = torch.arange(5, 25)[None]
        a, b = (rrcli.load(path, device="cpu")[0](ids).logits for path in (one, finished))
    assert torch.allclose(a, b, atol=1e-4)


# -- without a second process ------------------------------------------------------------------------------------------


def leave_without_a_word() -> None:
    os._exit(0)


def test_a_process_that_ends_without_a_result_is_an_error():
    with pytest.raises(RRError, match="without a result"):
        launch(1, leave_without_a_word)


def test_one_process_is_alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    alone = join("cpu")
    assert (alone, alone.main, alone.rows(5)) == (Processes("cpu"), True, slice(0, 5))
    assert alone.gather("x") == ["x"]


def test_every_example_belongs_to_one_process():
    shares = [Processes("cpu", rank, 4).rows(12) for rank in range(4)]
    assert [i for share in shares for i in range(12)[share]] == list(range(12))


def test_buckets_keep_the_order_and_do_not_mix_formats(monkeypatch):
    monkeypatch.setattr(processes_module, "BUCKET", 10)
    sizes = [4, 4, 4, 30, 2]
    tensors = [torch.zeros(size) for size in sizes] + [torch.zeros(2, dtype=torch.bfloat16)]
    buckets = list(processes_module._buckets(tensors))
    assert [[len(t) for t in bucket] for bucket in buckets] == [[4, 4], [4], [30], [2], [2]]
    assert buckets[-1][0].dtype == torch.bfloat16


def test_what_an_accelerate_configuration_asks_for_in_vain_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(RRError, match="DEEPSPEED"):
        join("cpu")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "false")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(RRError, match="FSDP 1") as error:
        join("cpu")
    assert "fsdp_version: 2" in error.value.hint
