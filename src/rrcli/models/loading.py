"""Load a model from its source: weights, tokenizer and configuration; for a folder of rr also sidecar and adapters."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rrcli.errors import RRError, UsageError, first_line
from rrcli.files import MANIFEST, SIDECAR, safetensors_header
from rrcli.models.config import load_config, quiet, unreadable
from rrcli.models.fitting import arrangement, expanded, gib, refuse_misfit, surely_fits, where_layers_lie
from rrcli.models.inspection import inspect_weights
from rrcli.models.manifest import MODELLING_FILE, compare_hashes
from rrcli.models.placement import Parallel, Placement, read_placement
from rrcli.models.quantisation import NONE, refuse, stored_format
from rrcli.models.source import ModelSource, base_of, resolve
from rrcli.models.weights import adapter_folder, weight_files
from rrcli.recursion.config import RecursionConfig
from rrcli.recursion.exits import ExitRule
from rrcli.reporting import Reporter
from rrcli.settings import CommonSettings, TrainSettings

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
    placement: Placement | None = None,
    trains: bool = False,
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
        placement: where the weights lie; by default on the device if they fit there, else also on others and on disk.
        trains: whether all weights will train, which takes more memory.

    Returns:
        (model in evaluation mode, tokenizer).

    Raises:
        RRError: missing or broken files, a base that changed, weights that would be newly initialised, or that do not
            fit. UsageError: a device that is not there.
    """
    from rrcli.upstream import translate

    directory = directory or Path.cwd()
    source = resolve(str(path), directory)
    base = base_of(source, directory)
    manifest = source.manifest
    if check_hashes:
        compare_hashes(source.path, base.path)
    device = pick_device(device)
    placement = placement or Placement()
    number_format = pick_dtype(dtype, device)
    cut = placement.parallel is not None and placement.parallel.cuts
    refuse(base, placement.quantize, trains=trains, cut=cut)

    def shapes() -> Any:
        return _shapes(base, placement, device, number_format, trust_remote_code)

    if not surely_fits(base, placement, device, dtype=number_format, trains=trains, skeleton=shapes):
        config = RecursionConfig.from_dict(manifest["recursion"]) if manifest and manifest["recursion"] else None
        refuse_misfit(
            base, shapes, placement, device, config=config or RecursionConfig(), trains=trains,
        )  # fmt: skip
    model = _placed(
        base, placement, device, dtype=number_format, trust_remote_code=trust_remote_code, trains=trains, shapes=shapes
    )
    translate(model)
    carries_tokenizer = source.path.is_dir() and (source.path / "tokenizer_config.json").exists()
    tokenizer = load_tokenizer(source if carries_tokenizer else base, trust_remote_code=trust_remote_code)
    if manifest:
        equip(model, source.path, manifest)
    return model, tokenizer


def equip(model: Any, folder: Path, manifest: dict[str, Any]) -> None:
    """Attach the recursion and the adapters in a folder of rr to its base model, with the exit that was chosen.

    Raises:
        RRError: a file is missing or broken, or does not fit the model.
    """
    if manifest["recursion"]:
        recursion = load_sidecar(model, folder, RecursionConfig.from_dict(manifest["recursion"]))
        recursion.exit = ExitRule.from_dict(manifest["exit"]) if "exit" in manifest else None
    if manifest.get("lora"):
        from rrcli.recursion.lora import load_lora

        load_lora(model, adapter_folder(folder)).model.eval()


def load_for(
    settings: CommonSettings, source: ModelSource, directory: Path, reporter: Reporter | None = None
) -> tuple[Any, Any]:
    """Load `source` with the placement, device, dtype and trust of the settings; say where the layers lie if it is not
    on one device.
    """
    model, tokenizer = load(
        source.path if source.name != "default" else "default",
        dtype=settings.dtype,
        device=settings.device,
        trust_remote_code=settings.trust_remote_code,
        directory=directory,
        placement=read_placement(settings, directory),
        trains=isinstance(settings, TrainSettings) and settings.phase == "c",
    )
    from rrcli.recursion.families import find_layout, is_spread

    if reporter is not None and is_spread(model):
        lie = where_layers_lie(model, find_layout(model)[0].layers)
        away = sum(weight.numel() * weight.element_size() for weight in model.parameters() if weight.is_meta)
        brought = f"; each batch and each new token brings {gib(away)} of them to where they run" if away else ""
        reporter.note(f"the weights do not lie on one device: {lie}{brought}")
    return model, tokenizer


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

    quiet()
    try:
        found = AutoTokenizer.from_pretrained(**source.from_pretrained_arguments(), trust_remote_code=trust_remote_code)
        _try_out(found)
    except BaseException as error:
        # A panic in the Rust code of the library is no `Exception`.
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise unreadable(source, "tokenizer", error) from error
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


