"""The optimiser of a training: which parameters learn how fast, and its state as plain tensors that can be saved."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rrcli.errors import RRError
from rrcli.settings import TrainSettings

BETAS = (0.9, 0.95)
FINAL_SHARE = 0.1


def learning_rate_factor(step: int, settings: TrainSettings) -> float:
    """Return the share of the peak learning rate at a step: linear warm-up, then a cosine down to a tenth."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return FINAL_SHARE + (1 - FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


class Optimizer:
    """AdamW over what the phase trains of the model (nothing, its adapters, everything) and the sidecar.

    Each has its own learning rate; adapters learn at the model's.

    Weight decay applies to matrices only. The schedule is a function of the step, so it has no state to save.
    """

    def __init__(self, model: Any, settings: TrainSettings) -> None:
        self.settings = settings
        recursion = getattr(model, "recursion", None)
        model.requires_grad_(settings.phase == "c")
        for parameter in model.lora.parameters() if settings.phase == "b" else ():
            parameter.requires_grad_(True)
        named = [(f"model.{n}", p, settings.lr) for n, p in model.named_parameters() if p.requires_grad]
        if recursion is not None:
            named += [(f"recursion.{n}", p, settings.sidecar_lr) for n, p in recursion.named_parameters()]
        groups: dict[tuple[float, float], dict[str, Any]] = {}
        names: dict[tuple[float, float], list[str]] = {}
        for name, parameter, lr in named:
            decay = settings.weight_decay if parameter.ndim >= 2 else 0.0
            group = groups.setdefault((lr, decay), {"params": [], "lr": lr, "peak_lr": lr, "weight_decay": decay})
            group["params"].append(parameter)
            names.setdefault((lr, decay), []).append(name)
        self.names = [name for group in names.values() for name in group]
        self.adamw = torch.optim.AdamW(list(groups.values()), betas=BETAS)

    def set_step(self, step: int) -> float:
        """Set every group's learning rate for `step`; return the base model's."""
        factor = learning_rate_factor(step, self.settings)
        for group in self.adamw.param_groups:
            group["lr"] = group["peak_lr"] * factor
        return self.settings.lr * factor

    def parameters(self) -> list[Tensor]:
        """Return the parameters that have a gradient."""
        return [p for group in self.adamw.param_groups for p in group["params"] if p.grad is not None]

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
            RRError: it belongs to other parameters.
        """
        index = {name: number for number, name in enumerate(self.names)}
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            name, _, entry = key.rpartition("/")
            if name not in index:
                raise RRError(f"the saved optimiser state knows a parameter '{name}', the model does not", "--restart")
            state.setdefault(index[name], {})[entry] = tensor
        self.adamw.load_state_dict({"state": state, "param_groups": self.adamw.state_dict()["param_groups"]})
