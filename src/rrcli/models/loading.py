"""Load a model from its source: weights, tokenizer and configuration; for a folder of rr also sidecar and adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rrcli.errors import RRError, UsageError, first_line
from rrcli.files import MANIFEST, SIDECAR, safetensors_header
from rrcli.models.manifest import compare_hashes
from rrcli.models.source import ModelSource, base_of, resolve
from rrcli.models.weights import weight_files
from rrcli.recursion.config import RecursionConfig
from rrcli.recursion.exits import ExitRule
from rrcli.settings import CommonSettings

# What a tokenizer is tried on: words, digits, blanks, letters of other scripts, and no text at all.
TRIED_TEXTS = ("Question: 2 + 3 =\nAnswer: five, it's 5.", "\t naïve 東京 🙂", "")


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
        directory: where relative paths start; the current folder if not given.
        check_hashes: compute the hashes of the base's weight files, and compare them with those recorded by
            `rr surgery --hash`.

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
        recursion = load_sidecar(model, source.path, RecursionConfig.from_dict(manifest["recursion"]))
        recursion.exit = ExitRule.from_dict(manifest["exit"]) if "exit" in manifest else None
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
    """Attach the recursion whose weights are in `folder`.

    Raises:
        RRError: the file is broken, or its tensors do not match the configuration.
    """
    from rrcli.recursion.engine import attach

    tensors = read_tensors(folder / SIDECAR, "Run 'rr surgery' again.")
    recursion = attach(model, config)
    try:
        recursion.load_state_dict(tensors)
    except RuntimeError as error:
        raise RRError(f"{folder / SIDECAR} does not fit its {MANIFEST}: {error}", "Run 'rr surgery' again.") from error
    return recursion


def read_tensors(path: Path, hint: str) -> dict[str, Any]:
    """Return the tensors in a safetensors file.

    Raises:
        RRError: the file is missing, truncated or damaged; with this hint.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    safetensors_header(path)
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise RRError(f"cannot read {path}: {first_line(error)}", hint) from error


def load_tokenizer(source: ModelSource, *, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer in the folder of a model, and try it: a broken file is often found only in use.

    Raises:
        RRError: there is none, it cannot be read, or it fails on a short text.
    """
    from transformers import AutoTokenizer

    _quiet()
    try:
        found = AutoTokenizer.from_pretrained(**source.from_pretrained_arguments(), trust_remote_code=trust_remote_code)
        _try_out(found)
    except BaseException as error:
        # A panic in the Rust code of the library is no `Exception`.
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise _unreadable(source, "tokenizer", error) from error
        raise
    return found


def _try_out(tokenizer: Any) -> None:
    """Encode and decode short texts, and raise what is raised; a tokenizer may refuse words that it has no id for."""
    for text in TRIED_TEXTS:
        try:
            ids = tokenizer(text)["input_ids"]
        except Exception as error:
            if type(error) is not Exception:  # what the library refuses has no kind of its own
                raise
        else:
            tokenizer.decode(ids)


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


def pick_device(device: str) -> str:
    """Resolve `auto` to the best available device.

    Raises:
        UsageError: torch does not know the device, or it is not available.
    """
    import torch

    if device == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device '{device}' is not available: {first_line(error)}", "Try 'auto'.") from error
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


def _unreadable(source: ModelSource, what: str, error: BaseException) -> RRError:
    if isinstance(error, RRError):
        return error
    hint = ""
    if "trust_remote_code" in str(error):
        hint = "This model brings its own code; read it, then pass --trust-remote-code."
    return RRError(f"cannot read the {what} of {source.path}: {first_line(error)}", hint)


def _quiet() -> None:
    """Switch off the progress bars and notices of transformers; rr reports what matters itself."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