def _placed(
    source: ModelSource, placement: Placement, device: str, *, dtype: Any, trust_remote_code: bool, trains: bool,
    shapes: Callable[[], Any],
) -> Any:  # fmt: skip
    """Read the weights of a model to where they are to lie, and return it in evaluation mode.

    Args:
        shapes: makes its skeleton.
    """
    import torch

    from rrcli.upstream import left_in_files

    if placement.quantize != NONE or stored_format(source):
        options = _where(source, placement, device, dtype=dtype, shapes=shapes) or {"device_map": {"": device}}
        return _quantised(source, placement.quantize, dtype, trust_remote_code=trust_remote_code, options=options)
    if placement.parallel is not None and (placement.parallel.cuts or trains):
        return _in_parts(source, placement.parallel, dtype, trust_remote_code=trust_remote_code, trains=trains)
    options = _where(source, placement, device, dtype=dtype, shapes=shapes)
    if not options:
        return _read_weights(source, dtype, trust_remote_code).to(torch.device(device)).eval()
    # The few weights that can't be read from the model's own files each time are written here. Not among the system's
    # temporary files, which often lie in memory.
    folder = tempfile.TemporaryDirectory(prefix=".rr-offload-", dir=Path.cwd(), ignore_cleanup_errors=True)
    with left_in_files():
        model = _read_weights(source, dtype, trust_remote_code, **options, offload_folder=folder.name).eval()
    model.__dict__["offload_folder"] = folder  # which is removed with the model
    return model


def _where(
    source: ModelSource, placement: Placement, device: str, *, dtype: Any, shapes: Callable[[], Any]
) -> dict[str, Any]:
    """Return the options with which the weights are laid over devices; none where one device has all."""
    options = arrangement(source, placement, device, dtype=dtype, skeleton=shapes)
    if isinstance(placement.device_map, dict):
        options["device_map"] = expanded(options["device_map"], shapes())
    return options


def _quantised(
    source: ModelSource, quantize: str, dtype: Any, *, trust_remote_code: bool, options: dict[str, Any]
) -> Any:
    """Read a quantised base, or quantise it while it is read.

    Args:
        options: where its weights are to lie.

    Raises:
        UsageError: bitsandbytes is not installed. RRError: what the format needs is not there.
    """
    from rrcli.models.quantisation import configuration
    from rrcli.upstream import unpack_compressed, without_inference_kernels

    if quantize != NONE:
        options["quantization_config"] = configuration(quantize, dtype)
    model = _read_weights(source, dtype, trust_remote_code, **options)
    without_inference_kernels(model)
    unpack_compressed(model)
    return model.eval()


def _in_parts(source: ModelSource, parallel: Parallel, dtype: Any, *, trust_remote_code: bool, trains: bool) -> Any:
    """Read this process's part of the weights.

    Raises:
        UsageError: a GGUF file, or a family that cannot be cut as it is asked for.
    """
    from rrcli import upstream
    from rrcli.models.shares import obstacle
    from rrcli.recursion import parts
    from rrcli.recursion.families import find_layout

    if source.is_gguf:
        raise UsageError(
            f"{source.path} is a GGUF file, which cannot be read in parts", "Take a folder of safetensors."
        )
    shapes = _skeleton(source, dtype, trust_remote_code)
    if (found := obstacle(shapes, parallel)) is not None:
        reason, instead = found
        raise UsageError(f"--parallel {parallel} cannot be used: {reason}", f"Take --parallel {instead}.")
    layers = find_layout(shapes)[0].layers
    whole = [
        name
        for name, module in shapes.named_modules()
        if not f"{name}.".startswith(f"{layers}.") and next(module.parameters(recurse=False), None) is not None
    ]
    names = {module: name for name, module in shapes.named_modules()}
    ends = [names[module] for module in (shapes.get_input_embeddings(), shapes.get_output_embeddings())]
    config = upstream.distributed_config(asdict(parallel), layers=layers, whole=whole, ends=ends)
    with upstream.fused_before_cut():
        model = _read_weights(source, dtype, trust_remote_code, distributed_config=config)
    upstream.fill_buffers(model, shapes.config, trust_remote_code=trust_remote_code)
    parts.mark(model, whole)
    model.requires_grad_(trains)
    if trains:
        parts.hold_masters(model)
    parts.settle(model, trains=trains)
    return model.eval()


def _shapes(source: ModelSource, placement: Placement, device: str, dtype: Any, trust_remote_code: bool) -> Any:
    """Return a model's skeleton with what its weights take as they are placed."""
    from rrcli.models.devices import computes_fp8
    from rrcli.models.few_bits import hold

    return hold(_skeleton(source, dtype, trust_remote_code), source, placement.quantize, fp8=computes_fp8(device))


def _skeleton(source: ModelSource, dtype: Any, trust_remote_code: bool) -> Any:
    from rrcli.models.skeleton import skeleton

    name = "auto" if dtype == "auto" else str(dtype).removeprefix("torch.")
    settings = CommonSettings(dtype=name, trust_remote_code=trust_remote_code)
    return skeleton(settings, source, inspect_weights(source.path).dtype)


def _read_weights(source: ModelSource, dtype: Any, trust_remote_code: bool, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    quiet()
    weight_files(source.path)
    if (source.path / MODELLING_FILE).is_file():  # an export: its recursion is attached here, not by its own code
        options["config"] = load_config(source, trust_remote_code=trust_remote_code)
    if source.manifest:  # its adapters too: transformers looks for some in this folder, which is not there
        options["adapter_kwargs"] = {"subfolder": "none"}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            **source.from_pretrained_arguments(),
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except Exception as error:
        raise unreadable(source, "weights", error) from error
    model, info = loaded
    absent = sorted(info["missing_keys"])
    if absent:
        raise RRError(
            f"{source.path} lacks {len(absent)} tensors, among them {absent[0]}; they would be random",
            "Download or copy the model again.",
        )
    if source.manifest:
        # Where an export was loaded by transformers before in this process, and its base brings its own code, the code
        # of the export has done its work here too.
        vars(model).pop("generate", None)
        if "recursion" in vars(model):
            model.recursion.detach()
    return model
