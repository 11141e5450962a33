"""What each device holds of a model that is laid over several, and the figures of devices."""

from __future__ import annotations

from pathlib import Path

import pytest

import rrcli
from families import build
from operating import skeleton_of
from rrcli.errors import UsageError
from rrcli.models import devices, footprint
from rrcli.models.loading import load
from rrcli.models.placement import Parallel, Placement, read_placement
from rrcli.models.shares import Arrangement, Machine, Work, arrangements, held_by_each, obstacle, reading
from rrcli.settings import EvalSettings

CONFIG = rrcli.RecursionConfig(max_steps=2)


def operated(family: str, phase: str = "") -> tuple[object, list[object]]:
    model = skeleton_of(family)
    return model, footprint.operate(model, recursion=CONFIG, phase=phase, lora=(4, 8))


@pytest.mark.parametrize("phase", ["b", "c"])
def test_shards_hold_their_part_and_what_is_put_together(phase: str) -> None:
    model, trained = operated("llama", phase)
    whole = footprint.weights_of(model, trained)
    found = held_by_each(model, trained, Arrangement(fsdp=4))
    assert found.weights.base == pytest.approx(whole.base / 4, rel=0.1)
    assert (found.weights.sidecar, found.weights.adapters) == (whole.sidecar, whole.adapters)
    sidecar = whole.sidecar // 4 + whole.adapters // 4
    base = whole.trained - sidecar
    assert found.weights.gradients == 4 * (base // 4 + sidecar)
    assert (base == 0) is (phase == "b")
    layer = sum(p.numel() for p in model.recursion.layers[0].parameters() if p.shape[0] != 4)  # type: ignore[attr-defined]
    assert found.together > 2 * 4 * layer * 0.9


def test_tensor_parallelism_cuts_what_the_plan_names() -> None:
    model, trained = operated("llama")
    layers = sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 2)  # type: ignore[attr-defined]
    whole = footprint.weights_of(model).base
    found = held_by_each(model, trained, Arrangement(tp=2))
    assert whole - found.weights.base == 2 * layers  # embedding and head are whole in every process
    assert found.together == 0


def test_experts_are_shared_out_whole() -> None:
    model, trained = operated("qwen3_moe")
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)  # type: ignore[attr-defined]
    whole = footprint.weights_of(model).base
    sharded = held_by_each(model, trained, Arrangement(fsdp=2))
    apart = held_by_each(model, trained, Arrangement(fsdp=2, ep=2))
    assert apart.weights.base == sharded.weights.base == pytest.approx(whole / 2, rel=0.05)
    assert sharded.together - apart.together == 2 * 4 * experts // 4  # two layers of four are not put together


def test_layers_are_spread_over_devices_in_their_order() -> None:
    model, trained = operated("llama")
    whole = footprint.weights_of(model).base
    found = [held_by_each(model, trained, Arrangement(mapped=count)).weights.base for count in (2, 4)]
    assert whole * 0.49 < found[0] < whole * 0.7
    assert whole * 0.24 < found[1] < found[0]


def test_which_arrangements_there_are() -> None:
    assert list(map(str, arrangements(operated("llama")[0], 1))) == ["one device"]
    assert list(map(str, arrangements(operated("qwen3_moe")[0], 2))) == [
        "one device",
        "--parallel replicas=2",
        "--parallel fsdp=2",
        "--parallel fsdp=2,ep=2",
        "--parallel tp=2",
        "--parallel tp=2,ep=2",
        "--device-map auto",
    ]
    trained = {phase: [str(w) for w in arrangements(operated("qwen3_moe")[0], 2) if w.trains(phase)] for phase in "abc"}
    assert trained["a"][-1] == "--parallel tp=2,ep=2"
    assert trained["b"][-1] == "--parallel fsdp=2,ep=2"
    assert trained["c"][-1] == "--parallel fsdp=2"
    # No plan, and heads that eight devices cannot share.
    assert not any("tp" in str(way) for way in arrangements(operated("mamba2")[0], 2))
    assert not any("tp" in str(way) for way in arrangements(operated("llama")[0], 8))


