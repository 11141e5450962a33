"""A folder that stands alone: the base model's files under their own names, the sidecar, and a manifest.

Weight files are hard links, so an export of a 92 GB model takes no space of its own; small files are copies, so that
editing the export leaves the base alone. Writing over a linked file would reach the base: nothing here does, and
safetensors (0.8 and later) replaces a file instead of truncating it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from rrcli.errors import RRError, UsageError
from rrcli.files import MANIFEST, METRICS_FILE, SIDECAR, link, read_json, write_json
from rrcli.models.source import ModelSource

WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx")


def check_target(target: Path, base: ModelSource, sidecar: Path, *, overwrite: bool) -> None:
    """Refuse a target that would harm something, before any work is done.

    Raises:
        UsageError: a `.gguf` base, which stock `from_pretrained` cannot read from a folder alone.
        RRError: it exists, was not made by an export, or contains or lies in the base model or the sidecar's folder.
    """
    if base.is_gguf:
        raise UsageError(
            f"--export needs a model folder, {base.name} is a GGUF file", "Convert it to safetensors first."
        )
    resolved = target.resolve()
    for other, what in ((base.path, "the base model's folder"), (sidecar.resolve(), "the sidecar's folder")):
        if resolved.is_relative_to(other) or other.is_relative_to(resolved):
            raise RRError(f"the export {target} and {what}, {other}, lie in each other", "Choose another --export.")
    if not target.exists():
        return
    if not overwrite:
        raise RRError(f"{target} exists already", "Use --overwrite to replace it.")
    if target.is_dir() and any(target.iterdir()) and not (target / MANIFEST).is_file():
        raise RRError(f"{target} is no export of 'rr surgery', it is not replaced", "Choose another --export.")


def fill(folder: Path, base: ModelSource, weights: list[Path], sidecar: Path) -> int:
    """Fill `folder` with links to `weights`, the base's other files, and what surgery wrote into `sidecar`.

    Stock `from_pretrained` loads the result as the plain base, `rrcli.load` with the recursion.

    Returns:
        How many weight files had to be copied because they could not be linked.
    """
    copied = sum(not link(file, folder / file.name) for file in weights)
    for file in sorted(base.path.iterdir()):
        ours = file.name in (MANIFEST, METRICS_FILE, SIDECAR)
        if file.is_file() and file.suffix not in WEIGHTS and not ours and not file.name.startswith("."):
            shutil.copyfile(file, folder / file.name)
    for name in (SIDECAR, METRICS_FILE):
        shutil.copyfile(sidecar / name, folder / name)
    write_json(folder / MANIFEST, read_json(sidecar / MANIFEST, "rr surgery") | {"weights": "own"})
    return copied
