"""Find a model by what the user calls it: `default`, a folder, a `.gguf` file or a hub id. Loads no torch.

A folder that rr wrote has a `recursion.json`, which names the base model or says that the folder has its own weights.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rrcli.demo.defaults import MODEL_DIR
from rrcli.errors import RRError, UsageError, first_line
from rrcli.files import MANIFEST, METRICS_FILE, read_json
from rrcli.models.manifest import compare_hashes, read_manifest
from rrcli.models.weights import SUFFIXES, fingerprint, fingerprint_0_1, refuse_adapter, weight_files, written_since
from rrcli.schemas import Inputs


@dataclass(frozen=True)
class ModelSource:
    """Where a model is.

    Attributes:
        name: what the user called it. path: a folder or a `.gguf` file. hub: whether it was downloaded from the hub.
    """

    name: str
    path: Path
    hub: bool = False

    @property
    def is_gguf(self) -> bool:
        """Whether it is a single GGUF file."""
        return self.path.suffix == ".gguf"

    @property
    def hub_id(self) -> str | None:
        """Its id on the hub, without a revision; None if it is not from there."""
        return self.name.partition("@")[0] if self.hub else None

    @property
    def commit(self) -> str:
        """The hash of the hub's commit that its files are of; '' if it is not from there."""
        return self.path.name if self.hub and self.path.parent.name == "snapshots" else ""

    @property
    def manifest(self) -> dict[str, Any] | None:
        """The manifest, if rr wrote this folder."""
        return read_manifest(self.path) if (self.path / MANIFEST).is_file() else None

    def fingerprint(self) -> str:
        """Return the identity of its weights; see `weights.fingerprint`."""
        return fingerprint(self.path)

    def recorded(self, directory: Path) -> str:
        """Return how files name this model: `default` or a hub id as it is, a path inside `directory` relative to it.

        So a working directory that holds its model can be moved. Other paths are absolute.
        """
        if self.name == "default" or self.hub:
            return self.name
        root = Path(os.path.abspath(directory))
        named = Path(os.path.abspath(root / Path(self.name).expanduser()))  # may be a link to a folder elsewhere
        for path, above in ((named, root), (self.path, root.resolve())):
            if _real(path) == self.path and path.is_relative_to(above):
                return f"./{path.relative_to(above).as_posix()}"
        return str(self.path)

    def from_pretrained_arguments(self) -> dict[str, Any]:
        """Return the first argument and options of every `from_pretrained` for this source."""
        if self.is_gguf:
            return {"pretrained_model_name_or_path": str(self.path.parent), "gguf_file": self.path.name}
        return {"pretrained_model_name_or_path": str(self.path)}


