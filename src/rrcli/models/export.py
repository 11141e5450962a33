"""Make a self-contained folder of a model that rr made, which transformers, lm-eval and peft load by themselves.

    config.json                  the base's; for a recursion `auto_map` names the code of the export
    model*.safetensors           the weights, under their own names
    tokenizer and templates      as they were trained with
    generation_config.json       the base's, with every token that ends a text
    recursion.json, .safetensors what rr made, as in a checkpoint
    adapter/                     adapters that belong to the passes of a recursion; those of a model without one lie in
                                 the folder itself, where transformers adds them to the weights
    modeling_rr.py               a fixed line that imports rrcli (see `models/exported`)
    custom_generate/generate.py  the same, for `generate`
    README.md                    the model card

Weight files are hard links, so the export of a 92 GB model takes no further space. Small files are copies, so that
editing the export does not change the base. Overwriting a linked file would change the base: nothing here does that,
and safetensors (0.8 and later) replaces a file instead of truncating it. Loads no torch.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rrcli.errors import RRError
from rrcli.files import MANIFEST, SIDECAR, link, write_json, write_text
from rrcli.models.manifest import AUTO_CLASS, AUTO_MODEL, MODELLING_CLASS, MODELLING_FILE, base_auto_map, read_manifest
from rrcli.models.source import ModelSource, is_hub_id
from rrcli.models.weights import (
    ADAPTER_CONFIG,
    ADAPTER_FOLDER,
    ADAPTER_WEIGHTS,
    adapter_folder,
    behaviour_files,
    weight_files,
    weight_index,
)

CONFIG, GENERATION_CONFIG, CARD = "config.json", "generation_config.json", "README.md"
GENERATE_FILE = "custom_generate/generate.py"
MODELLING_CODE = f'''"""Loads this model with its recursion. It needs the package rrcli: pip install rrcli"""

from rrcli.models.exported import {MODELLING_CLASS}  # noqa: F401
'''
GENERATE_CODE = '''"""Decodes with the recursion of this model. It needs the package rrcli: pip install rrcli"""

from rrcli.models.exported import generation

generate = generation(__file__)
'''
# Files without which a copy of the base may not be handed on.
TERMS = ("license", "licence", "notice", "use_policy", "copying")
# Of the base's files, those that an export writes itself.
OWN = (CONFIG, GENERATION_CONFIG, MANIFEST, MODELLING_FILE, ADAPTER_CONFIG, f"{ADAPTER_FOLDER}/{ADAPTER_CONFIG}")


@dataclass(frozen=True)
class Content:
    """What an export is made of.

    Attributes:
        base: the folder of the model that was changed: the base, or what rr made itself, where that has all weights.
        weights: the folder of the weights; it is not `base` where they were written for this export.
        made: the folder that `rr surgery` or `rr train` wrote.
        ends: the tokens that end a text. card: the model card, as Markdown.
        hub_base: the base's id on the hub, if it has one. merged: whether the weights hold the adapters.
    """

    base: Path
    weights: Path
    made: Path
    ends: Collection[int]
    card: str
    hub_base: str | None = None
    merged: bool = False


def check_target(target: Path, base: ModelSource, made: Path, *, overwrite: bool) -> None:
    """Refuse, before any work is done, a target that would destroy something.

    Raises:
        RRError: the target exists or was not made by an export; or it is inside the folder of the base model or of what
            rr `made`, or contains it.
    """
    resolved = target.resolve()
    for other, what in ((base.path, "the base model"), (made.resolve(), "the folder that is exported")):
        if resolved.is_relative_to(other) or other.is_relative_to(resolved):
            raise RRError(f"the export {target} and {what}, {other}, contain one another", "Choose another folder.")
    if not target.exists():
        return
    if not overwrite:
        raise RRError(f"{target} exists already", "Use --overwrite to replace it.")
    # A checkpoint has a manifest too, and no card.
    export = all((target / name).is_file() for name in (MANIFEST, CARD))
    if target.is_dir() and any(target.iterdir()) and not export:
        raise RRError(f"{target} is not an export of rr and is not replaced", "Choose another folder.")


def fill(folder: Path, content: Content) -> int:
    """Fill an empty folder with an export.

    Returns:
        How many weight files had to be copied because they could not be linked.

    Raises:
        RRError: a file of the base or of what was made is missing or broken.
    """
    base, made = content.base, content.made
    manifest = read_manifest(made)
    if content.merged:
        manifest["lora"] = False
    copied = sum(not link(file, folder / file.name) for file in weight_files(content.weights))
    if index := weight_index(content.weights):
        shutil.copyfile(index, folder / index.name)
    _copy_small_files(folder, base, made)
    _copy_made(folder, made, manifest, hub_base=content.hub_base)
    config = _json(base / CONFIG)
    if manifest["recursion"]:
        auto_map = base_auto_map(config.get("auto_map") or {}, manifest)
        if AUTO_MODEL in auto_map:
            manifest["base_class"] = auto_map[AUTO_MODEL]
        config["auto_map"] = auto_map | {AUTO_MODEL: AUTO_CLASS}
        write_text(folder / MODELLING_FILE, MODELLING_CODE)
        write_text(folder / GENERATE_FILE, GENERATE_CODE)
    write_json(folder / CONFIG, config)
    if generation := _generation(base, config, content.ends):
        write_json(folder / GENERATION_CONFIG, generation)
    write_text(folder / CARD, content.card)
    manifest["base"] = {name: value for name, value in manifest["base"].items() if name != "sha256"}
    manifest["base"]["source"] = _public_name(manifest["base"]["source"])
    write_json(folder / MANIFEST, manifest | {"weights": "own"})
    return copied


def _copy_small_files(folder: Path, base: Path, made: Path) -> None:
    """Copy what decides what the model does beside its weights, and the terms of the base."""
    terms = [file for file in base.iterdir() if file.is_file() and file.name.lower().startswith(TERMS)]
    for source in (base, made):
        for file in [*behaviour_files(source), *(terms if source == base else [])]:
            name = file.relative_to(source).as_posix()
            if name not in OWN and not name.endswith(".index.json"):
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(file, folder / name)


def _copy_made(folder: Path, made: Path, manifest: dict[str, Any], *, hub_base: str | None) -> None:
    """Copy the sidecar and the adapters."""
    if manifest["recursion"]:
        shutil.copyfile(made / SIDECAR, folder / SIDECAR)
    if not manifest.get("lora"):
        return
    source = adapter_folder(made)
    target = folder / ADAPTER_FOLDER if manifest["recursion"] else folder
    target.mkdir(exist_ok=True)
    shutil.copyfile(source / ADAPTER_WEIGHTS, target / ADAPTER_WEIGHTS)
    # A path of this machine says nothing elsewhere; a plain name would be looked for on the hub.
    write_json(target / ADAPTER_CONFIG, _json(source / ADAPTER_CONFIG) | {"base_model_name_or_path": hub_base})


def _generation(base: Path, config: dict[str, Any], ends: Collection[int]) -> dict[str, Any]:
    """Return the base's settings of `generate`, with all tokens that end a text; where it has none, what these need."""
    own = _json(base / GENERATION_CONFIG) if (base / GENERATION_CONFIG).is_file() else {}
    if not ends:
        return own
    if not own:
        own = {name: config[name] for name in ("bos_token_id", "pad_token_id") if config.get(name) is not None}
    return own | {"eos_token_id": sorted(ends)}


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RRError(f"cannot read {file}: {error}", "Download or copy the model again.") from error
    if not isinstance(found, dict):
        raise RRError(f"{file} holds no JSON object", "Download or copy the model again.")
    return found


def _public_name(recorded: str) -> str:
    """Return how an export names its base: a hub id as it is, and of a path the last part alone."""
    return recorded if is_hub_id(recorded) else Path(recorded).name
