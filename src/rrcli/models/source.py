"""Find a model by what the user calls it: `default`, a folder, a `.gguf` file or a hub id. Loads no torch.

A folder that rr wrote has a `recursion.json`, which names the base model or says that the folder has its own weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rrcli.demo.defaults import MODEL_DIR
from rrcli.errors import RRError, UsageError, first_line
from rrcli.files import MANIFEST, fingerprint, weight_files
from rrcli.models.manifest import read_manifest


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
    def manifest(self) -> dict[str, Any] | None:
        """The manifest, if rr wrote this folder."""
        return read_manifest(self.path) if (self.path / MANIFEST).is_file() else None

    def fingerprint(self) -> str:
        """Return the identity of its weights; see `files.fingerprint`."""
        return fingerprint(self.path)

    def from_pretrained_arguments(self) -> dict[str, Any]:
        """Return the first argument and options of every `from_pretrained` for this source."""
        if self.is_gguf:
            return {"pretrained_model_name_or_path": str(self.path.parent), "gguf_file": self.path.name}
        return {"pretrained_model_name_or_path": str(self.path)}


def resolve(name: str, directory: Path) -> ModelSource:
    """Find a model by `default`, path or hub id, and check that its files are complete. Hub models are downloaded.

    Raises:
        UsageError: nothing has that name. RRError: no config, no weights, truncated weights, or no connection.
    """
    if name == "default":
        return ModelSource(name, MODEL_DIR)
    path = Path(name).expanduser()
    path = path if path.is_absolute() else directory / path
    hub = not path.exists()
    if hub:
        if _looks_like_path(name):
            raise UsageError(f"the model {path} does not exist", "Name a folder, a .gguf file or a hub id.")
        path = _download(name)
    if path.is_file():
        if path.suffix != ".gguf":
            raise UsageError(f"the model {path} is not a .gguf file", "Name a folder, a .gguf file or a hub id.")
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise RRError(f"{path} is not a GGUF file: it does not start with 'GGUF'", "Download or copy it again.")
    elif not (path / MANIFEST).is_file():
        if not (path / "config.json").is_file():
            raise RRError(f"{path} has no config.json", "A model folder needs config.json and model*.safetensors.")
        weight_files(path)
    return ModelSource(name, path.resolve(), hub)


def base_of(source: ModelSource, directory: Path) -> ModelSource:
    """Return the base model that a folder of rr refers to, or `source` itself if it has its own weights.

    Raises:
        RRError: the base is not what it was when the folder was made.
    """
    manifest = source.manifest
    if manifest is None or manifest["weights"] == "own":
        return source
    recorded = manifest["base"]
    base = resolve(recorded["source"], directory)
    found = base.fingerprint()
    if found != recorded["fingerprint"]:
        raise RRError(
            f"the base model {recorded['source']} changed: {source.path} was made for {recorded['fingerprint']}, "
            f"found {found}",
            "Run 'rr surgery --overwrite' for the changed model, or restore the old one.",
        )
    return base


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(".gguf")


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except HFValidationError as error:
        raise UsageError(
            f"'{name}' is neither a folder nor a .gguf file nor a hub id", "Check its spelling."
        ) from error
    except Exception as error:
        raise RRError(
            f"the model '{name}' is not a folder, and cannot be downloaded from the hub: {first_line(error)}",
            "Check the name and the connection, log in with 'hf auth login' for gated models, or name a local folder.",
        ) from error
