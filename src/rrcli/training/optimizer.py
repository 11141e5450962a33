"""The optimiser of a training: what trains, at which learning rate, and the state to save, as plain tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from rrcli.settings import TrainSettings
from rrcli.training.sharding import cut_like

BETAS = (0.9, 0.95)
FINAL_SHARE = 0.1
# What AdamW keeps of each parameter.
ENTRIES = ("step", "exp_avg", "exp_avg_sq")


def learning_rate_factor(step: int, settings: TrainSettings) -> float:
    """Return the factor of the peak learning rate at a step: linear warm-up, then the schedule, down to a tenth."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return 1.0
    done = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    done = min(1.0, done)
    left = 1 - done if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return FINAL_SHARE + (1 - FINAL_SHARE) * left


def _trained(model: Any, settings: TrainSettings) -> list[tuple[str, torch.nn.Parameter, float]]:
    """Return name, parameter and peak learning rate of all that trains; tied parameters once."""
    named = [(f"model.{n}", p, settings.lr) for n, p in model.named_parameters() if p.requires_grad]
    recursion = getattr(model, "recursion", None)
    if recursion is not None:
        named += [(f"recursion.{n}", p, settings.sidecar_lr) for n, p in recursion.named_parameters()]
    return named


def prepare_parameters(model: Any, settings: TrainSettings) -> dict[str, torch.dtype]:
    """Let what the phase trains have gradients, and hold it in fp32; return the format each was loaded in, by name.

    In fp32 whatever the model was loaded in: a step of 1e-5 of a bfloat16 weight is lost in its rounding.
    """
    model.requires_grad_(settings.phase == "c")
    for parameter in model.lora.parameters() if settings.phase == "b" else ():
        parameter.requires_grad_(True)
    before = vars(model).get("formats", {})  # of parts, which are held in fp32 since they were loaded
    formats = {}
    for name, parameter, _ in _trained(model, settings):
        formats[name] = before.get(name, parameter.dtype)
        parameter.data = parameter.data.float()
    return formats


