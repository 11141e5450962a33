"""Whether a model fits into the memory that there is, found out before a byte of its weights is read.

The size of the weights comes from the headers of their files, so the question costs nothing where the answer is yes.
Only where they do not fit, the model's skeleton is built: `footprint` and `shares` tell from it the largest layer,
which has to fit alone onto the device that computes, and what training and caches take.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rrcli.errors import RRError, UsageError, suggest
from rrcli.models.inspection import BITS, inspect_weights
from rrcli.models.placement import BALANCED, Parallel, Placement
from rrcli.models.quantisation import NONE, stored_format
from rrcli.models.source import ModelSource
from rrcli.recursion.config import RecursionConfig

# The share of a device's free memory that weights may take where no --max-memory says it; the rest is for activations.
WEIGHTS_SHARE = 0.9
# Tokens whose caches are named in a refusal.
CACHED_TOKENS = 4096
GIB = 2**30


def weight_bytes(source: ModelSource, dtype: Any, quantize: str, *, skeleton: Callable[[], Any]) -> int | None:
    """Return what the weights of a source take in memory, in bytes; None for GGUF, whose weights grow when read.

    Args:
        dtype: a dtype of torch, or "auto": as stored. quantize: in how many bits they are held.
        skeleton: makes that of the model, which knows what quantised weights take (see `few_bits`); asked for those.
    """
    if source.is_gguf:
        return None
    if quantize != NONE or stored_format(source):
        from rrcli.models.footprint import weights_of

        return weights_of(skeleton()).base
    weights = inspect_weights(source.path)
    if dtype == "auto" or BITS.get(weights.dtype, 8) <= 8:
        return weights.size
    return weights.size * dtype.itemsize * 8 // BITS[weights.dtype]


def budgets(placement: Placement, device: str) -> dict[str | int, int]:
    """Return the most bytes that weights may take on each device: those that compute, then the CPU's memory.

    GPUs are named by their numbers, as accelerate does.

    Raises:
        UsageError: `--max-memory` names a device that is not there.
    """
    from accelerate.utils import get_max_memory

    there = dict(get_max_memory())
    there["cpu"] //= placement.copies
    kind, _, index = device.partition(":")
    if kind == "cpu":
        there = {"cpu": there["cpu"]}
    elif index:
        there = {key: size for key, size in there.items() if key in (int(index), "cpu")}
    found = {key: int(size * WEIGHTS_SHARE) for key, size in there.items()}
    for name, size in placement.max_memory.items():
        key = _key(name)
        if key not in found:
            seen = ", ".join(f"cuda:{key}" if isinstance(key, int) else key for key in found)
            raise UsageError(f"--max-memory names {name}, which is not used here", f"Devices: {seen}.")
        found[key] = size
    return found


def arrangement(
    base: ModelSource, placement: Placement, device: str, *, dtype: Any, skeleton: Callable[[], Any]
) -> dict[str, Any]:
    """Return the options with which `from_pretrained` lays the weights over devices; none where one device has all.

    Args:
        skeleton: see `weight_bytes`.

    Raises:
        UsageError: devices that are not there.
    """
    if isinstance(placement.device_map, dict):
        return {"device_map": {module: _key(str(where)) for module, where in placement.device_map.items()}}
    room, size = budgets(placement, device), weight_bytes(base, dtype, placement.quantize, skeleton=skeleton)
    spread = placement.device_map == BALANCED and len([key for key in room if isinstance(key, int)]) > 1
    if size is None or (size <= room[_main(device, room)] and not spread):
        return {}
    return {"device_map": "auto", "max_memory": room}


def expanded(device_map: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """Return a device map as accelerate takes it: every tensor under exactly one name; the longest given name counts.

    Args:
        model: the model's skeleton.

    Raises:
        UsageError: a name that the model does not have, or a part that no name covers.
    """
    modules = dict(model.named_modules())
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    unknown = [name for name in device_map if name not in modules and name not in tensors]
    if unknown:
        raise UsageError(
            f"--device-map names '{unknown[0]}', which the model does not have", suggest(unknown[0], modules)
        )
    found: dict[str, Any] = {}

    def walk(name: str, inherited: Any) -> None:
        device = device_map.get(name, inherited)
        below = f"{name}." if name else ""
        if name in tensors or not any(other.startswith(below) and other != name for other in device_map):
            if name not in tensors and not any(other.startswith(below) for other in tensors):
                return
            if device is None:
                raise UsageError(f"--device-map does not say where '{name}' lies", "Name it, or what it is a part of.")
            found[name] = device
            return
        inner = [child for child, _ in modules[name].named_children()]
        own = [tensor for tensor in tensors if tensor.startswith(below) and "." not in tensor[len(below) :]]
        for child in (*(below + child for child in inner), *own):
            walk(child, device)

    walk("", None)
    return found


@dataclass(frozen=True)
class Need:
    """What a model needs in memory; see `footprint` and `shares`.

    Attributes:
        model: its skeleton, with its recursion. trained: the tensors that train.
        caches: what the caches of all passes hold for `CACHED_TOKENS` tokens, in bytes, by depth. unknown: why they are
            not known, or ''.
    """

    model: Any
    trained: Sequence[Any]
    caches: tuple[int, ...] = ()
    unknown: str = ""

    def on_each(self, parallel: Parallel | None) -> int:
        """Return the least that the fullest process needs, in bytes: without activations and caches."""
        from rrcli.models.shares import Arrangement, held_by_each

        held = held_by_each(self.model, self.trained, Arrangement(**asdict(parallel or Parallel())))
        weights = held.weights
        kept = weights.base + weights.sidecar + weights.adapters + weights.gradients + weights.optimiser
        return kept + held.together

    @property
    def largest(self) -> int:
        """The bytes of the largest part that runs at a time."""
        from rrcli.models.shares import largest_part

        return largest_part(self.model)

    def __str__(self) -> str:
        from rrcli.models.footprint import weights_of

        weights = weights_of(self.model, self.trained)
        parts = [f"its weights take {gib(weights.base)}{' in fp32' if self.trained else ''}"]
        if self.trained:
            parts += [f"their gradients {gib(weights.gradients)}", f"AdamW's state {gib(weights.optimiser)}"]
        if self.caches:
            sizes = ", ".join(gib(size) for size in self.caches)
            depths = ", ".join(str(depth) for depth in range(len(self.caches)))
            parts.append(f"the caches of {CACHED_TOKENS:,} tokens {sizes} at depth {depths}")
        return ", ".join([*parts, self.unknown] if self.unknown else parts)


def need(model: Any, *, config: RecursionConfig, trains: bool = False) -> Need:
    """Return what a model needs, from its skeleton, which is given a recursion and is to be used for nothing else.

    Args:
        trains: whether all of its weights train (phase c).
    """
    from rrcli.models.costs import measure
    from rrcli.models.footprint import operate, seen

    trained = operate(model, recursion=config, phase="c" if trains else "")
    try:
        costs = seen(model, measure)
    except RRError as error:
        return Need(model, trained, unknown=f"its caches are not known: {error.message}")
    pairs = zip(costs.cache_bytes_per_token, costs.cache_bytes_constant, strict=True)
    return Need(model, trained, tuple(growing * CACHED_TOKENS + constant for growing, constant in pairs))


def surely_fits(
    base: ModelSource, placement: Placement, device: str, *, dtype: Any, trains: bool, skeleton: Callable[[], Any]
) -> bool:
    """Tell from the size of the weights alone whether there is no doubt that a model fits as it is placed.

    Args:
        trains: whether all weights train. skeleton: see `weight_bytes`.
    """
    size = weight_bytes(base, dtype, placement.quantize, skeleton=skeleton)
    if size is None:
        return True
    per_byte = 8 if trains else 1  # of a weight of two bytes: fp32 copy, gradient, moments
    if placement.parallel is None and placement.offload:
        return not arrangement(base, placement, device, dtype=dtype, skeleton=skeleton)
    return size * per_byte <= _total(device) // 2


def refuse_misfit(
    base: ModelSource, skeleton: Callable[[], Any], placement: Placement, device: str, *, config: RecursionConfig,
    trains: bool,
) -> None:  # fmt: skip
    """Refuse to load what cannot fit, with the numbers, and say what would fit.

    In training and in parts, the device's whole memory is what counts: what other programs use now may be free later.
    In one process that only reads weights, layers may lie on disk; the largest part has to fit where it computes.

    Args:
        skeleton: makes the model's skeleton. config: of its recursion. trains: whether all of its weights train.

    Raises:
        RRError: it cannot fit.
    """
    found = need(skeleton(), config=config, trains=trains)
    room = budgets(placement, device)
    main = _main(device, room)
    name = f"cuda:{main}" if isinstance(main, int) else "the CPU" if main == "cpu" else main
    if placement.parallel is not None or not placement.offload:
        least, there = found.on_each(placement.parallel), _total(device)
        each = f"each of {placement.processes} processes" if placement.parallel else "a process that has all of it"
        what = f"{each} needs at least {gib(least)}, {name} has {gib(there)}"
    else:
        least, there = found.largest, room[main]
        what = f"its largest part takes {gib(least)}, weights may take {gib(there)} on {name}"
    if least <= there:
        return
    total = _total(device)
    cut = placement.quantize == NONE and not stored_format(base)
    shares = next((n for n in (2, 4, 8, 16, 32, 64, 128) if cut and found.on_each(Parallel(fsdp=n)) <= total), None)
    fits = [f"--parallel fsdp={shares}"] if shares and device != "mps" and shares > placement.processes else []
    if trains and need(skeleton(), config=config).on_each(placement.parallel) <= total:
        fits.append("--phase b")
    hint = f"What would fit: {', or '.join(fits)}." if fits else "Take a device with more memory, or a smaller --dtype."
    raise RRError(f"{base.name} does not fit: {what} ({found})", hint)


def where_layers_lie(model: Any, layers: str) -> str:
    """Say on which devices accelerate has put the decoder layers and all else, such as 'layers 0-3 on cuda:0'.

    Args:
        layers: the path of the model's list of decoder layers.
    """
    of = {name: _named(device) for name, device in model.hf_device_map.items()}

    def places(module: str) -> list[str]:
        above = [device for name, device in of.items() if not name or f"{module}.".startswith(f"{name}.")]
        inside = [device for name, device in of.items() if name.startswith(f"{module}.")]
        return list(dict.fromkeys(above or inside))

    runs: list[tuple[int, int, str]] = []
    for index in range(len(model.get_submodule(layers))):
        there = " and ".join(places(f"{layers}.{index}"))
        if runs and runs[-1][2] == there:
            runs[-1] = (runs[-1][0], index, there)
        else:
            runs.append((index, index, there))
    parts = [f"layer {a} on {there}" if a == b else f"layers {a}-{b} on {there}" for a, b, there in runs]
    others = {device for name, device in of.items() if name and not f"{name}.".startswith(f"{layers}.")}
    return ", ".join([*parts, *([f"all else on {' and '.join(sorted(others))}"] if others else [])])


def gib(size: float) -> str:
    """Return a number of bytes in GiB, or in MiB where there are few."""
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.3g} MiB"


def _main(device: str, room: Mapping[str | int, int]) -> str | int:
    """Return the device that computes."""
    kind, _, index = device.partition(":")
    if kind != "cuda":
        return kind
    return int(index) if index else next(key for key in room if isinstance(key, int))


def _key(device: str) -> str | int:
    """Return a device as accelerate names it: GPUs by their numbers."""
    kind, _, index = device.partition(":")
    return int(kind) if kind.isdigit() else int(index or 0) if kind == "cuda" else device


def _named(device: Any) -> str:
    return {"cpu": "the CPU", "disk": "disk"}.get(
        str(device), f"cuda:{device}" if isinstance(device, int) else str(device)
    )


def _total(device: str) -> int:
    """Return the whole memory of a device."""
    import psutil
    import torch

    if device.startswith("cuda"):
        return int(torch.cuda.get_device_properties(torch.device(device)).total_memory)
    return int(psutil.virtual_memory().total)
