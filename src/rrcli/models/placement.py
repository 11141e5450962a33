"""Where the weights of a model lie: on one device, over several and the disk, or cut into parts among processes.

A `Placement` is made once from the options and checked then, so that what contradicts itself is refused before anything
is read. Loads no torch.

    one device      the default, where the model fits
    device map      one process; layers lie on GPUs, in the CPU's memory and on disk, and each is brought to the
                    computing device when it runs (accelerate)
    in parts        several processes, one GPU each (transformers' own sharding)
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from rrcli.errors import UsageError, suggest
from rrcli.files import mismatch
from rrcli.schemas import DeviceMap
from rrcli.settings import CommonSettings, TrainSettings

AUTO, BALANCED = "auto", "balanced"
# Bytes of a unit. Without one, a number is in bytes.
UNITS = {"": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9}
UNITS["TB"] = 10**12
DEVICE = re.compile(r"cpu|disk|(cuda|xpu|mps)(:\d+)?|\d+")
PARALLEL_HINT = "Write sizes, such as fsdp=8, or fsdp=4,tp=2,replicas=2; names: fsdp, tp, ep, replicas."
MEMORY_HINT = "Write devices and sizes, such as cuda:0=70GiB,cpu=100GiB."


@dataclass(frozen=True)
class Parallel:
    """How many processes share each kind of work.

    Attributes:
        fsdp: processes that share the weights, and have rows of a batch of their own; a layer is put together for the
            time it runs (FSDP 2).
        tp: processes that share each matrix of a layer, and work on the same rows (tensor parallelism).
        ep: processes that share the experts of each layer, among the fsdp x tp that there are.
        replicas: how many times the whole is there, with rows of a batch of their own.
    """

    fsdp: int = 1
    tp: int = 1
    ep: int = 1
    replicas: int = 1

    @property
    def processes(self) -> int:
        """How many processes there are."""
        return self.fsdp * self.tp * self.replicas

    @property
    def cuts(self) -> bool:
        """Whether a process holds less than the whole model."""
        return self.fsdp * self.tp * self.ep > 1

    def trains(self, phase: str, *, experts: bool = False) -> bool:
        """Tell whether a phase can be trained in such parts, in phase b with adapters on experts or without.

        Under tp each process holds a piece of every matrix, and adapters and optimiser need whole ones or rows of them.
        Adapters on experts are added to whole weights of experts.
        """
        whole_experts = not self.cuts or phase != "b" or not experts
        return (phase == "a" or self.tp == 1) and (phase != "c" or self.ep == 1) and whole_experts

    def __str__(self) -> str:
        sizes = {item.name: getattr(self, item.name) for item in fields(self)}
        return ",".join(f"{name}={size}" for name, size in sizes.items() if size > 1)


@dataclass(frozen=True)
class Placement:
    """Where weights lie; see the module.

    Attributes:
        parallel: how processes share them; None for one process that has all.
        device_map: auto (on the device if they fit there), balanced (spread evenly over all GPUs), or module -> device.
        max_memory: device -> the most bytes of it that weights may take; what is free, for those that are not named.
        offload: whether weights may lie where they are not computed with; not where something trains.
        copies: how many processes have all of it where none has a part.
        quantize: in how many bits they are held: none (as they are), 4bit or 8bit.
    """

    parallel: Parallel | None = None
    device_map: str | dict[str, str | int] = AUTO
    max_memory: dict[str, int] = field(default_factory=dict)
    offload: bool = True
    copies: int = 1
    quantize: str = "none"

    @property
    def processes(self) -> int:
        """How many processes load the model."""
        return self.copies if self.parallel is None else self.parallel.processes


def read_placement(settings: CommonSettings, directory: Path) -> Placement:
    """Return the placement that the options ask for.

    Args:
        directory: where the path of a device map starts.

    Raises:
        UsageError: an option cannot be understood, or two contradict each other.
    """
    parallel = _parallel(settings.parallel) if settings.parallel else None
    count: int = getattr(settings, "num_processes", 1)
    placement = Placement(
        parallel,
        _device_map(settings.device_map, directory),
        _max_memory(settings.max_memory),
        copies=count if parallel is None else 1,
        quantize=settings.quantize,
    )
    if parallel is not None:
        for given, name in ((settings.device_map != AUTO, "--device-map"), (placement.max_memory, "--max-memory")):
            if given:
                raise UsageError(
                    f"--parallel and {name} contradict each other",
                    "--parallel is for several processes, --device-map and --max-memory are for one.",
                )
        if count not in (1, parallel.processes):
            raise UsageError(
                f"--parallel {parallel} needs {parallel.processes} processes, --num-processes is {count}",
                "Leave --num-processes out.",
            )
    if placement.quantize != "none" and parallel is not None and parallel.cuts:
        raise UsageError(
            f"--parallel {parallel} and --quantize {placement.quantize} contradict each other",
            "A quantised weight cannot be cut: take --num-processes, or leave one of them out.",
        )
    trains = isinstance(settings, TrainSettings)
    if trains and placement.device_map != AUTO:
        raise UsageError(
            f"--device-map {settings.device_map} lays weights where they cannot train",
            "Train in parts: --parallel fsdp=N.",
        )
    if placement.max_memory and isinstance(placement.device_map, dict):
        raise UsageError("--device-map FILE says where all weights lie, so --max-memory changes nothing")
    return replace(placement, offload=not trains)


def _parallel(text: str) -> Parallel:
    """Read `fsdp=4,tp=2`.

    Raises:
        UsageError: an unknown name, one that occurs twice, a size below 1, or sizes that do not go together.
    """
    known = [item.name for item in fields(Parallel)]
    sizes: dict[str, int] = {}
    for name, value in _pairs(text, "--parallel", PARALLEL_HINT):
        if name not in known:
            raise UsageError(f"--parallel names '{name}'", suggest(name, known))
        if not (value.isascii() and value.isdigit() and int(value)):
            raise UsageError(f"--parallel {name} is '{value}', which is no whole number from 1 on", PARALLEL_HINT)
        sizes[name] = int(value)
    found = Parallel(**sizes)
    if found.processes == 1:
        raise UsageError(f"--parallel {text} means one process", "Leave it out, or write larger sizes.")
    if found.ep > 1 and found.ep % found.tp:
        raise UsageError(f"--parallel {text}: ep must be a multiple of tp", "Take ep=tp, or ep=fsdp*tp.")
    if (found.fsdp * found.tp) % found.ep:
        raise UsageError(f"--parallel {text}: ep must divide fsdp x tp", "Take ep=tp, or ep=fsdp*tp.")
    return found


def _device_map(text: str, directory: Path) -> str | dict[str, str | int]:
    """Return `auto`, `balanced`, or the map in a JSON file.

    Raises:
        UsageError: there is no such file, or it holds no map of modules to devices.
    """
    if text in (AUTO, BALANCED):
        return text
    path = directory / Path(text).expanduser()
    refuse = partial(UsageError, hint='Write modules and devices in a JSON object, such as {"model.layers.0": "cpu"}.')
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        hint = f"Take {AUTO}, {BALANCED}, or a JSON file of modules and devices."
        raise UsageError(f"--device-map is '{text}', which cannot be read: {error.strerror}", hint) from error
    except ValueError as error:
        raise refuse(f"{path} is not JSON: {error}") from error
    if problem := mismatch(found, DeviceMap):
        raise refuse(f"{path}: {problem}")
    if not found:
        raise refuse(f"{path} names no module")
    for module, device in found.items():
        if not DEVICE.fullmatch(str(device)):
            raise refuse(f"{path}: '{module}' is to lie on '{device}', which is no device")
    return dict(found)


def _max_memory(text: str) -> dict[str, int]:
    """Read `cuda:0=70GiB,cpu=100GiB`, in bytes.

    Raises:
        UsageError: an unknown device or unit, or a device that occurs twice.
    """
    found = {}
    for device, size in _pairs(text, "--max-memory", MEMORY_HINT) if text else ():
        if device == "disk" or not DEVICE.fullmatch(device):
            raise UsageError(f"--max-memory names '{device}', which is no device with memory", MEMORY_HINT)
        number = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", size)
        if number is None or number[2].upper() not in UNITS:
            raise UsageError(f"--max-memory of {device} is '{size}'", MEMORY_HINT)
        found[device] = int(float(number[1]) * UNITS[number[2].upper()])
    return found


def _pairs(text: str, option: str, hint: str) -> list[tuple[str, str]]:
    """Split `name=value,name=value`."""
    found = [tuple(part.strip() for part in item.partition("=")[::2]) for item in text.split(",")]
    names = [name for name, _ in found]
    for name, value in found:
        if not name or not value:
            raise UsageError(f"{option} is '{text}'", hint)
        if names.count(name) > 1:
            raise UsageError(f"{option} names '{name}' twice", hint)
    return [(name, value) for name, value in found]
