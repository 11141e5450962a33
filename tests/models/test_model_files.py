"""Which files of a model folder count: those that transformers reads, and those that decide what the model does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import rrcli
from families import build
from operating import operate, sidecar
from rrcli.demo.defaults import MODEL_DIR
from rrcli.errors import RRError
from rrcli.files import publish_folder, read_json
from rrcli.models import weights
from rrcli.models.inspection import inspect_weights
from rrcli.models.loading import load_tokenizer
from rrcli.models.saving import save_folder
from rrcli.models.source import ModelSource, base_of, resolve
from rrcli.schemas import Manifest
from tiny_configs import CONFIGS, MORE

FIRST = "model.embed_tokens.weight"
STALE = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The embedded model in one file."""
    return Path(shutil.copytree(MODEL_DIR, tmp_path / "model"))


def other(folder: Path, *names: str, factor: float = 2.0, index: bool = False) -> None:
    """Write the model's tensors times a factor into further files, and, if asked for, the index that names them."""
    tensors = {name: tensor * factor for name, tensor in load_file(MODEL_DIR / "model.safetensors").items()}
    parts = {name: names[number % len(names)] for number, name in enumerate(sorted(tensors))}
    for file in names:
        part = {name: tensor for name, tensor in tensors.items() if parts[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    if index:
        text = json.dumps({"metadata": {"total_size": 1}, "weight_map": parts})
        (folder / "model.safetensors.index.json").write_text(text)


def configure(folder: Path, **values: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def read_by_us(folder: Path) -> torch.Tensor:
    [tensor] = [t[FIRST] for file in weights.weight_files(folder) if FIRST in (t := load_file(file))]
    return tensor


# -- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["one file", "stale index", "shards", "named file", "named index", "named and more"])
def test_weights_are_read_where_transformers_reads_them(folder: Path, layout: str) -> None:
    if layout in ("stale index", "shards", "named index", "named and more"):
        other(folder, *STALE, index=True)
    if layout == "shards":
        (folder / "model.safetensors").unlink()
    if layout == "named index":
        configure(folder, transformers_weights="model.safetensors.index.json")
    if layout in ("named file", "named and more"):
        other(folder, "mine.safetensors", factor=3.0)
        configure(folder, transformers_weights="mine.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)
    assert torch.equal(read_by_us(folder), loaded.state_dict()[FIRST])
    assert inspect_weights(folder).size == sum(file.stat().st_size for file in weights.weight_files(folder))


@pytest.mark.parametrize(
    "beside",
    ["model.fp16.safetensors", "consolidated.safetensors", "optimizer.safetensors", "adapter_model.safetensors"],
)
def test_other_files_beside_the_weights_count_for_nothing(folder: Path, tmp_path: Path, beside: str) -> None:
    before = inspect_weights(folder), weights.fingerprint(folder)
    other(folder, beside)
    assert (inspect_weights(folder), weights.fingerprint(folder)) == before
    operate(tmp_path, export=Path("alone"), verify=False, hash_weights=True)
    assert beside not in {file.name for file in (tmp_path / "alone").iterdir()}
    assert list(read_json(sidecar(tmp_path) / "recursion.json", "", Manifest)["base"]["sha256"]) == [
        "model.safetensors"
    ]


@pytest.mark.parametrize("alone", ["model.fp16.safetensors", "consolidated.safetensors", "adapter_model.safetensors"])
def test_weights_that_transformers_does_not_find_are_not_found(folder: Path, alone: str) -> None:
    (folder / "model.safetensors").rename(folder / alone)
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)
    with pytest.raises(RRError, match=f"holds no model.safetensors .*only {alone}"):
        resolve("model", folder.parent)


@pytest.mark.parametrize("named", ["adapter_model.bin", "../model.safetensors", 3])
def test_weights_that_the_configuration_names_are_safetensors_of_the_folder(folder: Path, named: object) -> None:
    configure(folder, transformers_weights=named)
    with pytest.raises(RRError, match=r"no safetensors file|is not a plain name"):
        resolve("model", folder.parent)


def test_an_export_of_a_folder_with_a_stale_index_holds_the_weights_that_are_read(folder: Path, tmp_path: Path) -> None:
    other(folder, *STALE, index=True)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")
    operate(tmp_path, export=Path("alone"), verify=False)
    alone = tmp_path / "alone"
    assert sorted(f.name for f in alone.glob("*.safetensors*")) == ["model.safetensors", "recursion.safetensors"]
    assert torch.equal(read_by_us(alone), load_file(MODEL_DIR / "model.safetensors")[FIRST])
    assert (alone / "additional_chat_templates" / "tool.jinja").is_file()


# -- what else decides what a model does -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *(
            "modeling_mine.py",
            "spiece.model",
            "added_tokens.json",
            "tekken.json",
            "vocab.txt",
            "sentencepiece.bpe.model",
        ),
        *("additional_chat_templates/tool.jinja", "chat_template.json", "qwen.tiktoken", "tokenizer.model.v3"),
        *("source.spm", "special_tokens_map.json", "preprocessor_config.json", "bpe.codes"),
    ],
)
def test_a_fingerprint_changes_with_every_file_that_decides_what_a_model_does(folder: Path, name: str) -> None:
    seen = [weights.fingerprint(folder)]
    (folder / name).parent.mkdir(exist_ok=True)
    for content in ("one", "two"):
        (folder / name).write_text(content)
        seen.append(weights.fingerprint(folder))
    assert len(set(seen)) == 3