@pytest.mark.parametrize(
    ("family", "parts", "reason", "instead"),
    [
        ("llama", Parallel(fsdp=2, ep=2), "transformers has no sharing of experts for 'llama' models", "fsdp=2"),
        ("llama", Parallel(tp=2, ep=2), "transformers has no sharing of experts for 'llama' models", "tp=2"),
        ("falcon_h1", Parallel(tp=2), "transformers has no tensor parallelism for 'falcon_h1' models", "fsdp=2"),
        ("qwen3_moe", Parallel(fsdp=2, tp=4, ep=4), "num_key_value_heads, 2, is no multiple of tp=4", "fsdp=8"),
        ("qwen3_moe", Parallel(fsdp=8, ep=8), "model's experts, 4, is no multiple of ep=8", "fsdp=8"),
    ],
)
def test_what_cannot_be_cut_is_refused_with_what_can(
    family: str, parts: Parallel, reason: str, instead: str, tmp_path: Path
) -> None:
    build(family).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=reason) as error:  # before a process looks for the others
        load(tmp_path, device="cpu", placement=Placement(parts))
    assert error.value.message.startswith(f"--parallel {parts} cannot be used")
    assert error.value.hint == f"Take --parallel {instead}."
    model = skeleton_of(family)
    assert obstacle(model, parts) is not None
    assert obstacle(model, read_placement(EvalSettings(parallel=instead), tmp_path).parallel or parts) is None


def test_a_token_reads_the_experts_it_is_routed_to() -> None:
    found = reading(operated("qwen3_moe")[0])
    assert found.share == 0.5
    assert found.of_model(1) == found.dense + found.experts / 2
    assert found.of_model(100) == pytest.approx(found.dense + found.experts)
    assert found.of_pass(1) < found.of_model(1)


def test_the_slowest_part_is_the_bound() -> None:
    device = devices.named("h100")

    def bound(arrangement: Arrangement, work: Work) -> tuple[float, str]:
        seconds, name = Machine(device, arrangement, 0.5, "bfloat16").seconds(work)
        return round(seconds, 4), name

    assert bound(Arrangement(), Work(989e12, read=1)) == (2.0, "compute")
    assert bound(Arrangement(), Work(1, read=3350e9)) == (2.0, "memory")
    assert bound(Arrangement(fsdp=8), Work(989e12, gathered=1)) == (2.0, "compute")
    assert bound(Arrangement(fsdp=8), Work(1, gathered=450e9 * 8 / 7)) == (2.0, "link")
    assert bound(Arrangement(tp=2), Work(989e12)) == (1.0, "compute")
    assert bound(Arrangement(tp=2), Work(1, layers=25_000)) == (1.0, "link")  # 50,000 times 20 microseconds
    assert bound(Arrangement(tp=2), Work(1, layers=1, states=225e9))[0] == 2.0


def test_the_figures_of_devices() -> None:
    assert set(devices.DEVICES) == {"a100", "h100", "h200", "b200", "l40s", "rtx4090", "mi300x"}
    found = devices.named("RTX 4090")
    assert (found.peak("bfloat16"), found.peak("float16"), found.peak("float32")) == (165e12, 165e12, 82.6e12)
    assert (found.bandwidth, found.link) == (1008e9, 32e9)
    assert [devices.with_memory(gib).name for gib in (24, 80, 141, 180)] == ["rtx4090", "h100", "h200", "b200"]
    with pytest.raises(UsageError, match="'h900' are not known") as failed:
        devices.named("h900")
    assert "'h200'" in failed.value.hint


def test_this_machine_is_measured() -> None:
    found = devices.this_cpu()
    assert 1e8 < found.bandwidth < 1e12
    assert 1e9 < found.peak("float32") < 1e14
