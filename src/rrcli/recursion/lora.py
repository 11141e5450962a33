"""LoRA for phase b, through `peft`: adapters on the linear layers of the span, for the passes that are to have them.

With a recursion the adapters are on in passes >= 1 only, so pass 0 stays the base model bit for bit. Without one
(vanilla) the same adapters are on always, that is in pass 0.

They are off unless a pass switches them on, one layer at a time. Activation checkpointing runs a layer a second time in
the backward pass, long after that pass, so the switch is part of the function that is checkpointed.

Some layers get no adapter, since `peft` cannot adapt them: those whose weight a fused kernel reads (Mamba's
projections), and a mixture's shared experts where the experts are one parameter for all of a layer. These experts
themselves are adapted where that is asked for, by peft's `target_parameters`: every expert has adapters of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rrcli import upstream
from rrcli.errors import RRError
from rrcli.recursion.facts import text_config
from rrcli.recursion.families import find_layout, home_of

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
NAME = "default"
PREFIX = "base_model.model."

BYPASSED = dict.fromkeys(
    (
        *("mamba", "falcon_mamba", "jamba", "mamba2", "falcon_h1", "nemotron_h", "bamba", "zamba2"),
        "granitemoehybrid",
    ),
    ("x_proj", "dt_proj", "out_proj"),
)
# Some routers are linear layers that return a pair.
ROUTER = "router"
FUSED_WITH_EXPERTS = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}


class Lora:
    """The adapters of one model, reachable as `model.lora`.

    Attributes:
        config: peft's own `LoraConfig`.
        always: whether they are on in every pass (vanilla) or only where the recursion switches them on.
    """

    def __init__(self, model: Any, config: Any, *, always: bool) -> None:
        from peft import inject_adapter_in_model
        from peft.tuners.lora import LoraLayer

        self.model, self.config, self.always = model, config, always
        _refuse_experts_elsewhere(model, config)
        try:
            inject_adapter_in_model(config, model, NAME)
        except (ValueError, NotImplementedError, TypeError) as error:
            raise RRError(f"LoRA cannot be added to '{model.config.model_type}' models: {error}") from error
        upstream.peft_function("cast_adapter_dtype")(model, NAME)
        layers = model.get_submodule(find_layout(model)[0].layers)
        self._of_layer: dict[nn.Module, list[LoraLayer]] = {
            layer: [module for module in layer.modules() if isinstance(module, LoraLayer)] for layer in layers
        }
        for adapted in self._of_layer.values():
            for module in adapted:
                _bring_back(module)
            upstream.switch_adapters(adapted, always)
        model.__dict__["lora"] = self

    def parameters(self) -> list[nn.Parameter]:
        """Return the adapters' weights, in the model's order."""
        return [p for name, p in self.model.named_parameters() if ".lora_" in name]

    def call(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Call a decoder layer with its adapters on, now and when a checkpoint recomputes it."""
        adapted = self._of_layer[layer]
        with upstream.checkpointed_with(layer, lambda run: self._with_adapters(run, adapted)):
            return self._with_adapters(layer, adapted)(*args, **kwargs)

    def remove(self) -> None:
        """Put the model's own modules back."""
        adapters = {one for adapted in self._of_layer.values() for one in adapted}
        # Of one around another, as a parameter and another one of the same module have, the outer one goes. All are
        # found before any goes: then the inner one's name is that of a part of the model's own module.
        outer = [
            (self.model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], module)
            for name, module in self.model.named_modules()
            if module in adapters and self.model.get_submodule(name.rpartition(".")[0]) not in adapters
        ]
        for parent, child, module in outer:
            setattr(parent, child, module.get_base_layer())
        del self.model.peft_config, self.model.__dict__["lora"]

    def merge(self) -> None:
        """Add the adapters to the weights, which stay, and put the model's own modules back; for those always on."""
        assert self.always
        for adapted in self._of_layer.values():
            for module in adapted:
                module.merge(safe_merge=True)
        self.remove()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the adapters' weights under the names that peft gives them in a file."""
        state_dict = upstream.peft_function("get_peft_model_state_dict")
        # Not peft's own choice, the model's whole state dictionary: asking a model in parts for it changes what this
        # process has put together, and the others would wait.
        own = {name: parameter.detach() for name, parameter in self.model.named_parameters() if ".lora_" in name}
        weights = state_dict(self.model, state_dict=own, adapter_name=NAME, save_embedding_layers=False)
        return {PREFIX + name: tensor.contiguous() for name, tensor in weights.items()}

    def save(self, folder: Path, base: str, revision: str | None = None) -> None:
        """Write what `PeftModel.from_pretrained(base, folder)` reads.

        Args:
            base: path or hub id of the base model, noted for `AutoPeftModelForCausalLM`, and its revision on the hub.
        """
        from safetensors.torch import save_file

        save_file(self.state_dict(), folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        self.config.base_model_name_or_path, self.config.revision = base, revision
        self.config.save_pretrained(folder)
        # peft keeps the targets in a set: sort them, so that equal adapters make equal files.
        path = folder / ADAPTER_CONFIG
        values = json.loads(path.read_text(encoding="utf-8"))
        values |= {"target_modules": sorted(values["target_modules"]), "inference_mode": True}
        path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def _with_adapters(self, run: Callable[..., Any], adapted: list[Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self._on(adapted):
                return run(*args, **kwargs)

        return call

    @contextmanager
    def _on(self, adapted: list[Any]) -> Iterator[None]:
        upstream.switch_adapters(adapted, True)
        try:
            yield
        finally:
            upstream.switch_adapters(adapted, self.always)


def _bring_back(module: Any) -> None:
    """Give an adapter real weights where peft has put it on the meta device.

    There it follows the weight that it adapts, if accelerate keeps that on disk.
    """
    parts = [parts[NAME] for parts in (module.lora_A, module.lora_B) if NAME in parts]
    if any(parameter.device.type == "meta" for part in parts for parameter in part.parameters()):
        for part in parts:
            part.to_empty(device=home_of(module.get_base_layer()))
        module.reset_lora_parameters(NAME, True)


def _refuse_experts_elsewhere(model: Any, config: Any) -> None:
    """Refuse adapters on experts whose weights accelerate keeps elsewhere: peft adds to them before they are brought.

    Raises:
        RRError: such weights.
    """
    for name in getattr(config, "target_parameters", None) or ():
        module = model.get_submodule(name.rpartition(".")[0])
        weight = getattr(module, name.rpartition(".")[2], None)
        if weight is not None and weight.is_meta and upstream.computing_device(model) is not None:
            raise RRError(
                "adapters on experts cannot be used where experts lie in other memory than the device's",
                "Take a device with more memory, or merge the adapters into the base with peft's merge_and_unload().",
            )


def add_lora(
    model: Any,
    rank: int,
    alpha: int,
    seed: int = 0,
    span: Sequence[int] | None = None,
    *,
    experts: bool = False,
) -> Lora:
    """Add fresh adapters (B is zero, so nothing changes) to the linear layers of a span of decoder layers.

    The model's own weights are frozen. With a recursion attached the adapters belong to its passes >= 1.

    Args:
        rank, alpha: an adapter adds `alpha / rank · B · A`, with rank rows in A.
        seed: draws A.
        span: the layers `[start, end)`; None means those of the recursion, or all where there is none.
        experts: adapt the experts of a mixture too, rank for each of them.

    Raises:
        RRError: there is no layer that `peft` can adapt, or there are adapters already.
    """
    from peft import LoraConfig
    from transformers.pytorch_utils import Conv1D

    if getattr(model, "lora", None) is not None or hasattr(model, "peft_config"):
        raise RRError("the model has adapters already", "Merge them with peft's merge_and_unload() first.")
    family = text_config(model.config).model_type
    layers = find_layout(model)[0].layers
    recursion = getattr(model, "recursion", None)
    start, end = span or ((recursion.start, recursion.end) if recursion else (0, len(model.get_submodule(layers))))
    left_out = {ROUTER, *BYPASSED.get(family, ())}
    found: dict[str, nn.Module] = {}
    for layer in model.get_submodule(layers)[start:end]:
        if any(name.endswith("experts.gate_up_proj") for name, _ in layer.named_parameters()):
            left_out |= FUSED_WITH_EXPERTS
        linear = {name: module for name, module in layer.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
        found |= {name.rpartition(".")[2]: module for name, module in linear.items()}
    targets = {name: module for name, module in found.items() if name not in left_out}
    of_experts = _experts(model, layers, range(start, end)) if experts else []
    if experts and not of_experts:
        raise RRError(f"'{family}' models have no experts that peft can adapt", "Leave --lora-experts out.")
    if not targets and not of_experts:
        raise RRError(
            f"LoRA cannot be added to '{family}' models: peft can adapt none of their linear layers",
            "Use --phase a or --phase c.",
        )
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=sorted(targets),
        target_parameters=of_experts or None,
        layers_to_transform=list(range(start, end)),
        layers_pattern=layers.rpartition(".")[2],
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in targets.values()),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Lora(model, config, always=recursion is None)


def _experts(model: Any, layers: str, span: range) -> list[str]:
    """Return the names of the weights that hold all experts of a layer, `[expert, ...]`, of the layers of a span."""
    return [
        name
        for index in span
        for name, weight in model.get_submodule(f"{layers}.{index}").named_parameters(f"{layers}.{index}")
        if ".experts." in name and weight.dim() == 3
    ]


def load_lora(model: Any, folder: Path) -> Lora:
    """Add the adapters that are saved in `folder`.

    Raises:
        RRError: files are missing or broken, or belong to another model.
    """
    from peft import PeftConfig
    from safetensors.torch import load_file

    try:
        config = PeftConfig.from_pretrained(str(folder))
        weights: dict[str, Tensor] = load_file(folder / ADAPTER_WEIGHTS)
    except Exception as error:
        raise RRError(f"cannot read the adapter in {folder}: {error}", "Make the checkpoint again.") from error
    lora = Lora(model, config, always=getattr(model, "recursion", None) is None)
    try:
        result = upstream.peft_function("set_peft_model_state_dict")(
            model, {name.removeprefix(PREFIX): tensor for name, tensor in weights.items()}, NAME
        )
    except RuntimeError as error:
        raise RRError(f"the adapter in {folder} does not fit the model: {error}") from error
    wrong = [*result.unexpected_keys, *(name for name in result.missing_keys if ".lora_" in name)]
    if wrong:
        raise RRError(f"the adapter in {folder} does not fit the model: {wrong[0]}")
    return lora
