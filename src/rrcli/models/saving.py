"""Write a model folder of rr: sidecar, adapters, weights if it has its own, tokenizer, and last the manifest.

What was written is read back and compared before anybody relies on it: names, shapes and number formats of all tensors,
and the first and last row of each. That takes little time, since the rest of the files is not read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rrcli.errors import RRError
from rrcli.files import MANIFEST, SCHEMA, SIDECAR, safetensors_header, write_json
from rrcli.models.manifest import read_manifest
from rrcli.models.source import ModelSource
from rrcli.models.weights import ADAPTER_WEIGHTS, refuse_adapter, weight_files


def save_folder(
    folder: Path,
    model: Any,
    tokenizer: Any,
    *,
    base: ModelSource,
    directory: Path,
    base_fingerprint: str,
    own_weights: bool,
    hashes: Mapping[str, str] | None = None,
    states: tuple[Mapping[str, Any], ...] | None = None,
) -> None:
    """Write a model's sidecar, adapters, weights (if its own), tokenizer and, last, the manifest into `folder`.

    Args:
        directory: the working directory; the manifest names a base inside it relative to it.
        hashes: file -> SHA-256 of the base's weight files, to be recorded in the manifest.
        states: weights of the model and of the sidecar, for a process that holds only shards of them.

    Raises:
        RRError: what was read back is not what was to be written.
    """
    from safetensors.torch import save_file

    from rrcli.upstream import forget_quantisation, saves_as_one, unsaved_tensors

    recursion = getattr(model, "recursion", None)
    sidecar: Mapping[str, Any] = {}
    if recursion is not None:
        sidecar = states[1] if states else recursion.state_dict()
        save_file({name: t.contiguous() for name, t in sidecar.items()}, folder / SIDECAR)
    lora = getattr(model, "lora", None)
    if lora is not None:
        lora.save(folder, base.hub_id or str(base.path), base.commit or None)
    if own_weights:
        forget_quantisation(model)
        with saves_as_one(model):
            model.save_pretrained(folder, **({"state_dict": _once(model, states[0])} if states else {}))
        if states:  # the model trains in fp32
            model.config.dtype = next(iter(states[0].values())).dtype
            model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    about = {"source": base.recorded(directory), "fingerprint": base_fingerprint}
    manifest = {
        "schema": SCHEMA,
        "base": about | ({"sha256": hashes} if hashes else {}) | ({"commit": base.commit} if base.commit else {}),
        "weights": "own" if own_weights else "base",
        "recursion": recursion.config.to_dict() if recursion is not None else None,
        "lora": lora is not None,
    }
    write_json(folder / MANIFEST, manifest)
    try:
        if recursion is not None:
            _compare([folder / SIDECAR], sidecar)
        if lora is not None:
            _compare([folder / ADAPTER_WEIGHTS], lora.state_dict())
        if own_weights:
            refuse_adapter(folder)
            left_out = unsaved_tensors(model)
            weights = _once(model, states[0]) if states else model.state_dict()
            _compare(weight_files(folder), {name: t for name, t in weights.items() if name not in left_out})
        read_manifest(folder)
    except RRError as error:
        hint = "Nothing was published; what was there before stays. Look at the disk; report the model's family."
        raise RRError(f"what was written is not what was to be saved: {error.message}", hint) from error


def _once(model: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dictionary without the second names of tied tensors; put together, they no longer share memory."""
    return {name: t for name, t in state.items() if name not in model.all_tied_weights_keys}


def _compare(files: list[Path], expected: Mapping[str, Any]) -> None:
    """Compare the tensors in safetensors files with those that were to be written; tied ones are written once.

    transformers saves some families under the names and in the parts of their original checkpoints. There the number
    of elements alone is compared.

    Raises:
        RRError: they differ.
    """
    from safetensors import safe_open

    found = {name: (file, entry) for file in files for name, entry in safetensors_header(file).items()}
    distinct = {(t.data_ptr(), t.shape, t.stride()) if t.numel() else name: t for name, t in expected.items()}
    elements = sum(tensor.numel() for tensor in distinct.values())
    if (written := sum(math.prod(entry["shape"]) for _, entry in found.values())) != elements:
        raise _wrong(files[0], f"it holds {written:,} numbers, {elements:,} were to be written")
    if not found.keys() <= expected.keys():
        return
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dictionary
                saved, tensor = opened.get_slice(name), expected[name]
                if saved.get_shape() != list(tensor.shape):
                    raise _wrong(file, f"'{name}' has the shape {saved.get_shape()}, not {list(tensor.shape)}")
                if tensor.ndim and tensor.numel() and not _same_ends(saved, tensor):
                    raise _wrong(file, f"'{name}' holds other numbers")


def _same_ends(saved: Any, tensor: Any) -> bool:
    """Compare the first and the last row, byte by byte: what is not a number also equals itself."""
    import torch

    for rows in (slice(0, 1), slice(len(tensor) - 1, len(tensor))):
        there, here = saved[rows].contiguous(), tensor[rows].detach().cpu().contiguous()
        if there.dtype != here.dtype or not torch.equal(there.view(torch.uint8), here.view(torch.uint8)):
            return False
    return True


def _wrong(file: Path, what: str) -> RRError:
    return RRError(f"{file.name}: {what}")
