"""Export a self-contained folder: the base model's files under their own names, the sidecar, and a manifest.

Weight files are hard links, so the export of a 92 GB model takes no further space. Small files are copies, so that
editing the export does not change the base. Overwriting a linked file would change the base: nothing here does that,
and safetensors (0.8 and later) replaces a file instead of truncating it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from rrcli.errors import RRError, UsageError
from rrcli.files import MANIFEST, METRICS_FILE, SIDECAR, link, write_json
from rrcli.models.manifest import read_manifest
from rrcli.models.source import ModelSource
from rrcli.models.weights import TEMPLATES, weight_index

WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx")


def check_target(target: Path, base: ModelSource, sidecar: Path, *, overwrite: bool) -> None:
    """Refuse, before any work is done, a target that would destroy something.

    Raises:
        UsageError: a `.gguf` base, which stock `from_pretrained` cannot read from a folder alone.
        RRError: the target exists or was not made by an export; or it is inside the folder of the base model or of the
            sidecar, or contains it.
    """
    if base.is_gguf:
        raise UsageError(
            f"--export needs a model folder, {base.name} is a GGUF file", "Convert it to safetensors first."
        )
    resolved = target.resolve()
    for other, what in ((base.path, "the base model's folder"), (sidecar.resolve(), "the sidecar's folder")):
        if resolved.is_relative_to(other) or other.is_relative_to(resolved):
            raise RRError(f"the export {target} and {what}, {other}, contain one another", "Choose another --export.")
    if not target.exists():
        return
    if not overwrite:
        raise RRError(f"{target} exists already", "Use --overwrite to replace it.")
    if target.is_dir() and any(target.iterdir()) and not (target / MANIFEST).is_file():
        raise RRError(f"{target} is not an export of 'rr surgery' and is not replaced", "Choose another --export.")


def fill(folder: Path, base: ModelSource, weights: list[Path], sidecar: Path) -> int:
    """Fill `folder` with links to `weights`, the base's other files, and what surgery wrote into `sidecar`.

    Stock `from_pretrained` loads the result as the plain base, `rrcli.load` with the recursion.

    Returns:
        How many weight files had to be copied because they could not be linked.
    """
    copied = sum(not link(file, folder / file.name) for file in weights)
    index = weight_index(base.path)
    for file in sorted(base.path.iterdir()):
        ours = file.name in (MANIFEST, METRICS_FILE, SIDECAR)
        left_behind = file.name.endswith(".index.json") and file != index
        if file.is_file() and file.suffix not in WEIGHTS and not (ours or left_behind or file.name.startswith(".")):
            shutil.copyfile(file, folder / file.name)
    if (base.path / TEMPLATES).is_dir():
        shutil.copytree(base.path / TEMPLATES, folder / TEMPLATES)
    for name in (SIDECAR, METRICS_FILE):
        shutil.copyfile(sidecar / name, folder / name)
    write_json(folder / MANIFEST, read_manifest(sidecar) | {"weights": "own"})
    return copied
