"""Training a model of which two processes hold a part each: what one process learns, in every phase."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from families import NO_DRIVER, build
from rrcli.demo.defaults import MODEL_DIR
from rrcli.errors import UsageError
from rrcli.files import checkpoints
from rrcli.models.placement import Parallel
from rrcli.reporting import Silent
from rrcli.services import train as service
from rrcli.services.surgery import surgery
from rrcli.settings import SurgerySettings, TrainSettings, with_changes
from rrcli.training.launching import launch
from rrcli.training.processes import Processes
from training_runs import assert_same_weights, curve

FAMILIES = ("llama", "qwen3_moe")
SETTINGS = TrainSettings(
    steps=3, batch_size=4, warmup_steps=1, save_interval=1, eval_interval=0, max_length=64, device="cpu", keep=9,
    model="base", lr=1e-3, task_share=1.0,
)  # fmt: skip
# The phases, with what is most likely to go wrong in each.
PHASES: dict[str, dict[str, Any]] = {
    "a": {},
    "b": {"packing": True, "gradient_checkpointing": True, "lora_rank": 4},
    "c": {},
}
RUNS = [(family, phase) for family in FAMILIES for phase in PHASES]


def settings_of(phase: str, **changes: Any) -> TrainSettings:
    return with_changes(SETTINGS, phase=phase, **PHASES[phase], **changes)


def train_in_parts(folder: Path) -> None:
    """Train every run in one launch, as starting two processes takes far longer than their training."""
    for family, phase in RUNS:
        two = settings_of(phase, run_name=f"{phase}-two", parallel="fsdp=2")
        service.train(two, "recursive", folder / family, Silent())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    for family in FAMILIES:
        base = folder / family / "base"
        build(family, vocab_size=1024, max_position_embeddings=128).save_pretrained(base)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(Path(MODEL_DIR) / name, base)
        surgery(SurgerySettings(model="base", device="cpu"), folder / family, Silent(), verify=False)
        for phase in PHASES:
            one = settings_of(phase, run_name=f"{phase}-one", gradient_accumulation=2)
            service.train(one, "recursive", folder / family, Silent())
    launch(2, train_in_parts, folder)
    return folder


@pytest.mark.skipif(NO_DRIVER, reason="a torch for CUDA does not shard on a CPU")
@pytest.mark.parametrize(("family", "phase"), RUNS)
def test_two_processes_with_parts_learn_what_one_learns(family: str, phase: str, trained: Path) -> None:
    one, two = (curve(trained / family, f"{phase}-{run}") for run in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-6)
    norms = [curve(trained / family, f"{phase}-{run}", "train/gradient_norm") for run in ("one", "two")]
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)
    last = [checkpoints(trained / family / "checkpoints" / f"{phase}-{run}")[-1] for run in ("one", "two")]
    assert_same_weights(*last, tolerance=1e-5 if phase == "c" else 1e-6)


@pytest.mark.skipif(NO_DRIVER, reason="a torch for CUDA does not shard on a CPU")
@pytest.mark.parametrize("phase", PHASES)
def test_one_process_goes_on_from_a_checkpoint_of_two(phase: str, trained: Path) -> None:
    """The checkpoint before the last is resumed from by one process, in a copy of the experiment."""
    folder = trained / "llama"
    run = folder / "checkpoints" / f"{phase}-two"
    shutil.copytree(run, folder / "checkpoints" / f"{phase}-alone")
    last = checkpoints(folder / "checkpoints" / f"{phase}-alone")[-1]
    shutil.rmtree(last)
    alone = settings_of(phase, run_name=f"{phase}-alone")
    result = service.train(alone, "recursive", folder, Silent())
    assert result.first_step == 2
    assert_same_weights(checkpoints(run)[-1], result.checkpoint, tolerance=1e-5)


@pytest.mark.skipif(NO_DRIVER, reason="a torch for CUDA does not shard on a CPU")
def test_a_frozen_base_is_not_copied_into_checkpoints(trained: Path) -> None:
    for phase, saved in (("a", False), ("b", False), ("c", True)):
        last = checkpoints(trained / "llama" / "checkpoints" / f"{phase}-two")[-1]
        assert (last / "model.safetensors").exists() is saved
        assert (last / "adapter_model.safetensors").exists() is (phase == "b")


# -- without a second process ------------------------------------------------------------------------------------------


def test_rows_are_shared_out_among_those_that_do_not_work_on_the_same_ones() -> None:
    rows = [Processes("cpu", rank, 4, Parallel(fsdp=2, tp=2)).rows(6) for rank in range(4)]
    assert rows == [slice(0, 3), slice(0, 3), slice(3, 6), slice(3, 6)]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"phase": "b", "parallel": "tp=2"}, "phase b cannot be trained with --parallel tp=2"),
        ({"phase": "c", "parallel": "fsdp=2,ep=2"}, "phase c cannot be trained with --parallel fsdp=2,ep=2"),
        ({"phase": "c", "parallel": "fsdp=2", "histograms": 1}, "--histograms needs whole weights"),
        ({"phase": "a", "parallel": "fsdp=4", "batch_size": 6}, "shared out evenly among 4 processes"),
        ({"phase": "a", "device_map": "balanced"}, "lays weights where they cannot train"),
    ],
)
def test_what_cannot_be_trained_in_such_parts_is_refused(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    settings = with_changes(TrainSettings(device="cpu"), **options)
    surgery(SurgerySettings(device="cpu"), tmp_path, Silent(), verify=False)
    with pytest.raises(UsageError, match=said):
        service.train(settings, "recursive", tmp_path, Silent())
