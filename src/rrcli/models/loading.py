"""Models on disk and in memory: finding a base model, loading what a folder describes, saving a sidecar.

A folder of ours holds `recursion.json`, which names the base model (or says that the folder carries its own weights)
and the recursion. Everything else is loaded as a plain base model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rrcli import demo
from rrcli.errors import RRError, UsageError
from rrcli.files import MANIFEST, SCHEMA, SIDECAR, fingerprint, weight_files, write_json
from rrcli.models.manifest import compare_hashes, read_manifest
from rrcli.recursion.config import RecursionConfig
from rrcli.settings import CommonSettings


@dataclass(frozen=True)
class ModelSource:
    """Where a model lies. `name` is what the user called it; `path` a folder, or a `.gguf` file; `hub`: downloaded."""

    name: str
    path: Path
    hub: bool = False

    @property
    def is_gguf(self) -> bool:
        """Whether it is a single GGUF file."""
        return self.path.suffix == ".gguf"

    @property
    def manifest(self) -> dict[str, Any] | None:
        """The manifest, if this is a folder of ours."""
        return read_manifest(self.path) if (self.path / MANIFEST).is_file() else None

    def fingerprint(self) -> str:
        """Return the identity of its weights; see `store.fingerprint`."""
        return fingerprint(self.path)

    def from_pretrained_arguments(self) -> dict[str, Any]:
        """Return the first argument and options of every `from_pretrained` for this source."""
        if self.is_gguf:
            return {"pretrained_model_name_or_path": str(self.path.parent), "gguf_file": self.path.name}
        return {"pretrained_model_name_or_path": str(self.path)}


def resolve(name: str, directory: Path) -> ModelSource:
    """Find a model by `default`, path or hub id, and check that its files are whole. Hub models are downloaded.

    Raises:
        UsageError: nothing of that name. RRError: no config, no weights, truncated weights, or no connection.
    """
    if name == "default":
        return ModelSource(name, demo.MODEL_DIR)
    path = Path(name).expanduser()
    path = path if path.is_absolute() else directory / path
    hub = not path.exists()
    if hub:
        if _looks_like_path(name):
            raise UsageError(f"the model {path} does not exist", "Name a folder, a .gguf file or a hub id.")
        path = _download(name)
    if path.is_file():
        if path.suffix != ".gguf":
            raise UsageError(f"the model {path} is no .gguf file", "Name a folder, a .gguf file or a hub id.")
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise RRError(f"{path} is no GGUF file: it does not start with 'GGUF'", "Download or copy it again.")
    elif not (path / MANIFEST).is_file():
        if not (path / "config.json").is_file():
            raise RRError(f"{path} holds no config.json", "A model folder needs config.json and model*.safetensors.")
        weight_files(path)
    return ModelSource(name, path.resolve(), hub)


def base_of(source: ModelSource, directory: Path) -> ModelSource:
    """Return the base model that a folder of ours refers to, or `source` itself where it carries its own weights.

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
            "Run 'rr surgery --overwrite' for the changed model, or bring the old one back.",
        )
    return base