def resolve(name: str, directory: Path) -> ModelSource:
    """Find a model by `default`, path or hub id, and check that its files are complete. Hub models are downloaded.

    Args:
        name: a hub id may name a branch, a tag or a commit: `org/name@revision`.

    Raises:
        UsageError: nothing has that name. RRError: no config, no weights, truncated weights, or no connection.
    """
    if name == "default":
        return ModelSource(name, MODEL_DIR)
    path = Path(name).expanduser()
    path = path if path.is_absolute() else directory / path
    hub = not path.exists()
    if hub:
        hub_id, at, revision = name.partition("@")
        if _looks_like_path(hub_id):
            raise UsageError(f"the model {path} does not exist", "Name a folder, a .gguf file or a hub id.")
        if at and not revision:
            raise UsageError(f"the model {name} names no revision", "Write org/name@branch, @tag or @commit.")
        path = _download(hub_id, revision or None)
    elif not (path / "config.json").exists() and (path / "snapshots").is_dir():
        path = _cached_snapshot(path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise UsageError(f"the model {path} is not a .gguf file", "Name a folder, a .gguf file or a hub id.")
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise RRError(f"{path} is not a GGUF file: it does not start with 'GGUF'", "Download or copy it again.")
    elif not (path / MANIFEST).is_file():
        refuse_adapter(path)
        if not (path / "config.json").is_file():
            raise RRError(f"{path} has no config.json", "A model folder needs config.json and model.safetensors.")
        weight_files(path)
    source = ModelSource(name, _real(path), hub)
    if source.is_gguf or (source.manifest and not source.manifest.get("lora")):
        refuse_adapter(source.path)
    return source


def base_of(source: ModelSource, directory: Path) -> ModelSource:
    """Return the base model that a folder of rr refers to, or `source` itself if it has its own weights.

    Raises:
        RRError: the base is not what it was when the folder was made.
    """
    manifest = source.manifest
    if manifest is None or manifest["weights"] == "own":
        return source
    recorded = manifest["base"]
    if commit := recorded.get("commit"):
        # That commit, wherever its branch has moved to since.
        at_commit = resolve(f"{recorded['source'].partition('@')[0]}@{commit}", directory)
        base = replace(at_commit, name=recorded["source"])
    else:
        base = resolve(recorded["source"], _start_of(recorded["source"], source, directory))
    found = base.fingerprint()
    if found != recorded["fingerprint"] != fingerprint_0_1(base.path):
        raise RRError(
            f"the base model {recorded['source']} changed: {source.path} was made for {recorded['fingerprint']}, "
            f"found {found}",
            "Run 'rr surgery --overwrite' for the changed model, or restore the old one.",
        )
    metrics = source.path / METRICS_FILE
    again = (
        written_since(read_json(metrics, "rr surgery", Inputs).get("stamps"), base.path) if metrics.is_file() else ""
    )
    if again and recorded.get("sha256"):
        compare_hashes(source.path, base.path)
    elif again:
        raise RRError(
            f"{again} was written again after {source.path} was made; a large file is compared by samples, which did "
            "not change",
            "Run 'rr surgery --overwrite' for the changed model. If the file is certainly the same, remove 'stamps' "
            f"from {metrics}. With 'rr surgery --hash' all bytes are compared.",
        )
    return base


def _real(path: Path) -> Path:
    """Return a path without links to folders. A link to a file stays: its target in the hub's cache has no suffix."""
    return path.parent.resolve() / path.name if path.is_file() else path.resolve()


def _start_of(recorded: str, source: ModelSource, directory: Path) -> Path:
    """Return where the path that a manifest names for its base starts: the working directory the folder was made in.

    That is the folder above it in which the path exists; else, as for a folder that lies elsewhere, `directory`.
    """
    if not recorded.startswith("./"):
        return directory
    return next((above for above in source.path.parents if (above / recorded).exists()), directory)


def _cached_snapshot(folder: Path) -> Path:
    """Return the files of a model in the cache of the hub, whose folders are called `models--owner--name`.

    Raises:
        RRError: there is none, or there are several and none of them is the main one.
    """
    main = folder / "refs" / "main"
    revisions = sorted(path.name for path in (folder / "snapshots").iterdir() if path.is_dir())
    revision = main.read_text(encoding="utf-8").strip() if main.is_file() else ""
    if revision not in revisions:
        if len(revisions) != 1:
            what = f"holds {len(revisions)} revisions, none of which is the main one" if revisions else "holds no files"
            raise RRError(f"{folder} is a folder of the hub's cache and {what}", "Name a folder in its 'snapshots'.")
        revision = revisions[0]
    return folder / "snapshots" / revision


def is_hub_id(recorded: str) -> bool:
    """Tell whether what a manifest records is an id of the hub, and neither a path nor the embedded model."""
    return recorded.partition("@")[0].count("/") == 1 and not recorded.startswith((".", "/", "~"))


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(".gguf")


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RevisionNotFoundError

    patterns = [f"*{suffix}" for suffix in (*SUFFIXES, ".safetensors")]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except RevisionNotFoundError as error:
        raise UsageError(
            f"the model '{name}' has no revision '{revision}'", "Name a branch, a tag or a commit, or leave it out."
        ) from error
    except HFValidationError as error:
        raise UsageError(
            f"'{name}' is neither a folder nor a .gguf file nor a hub id", "Check its spelling."
        ) from error
    except Exception as error:
        raise RRError(
            f"the model '{name}' is not a folder, and cannot be downloaded from the hub: {first_line(error)}",
            "Check the name and the connection, log in with 'hf auth login' for gated models, or name a local folder.",
        ) from error
