"""An export stands alone, takes no space, and harms nothing."""

from __future__ import annotations

import os
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import rrcli
from operating import logits, operate, sidecar, written
from rrcli.errors import RRError, UsageError
from rrcli.models.inspection import inspect_weights
from rrcli.reporting import Silent
from rrcli.services.surgery import surgery
from rrcli.settings import SurgerySettings


@pytest.mark.parametrize("verify", [True, False])
def test_an_export_stands_alone_and_takes_no_space(model: Path, tmp_path: Path, verify: bool) -> None:
    result = operate(tmp_path, export=Path("alone"), verify=verify)
    alone = tmp_path / "alone"
    assert result.export == alone
    stock, _ = rrcli.load(model)
    expected = logits(stock)
    for file in model.glob("*.safetensors"):
        assert (alone / file.name).stat().st_ino == file.stat().st_ino
    shutil.rmtree(sidecar(tmp_path))
    shutil.rmtree(model)
    loaded, _ = rrcli.load(alone)
    assert loaded.recursion.depth == 2
    assert torch.equal(logits(loaded), expected)
    plain, found = AutoModelForCausalLM.from_pretrained(alone, output_loading_info=True)
    assert not any(found.values())
    assert torch.equal(logits(plain.eval()), expected)


def test_writing_into_an_export_leaves_the_base_alone(model: Path, tmp_path: Path) -> None:
    operate(tmp_path, export=Path("alone"), verify=False)
    before = {file.name: file.read_bytes() for file in model.iterdir()}
    loaded, tokenizer = rrcli.load(tmp_path / "alone")
    loaded.recursion.detach()
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.zero_()
    loaded.save_pretrained(tmp_path / "alone", max_shard_size=loaded.get_memory_footprint() // 3)
    tokenizer.save_pretrained(tmp_path / "alone")
    for file in (tmp_path / "alone").glob("model-*.safetensors"):
        save_file({"x": torch.zeros(3)}, file)
    (tmp_path / "alone" / "config.json").write_text("{}")
    assert {file.name: file.read_bytes() for file in model.iterdir()} == before


def test_links_of_a_download_cache_are_resolved(model: Path, tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(model.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(Path("..") / "blobs" / str(number))
    operate(tmp_path, export=Path("deep/er/alone"), verify=False)
    alone = tmp_path / "deep" / "er" / "alone"
    assert not any(file.is_symlink() for file in alone.iterdir())
    assert {(alone / f.name).stat().st_ino for f in model.glob("*.safetensors")} <= {
        b.stat().st_ino for b in blobs.iterdir()
    }
    shutil.rmtree(model)
    rrcli.load(alone)


def test_weights_that_cannot_be_linked_are_copied_and_it_is_said(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other_device(*_: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", other_device)
    reporter = Silent()
    result = surgery(SurgerySettings(model="model"), tmp_path, reporter, verify=False, export=Path("alone"))
    count = len(list(model.glob("*.safetensors")))
    assert result.copied_files == count
    assert f"{count} weight files were copied" in reporter.warnings[0]
    for file in model.glob("*.safetensors"):
        assert (tmp_path / "alone" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("where", ["model/alone", "model", ".", "checkpoints", "checkpoints/after_surgery/alone"])
@pytest.mark.parametrize("overwrite", [True, False])
def test_an_export_that_would_harm_something_is_refused(
    model: Path, tmp_path: Path, where: str, overwrite: bool
) -> None:
    with pytest.raises(RRError, match=r"contain one another|exists already"):
        operate(tmp_path, export=Path(where), overwrite=overwrite, verify=False)
    assert written(tmp_path) == []
    inspect_weights(model)


def test_an_export_replaces_only_an_export_and_only_when_asked(model: Path, tmp_path: Path) -> None:
    operate(tmp_path, export=Path("alone"), verify=False)
    (tmp_path / "alone" / "stale").touch()
    with pytest.raises(RRError, match="exists already") as caught:
        operate(tmp_path, export=Path("alone"), verify=False)
    assert "--overwrite" in caught.value.hint
    operate(tmp_path, export=Path("alone"), overwrite=True, verify=False)
    assert not (tmp_path / "alone" / "stale").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(RRError, match="is not an export"):
        operate(tmp_path, export=Path("mine"), overwrite=True, verify=False)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"
    inspect_weights(model)


def test_a_gguf_base_is_not_exported(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 1))
    with pytest.raises(UsageError, match="needs a model folder"):
        operate(tmp_path, "model.gguf", export=Path("alone"))
