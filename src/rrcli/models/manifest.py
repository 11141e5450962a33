"""Read and check `recursion.json`, the manifest of a model folder that rr wrote. Loads no torch.

key        value
schema     the version of this table
base       source (path, hub id or `default`), fingerprint; sha256 (file -> digest) where `rr surgery --hash` wrote it;
           commit where it is from the hub: the one that was taken, wherever its branch moves to
weights    "base": the folder refers to its base model; "own": it has all weights itself
recursion  the recursion's configuration, or null
lora       whether the folder has adapters of peft; false where the key is missing
exit       the exit rule that was chosen for it (rule, threshold); every pass is run where the key is missing
base_class in an export of a model that brings its own code: its class, as `auto_map` of its config.json named it
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from rrcli.errors import RRError, UsageError, suggest
from rrcli.files import MANIFEST, METRICS_FILE, read_json, sha256, write_json
from rrcli.models.weights import weight_files
from rrcli.recursion.config import RecursionConfig
from rrcli.recursion.exits import ExitRule
from rrcli.schemas import Base, CheckpointMetrics, ChosenExit, ExitChoice, Manifest

# The code in an export that transformers runs, with `trust_remote_code`, to attach the recursion.
MODELLING_FILE, MODELLING_CLASS = "modeling_rr.py", "RecursiveForCausalLM"
AUTO_MODEL, AUTO_CLASS = "AutoModelForCausalLM", f"{MODELLING_FILE.removesuffix('.py')}.{MODELLING_CLASS}"

HINT = "Make the folder again with 'rr surgery' or 'rr train', or read it with the version of rr that wrote it."


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read and check the manifest of a folder.

    Raises:
        RRError: it is missing or cut off, lacks a key, or has an unknown key or an invalid value.
    """
    path = folder / MANIFEST
    manifest = read_json(path, "rr surgery", Manifest)
    for place, value, kind in (("", manifest, Manifest), ("base", manifest["base"], Base)):
        _refuse_unknown(path, place, value, known=kind.__annotations__)
    if manifest["recursion"] is not None:
        known = [field.name for field in fields(RecursionConfig)]
        _refuse_unknown(path, "recursion", manifest["recursion"], known=known)
        try:
            RecursionConfig.from_dict(dict(manifest["recursion"]))
        except UsageError as error:
            raise RRError(f"{path} holds no recursion: {error}", HINT) from error
    if "exit" in manifest:
        _refuse_unknown(path, "exit", manifest["exit"], known=ChosenExit.__annotations__)
        try:
            ExitRule.from_dict(dict(manifest["exit"]))
        except UsageError as error:
            raise RRError(f"{path} holds no exit rule: {error}", HINT) from error
    return dict(manifest)


def base_auto_map(auto_map: Mapping[str, str], manifest: Mapping[str, Any] | None) -> dict[str, str]:
    """Return `auto_map` of a configuration without the code of an export: with the class of its base, if that has one.

    So a loader that attaches the recursion itself gets the base model from transformers.
    """
    if auto_map.get(AUTO_MODEL) != AUTO_CLASS:
        return dict(auto_map)
    own = (manifest or {}).get("base_class")
    return {name: value for name, value in auto_map.items() if name != AUTO_MODEL} | ({AUTO_MODEL: own} if own else {})


def write_exit(folder: Path, choice: ExitChoice | None) -> None:
    """Write the exit that was chosen for a model, in place of an earlier one; None removes it.

    The rule goes into the manifest, and then, as a mark that this was done, the whole choice into `metrics.json`, if
    there is one.
    """
    manifest, metrics = read_manifest(folder), folder / METRICS_FILE
    manifest.pop("exit", None)
    chosen = choice["chosen"] if choice is not None else None
    write_json(folder / MANIFEST, manifest | ({} if chosen is None else {"exit": chosen}))
    if metrics.is_file():
        about = dict(read_json(metrics, "rr train", CheckpointMetrics))
        about.pop("exit", None)
        write_json(metrics, about | ({} if choice is None else {"exit": choice}))


def compare_hashes(folder: Path, base: Path) -> None:
    """Compute the hashes of the weight files of `base`, and compare them with those in the manifest of `folder`.

    Raises:
        RRError: no hashes were recorded, or a file has another hash.
    """
    recorded = read_manifest(folder)["base"].get("sha256") if (folder / MANIFEST).is_file() else None
    if not recorded:
        raise RRError(f"{folder} records no hashes of its base", "'rr surgery --hash' records them.")
    for file in weight_files(base):
        found = sha256(file, lambda _: None)
        if found != recorded.get(file.name):
            raise RRError(
                f"{file} changed: its SHA-256 was {recorded.get(file.name)}, found {found}",
                "Run 'rr surgery --overwrite' for the changed model, or restore the old one.",
            )


def _refuse_unknown(path: Path, place: str, value: Iterable[str], *, known: Iterable[str]) -> None:
    where = f"{path}, under '{place}'," if place else f"{path}"
    for key in value:
        if key not in known:
            raise RRError(f"{where} holds the unknown key '{key}'", f"{suggest(key, known)} {HINT}")