@pytest.mark.parametrize(
    "name", ["README.md", "LICENSE.txt", "trainer_state.json", "eval_results.json", ".gitattributes"]
)
def test_a_fingerprint_does_not_change_with_what_only_people_read(folder: Path, name: str) -> None:
    before = weights.fingerprint(folder)
    (folder / name).write_text("one")
    assert weights.fingerprint(folder) == before


def test_a_large_file_that_is_written_again_makes_stale_what_was_made_from_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rrcli import configuration
    from rrcli.experiment.planning import status_of
    from rrcli.experiment.replicates import Replicate

    def status(directory: Path) -> str:
        one, flags = Replicate("after_surgery", 0), {"model": "model"}
        step = status_of("surgery", one, directory, lambda cls: configuration.load(cls, directory, flags))
        return f"{step.status} {step.detail}".strip()

    monkeypatch.setattr(weights, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(weights, "BLOCK_BYTES", 64)
    operate(tmp_path, verify=False)
    assert status(tmp_path) == "done"
    copy = tmp_path / "copy"
    copy.mkdir()
    for part in ("model", "checkpoints"):
        shutil.copytree(tmp_path / part, copy / part, copy_function=shutil.copyfile)
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2 + 3000] ^= 1
    file.write_bytes(content)
    assert status(tmp_path) == "stale model.safetensors was written again"
    with pytest.raises(RRError, match="was written again after"):
        base_of(resolve(str(sidecar(tmp_path)), tmp_path), tmp_path)
    assert status(copy) == "done"
    base_of(resolve(str(sidecar(copy)), copy), copy)


def test_a_folder_that_version_0_1_made_is_read_as_long_as_its_base_is_the_same(folder: Path, tmp_path: Path) -> None:
    operate(tmp_path, verify=False)
    file = sidecar(tmp_path) / "recursion.json"
    manifest = json.loads(file.read_text())
    manifest["base"] = {"source": str(folder), "fingerprint": weights.fingerprint_0_1(folder)}
    file.write_text(json.dumps(manifest))
    assert base_of(resolve(str(sidecar(tmp_path)), tmp_path), tmp_path).path == folder
    configure(folder, rope_theta=5.0)
    with pytest.raises(RRError, match=r"was made for \w{16}, found"):
        base_of(resolve(str(sidecar(tmp_path)), tmp_path), tmp_path)


# -- adapters ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("merged", [True, False])
def test_an_adapter_in_the_folder_of_a_model_is_refused(folder: Path, tmp_path: Path, merged: bool) -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(folder)
    if not merged:
        (folder / "config.json").unlink()
        (folder / "model.safetensors").unlink()
    what = "beside the model's weights" if merged else "is an adapter on another model"
    with pytest.raises(RRError, match=what) as caught:
        operate(tmp_path, verify=False)
    assert "merge_and_unload" in caught.value.hint
    if merged:
        (folder / "adapter_config.json").unlink()
        operate(tmp_path)


# -- names and places --------------------------------------------------------------------------------------------------


def test_a_folder_of_the_hubs_cache_is_its_main_revision(folder: Path, tmp_path: Path) -> None:
    cached = tmp_path / "models--someone--small"
    (cached / "refs").mkdir(parents=True)
    (cached / "snapshots" / "old").mkdir(parents=True)
    folder.rename(cached / "snapshots" / "new")
    with pytest.raises(RRError, match="2 revisions, none of which is the main one"):
        resolve("models--someone--small", tmp_path)
    (cached / "refs" / "main").write_text("new")
    source = resolve("models--someone--small", tmp_path)
    assert source.path == cached / "snapshots" / "new"
    assert source.recorded(tmp_path) == "./models--someone--small/snapshots/new"
    (cached / "refs" / "main").unlink()
    (cached / "snapshots" / "old").rmdir()
    assert resolve("models--someone--small", tmp_path).path == source.path
    shutil.rmtree(cached / "snapshots" / "new")
    with pytest.raises(RRError, match="holds no files"):
        resolve("models--someone--small", tmp_path)


