"""A model larger than its device: layers in memory and on disk, exact at every depth; or refused, with the numbers."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from families import build, tokens, wake
from operating import skeleton_of
from rrcli import upstream
from rrcli.data.batching import CPU_TOKENS, affordable
from rrcli.demo.defaults import MODEL_DIR
from rrcli.errors import RRError, UsageError
from rrcli.files import safetensors_header
from rrcli.models import costs, fitting, verification
from rrcli.models.loading import load
from rrcli.models.placement import Parallel, Placement, read_placement
from rrcli.models.shares import Arrangement, held_by_each
from rrcli.models.source import ModelSource
from rrcli.recursion.config import RecursionConfig
from rrcli.recursion.engine import attach
from rrcli.recursion.families import find_layout, input_device
from rrcli.recursion.lora import add_lora
from rrcli.recursion.readout import Readout
from rrcli.reporting import Silent
from rrcli.settings import EvalSettings, TrainSettings

FAMILIES = ["llama", "qwen3_moe", "kimi_linear"]
# So little that accelerate keeps a part of the layers in memory, and the rest on disk.
LITTLE = 160_000


def saved(family: str, folder: Path) -> Path:
    build(family).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(MODEL_DIR) / name, folder)
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A model in memory, and the same one of which most layers are on disk; with recursions that do something."""
    folder = saved(request.param, tmp_path_factory.mktemp(request.param))
    plain = load(folder, device="cpu")[0]
    spread = load(folder, device="cpu", placement=Placement(max_memory={"cpu": LITTLE}))[0]
    for model in (plain, spread):
        wake(attach(model, RecursionConfig(max_steps=2)))
    return plain, spread


def test_some_layers_are_in_memory_and_others_on_disk(pair: tuple[Any, Any]) -> None:
    plain, spread = pair
    assert not hasattr(plain, "hf_device_map")
    assert set(spread.hf_device_map.values()) == {"cpu", "disk"}
    assert any(parameter.device.type == "meta" for parameter in spread.parameters())
    assert input_device(spread) == torch.device("cpu")
    lie = fitting.where_layers_lie(spread, find_layout(spread)[0].layers)
    assert lie.startswith("layer")
    assert "on the CPU" in lie
    assert "on disk" in lie


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_logits_scores_and_texts_equal_those_of_the_model_in_memory(pair: tuple[Any, Any], depth: int) -> None:
    ids = tokens()
    logits, texts, losses = [], [], []
    for model in pair:
        with model.recursion.at_depth(depth), torch.no_grad():
            logits.append(model(ids).logits)
            texts.append(model.generate(ids, max_new_tokens=8, do_sample=False))
            readout = Readout(model)
            mask = torch.ones_like(ids)
            assert readout.choose_way(ids, mask) is None
            scored = mask.bool()
            losses.append(readout.score(ids, mask, scored, targets=ids.flatten()).losses)
    assert torch.equal(*logits)
    assert torch.equal(*texts)
    assert torch.allclose(*losses, atol=1e-5)


def test_a_batch_is_as_large_as_was_asked_for_where_each_one_reads_the_layers(pair: tuple[Any, Any]) -> None:
    plain, spread = (affordable(model, 8192, 100, Silent()) for model in pair)
    assert (plain, spread) == (CPU_TOKENS, 8192)


def test_the_caches_of_the_passes_are_the_same(pair: tuple[Any, Any]) -> None:
    ids = tokens(length=9)
    found = []
    for model in pair:
        with torch.no_grad():
            first = model(ids[:, :6], use_cache=True)
            cache = next(value for value in first.values() if hasattr(value, "get_seq_length"))
            name = "cache" if "cache" in first else "past_key_values"
            steps = [model(ids[:, place : place + 1], **{name: cache}).logits for place in (6, 7, 8)]
        found.append(torch.cat([first.logits, *steps], 1))
    assert torch.equal(*found)


def test_adapters_work_on_layers_that_are_on_disk(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path / "base")
    ids, found = tokens(), []
    for placement in (Placement(), Placement(max_memory={"cpu": LITTLE})):
        model = load(folder, device="cpu", placement=placement)[0]
        wake(attach(model, RecursionConfig(max_steps=1)))
        lora = add_lora(model, 4, 8, seed=3)
        torch.manual_seed(0)
        for parameter in lora.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        with torch.no_grad():
            found.append(model(ids).logits)
    assert torch.equal(*found)


