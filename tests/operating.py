"""Surgery in a test: doing it, and looking at what it wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from families import CONFIGS
from rrcli.reporting import Silent
from rrcli.services.surgery import SurgeryResult, surgery
from rrcli.settings import SurgerySettings

PROMPT = torch.tensor([[5, 9, 3, 17, 6, 30]])


def operate(directory: Path, model: Path | str = "model", **options: Any) -> SurgeryResult:
    return surgery(SurgerySettings(model=str(model)), directory, Silent(), **options)


def written(directory: Path) -> list[str]:
    """Everything under a directory other than the model itself."""
    found = (path.relative_to(directory) for path in directory.rglob("*"))
    return sorted(str(path) for path in found if path.parts[0] != "model")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(PROMPT).logits


def sidecar(directory: Path) -> Path:
    return directory / "checkpoints" / "after_surgery"


def skeleton_of(family: str) -> Any:
    config = AutoConfig.for_model(family, **(CONFIGS[family] | {"pad_token_id": 0, "bos_token_id": 1}))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