def test_a_linked_gguf_file_stays_one(tmp_path: Path) -> None:
    (tmp_path / "0123abcd").write_bytes(b"GGUF")
    (tmp_path / "model.gguf").symlink_to("0123abcd")
    source = resolve("model.gguf", tmp_path)
    assert source.is_gguf
    assert source.recorded(tmp_path) == "./model.gguf"


def test_an_experiment_with_its_model_inside_can_be_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tmp_path / "before"
    before.mkdir()
    shutil.copytree(MODEL_DIR, before / "model")
    operate(before, before / "model", verify=False)  # named by an absolute path
    assert read_json(sidecar(before) / "recursion.json", "", Manifest)["base"]["source"] == "./model"
    after = before.rename(tmp_path / "after")
    assert base_of(resolve(str(sidecar(after)), after), after).path == after / "model"
    monkeypatch.chdir("/")
    model, _ = rrcli.load(sidecar(after))
    assert model.recursion is not None


def test_a_base_outside_of_the_experiment_is_recorded_by_its_whole_path(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    operate(tmp_path / "inside", folder, verify=False)
    manifest = sidecar(tmp_path / "inside") / "recursion.json"
    assert read_json(manifest, "", Manifest)["base"]["source"] == str(folder)
    (tmp_path / "inside" / "link").symlink_to(folder)
    operate(tmp_path / "inside", "link", verify=False, overwrite=True)
    assert read_json(manifest, "", Manifest)["base"]["source"] == "./link"
    rrcli.load(sidecar(tmp_path / "inside"))


# -- what was saved is read back ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["adapter alone", "a tensor less", "other numbers", "cut off", "other format"])
def test_what_was_saved_is_compared_before_it_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    source = ModelSource("default", MODEL_DIR)
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR)
    tokenizer = load_tokenizer(source)
    save = model.save_pretrained

    def save_wrongly(folder: Path, **options: object) -> None:
        save(folder, **options)
        file = folder / "model.safetensors"
        tensors = load_file(file)
        if fault == "adapter alone":
            file.rename(folder / "adapter_model.safetensors")
        elif fault == "a tensor less":
            del tensors[sorted(tensors)[3]]
        elif fault == "other numbers":
            tensors[sorted(tensors)[3]][-1] += 1
        elif fault == "other format":
            tensors[FIRST] = tensors[FIRST].bfloat16()
        if fault == "cut off":
            file.write_bytes(file.read_bytes()[:-4])
        elif file.exists():
            save_file(tensors, file, metadata={"format": "pt"})

    monkeypatch.setattr(model, "save_pretrained", save_wrongly)
    found = "is not what was to be saved: .*(no model.safetensors|to be written|holds other numbers|is truncated)"
    with pytest.raises(RRError, match=found), publish_folder(tmp_path / "step-000001") as folder:
        save_folder(
            folder, model, tokenizer, base=source, directory=tmp_path, base_fingerprint="x", own_weights=True
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(model, "save_pretrained", save)
    with publish_folder(tmp_path / "step-000001") as folder:
        save_folder(
            folder, model, tokenizer, base=source, directory=tmp_path, base_fingerprint="x", own_weights=True
        )  # fmt: skip


def saved_and_read_back(family: str, folder: Path) -> None:
    source = ModelSource("default", MODEL_DIR)
    save_folder(
        folder, build(family), load_tokenizer(source),
        base=source, directory=folder, base_fingerprint="x", own_weights=True,
    )  # fmt: skip


# Tied weights, transposed ones, experts that are saved apart, and parameters without a matrix.
@pytest.mark.parametrize("family", ["gpt2", "mixtral", "mamba", "gemma4_text", "qwen3_moe"])
def test_whatever_way_a_family_is_saved_it_is_found_to_be_the_same(family: str, tmp_path: Path) -> None:
    saved_and_read_back(family, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(CONFIGS | MORE))
def test_every_family_is_found_to_be_the_same(family: str, tmp_path: Path) -> None:
    saved_and_read_back(family, tmp_path)
