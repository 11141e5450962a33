"""Write a model folder of rr: sidecar, adapters, weights if it has its own, tokenizer, and last the manifest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rrcli.files import MANIFEST, SCHEMA, SIDECAR, write_json
from rrcli.models.source import ModelSource


def save_folder(
    folder: Path,
    model: Any,
    tokenizer: Any,
    *,
    base: ModelSource,
    base_fingerprint: str,
    own_weights: bool,
    hashes: Mapping[str, str] | None = None,
    states: tuple[Mapping[str, Any], Mapping[str, Any]] | None = None,
) -> None:
    """Write a model's sidecar, adapters, weights (if its own), tokenizer and, last, the manifest into `folder`.

    Args:
        hashes: file -> SHA-256 of the base's weight files, to be recorded in the manifest.
        states: weights of the model and of the sidecar, for a process that holds only shards of them.
    """
    from safetensors.torch import save_file

    from rrcli.upstream import forget_quantisation

    recursion = getattr(model, "recursion", None)
    if recursion is not None:
        sidecar = states[1] if states else recursion.state_dict()
        save_file({name: t.contiguous() for name, t in sidecar.items()}, folder / SIDECAR)
    lora = getattr(model, "lora", None)
    if lora is not None:
        lora.save(folder, base.name if _recorded(base) == base.name != "default" else str(base.path))
    if own_weights:
        forget_quantisation(model)
        model.save_pretrained(folder, **({"state_dict": dict(states[0])} if states else {}))
        if states:  # the model trains in fp32
            model.config.dtype = next(iter(states[0].values())).dtype
            model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    manifest = {
        "schema": SCHEMA,
        "base": {"source": _recorded(base), "fingerprint": base_fingerprint, **({"sha256": hashes} if hashes else {})},
        "weights": "own" if own_weights else "base",
        "recursion": recursion.config.to_dict() if recursion is not None else None,
        "lora": lora is not None,
    }
    write_json(folder / MANIFEST, manifest)


def _recorded(base: ModelSource) -> str:
    """Return how a manifest names its base: hub ids and `default` as they are, paths made absolute."""
    return base.name if base.name == "default" or base.hub else str(base.path)
