"""How a model is laid over devices, what each of them then holds, and how long it then takes.

    one device             all of it; other devices are not used
    --parallel replicas=N  all of it on each; every device has rows of a batch of its own
    --parallel fsdp=N      a part of every weight, gradient and optimiser state on each, with rows of its own. A layer
                           is put together while it runs, and the next one meanwhile
    --parallel tp=N        a part of the matrices that the model's plan names on each; all work on the same rows
    ...,ep=N               experts whole, some on each
    --device-map auto      layers one after the other over devices, in one process; for what does not train

The sidecar and the adapters are whole on each device. Activations are taken to be whole where rows are shared by tensor
parallelism, which is a little more than there is. Times are bounds: the slowest of computing, reading weights and
caches, and sending between devices, with nothing else to wait for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from rrcli.models.devices import Device
from rrcli.models.few_bits import sizes
from rrcli.models.footprint import Weights, weights_of
from rrcli.models.placement import Parallel
from rrcli.recursion.facts import experts_per_token, hidden_size, text_config
from rrcli.recursion.families import find_layout
from rrcli.upstream import parallel_plan

# How long the devices take to meet for one sum, in seconds: the time of a small all-reduce inside of one machine.
MEETING = 20e-6


@dataclass(frozen=True)
class Arrangement:
    """How a model is laid over devices.

    Attributes:
        fsdp, tp, ep, replicas: as in `--parallel`. mapped: over how many devices layers are spread; 1 for none.
    """

    fsdp: int = 1
    tp: int = 1
    ep: int = 1
    replicas: int = 1
    mapped: int = 1

    @property
    def devices(self) -> int:
        """How many devices it needs."""
        return self.fsdp * self.tp * self.replicas * self.mapped

    @property
    def batches(self) -> int:
        """How many parts the rows of a batch are shared out in."""
        return self.fsdp * self.replicas

    def trains(self, phase: str, *, experts: bool = False) -> bool:
        """Tell whether a phase can be trained so, in phase b with adapters on experts or without."""
        return self.mapped == 1 and self.parallel.trains(phase, experts=experts)

    @property
    def parallel(self) -> Parallel:
        """The same as an option, without `mapped`."""
        return Parallel(self.fsdp, self.tp, self.ep, self.replicas)

    def __str__(self) -> str:
        if self.mapped > 1:
            return "--device-map auto"
        given = str(self.parallel)
        return f"--parallel {given}" if given else "one device"


def arrangements(model: Any, count: int, *, cut: bool = True) -> list[Arrangement]:
    """Return how a model can be laid over so many devices, those first that send least between them.

    Args:
        cut: whether its weights can be cut into parts, which quantised ones cannot.
    """
    if count == 1:
        return [Arrangement()]
    found = [
        *(Arrangement(), Arrangement(replicas=count), Arrangement(fsdp=count), Arrangement(fsdp=count, ep=count)),
        *(Arrangement(tp=count), Arrangement(tp=count, ep=count), Arrangement(mapped=count)),
    ]
    return [one for one in found if (cut or not one.parallel.cuts) and obstacle(model, one.parallel) is None]


def obstacle(model: Any, parallel: Parallel) -> tuple[str, Parallel] | None:
    """Return why a model cannot be cut into such parts, and parts for as many processes that it can be cut into; None
    where it can be.

    Args:
        model: the model, or its skeleton.
    """
    plan, family = parallel_plan(model), model.config.model_type
    if parallel.tp > 1:
        instead = replace(parallel, fsdp=parallel.fsdp * parallel.tp, tp=1, ep=1)
        if not plan.tensor:
            return f"transformers has no tensor parallelism for '{family}' models", instead
        config = text_config(model.config)
        for name in ("num_attention_heads", "num_key_value_heads"):
            if (heads := getattr(config, name, None) or 0) % parallel.tp:
                return f"the model's {name}, {heads}, is no multiple of tp={parallel.tp}", instead
    if parallel.ep > 1:
        instead = replace(parallel, ep=1)
        if not plan.experts:
            return f"transformers has no sharing of experts for '{family}' models", instead
        for _, weight in _experts(model):
            if weight.shape[0] % parallel.ep:
                return (
                    f"the number of the model's experts, {weight.shape[0]}, is no multiple of ep={parallel.ep}",
                    instead,
                )
    return None


@dataclass(frozen=True)
class Held:
    """What one device holds of a model that is laid over several.

    Attributes:
        weights: its share. together: bytes of layers that are put together while they run.
    """

    weights: Weights
    together: int


def held_by_each(model: Any, trained: Sequence[Tensor], arrangement: Arrangement, *, average: bool = False) -> Held:
    """Return what the fullest device holds; see `footprint.operate` and `footprint.weights_of`."""
    whole = weights_of(model, trained, average=average)
    if arrangement.mapped > 1:
        return Held(replace(whole, base=_fullest(model, arrangement.mapped)), 0)
    if arrangement.devices == arrangement.replicas:
        return Held(whole, 0)
    trains, plan = {id(p) for p in trained}, parallel_plan(model)
    experts = {id(p) for _, p in _experts(model)}
    base = states = 0.0
    layers, outside = dict[str, float](), 0.0
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        size = parameter.numel() * parameter.element_size()
        if id(parameter) in experts and arrangement.ep > 1:
            share, alone = arrangement.fsdp * arrangement.tp, arrangement.ep
        else:
            alone = arrangement.tp if plan.cuts(name) else 1
            share = alone * arrangement.fsdp
        base += size / share
        states += parameter.numel() / share if id(parameter) in trains else 0
        # What is put together for the time it runs: everything but experts that lie whole on their device.
        if id(parameter) not in experts or arrangement.ep == 1:
            layer = re.match(r".*?\.\d+\.", name)
            cost = (parameter.element_size() + (4 if id(parameter) in trains else 0)) * parameter.numel() / alone
            if layer:
                layers[layer[0]] = layers.get(layer[0], 0) + cost
            else:
                outside += cost
    kept = [p for p in trained if id(p) not in {id(q) for n, q in model.named_parameters() if ".lora_" not in n}]
    count = math.ceil(states) + sum(p.numel() for p in kept)
    scale = count / max(1, whole.trained)
    weights = replace(
        whole,
        base=math.ceil(base) + sum(b.numel() * b.element_size() for b in model.buffers()),
        gradients=4 * count,
        optimiser=math.ceil(whole.optimiser * scale),
    )
    together = outside + 2 * max(layers.values(), default=0) if arrangement.fsdp > 1 else 0
    return Held(weights, math.ceil(together))


def _fullest(model: Any, count: int) -> int:
    """Return the bytes of the fullest of `count` devices over which the layers are spread in their order."""
    held = sizes(model)
    layers = [sum(held.pop(id(p), 0) for p in layer.parameters()) for layer in _layers(model)]
    parts = [sum(held.values()) // 2, *layers, sum(held.values()) - sum(held.values()) // 2]
    least = max(max(parts), math.ceil(sum(parts) / count))
    while _devices_for(parts, least) > count:
        least = math.ceil(least * 1.02)
    return least


def largest_part(model: Any) -> int:
    """Return the bytes of the largest part that runs at a time: a layer, the embedding or the head."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    parts = [*_layers(model), *(module for module in ends if module is not None)]
    held = sizes(model)
    return max(sum(held[id(p)] for p in part.parameters()) for part in parts)