def load_tokenizer(source: ModelSource, *, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer that lies beside a model.

    Raises:
        RRError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    _quiet()
    try:
        return AutoTokenizer.from_pretrained(**source.from_pretrained_arguments(), trust_remote_code=trust_remote_code)
    except Exception as error:
        raise _unreadable(source, "tokenizer", error) from error


def load_config(source: ModelSource, *, trust_remote_code: bool = False) -> Any:
    """Load a model's configuration.

    Raises:
        RRError: it cannot be read, or its code would have to be trusted.
    """
    from transformers import AutoConfig

    _quiet()
    try:
        return AutoConfig.from_pretrained(**source.from_pretrained_arguments(), trust_remote_code=trust_remote_code)
    except Exception as error:
        raise _unreadable(source, "configuration", error) from error


def load(
    path: str | Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    directory: Path | None = None,
    check_hashes: bool = False,
) -> tuple[Any, Any]:
    """Load a model and its tokenizer: a base model, or a folder that `rr surgery` or `rr train` wrote.

    A recursion is attached and reachable as `model.recursion`, at its full depth; adapters as `model.lora`.

    Args:
        path: 'default', a hub id, a folder or a `.gguf` file.
        dtype: auto (as stored; on a CPU always float32), float32, bfloat16 or float16.
        device: auto (cuda, then mps, then cpu), or a torch device.
        directory: what relative paths are relative to; the current folder if not given.
        check_hashes: read the base's weight files whole and compare them with what `rr surgery --hash` recorded.

    Returns:
        (model in evaluation mode, tokenizer).

    Raises:
        RRError: missing or broken files, a base that changed, weights that would be newly initialised.
    """
    import torch

    from rrcli.upstream import translate

    directory = directory or Path.cwd()
    source = resolve(str(path), directory)
    base = base_of(source, directory)
    manifest = source.manifest
    if check_hashes:
        compare_hashes(source.path, base.path)
    device = pick_device(device)
    model = _load_weights(base, pick_dtype(dtype, device), trust_remote_code).to(torch.device(device)).eval()
    translate(model)
    carries_tokenizer = source.path.is_dir() and (source.path / "tokenizer_config.json").exists()
    tokenizer = load_tokenizer(source if carries_tokenizer else base, trust_remote_code=trust_remote_code)
    if manifest and manifest["recursion"]:
        load_sidecar(model, source.path, RecursionConfig.from_dict(manifest["recursion"]))
    if manifest and manifest.get("lora"):
        from rrcli.recursion.lora import load_lora

        load_lora(model, source.path).model.eval()
    return model, tokenizer


def load_for(settings: CommonSettings, source: ModelSource, directory: Path) -> tuple[Any, Any]:
    """Load `source` with the device, dtype and trust of the settings."""
    return load(
        source.path if source.name != "default" else "default",
        dtype=settings.dtype,
        device=settings.device,
        trust_remote_code=settings.trust_remote_code,
        directory=directory,
    )


def load_sidecar(model: Any, folder: Path, config: RecursionConfig) -> Any:
    """Attach the recursion whose weights lie in `folder`.

    Raises:
        RRError: the file is broken, or its tensors are not those of the configuration.
    """
    from safetensors.torch import load_file

    from rrcli.files import safetensors_header
    from rrcli.recursion.engine import attach

    safetensors_header(folder / SIDECAR)
    recursion = attach(model, config)
    try:
        recursion.load_state_dict(load_file(folder / SIDECAR))
    except RuntimeError as error:
        raise RRError(f"{folder / SIDECAR} does not fit its {MANIFEST}: {error}", "Run 'rr surgery' again.") from error
    return recursion


def save_folder(
    folder: Path,
    model: Any,
    tokenizer: Any,
    base: ModelSource,
    base_fingerprint: str,
    *,
    own_weights: bool,
    hashes: Mapping[str, str] | None = None,
    states: tuple[Mapping[str, Any], ...] | None = None,
) -> None:
    """Write a model's sidecar, adapters, weights (if its own), tokenizer and, last, the manifest into `folder`.

    Args:
        hashes: file -> SHA-256 of the base's weight files, recorded where it is given.
        states: what to write in place of the model's and the sidecar's own weights, of which this process has a part.
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


def pick_device(device: str) -> str:
    """Resolve `auto` to the best device there is.

    Raises:
        UsageError: a device that torch does not know or that is not there.
    """
    import torch

    if device == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device '{device}' is not to be had: {str(error).splitlines()[0]}", "Try 'auto'.") from error
    return device


def pick_dtype(dtype: str, device: str) -> Any:
    """Resolve `auto`: float32 on a CPU, where it is fastest and exact, else as stored ("auto" of transformers)."""
    import torch

    if dtype == "auto":
        return torch.float32 if device == "cpu" else "auto"
    return getattr(torch, dtype)


def _load_weights(source: ModelSource, dtype: Any, trust_remote_code: bool) -> Any:
    from transformers import AutoModelForCausalLM

    _quiet()
    weight_files(source.path)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            **source.from_pretrained_arguments(),
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:
        raise _unreadable(source, "weights", error) from error
    model, info = loaded
    absent = sorted(info["missing_keys"])
    if absent:
        raise RRError(
            f"{source.path} lacks {len(absent)} tensors, among them {absent[0]}; they would be random",
            "Download or copy the model again.",
        )
    return model


def _recorded(base: ModelSource) -> str:
    """Return how a manifest names its base: hub ids and `default` as they are, paths made absolute."""
    return base.name if base.name == "default" or base.hub else str(base.path)


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(".gguf")


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except HFValidationError as error:
        raise UsageError(f"'{name}' is no folder, no .gguf file and no hub id", "Check its spelling.") from error
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RRError(
            f"the model '{name}' is no folder here and cannot be had from the hub: {first}",
            "Check the name and the connection, log in with 'hf auth login' for gated models, or name a local folder.",
        ) from error


def _unreadable(source: ModelSource, what: str, error: Exception) -> RRError:
    if isinstance(error, RRError):
        return error
    message = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    hint = ""
    if "trust_remote_code" in str(error):
        hint = "This model brings its own code; read it, then pass --trust-remote-code."
    return RRError(f"cannot read the {what} of {source.path}: {message}", hint)


def _quiet() -> None:
    """Keep transformers' bars and notices off the screen; what matters is reported by us."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
