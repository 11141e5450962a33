"""All use of what other packages do not document, and may rename or remove in their next release.

Everywhere else `rrcli` calls what its dependencies document. What it needs beyond that is here, one function for each
need. It is found by signature, type or trial, never by a version number. What happens where it is not found:

    needed for                                    rests on                                   without it
    the name a model takes its cache under        signatures, annotations of `Cache`         RRError
    the cache in what a model returns             the type of a value, not its name          None: callers do without
    remote code that names its cache otherwise    `generate` hands its cache on by keyword   nothing to translate
    what a cache layer holds                      attributes of transformers' layer classes  the tensors in it
    passes that leave recorded outputs alone      transformers' `_active_collector`          RRError where asked for
    decoding token by token inside `generate`     `GenerationMixin._sample`                  RRError
    which generation settings change nothing      `_get_default_generation_params`           all are taken to change
    adapters that are on for one pass             peft's `_disable_adapters`                 the public switch, slower
    adapters on when a checkpoint is recomputed   `_gradient_checkpointing_func` of layers   RRError
    leaving a process group, to join another      accelerate's `PartialState._reset_state`   one training a process
    products of rows on a CPU by oneDNN           torch's `mkldnn._linear_pointwise`         torch's own product
    telling that no C++ compiler works            `torch._inductor.cpp_builder`              torch's own error, later
    running a mixture of experts on shapes alone  `_experts_implementation` of a config      costs are not shown
    what experts hold, on shapes alone            `_grouped_mm`, its fallback operators      a higher estimate
    what is cut among processes                   plans of a config and a model              nothing is
    telling storages on the meta device apart     `_cdata` of a storage                      rr plan does not work
    attention on shapes that keeps no scores      torch's flash operator for a CPU           a higher estimate
    FLOPs of torch's operators                    `torch.utils.flop_counter.flop_registry`   operators are uncounted
    seeing every operator that runs               `torch.utils._python_dispatch`             rr does not start
    what an operator of torch fills               `_schema` of an operator                   all that it is given
    estimating what scoring takes in memory       `_attn_implementation` of a config         a lower estimate
    hyper-parameters inside a run                 `torch.utils.tensorboard.summary.hparams`  they are not logged
    an event file that may fail                   the file of TensorBoard's writer           the command ends with it
    weights that are read in parts                transformers' `DistributedConfig`            RRError
    fused weights that are read in parts          transformers' loader of weights              RRError
    weights on disk that are not copied there     the same; `weights_map` of accelerate        they are copied to disk
    code that comes with a model's folder         `get_class_from_dynamic_module`            RRError
    a server that has one model alone             `ModelManager` of `transformers serve`     RRError
    a GGUF model that can be saved                `hf_quantizer`, `quantization_config`      transformers' own error
    gradients through 4 bits on a CPU             a switch of bitsandbytes' `Linear4bit`     rr train refuses
    which matrices bitsandbytes quantises         `get_keys_to_not_convert` of transformers  rr plan does not work
    weights of compressed-tensors as floats       `ct_decompress_hook` and the compressor    unpacked when first used
    reading back what was saved                   `_keys_to_ignore_on_save` of a model       RRError if it has any

The versions that this was tested with are in pyproject.toml; `untested` compares them with what is installed.
`patched` is here because other packages replace the same attributes.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
import platform
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import Any

import torch
from packaging.requirements import Requirement
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from rrcli.allocator import return_freed_memory
from rrcli.errors import RRError

# The class of what sees every operator that torch runs.
DispatchMode = TorchDispatchMode

# Of weights on disk, so many bytes are brought before freed memory is given back to the system.
TRIMMED_AFTER = 2**26
# Packages whose internals are used here; in pyproject.toml their tested ranges have an upper end.
WATCHED = ("transformers", "peft", "accelerate", "torch", "tensorboard")


# -- other people's objects --------------------------------------------------------------------------------------------


@contextmanager
def patched(target: Any, **attributes: Any) -> Iterator[None]:
    """While it is entered, `target` has these instance attributes, which hide attributes of its class.

    This is how a module's `forward` is replaced for a while. Other packages put a `forward` on an instance too
    (accelerate, torch.compile), so instance attributes that were there before are put back at the end.
    """
    own = vars(target)
    before = {name: own[name] for name in attributes if name in own}
    own.update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            own.pop(name, None)
        own.update(before)


# -- versions ----------------------------------------------------------------------------------------------------------


@functools.cache
def untested() -> list[str]:
    """Return what is installed and was not tested with rr, each as 'peft 0.30 (tested: >=0.21)'."""
    try:
        requirements = [Requirement(text) for text in metadata.requires("rrcli") or ()]
    except metadata.PackageNotFoundError:
        return ["whatever is installed: rrcli itself is not, so its ranges are not known"]
    ranges = {r.name: r.specifier for r in requirements if r.name in WATCHED and r.marker is None}
    installed = {name: metadata.version(name) for name in ranges}
    return [
        f"{name} {version} (tested: {ranges[name]})"
        for name, version in installed.items()
        if not ranges[name].contains(version.partition("+")[0], prereleases=True)
    ]


# -- transformers: the cache and its names -----------------------------------------------------------------------------

# Names that models have given to their cache: today's first, then older ones, which remote code still uses.
CACHE_NAMES = ("cache", "past_key_values", "cache_params")


def is_cache(value: object) -> bool:
    """Tell a cache by its type, since models pass it under different names and positions."""
    if isinstance(value, Cache):
        return True
    name = type(value).__name__  # torch.compile before 2.11 cannot trace `str.endswith`
    return (name[-5:] == "Cache" or name[-11:] == "CacheParams") and hasattr(value, "__dict__")


def takes_cache(model: Any) -> bool:
    """Tell whether one of the arguments of a model's forward is known to be its cache."""
    return _cache_parameter(model.forward) is not None