def _devices_for(parts: Sequence[int], room: int) -> int:
    used, left = 1, room
    for size in parts:
        if size > left:
            used, left = used + 1, room
        left -= size
    return used


# -- how long ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """What a forward reads of the weights, in bytes.

    Attributes:
        dense, experts: of the whole model. span_dense, span_experts: of the layers that are run again, with the cell.
        share: how many of its experts a token is routed to, of all.
        layers, span: how many layers there are, and are run again. width: of the states between them, in bytes.
    """

    dense: int
    experts: int
    span_dense: int
    span_experts: int
    share: float
    layers: int
    span: int
    width: int

    def of_model(self, tokens: float) -> float:
        """Return what pass 0 and the head read for so many tokens at a time."""
        return self.dense + self.experts * self._touched(tokens)

    def of_pass(self, tokens: float) -> float:
        """Return what a pass after pass 0 reads for so many tokens at a time."""
        return self.span_dense + self.span_experts * self._touched(tokens)

    def _touched(self, tokens: float) -> float:
        return 1 - (1 - self.share) ** max(1.0, tokens)


def reading(model: Any) -> Reading:
    """Return what a forward reads of a skeleton with its recursion."""
    recursion = model.__dict__.get("recursion")
    span = set[int]()
    for layer in recursion.layers[recursion.start : recursion.end] if recursion is not None else ():
        span |= {id(p) for p in layer.parameters()}
    experts = {id(p) for _, p in _experts(model)}
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    rows_alone = {id(embedding)} if head is None or head.weight is not embedding else set()
    held = sizes(model)
    of_weights = {id(p): held[id(p)] for p in model.parameters() if id(p) not in rows_alone}
    sidecar = sum(p.numel() * p.element_size() for p in recursion.parameters()) if recursion is not None else 0
    most = max((p.shape[0] for _, p in _experts(model)), default=1)
    return Reading(
        dense=sum(size for key, size in of_weights.items() if key not in experts),
        experts=sum(size for key, size in of_weights.items() if key in experts),
        span_dense=sidecar + sum(size for key, size in of_weights.items() if key in span and key not in experts),
        span_experts=sum(size for key, size in of_weights.items() if key in span and key in experts),
        share=min(1.0, experts_per_token(model) / most),
        layers=len(_layers(model)),
        span=recursion.end - recursion.start if recursion is not None else 0,
        width=hidden_size(model) * model.dtype.itemsize,
    )


@dataclass(frozen=True)
class Work:
    """What the devices that share the same rows do, which are as many as the tensor parallelism has.

    Attributes:
        flops: of all of them together. read: bytes of weights and caches. gathered: bytes of weights that are put
            together where they are cut into shards.
        layers: how many are run. states: bytes of the states between two layers.
    """

    flops: float
    read: float = 0.0
    gathered: float = 0.0
    layers: float = 0
    states: float = 0.0


@dataclass(frozen=True)
class Machine:
    """Devices and how a model is laid over them.

    Attributes:
        efficiency: the share of a device's figures that a program reaches. dtype: the number format it computes in.
    """

    device: Device
    arrangement: Arrangement
    efficiency: float
    dtype: str

    def seconds(self, work: Work) -> tuple[float, str]:
        """Return the least time of a piece of work, and what bounds it: compute, memory or link.

        Shards are gathered while something else is computed. The sums of tensor parallelism, two in a layer, are not:
        each sends its states twice, in a ring, and has to wait for the devices to meet.
        """
        device, shared = self.device, self.arrangement.tp
        bounds = {
            "compute": work.flops / (shared * device.peak(self.dtype) * self.efficiency),
            "memory": work.read / (shared * device.bandwidth * self.efficiency),
        }
        link = device.link * self.efficiency
        if self.arrangement.fsdp > 1 and link:
            bounds["link"] = work.gathered * (1 - 1 / self.arrangement.fsdp) / shared / link
        name = max(bounds, key=lambda key: bounds[key])
        sums = 2 * work.layers * (MEETING + 2 * work.states * (1 - 1 / shared) / link) if shared > 1 and link else 0.0
        return bounds[name] + sums, "link" if sums > bounds[name] else name


def _layers(model: Any) -> list[nn.Module]:
    return list(model.get_submodule(find_layout(model)[0].layers))


def _experts(model: Any) -> list[tuple[str, Tensor]]:
    """Return the weights of experts that are one tensor for all of a layer: `[expert, ...]`."""
    return [(name, p) for name, p in model.named_parameters() if ".experts." in name and p.dim() == 3]