def test_a_file_may_say_where_each_module_lies(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path / "base")
    where = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers": "cpu", "model.norm": "cpu"}
    where |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    (tmp_path / "map.json").write_text(json.dumps(where))
    placement = read_placement(EvalSettings(device_map="map.json"), tmp_path)
    model = load(folder, device="cpu", placement=placement)[0]
    lie = fitting.where_layers_lie(model, "model.layers")
    assert lie == "layer 0 on disk, layers 1-3 on the CPU, all else on the CPU"
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, load(folder, device="cpu")[0](tokens()).logits)


@pytest.mark.parametrize("family", ["qwen3_moe", "kimi_linear"])
def test_experts_that_lie_one_by_one_in_the_files_are_joined_when_they_run(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = saved(family, tmp_path / "base")
    for file in folder.glob("*.safetensors"):
        assert any(".experts.0." in name for name in safetensors_header(file))
    applied: list[str] = []
    real = upstream._made
    monkeypatch.setattr(
        upstream, "_made", lambda rule, name, *a, **b: applied.append(name) or real(rule, name, *a, **b)
    )
    model = load(folder, device="cpu", placement=Placement(max_memory={"cpu": 60_000}))[0]
    assert not applied
    [written] = tmp_path.glob(".rr-offload-*")
    assert not list(written.iterdir())  # no second copy
    with torch.no_grad():
        model(tokens())
    offloaded = [name for name in applied if "experts" in name]
    assert offloaded
    assert len(applied) == len(set(applied))
    model.offload_folder.cleanup()
    assert not written.exists()


def test_what_has_to_be_written_to_the_disk_is_refused_where_there_is_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(upstream, "_named_in", lambda *_: True)  # as if all had a number format of their own
    folder = saved("qwen3_moe", tmp_path / "base")
    little = Placement(max_memory={"cpu": 40_000})
    model = load(folder, device="cpu", placement=little)[0]
    [written] = tmp_path.glob(".rr-offload-*")
    size = sum(file.stat().st_size for file in written.iterdir())
    assert size > 0
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, load(folder, device="cpu")[0](tokens()).logits)
    usage = shutil._ntuple_diskusage(10**9, 10**9, size // 2)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(RRError, match=r"GiB of weights must be written to .*rr-offload-.* 0.0 GiB are free") as error:
        load(folder, device="cpu", placement=little)
    assert "larger disk" in error.value.hint


def test_layers_on_disk_are_read_as_rarely_as_can_be(tmp_path: Path) -> None:
    """Counted are the runs of a layer, each of which reads it: once for each pass of a batch, and few to check."""
    folder, counts = saved("llama", tmp_path / "base"), []
    ids = tokens()
    mask = torch.ones_like(ids)
    for placement in (Placement(), Placement(max_memory={"cpu": LITTLE})):
        model, tokenizer = load(folder, device="cpu", placement=placement)
        runs: list[int] = []
        model.model.layers[0].register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        before = verification.reference(model, tokenizer)
        attach(model, RecursionConfig(max_steps=2))
        assert verification.verify(model, tokenizer, before, reporter=Silent()) == [0, 1, 2]
        ends, readout = [len(runs)], Readout(model)
        readout.choose_way(ids, mask, depth=2)
        ends.append(len(runs))
        readout.score(ids, mask, mask.bool(), targets=ids.flatten(), depth=2)
        ends.append(len(runs))
        counts.append(ends)
    assert counts == [[70, 79, 82], [21, 22, 25]]


# -- what does not fit -------------------------------------------------------------------------------------------------


def test_a_layer_that_does_not_fit_alone_is_refused_with_the_numbers(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path / "base")
    with pytest.raises(
        RRError, match=r"does not fit: its largest part takes \d.* MiB, weights may take .* on the CPU"
    ) as e:
        load(folder, device="cpu", placement=Placement(max_memory={"cpu": 1000}))
    assert "its weights take 0.165 MiB" in e.value.message
    assert "the caches of 4,096 tokens 2 MiB, 4 MiB, 6 MiB at depth 0, 1, 2" in e.value.message


def test_a_training_that_does_not_fit_is_refused_with_gradients_and_optimiser(tmp_path: Path, monkeypatch: Any) -> None:
    folder = saved("llama", tmp_path / "base")
    monkeypatch.setattr(fitting, "_total", lambda _: 300_000)
    with pytest.raises(RRError, match="does not fit: a process that has all of it needs at least") as error:
        load(folder, device="cpu", placement=Placement(offload=False), trains=True)
    assert re.search(r"its weights take 0.165 MiB in fp32, their gradients \S+ MiB, AdamW's state", error.value.message)
    assert error.value.hint == "What would fit: --parallel fsdp=16, or --phase b."
    load(folder, device="cpu", placement=Placement(offload=False))  # frozen, it fits


def test_what_each_process_needs_is_what_rr_plan_says() -> None:
    config = RecursionConfig(max_steps=2)
    frozen, trained = (fitting.need(skeleton_of("llama"), config=config, trains=trains) for trains in (False, True))
    for found in (frozen, trained):
        held = held_by_each(found.model, found.trained, Arrangement(fsdp=4))
        weights = held.weights
        states = weights.sidecar + weights.gradients + weights.optimiser
        assert found.on_each(Parallel(fsdp=4)) == weights.base + states + held.together
        assert found.on_each(Parallel(fsdp=4)) < found.on_each(Parallel(fsdp=2)) < 2 * found.on_each(None)
    assert len(frozen.caches) == 3
    assert 3 < trained.on_each(None) / frozen.on_each(None) < 4.2


def test_a_family_that_cannot_run_on_shapes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Any) -> Any:
        raise ValueError("no values here")

    monkeypatch.setattr(costs, "measure", fail)
    found = fitting.need(skeleton_of("llama"), config=RecursionConfig())
    assert "its caches are not known: a 'llama' model cannot be run on shapes alone: no values here" in str(found)
    assert found.on_each(None) > 0