def cache_argument(model: Any) -> str:
    """Return the keyword under which a model's forward takes its cache.

    Raises:
        RRError: none of its arguments can be told to be the cache.
    """
    found = _cache_parameter(model.forward)
    if found is None:
        raise RRError(
            f"'{model.config.model_type}' models cannot be supported: no argument of their forward is known as a cache",
            "This needs a model that takes a cache of transformers, or another version of transformers.",
        )
    return found


def cache_of(values: Mapping[str, Any]) -> Any:
    """Return the cache among a model's outputs, or among the arguments of a generation; None if there is none."""
    return next((value for value in values.values() if is_cache(value)), None)


def translate(model: Any) -> Callable[[], None]:
    """Translate between the names that `generate` and a model's remote code have for the cache.

    `generate` hands the cache on under the name that the installed transformers has for it. Code that was written for
    another version would take that name for an unknown option, and ignore the tokens before.

    Returns:
        A function that ends the translation; it does nothing where none was needed.
    """
    theirs, own = generation_cache_argument(model), _cache_parameter(model.forward)
    if own is None or theirs is None or theirs == own or "rr_translated" in vars(model):
        return lambda: None
    vars(model)["rr_translated"] = True

    def rename(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, {own if name == theirs else name: value for name, value in kwargs.items()}

    hook = model.register_forward_pre_hook(rename, with_kwargs=True)
    prepare = model.prepare_inputs_for_generation
    if own in inspect.signature(prepare).parameters:

        @functools.wraps(prepare)
        def renamed(*args: Any, **kwargs: Any) -> Any:
            return prepare(*args, **rename(None, (), kwargs)[1])

        model.prepare_inputs_for_generation = renamed

    def undo() -> None:
        hook.remove()
        vars(model).pop("prepare_inputs_for_generation", None)
        vars(model).pop("rr_translated", None)

    return undo


def output_cache_field() -> str:
    """Return the name under which `generate` returns the cache.

    Raises:
        RRError: none of its fields can be told to be the cache.
    """
    found = _cache_parameter(import_module("transformers.generation").GenerateDecoderOnlyOutput)
    if found is None:
        raise RRError(
            "the cache of a generation cannot be returned: transformers' output has no field for it",
            "Leave return_dict_in_generate out, or install a version of transformers that rr was tested with.",
        )
    return found


def _cache_parameter(function: Callable[..., Any]) -> str | None:
    parameters = inspect.signature(function).parameters
    known = [name for name in CACHE_NAMES if name in parameters]
    # An unknown name is the cache's too if its annotation says so.
    declared = [name for name, p in parameters.items() if re.search(r"\bCache\b", str(p.annotation))]
    if known:
        return next((name for name in known if name in declared), known[0])
    return declared[0] if len(declared) == 1 else None


def generation_cache_argument(model: Any) -> str | None:
    """Return the keyword under which `generate` takes a cache for this model, and hands it on; None if not known."""
    from transformers import GenerationMixin

    name = _cache_parameter(GenerationMixin.prepare_inputs_for_generation)
    # Before there was one name for all, `generate` told models with recurrent states by the name of their class.
    return "cache_params" if name == "past_key_values" and "mamba" in type(model).__name__.lower() else name


def goes_on(cache: Any) -> bool:
    """Tell whether `generate` continues after the tokens in a cache, and `reorder_cache` selects its rows.

    It does not where all layers are recurrent (`generate` then runs the whole text again), nor with a family's own
    subclass of a cache.
    """
    linear = getattr(cache, "is_linear", None)
    return _is_plain(cache) and isinstance(linear, list) and not all(linear)


def can_be_taken_back(cache: Any) -> bool:
    """Tell whether `Snapshot` and `crop` can take a cache back to an earlier token.

    Not a family's own subclass of a cache: it holds more than layers.
    """
    return _is_plain(cache) and not getattr(cache, "offloading", True) and hasattr(cache, "is_croppable")


def _is_plain(cache: Any) -> bool:
    return isinstance(cache, DynamicCache) and type(cache).__name__ == DynamicCache.__name__


def remote_class(reference: str, folder: Any, **hub: Any) -> Any:
    """Return a model class from the code in a model's folder, as `AutoModelForCausalLM` would load it.

    Args:
        reference: its name in `auto_map`, such as `modeling_x.XForCausalLM`. hub: where and which, as for
            `from_pretrained`.

    Raises:
        RRError: this transformers cannot.
    """
    try:
        load = import_module("transformers.dynamic_module_utils").get_class_from_dynamic_module
        with_generation = import_module("transformers.models.auto.auto_factory").add_generation_mixin_to_remote_model
    except (ImportError, AttributeError) as error:
        raise RRError(
            f"the class {reference} of {folder} cannot be loaded with this transformers: {error}",
            "Install a version of transformers that rr was tested with.",
        ) from error
    return with_generation(load(reference, folder, **hub))


def serve_one_model() -> None:
    """Run the command line of transformers, whose server then loads the model that it was started with, and no other.

    It has an endpoint that loads whatever a request names, with the trust in code that was meant for the first one.

    Raises:
        RRError: this transformers has no such server.
    """
    try:
        manager = import_module("transformers.cli.serving.model_manager").ModelManager
        main = import_module("transformers.cli.transformers").main
        load, canonical = manager.load_model_and_processor, manager.process_model_name
    except (ImportError, AttributeError) as error:
        raise RRError(
            f"the server of this transformers cannot be kept to one model: {error}",
            "Install a version of transformers that rr was tested with.",
        ) from error

    @functools.wraps(load)
    def load_own(self: Any, name: str, *args: Any, **kwargs: Any) -> Any:
        if name != canonical(self.force_model) or kwargs.get("gguf_file") is not None:
            raise ValueError(f"this server has the model {self.force_model} alone")
        found = load(self, name, *args, **kwargs)
        for part in found if isinstance(found, tuple) else (found,):
            without_inference_kernels(part) if isinstance(part, torch.nn.Module) else None
        return found

    manager.load_model_and_processor = load_own
    if hasattr(manager, "get_quantization_config"):
        manager.get_quantization_config = _quantised_as_in_training(manager.get_quantization_config)
    main()


def _quantised_as_in_training(own: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return how the server quantises, but with scales as they are, and products as in a training."""

    @functools.wraps(own)
    def configured(self: Any) -> Any:
        found = own(self)
        if getattr(found, "load_in_4bit", False):
            named = getattr(torch, str(getattr(self, "dtype", "auto")).removeprefix("torch."), None)
            found.bnb_4bit_use_double_quant = False
            found.bnb_4bit_compute_dtype = named if isinstance(named, torch.dtype) else torch.bfloat16
        return found

    return configured


# -- transformers: the layers of a cache -------------------------------------------------------------------------------

# Classes of layers whose rows can be moved separately, and for each attribute the axis of its positions.
POSITIONS: dict[type, dict[str, int]] = {
    DynamicLayer: {"keys": 2, "values": 2},
    DynamicSlidingWindowLayer: {"keys": 2, "values": 2},
    LinearAttentionLayer: {"conv_states": 2},
}


def is_blank(layer: Any) -> bool:
    """Tell whether a layer of a cache has seen no token; a layer that cannot tell is blank if it holds no values."""
    length, previous = getattr(layer, "get_seq_length", None), getattr(layer, "has_previous_state", None)
    if length is None and previous is None:
        return not any(isinstance(value, Tensor) and value.numel() for value in vars(layer).values())
    if getattr(layer, "is_initialized", True) and length is not None and int(length()) > 0:
        return False
    if isinstance(previous, dict):
        previous = list(previous.values())
    return not (previous is True or (isinstance(previous, list) and any(previous)))


def remembers_all(layer: Any) -> bool:
    """Tell whether a layer never forgets a token, so that any number of the last ones can be cropped."""
    return type(layer) is DynamicLayer


def window_of(layer: Any) -> int | None:
    """Return how many tokens a layer with a sliding window keeps; None for any other."""
    return int(layer.sliding_window) - 1 if isinstance(layer, DynamicSlidingWindowLayer) else None


# -- transformers: recorded outputs ------------------------------------------------------------------------------------

# What a caller may ask a model to return besides its logits.
RECORDED = ("output_hidden_states", "output_attentions", "output_router_logits")


def _recorder() -> Any:
    try:
        found = import_module("transformers.utils.output_capturing")._active_collector
    except (ImportError, AttributeError):
        return None
    return found if all(hasattr(found, name) for name in ("get", "set")) else None


# The context variable in which transformers collects the recorded outputs of a forward; None if it was not found.
RECORDER = _recorder()


def refuse_unhidden_outputs(model: Any, asked: Mapping[str, Any]) -> None:
    """Refuse to record outputs if the passes cannot be kept out of them, because `RECORDER` was not found.

    Args:
        asked: the keyword arguments of a forward.

    Raises:
        RRError: outputs are to be recorded, and this transformers has no recorder that can be switched off for a while.
    """
    if RECORDER is not None:
        return
    for name in RECORDED:
        if asked.get(name) if name in asked else getattr(model.config, name, False):
            raise RRError(
                f"{name} cannot be had with a recursion: transformers' recorder of outputs was not found",
                "Set the depth to 0 for this call, or install a version of transformers that rr was tested with.",
            )


@contextmanager
def unrecorded() -> Iterator[None]:
    """While it is entered, transformers does not record hidden states, attentions and router logits."""
    before = None if RECORDER is None else RECORDER.get()
    if not before:
        yield
        return
    RECORDER.set(None)
    try:
        yield
    finally:
        RECORDER.set(before)


# -- transformers: generating, loading ---------------------------------------------------------------------------------


def sample_one_by_one(model: Any, input_ids: Tensor, **options: Any) -> Any:
    """Decode token by token, greedily or by sampling: what `generate` does after its preparations.

    Args:
        options: `logits_processor`, `stopping_criteria`, `generation_config`, `synced_gpus`, `streamer` and the model's
            own arguments, as `generate` hands them to a custom decoding method.

    Raises:
        RRError: this transformers has no such function, or it takes other arguments.
    """
    function = getattr(model, "_sample", None)
    taken = inspect.signature(function).parameters if function is not None else {}
    named = ("logits_processor", "stopping_criteria", "generation_config", "synced_gpus", "streamer")
    if function is None or not all(name in taken for name in named):
        raise RRError(
            "this model cannot be decoded token by token: transformers' own way to do it was not found",
            "Leave custom_generate out, or install a version of transformers that rr was tested with.",
        )
    return function(input_ids, **options)


def generation_defaults() -> dict[str, Any]:
    """Return what `generate` takes for settings that nobody gives; empty where transformers does not say it."""
    return dict(getattr(GenerationConfig, "_get_default_generation_params", dict)())


def padding_token(generation_config: Any) -> int:
    """Return the token that `generate` pads ended rows with: the padding token, or the first end token, or 0."""
    ends = generation_config.eos_token_id
    first = ends[0] if isinstance(ends, (list, tuple)) and ends else ends
    found = first if generation_config.pad_token_id is None else generation_config.pad_token_id
    return 0 if found is None else int(found)


def forget_quantisation(model: Any) -> None:
    """Make a model that was read from GGUF saveable: its weights are plain floats, so the mark of quantisation goes."""
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def without_inference_kernels(model: Any) -> None:
    """Let bitsandbytes leave 4-bit weights as they are on a CPU.

    In evaluation it packs them for a kernel that has no gradients, and goes on using that in training: the gradients of
    what lies before such a layer would silently be lost.
    """
    for module in model.modules():
        if "support_avx512bf16_for_cpu" in vars(module):
            module.support_avx512bf16_for_cpu = False


def quantised_matrices(model: Any) -> list[str]:
    """Return the names of the linear layers that transformers has bitsandbytes quantise."""
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = [*get_keys_to_not_convert(model), *(getattr(model, "_keep_in_fp32_modules", None) or ())]
    linear = [name for name, part in model.named_modules() if type(part) is torch.nn.Linear or isinstance(part, Conv1D)]
    return [name for name in linear if should_convert_module(name, kept)]


def unpack_compressed(model: Any) -> None:
    """Make floats of weights that compressed-tensors has packed, which it would do in the first forward pass.

    Before that, the layers are of another kind than after it, and cannot be run alone. Some formats are unpacked in
    bfloat16, whatever the model computes in.
    """
    if getattr(model, "ct_decompress_hook", None) is None:
        return
    model.hf_quantizer.compressor.decompress_model(model)
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None and module.weight.dtype != model.dtype:
            module.weight.data = module.weight.data.to(model.dtype)


def unsaved_tensors(model: Any) -> tuple[str, ...]:
    """Return the names of a model's tensors that `save_pretrained` leaves out."""
    return tuple(getattr(model, "_keys_to_ignore_on_save", None) or ())


def computing_device(module: Any) -> Any:
    """Return the device on which accelerate runs a module whose weights it keeps elsewhere; None if there is none."""
    hooks = [getattr(part, "_hf_hook", None) for part in module.modules()]
    return next((home for hook in hooks if (home := getattr(hook, "execution_device", None)) is not None), None)


def attention_is_eager(config: Any) -> bool:
    """Tell whether a model computes whole matrices of attention scores; only for an estimate of memory."""
    return getattr(config, "_attn_implementation", None) == "eager"


@dataclass(frozen=True)
class ParallelPlan:
    """Which weights transformers would cut: module or parameter, with * for the number of its layer, -> rule.

    Attributes:
        tensor: by tensor parallelism. experts: by sharing out experts. Each is empty where the family has no such plan.
    """

    tensor: Mapping[str, str]
    experts: Mapping[str, str]

    def cuts(self, parameter: str) -> bool:
        """Tell whether tensor parallelism cuts a parameter, by its name in the model."""
        name = re.sub(r"\.\d+(?=\.)", ".*", parameter)
        rule = self.tensor.get(name) or self.tensor.get(name.rpartition(".")[0]) or ""
        return any(word in rule for word in ("colwise", "rowwise"))


def parallel_plan(model: Any) -> ParallelPlan:
    """Return how transformers would cut a model among processes; an empty plan where it does not say.

    Embedding and head are left out: `distributed_config` keeps them whole in every process.
    """
    prefix = getattr(model, "base_model_prefix", "")
    whole = (model.get_input_embeddings(), model.get_output_embeddings())
    ends = {name for name, module in model.named_modules() if module in whole}
    plans = []
    for own, of_config in (("_tp_plan", "base_model_tp_plan"), ("_ep_plan", "base_model_ep_plan")):
        found = dict(getattr(model, own, None) or {})
        base = getattr(model.config, of_config, None) or {}
        found = {f"{prefix}.{name}": rule for name, rule in base.items()} | found
        plans.append({name: rule for name, rule in found.items() if name not in ends})
    return ParallelPlan(*plans)


@contextmanager
def on_shapes(model: Any) -> Iterator[None]:
    """While it is entered, no shape in `model` depends on the values of a tensor, as on the meta device there are none.

    Experts compute in an implementation for which that holds, and families with a padding id do not look for it among
    the tokens. That implementation is the one that models use, through its fallback for any number format. Where the
    fallback is not found it is another one, which copies the experts' weights for every token: as many FLOPs, and more
    memory than a model takes.
    """
    configs = list(
        {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}.values()
    )
    experts = [(c, c._experts_implementation) for c in configs if hasattr(c, "_experts_implementation")]
    with ExitStack() as patches:
        for config in configs:
            if hasattr(config, "pad_token_id"):  # not by setattr: some configurations check the type
                patches.enter_context(patched(config, pad_token_id=None))
        for config, before in experts:
            patches.callback(setattr, config, "_experts_implementation", before)
        if experts:
            implementation = _experts_on_shapes(patches)
            for config, _ in experts:
                config._experts_implementation = implementation
        yield


def _experts_on_shapes(patches: ExitStack) -> str:
    """Return the implementation of experts that runs on shapes, with what it needs patched while `patches` is open."""
    try:
        module = import_module("transformers.integrations.moe")
        parameters = inspect.signature(module._grouped_mm).parameters
        there = hasattr(torch.ops.transformers, "grouped_mm_fallback_backward")
    except (ImportError, AttributeError):
        return "batched_mm"
    if not there or not {"input", "weight", "offs"} <= parameters.keys():
        return "batched_mm"

    def product(input: Tensor, weight: Tensor, offs: Tensor) -> Any:
        return _GroupedProduct.apply(input.to(weight.dtype), weight, offs)  # type: ignore[no-untyped-call]

    patches.enter_context(patched(module, _grouped_mm=product))
    return "grouped_mm"


class _GroupedProduct(torch.autograd.Function):
    """Products of groups of rows with a matrix each, on shapes, with the gradients that are asked for.

    torch's own takes one number format alone there, and the fallback of transformers always computes both gradients.
    """

    @staticmethod
    def forward(context: Any, rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        context.save_for_backward(rows if context.needs_input_grad[1] else None, weight, ends)
        result: Tensor = torch.ops.transformers.grouped_mm_fallback(rows, weight, ends)
        return result

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, ends = context.saved_tensors
        if context.needs_input_grad[1]:
            return *torch.ops.transformers.grouped_mm_fallback_backward(rows, weight, ends, gradient), None
        return torch.ops.transformers.grouped_mm_fallback(gradient, weight.transpose(-2, -1), ends), None, None


# -- transformers: models in parts -------------------------------------------------------------------------------------


def distributed_config(sizes: Mapping[str, int], *, layers: str, whole: Sequence[str], ends: Sequence[str]) -> Any:
    """Return transformers' configuration of a model of which each process has a part.

    Args:
        sizes: how many processes share by fsdp, tp, ep and replicas.
        layers: the path of the list of decoder layers; a layer is put together while it runs.
        whole: modules outside of the layers that hold weights; under fsdp these stay together once they have run, since
            the head's weights are read without a call of the head.
        ends: of these, embedding and head; under tp every process has them whole, for the same reason.

    Raises:
        RRError: this transformers does not read models in parts.
    """
    try:
        kind = import_module("transformers.distributed").DistributedConfig
        found = kind(
            fsdp_size=sizes["fsdp"],
            tp_size=sizes["tp"],
            ep_size=sizes["ep"],
            dp_replicate_size=sizes["replicas"],
            fsdp_plan={f"{layers}.*": "free_full_weight", **dict.fromkeys(whole, "keep_full_weight")},
            tp_plan=dict.fromkeys(ends, "replicate") if sizes["tp"] > 1 else None,
        )
    except (ImportError, AttributeError, TypeError) as error:
        raise RRError(
            f"this transformers cannot read a model in parts: {error}", "Install a version that rr was tested with."
        ) from error
    return found


@contextmanager
def fused_before_cut() -> Iterator[None]:
    """While it is entered, weights that transformers makes of several tensors are made whole, and cut then.

    It cuts every tensor of a file before it makes one weight of several. That is right for experts that are stacked,
    but a part of three tensors one after the other is not the three parts one after the other: without this,
    Kimi-Linear's convolutions would hold other numbers, and nothing would tell.

    Raises:
        RRError: transformers' loader of weights was not found as it is known here.
    """
    try:
        loader, modeling = (
            import_module("transformers.core_model_loading"),
            import_module("transformers.modeling_utils"),
        )
        real, cut, store = (
            modeling.convert_and_load_state_dict_in_model,
            loader.DtensorShardOperation,
            loader.set_param_for_module,
        )
        converter, stacking, joining = loader.WeightConverter, loader.MergeModulelist, loader.Concatenate
    except (ImportError, AttributeError) as error:
        raise RRError(
            f"a model cannot be read in parts here: {error}",
            "Install a version of transformers that rr was tested with.",
        ) from error

    class Uncut:
        """Returns tensors whole where transformers expects them to be cut."""

        def shard_tensor(self, source: Any, tensor_idx: Any = None, device: Any = None, dtype: Any = None) -> Tensor:
            whole: Tensor = source[...].to(device=device, dtype=dtype)
            return whole

    def load(**given: Any) -> Any:
        model, mapping = given["model"], given["load_config"].weight_mapping
        fused = _fused(model, mapping or (), converter, stacking, joining)
        tensors = model.state_dict()
        ids = {id(tensor) for name, tensor in tensors.items() if name in fused}

        def cutting(parameter: Any) -> Any:
            return Uncut() if id(parameter) in ids else cut(parameter)

        def storing(model: Any, name: str, value: Tensor, *rest: Any, **named: Any) -> Any:
            parameter = model.get_parameter_or_buffer(name)
            if name in fused and value.shape == parameter.shape:
                value = cut(parameter).shard_tensor(value, device=value.device, dtype=value.dtype)
            return store(model, name, value, *rest, **named)

        # The loader takes the tensors that it asks about from the state dictionary.
        known = patched(model, state_dict=lambda *_, **__: tensors)
        with known, patched(loader, DtensorShardOperation=cutting, set_param_for_module=storing):
            return real(**given)

    with patched(modeling, convert_and_load_state_dict_in_model=load):
        yield


def _fused(model: Any, mapping: Sequence[Any], converter: Any, stacking: Any, joining: Any) -> set[str]:
    """Return the names of the parameters in parts whose tensors must not be cut before they are made into one.

    Cutting first is right where tensors are stacked along a new axis, or joined along an axis that is not cut (or cut
    in strides, which is how transformers marks joined matrices under tensor parallelism).
    """
    found: set[str] = set()
    for name, parameter in model.named_parameters():
        cuts = {
            getattr(placement, "dim", None) for placement in getattr(parameter, "placements", ()) if _plain(placement)
        }
        for rule in mapping:
            if not cuts - {None} or not isinstance(rule, converter) or not _makes(rule, name):
                continue
            harmless = all(
                isinstance(step, stacking) or (isinstance(step, joining) and step.dim not in cuts)
                for step in rule.operations
            )
            found.update(() if harmless else (name,))
    return found


def _plain(placement: Any) -> bool:
    """Tell whether a placement cuts an axis into one piece for each process."""
    return hasattr(placement, "dim") and bool(placement.is_shard())


def _makes(rule: Any, name: str) -> bool:
    """Tell whether a rule of transformers may make the parameter of this name, from the plain part of its patterns."""
    for pattern in rule.target_patterns:
        pieces = re.split(r"[*+?()\[\]|^$]|\\[0-9dw]", pattern.replace("\\.", "."))
        longest = max(pieces, key=len).strip("\\")
        if longest in name:
            return True
    return False


@contextmanager
def left_in_files() -> Iterator[None]:
    """While it is entered, weights that are to lie on disk stay in the model's own files, and are read when they run.

    Without it, transformers reads each of them while it loads. What it makes of several tensors (experts, which most
    mixtures have one by one in their files) it writes to the disk in the format that it computes in: a second copy of
    nearly the whole model. Here its own rules are applied each time such a weight is brought to where it runs. All
    other weights are pages of the files, which take no memory of the process.

    Two kinds are still written: those of a rule that makes several of one, and those that have a format of their own.

    Raises:
        RRError: that has no room on the disk. Nothing was read then.
    """
    try:
        loader, modeling, big = (
            import_module(name)
            for name in ("transformers.core_model_loading", "transformers.modeling_utils", "accelerate.big_modeling")
        )
        real, kept = modeling.convert_and_load_state_dict_in_model, big.OffloadedWeightsLoader
        rename, order, place = loader.rename_source_key, loader.dot_natural_key, loader.get_device
        kinds = (loader.WeightRenaming, loader.WeightConverter)
        makes = functools.partial(_made, stacking=loader.MergeModulelist, joining=loader.Concatenate)
    except (ImportError, AttributeError):
        yield
        return
    made: dict[str, Callable[[], Tensor]] = {}

    def load(**given: Any) -> Any:
        model, config, index = given["model"], given["load_config"], given["disk_offload_index"]
        if index is None or config.hf_quantizer is not None:
            return real(**given)
        tensors, buffers = model.state_dict(), {name for name, _ in model.named_buffers()}
        rules = [[rule for rule in config.weight_mapping or () if isinstance(rule, kind)] for kind in kinds]
        of_pattern = {pattern: rule for rule in rules[1] for pattern in rule.source_patterns}
        sources: dict[str, list[tuple[str, str | None]]] = {}
        for key in sorted(given["state_dict"], key=order):
            name, pattern = rename(key, *rules, model.base_model_prefix, tensors)
            if name in tensors and name not in buffers:
                sources.setdefault(name, []).append((key, pattern))
        state, left, written = dict(given["state_dict"]), set(), 0
        for name, found in sources.items():
            if place(config.device_map, name) != "disk":
                continue
            rule, slices = of_pattern.get(found[0][1] or ""), [state[key] for key, _ in found]
            if rule is not None and len(rule.target_patterns) == 1 and not _named_in(config.dtype_plan, name):
                parts = tuple((key, pattern, part) for (key, pattern), part in zip(found, slices, strict=True))
                made[name] = functools.partial(makes, rule, name, parts, model=model, like=tensors[name])
            elif rule is None and name in index and len(found) == 1:
                made[name] = functools.partial(_part, slices[0], tensors[name].dtype)
            else:
                written += sum(math.prod(part.get_shape()) for part in slices) * tensors[name].element_size()
                continue
            left.add(name)
            for key, _ in found:
                del state[key]
        _refuse_full_disk(config.disk_offload_folder, written)
        info, index = real(**{**given, "state_dict": state})
        info.missing_keys.difference_update(left)
        return info, index

    class Made(kept):  # type: ignore[misc, valid-type]
        """Weights on disk, which are pages of the files, or made of several tensors when they are asked for."""

        brought = 0

        def __getitem__(self, name: str) -> Any:
            found = made[name]() if name in made else super().__getitem__(name)
            # malloc keeps what activations have freed between objects that stay, some more of it for every layer.
            self.brought += getattr(found, "nbytes", 0)
            if self.brought >= TRIMMED_AFTER:
                return_freed_memory()
                self.brought = 0
            return found

    with patched(modeling, convert_and_load_state_dict_in_model=load), patched(big, OffloadedWeightsLoader=Made):
        yield


def _named_in(plan: Mapping[str, Any] | None, name: str) -> bool:
    """Tell whether a weight has a number format of its own, by transformers' patterns."""
    return any(re.search(pattern.replace("*", ".*"), name) for pattern in plan or ())


def _part(part: Any, dtype: torch.dtype | None) -> Tensor:
    """Return a tensor in a file, whose pages are read when they are used; a copy only if it has another format."""
    tensor: Tensor = part[...]
    return tensor.to(dtype=dtype)


def _made(
    rule: Any,
    name: str,
    parts: Sequence[tuple[str, str, Any]],
    *,
    model: Any,
    like: Tensor,
    stacking: type[Any],
    joining: type[Any],
) -> Tensor:
    """Make one weight of several tensors in files by a rule of transformers, in the shape and the format of `like`.

    Where tensors are stacked first and joined along other axes then, this is done expert by expert, so that the weight
    and one expert are all that is held.

    Args:
        parts: key in the file, pattern of the rule, and the tensor, of which nothing has been read so far.

    Raises:
        RRError: another shape comes out.
    """
    rule = copy.deepcopy(rule)

    def apply(some: Iterable[tuple[str, str, Any]], dtype: torch.dtype | None) -> Tensor:
        for key, pattern, tensor in some:
            rule.add_tensor(name, key, pattern, functools.partial(_part, tensor, dtype))
        [value] = rule.convert(name, model=model, config=model.config).values()
        result: Tensor = value[0] if isinstance(value, list) else value
        return result

    first, *rest = rule.operations
    by_pattern = [[part for part in parts if part[1] == pattern] for pattern in dict.fromkeys(p for _, p, _ in parts)]
    one_by_one = isinstance(first, stacking) and first.dim == 0
    one_by_one = one_by_one and all(isinstance(step, joining) and step.dim > 0 for step in rest)
    if one_by_one and {len(of) for of in by_pattern} == {like.shape[0]}:
        found = torch.empty(like.shape, dtype=like.dtype)
        for place, some in enumerate(zip(*by_pattern, strict=True)):
            found[place] = apply(some, None)[0]
    else:
        found = apply(parts, like.dtype)
    if found.shape != like.shape:
        raise RRError(
            f"{name} has the shape {tuple(found.shape)} in the files, not {tuple(like.shape)}", "Download it again."
        )
    return found


def _refuse_full_disk(folder: str | None, size: int) -> None:
    """Refuse to write so many bytes into a folder that has no room for them.

    Raises:
        RRError: there is no room.
    """
    free = shutil.disk_usage(folder or ".").free
    if size > free:
        raise RRError(
            f"{size / 2**30:.1f} GiB of weights must be written to {folder}, as the model computes with other shapes "
            f"or formats than its files have; {free / 2**30:.1f} GiB are free there",
            "Run rr in a folder on a larger disk, or take more --max-memory.",
        )


def fill_buffers(model: Any, config: Any, *, trust_remote_code: bool) -> None:
    """Give the buffers that no file holds their values, as the family computes them.

    transformers leaves some of them as they were in memory where it reads a model in parts.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        fresh = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    saved = set(model.state_dict())
    right = dict(fresh.named_buffers())
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name not in saved and name in right and right[name].shape == buffer.shape:
                buffer.copy_(right[name])


def saves_as_one(model: Any) -> AbstractContextManager[Any]:
    """Return a context in which `save_pretrained` takes a model in parts for a whole one: it is given whole weights."""
    config = model.config
    return patched(config, distributed_config=None) if hasattr(config, "distributed_config") else nullcontext()


# -- peft --------------------------------------------------------------------------------------------------------------


def peft_function(name: str) -> Any:
    """Return a function that peft offers to other packages, from the module in which the installed version has it.

    Raises:
        RRError: it has none of that name.
    """
    for place in ("peft.functional", "peft", "peft.utils", "peft.tuners.tuners_utils"):
        try:
            return getattr(import_module(place), name)
        except (ImportError, AttributeError):
            continue
    raise RRError(f"peft has no '{name}'", "Install a version of peft that rr was tested with.")


def switch_adapters(layers: Sequence[Any], on: bool) -> None:
    """Turn peft's adapters on or off without changing `requires_grad` of their weights.

    peft's public switch changes that too, and autograd then drops the gradients of passes that were run already. Where
    the private flag is not found, the public switch is used and `requires_grad` is set back.
    """
    for layer in layers:
        if isinstance(getattr(layer, "_disable_adapters", None), bool):
            layer._disable_adapters = not on
        if layer.disable_adapters is on:
            wanted = [(parameter, parameter.requires_grad) for parameter in layer.parameters()]
            layer.enable_adapters(on)
            for parameter, requires in wanted:
                parameter.requires_grad_(requires)


@contextmanager
def checkpointed_with(layer: Any, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """While it is entered, a decoder layer checkpoints `around(forward)`, so that `around` is recomputed too.

    Raises:
        RRError: the layer is checkpointed in a way that is not known here, so that a recomputation would not have
            `around`.
    """
    name = "_gradient_checkpointing_func"
    checkpoint = vars(layer).get(name)
    if checkpoint is None:
        if getattr(layer, "gradient_checkpointing", False) and layer.training:
            raise RRError(
                "LoRA in passes after pass 0 cannot be trained with --gradient-checkpointing here: how transformers "
                "checkpoints a layer was not found",
                "Leave --gradient-checkpointing out, or install a version of transformers that rr was tested with.",
            )
        yield
        return
    with patched(layer, **{name: lambda run, *inputs, **options: checkpoint(around(run), *inputs, **options)}):
        yield


# -- accelerate, torch, tensorboard ------------------------------------------------------------------------------------


def leave_process_group() -> None:
    """End accelerate's process group; where accelerate cannot reset its state, this process cannot join another one."""
    from accelerate import PartialState

    PartialState().destroy_process_group()
    reset = getattr(PartialState, "_reset_state", None)
    if reset is not None:
        reset()


@functools.cache
def onednn_product() -> Callable[[Tensor, Tensor, Tensor | None], Tensor] | None:
    """Return oneDNN's `rows @ weight.T + bias` if this torch has it and the results agree with torch's; else None."""
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return None

    def product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        result: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
        return result

    rows, weight, bias = torch.linspace(-1, 1, 12).view(3, 4), torch.linspace(-2, 2, 20).view(5, 4), torch.ones(5)
    try:
        found = [product(rows, weight, b) for b in (bias, None)]
    except (AttributeError, RuntimeError, TypeError):
        return None
    right = [torch.nn.functional.linear(rows, weight, b) for b in (bias, None)]
    return product if all(map(torch.allclose, found, right)) else None


@functools.cache
def torch_flop_formulas() -> dict[str, Callable[..., Any]]:
    """Return torch's own formulas for FLOPs: name of an operator -> function of its arguments and `out_val`."""
    try:
        registry = import_module("torch.utils.flop_counter").flop_registry
    except (ImportError, AttributeError):
        return {}
    names = {getattr(key, "_qualified_op_name", None) or getattr(key, "name", str)(): key for key in registry}
    return {name: registry[key] for name, key in names.items()}


def fused_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, dropout: float, causal: bool, scale: float | None
) -> Tensor | None:
    """Return attention by torch's flash kernel for a CPU, which runs on shapes too and keeps no scores.

    None where this torch has no such operator.
    """
    operator = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
    if operator is None:
        return None
    result: Tensor = operator(query, key, value, dropout, causal, attn_mask=mask, scale=scale)[0]
    return result


def storage_address(tensor: Tensor) -> int:
    """Return what tells the storage of a tensor from all others that exist, also on the meta device.

    torch's `StorageWeakRef` is not it: with some versions of torch, a storage that it refers to never seems to be gone.
    """
    return int(tensor.untyped_storage()._cdata)


def operator_arguments(operator: Any) -> tuple[list[str], set[str]]:
    """Return the names of an operator's arguments, in order, and those that it writes into; all if it does not say."""
    try:
        arguments = operator._schema.arguments
        names = [argument.name for argument in arguments]
        return names, {a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write}
    except AttributeError:
        return [str(place) for place in range(100)], {str(place) for place in range(100)}


def has_cpp_compiler() -> bool:
    """Tell whether torch.compile finds a C++ compiler; True if it is not known, as torch then raises its own error."""
    try:
        find = import_module("torch._inductor.cpp_builder").get_cpp_compiler
    except (ImportError, AttributeError):
        return True
    try:
        find()
    except RuntimeError:
        return False
    return True


def add_hparams(writer: Any, values: Mapping[str, Any], metrics: Mapping[str, float]) -> bool:
    """Write hyper-parameters into a TensorBoard writer's own run, and return whether that was possible.

    The writer's public `add_hparams` writes them into a run of their own.
    """
    try:
        summaries = import_module("torch.utils.tensorboard.summary").hparams(dict(values), dict(metrics))
        add = writer.file_writer.add_summary
    except (ImportError, AttributeError):
        return False
    for summary in summaries:
        add(summary)
    return True


def guard_events(writer: Any, failed: Callable[[Exception], None]) -> bool:
    """Hand the first error of writing a TensorBoard writer's file to `failed`, and return whether that was possible.

    Without it, the writer's own thread would end with a traceback on the screen, and every later call would raise.
    """
    try:
        records = writer.file_writer.event_writer._async_writer._writer
        records._writer = _Guarded(records._writer, failed)
    except AttributeError:
        return False
    return True


class _Guarded:
    """A file that ignores every write after the first that failed."""

    def __init__(self, file: Any, failed: Callable[[Exception], None]) -> None:
        self._file, self._failed, self._broken = file, failed, False
        self.closed = False

    def write(self, data: bytes) -> None:
        """Write bytes."""
        self._attempt("write", data)

    def flush(self) -> None:
        """Flush the file."""
        self._attempt("flush")

    def close(self) -> None:
        """Close the file."""
        self.closed = True
        self._attempt("close")

    def _attempt(self, name: str, *arguments: Any) -> None:
        if self._broken and name != "close":
            return
        try:
            getattr(self._file, name)(*arguments)
        except Exception as error:  # an OSError, or TensorFlow's own kind where that is installed
            if not self._broken:
                self._failed(error)
            self._broken = True