class Optimizer:
    """AdamW over what the phase trains of the model (nothing, its adapters, everything) and the sidecar.

    Each has its own learning rate; adapters learn at the model's. Weight decay applies to matrices only. The schedule
    is a function of the step, so it has no state to save.

    Parameters train in fp32 (see `prepare_parameters`). With `--ema` an average of the weights goes along. `published`
    puts the weights into the model that are evaluated and saved: averaged, and in the format that the model was loaded
    in.

    Args:
        model: its parameters are prepared and, where processes share them, sharded.
        formats: what `prepare_parameters` returned.
    """

    def __init__(self, model: Any, settings: TrainSettings, formats: dict[str, torch.dtype]) -> None:
        self.settings, self.formats = settings, formats
        named = _trained(model, settings)
        # Tensors in parts and whole ones are updated apart.
        groups: dict[tuple[float, float, object], dict[str, Any]] = {}
        names: dict[tuple[float, float, object], list[str]] = {}
        for name, parameter, lr in named:
            decay = settings.weight_decay if parameter.ndim >= 2 else 0.0
            key = (lr, decay, parameter.device_mesh if isinstance(parameter, DTensor) else None)
            group = groups.setdefault(key, {"params": [], "lr": lr, "peak_lr": lr, "weight_decay": decay})
            group["params"].append(parameter)
            names.setdefault(key, []).append(name)
        self.names = [name for group in names.values() for name in group]
        self.trained = {name: parameter for name, parameter, _ in named}
        self.sharded = any(isinstance(parameter, DTensor) for parameter in self.trained.values())
        self.average = {n: p.detach().clone() for n, p in self.trained.items()} if settings.ema else {}
        # Fused: it goes over the memory once instead of a dozen times.
        self.adamw = torch.optim.AdamW(list(groups.values()), betas=BETAS, fused=True)

    def set_step(self, step: int) -> float:
        """Set every group's learning rate for `step`; return the base model's."""
        factor = learning_rate_factor(step, self.settings)
        for group in self.adamw.param_groups:
            group["lr"] = group["peak_lr"] * factor
        return self.settings.lr * factor

    def parameters(self) -> list[Tensor]:
        """Return the parameters that have a gradient."""
        return [p for group in self.adamw.param_groups for p in group["params"] if p.grad is not None]

    def forget_gradients(self) -> None:
        """Drop all gradients and free their memory."""
        self.adamw.zero_grad(set_to_none=True)

    @torch.no_grad()
    def step(self, step: int) -> None:
        """Take optimiser step `step` (from 0), free the gradients, and update the average.

        The decay of the average warms up as min(decay, (1 + t) / (10 + t)), so that it soon forgets the first weights.
        """
        self.adamw.step()
        self.forget_gradients()
        decay = min(self.settings.ema, (1 + step) / (10 + step))
        for name, average in self.average.items():
            average.lerp_(self.trained[name].detach(), 1 - decay)

    @contextmanager
    def published(self) -> Iterator[None]:
        """Within this context the model holds the weights to evaluate and save; then the ones in training come back."""
        if self.sharded:  # torch holds references to a shard's memory, so its content has to be replaced
            with self._published_in_place():
                yield
            return
        before = [parameter.data for parameter in self.trained.values()]
        try:
            for name, parameter in self.trained.items():
                parameter.data = self.average.get(name, parameter.data).to(self.formats[name])
            yield
        finally:
            for parameter, data in zip(self.trained.values(), before, strict=True):
                parameter.data = data

    @contextmanager
    def _published_in_place(self) -> Iterator[None]:
        before = {name: tensor.clone() for name, tensor in self.weights().items() if name.startswith("raw/")}
        with torch.no_grad():
            for name, parameter in self.trained.items() if before else ():
                parameter.copy_(self.average.get(name, parameter).to(self.formats[name]))
        try:
            yield
        finally:
            with torch.no_grad():
                for name, tensor in before.items():
                    self.trained[name.removeprefix("raw/")].copy_(tensor)

    def weights(self) -> dict[str, Tensor]:
        """Return the fp32 weights in training and their average; nothing where the published weights are the same.

        Tied parameters occur once.
        """
        if not self.average and all(dtype == torch.float32 for dtype in self.formats.values()):
            return {}
        raw = {f"raw/{name}": p.detach().contiguous() for name, p in self.trained.items()}
        return raw | {f"average/{name}": t for name, t in self.average.items()}

    @torch.no_grad()
    def load_weights(self, tensors: dict[str, Tensor]) -> None:
        """Bring back what `weights` returned.

        Raises:
            ValueError: tensors are missing, or are those of other parameters.
        """
        expected: dict[str, Tensor] = {f"raw/{name}": p for name, p in self.trained.items()}
        expected |= {f"average/{name}": t for name, t in self.average.items()}
        if {name: t.shape for name, t in tensors.items()} != {name: t.shape for name, t in expected.items()}:
            raise ValueError("its weights are not those that train")
        for name, parameter in self.trained.items():
            parameter.copy_(cut_like(tensors[f"raw/{name}"], parameter))
        for name, average in self.average.items():
            average.copy_(cut_like(tensors[f"average/{name}"], average))

    def state(self) -> dict[str, Tensor]:
        """Return the optimiser's state, one tensor for each parameter and entry: `<parameter>/exp_avg`, ..."""
        return {
            f"{self.names[index]}/{entry}": torch.as_tensor(value).contiguous()
            for index, entries in self.adamw.state_dict()["state"].items()
            for entry, value in entries.items()
        }

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Bring back what `state` returned.

        Raises:
            ValueError: tensors are missing, or are those of other parameters.
        """
        index = {name: number for number, name in enumerate(self.names)}
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            name, _, entry = key.rpartition("/")
            if name not in index:
                raise ValueError(f"the model has no parameter '{name}'")
            if entry not in ENTRIES or (entry != "step" and tensor.shape != self.trained[name].shape):
                raise ValueError(f"'{key}' of shape {list(tensor.shape)} is no state of that parameter")
            state.setdefault(index[name], {})[entry] = cut_like(tensor, self.trained[name])
        if incomplete := [self.names[number] for number, entries in state.items() if len(entries) != len(ENTRIES)]:
            raise ValueError(f"the state of '{incomplete[0]}' is not complete")
        self.adamw.load_state_dict({"state": state, "param_groups": self.adamw.state_dict()["param_groups"]})