def test_the_size_of_weights_is_known_from_their_headers(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path / "base")
    source = ModelSource("base", folder)
    stored = (folder / "model.safetensors").stat().st_size
    unasked: Any = None
    assert fitting.weight_bytes(source, "auto", "none", skeleton=unasked) == stored
    assert fitting.weight_bytes(source, torch.bfloat16, "none", skeleton=unasked) == stored // 2


# -- the options -------------------------------------------------------------------------------------------------------


def test_a_placement_is_read_from_the_options(tmp_path: Path) -> None:
    read = read_placement(EvalSettings(parallel="fsdp=4, tp=2,replicas=2"), tmp_path)
    assert read.parallel == Parallel(fsdp=4, tp=2, replicas=2)
    assert (read.processes, str(read.parallel)) == (16, "fsdp=4,tp=2,replicas=2")
    read = read_placement(EvalSettings(max_memory="cuda:0=70GiB,cpu=1.5GB"), tmp_path)
    assert read.max_memory == {"cuda:0": 70 * 2**30, "cpu": 1_500_000_000}
    assert read_placement(EvalSettings(), tmp_path) == Placement()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"parallel": "fsdq=2"}, "names 'fsdq'"),
        ({"parallel": "fsdp"}, "--parallel is 'fsdp'"),
        ({"parallel": "fsdp=0"}, "fsdp is '0'"),
        ({"parallel": "fsdp=2,fsdp=4"}, "names 'fsdp' twice"),
        ({"parallel": "fsdp=1"}, "means one process"),
        ({"parallel": "tp=4,ep=2"}, "ep must be a multiple of tp"),
        ({"parallel": "fsdp=4,ep=3"}, "ep must divide fsdp x tp"),
        ({"parallel": "fsdp=2", "device_map": "balanced"}, "--parallel and --device-map contradict each other"),
        ({"parallel": "fsdp=2", "max_memory": "cpu=1GiB"}, "--parallel and --max-memory contradict each other"),
        ({"device_map": "nothing.json"}, "cannot be read"),
        ({"device_map": "list.json"}, "list.json: expected `object`"),
        ({"device_map": "odd.json"}, "'lm_head' is to lie on 'moon', which is no device"),
        ({"max_memory": "cpu"}, "--max-memory is 'cpu'"),
        ({"max_memory": "disk=1GiB"}, "names 'disk', which is no device with memory"),
        ({"max_memory": "cpu=1 parsec"}, "of cpu is '1 parsec'"),
    ],
)
def test_what_contradicts_itself_is_a_wrong_usage(options: dict[str, str], said: str, tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "odd.json").write_text('{"lm_head": "moon"}')
    with pytest.raises(UsageError, match=said) as error:
        read_placement(EvalSettings(**options), tmp_path)
    assert error.value.exit_code == 2
    assert error.value.hint or "contradict" in error.value.message


def test_another_number_of_processes_than_the_parts_is_a_wrong_usage(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs 2 processes, --num-processes is 4"):
        read_placement(TrainSettings(parallel="fsdp=2", num_processes=4), tmp_path)
    assert read_placement(TrainSettings(parallel="fsdp=2", num_processes=2), tmp_path).processes == 2


def test_a_device_that_is_not_there_is_a_wrong_usage(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path / "base")
    with pytest.raises(UsageError, match="names cuda:7, which is not used here"):
        load(folder, device="cpu", placement=Placement(max_memory={"cuda:7": 2**30}))
