"""`rr plan`: what an experiment takes in memory, FLOPs and hours, and whether it fits, from the skeleton alone.

Neither weights nor results are read, and nothing is written. Inside of an experiment its rr.toml counts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rrcli.configuration import SETTINGS_FILE
from rrcli.demo import defaults
from rrcli.errors import RRError, UsageError
from rrcli.experiment.planning import Load
from rrcli.experiment.workspace import Workspace, check_passes
from rrcli.models.inspection import inspect_weights
from rrcli.models.loading import load_tokenizer
from rrcli.models.quantisation import NONE, refuse, stored_format
from rrcli.reporting import Reporter
from rrcli.settings import EvalSettings, PlanSettings, S, SurgerySettings, TrainSettings, with_changes

if TYPE_CHECKING:
    from rrcli.experiment.hours import Pace, StageCost, TimedEstimate
    from rrcli.experiment.resources import Estimate, Memory
    from rrcli.experiment.workload import Workload
    from rrcli.models.devices import Device
    from rrcli.models.shares import Arrangement

# The share of a device's memory that may be filled: the rest is for its context, for kernels at work, and fragments.
USABLE = 0.92
GIB = 2**30
# Where nothing fits, so many devices are tried.
MORE_DEVICES = (2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True)
class PlanResult:
    """What an experiment takes.

    Attributes:
        model: about it, by name. device: whose figures are used. count: how many there are.
        room: bytes of a device that may be filled. efficiency: the share of its figures that is reached.
        memory: what a device holds in each command, in every arrangement. chosen: command -> the fastest arrangement
            that fits; absent where none does.
        paces: training and generation, in the arrangements chosen. caches: bytes that the caches of all passes hold for
            the texts that are generated, by depth.
        stages: the commands of `rr run`; empty where it cannot be run, or not everything fits.
        work: what the data holds. would_fit: what to change where something does not fit.
    """

    model: dict[str, Any]
    device: Device
    count: int
    room: int
    efficiency: float
    memory: list[Memory]
    chosen: dict[str, Arrangement]
    paces: list[Pace]
    caches: list[int]
    stages: list[StageCost]
    work: Workload
    would_fit: list[str]

    @property
    def misfits(self) -> list[str]:
        """The commands that fit in no arrangement."""
        return [name for name in dict.fromkeys(one.command for one in self.memory) if name not in self.chosen]

    @property
    def seconds(self) -> float:
        """How long the whole experiment takes at least."""
        return sum(stage.seconds for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, sizes in bytes and times in seconds."""
        return {
            "fits": not self.misfits,
            "model": self.model,
            "device": asdict(self.device) | {"count": self.count, "room": self.room, "efficiency": self.efficiency},
            "memory": [
                asdict(one) | {"arrangement": str(one.arrangement), "total": one.total, "fits": one.total <= self.room}
                for one in self.memory
            ],
            "chosen": {command: str(arrangement) for command, arrangement in self.chosen.items()},
            "would_fit": self.would_fit,
            "cache_bytes": self.caches,
            "paces": [asdict(pace) for pace in self.paces],
            "stages": [asdict(stage) for stage in self.stages],
            "seconds": self.seconds,
            "device_hours": self.seconds * self.count / 3600,
            "workload": asdict(self.work),
        }


def plan(
    settings: PlanSettings,
    load: Load,
    directory: Path,
    reporter: Reporter,
    *,
    hardware: str,
    given: Mapping[str, Mapping[str, Any]],
) -> PlanResult:
    """Estimate an experiment.

    Args:
        hardware: the device whose figures count, by name; '' for what `--gpus` suggests, else for this machine.
        given: section -> option -> value, as given on the command line.

    Raises:
        UsageError: a device that is not known, options that contradict each other, or a phase that trains quantised
            weights. RRError: there is no such model, or it cannot be run on shapes.
    """
    load = _with_demo(load, settings, directory, given)
    surgery, training, evaluation = load(SurgerySettings), load(TrainSettings), load(EvalSettings)
    check_passes(training, surgery.max_steps)
    device, count = _devices(settings.gpus, hardware)
    if settings.dtype == "auto" and device.kind == "cpu":  # as a model is loaded there
        settings = with_changes(settings, dtype="float32")
    workspace = Workspace(directory, settings)
    source = workspace.base()
    weights = inspect_weights(source.path)
    refuse(source, settings.quantize, trains=training.phase == "c", cut=False)

    from rrcli.experiment.hours import TimedEstimate
    from rrcli.experiment.resources import EVALUATE, GENERATE, RECURSIVE, VANILLA
    from rrcli.experiment.workload import workload
    from rrcli.models.few_bits import hold
    from rrcli.models.shares import arrangements
    from rrcli.models.skeleton import skeleton
    from rrcli.recursion.facts import context_length

    model = hold(skeleton(settings, source, weights.dtype), source, settings.quantize, fp8=device.fp8)
    held = stored_format(source) or settings.quantize
    try:
        tokenizer = load_tokenizer(source, trust_remote_code=settings.trust_remote_code)
    except RRError as error:
        reporter.warn(error.message)
        tokenizer = None
    work = workload(training, evaluation, directory, model, tokenizer)
    for notice in work.notices:
        reporter.note(notice)
    room = int(device.memory * USABLE)
    context = min(settings.context, context_length(model))
    estimate = TimedEstimate(
        model, surgery=surgery, training=training, evaluation=evaluation, device=device,
        efficiency=settings.efficiency, context=context, rows=settings.rows,
    )  # fmt: skip
    possible = arrangements(model, count, cut=held == NONE)
    with reporter.progress("plan", len(possible), "placements") as progress:
        memory: list[Memory] = []
        for arrangement in possible:
            memory += estimate.memory(arrangement, room)
            progress.advance(note=str(arrangement))
    chosen = _chosen(estimate, work, memory, room)
    fits = {one.command for one in memory} <= chosen.keys()
    trained, run = chosen.get(RECURSIVE), chosen.get(EVALUATE)
    stages: list[StageCost] = []
    if fits and VANILLA in chosen and trained is not None and run is not None:
        stages = list(estimate.stages(work, trained, run))
    paces = list(estimate.paces(work, trained, chosen.get(GENERATE)))
    if estimate.uncounted:
        reporter.warn(f"the FLOPs leave out what rr cannot count: {', '.join(sorted(estimate.uncounted))}")
    return PlanResult(
        model=_about(estimate, source.name) | {"quantised": held},
        device=device,
        count=count,
        room=room,
        efficiency=settings.efficiency,
        memory=memory,
        chosen=chosen,
        paces=paces,
        caches=estimate.token.held,
        stages=stages,
        work=work,
        would_fit=[]
        if fits
        else list(dict.fromkeys(_would_fit(estimate, possible, room, count, chosen, cut=held == NONE))),
    )


def _with_demo(load: Load, settings: PlanSettings, directory: Path, given: Mapping[str, Mapping[str, Any]]) -> Load:
    """Return what loads settings as they are after `rr setup`, which has values of its own for the embedded model."""
    if settings.model != "default" or (directory / SETTINGS_FILE).exists():
        return load

    def loading(cls: type[S]) -> S:
        own = defaults.SETTINGS.get(cls.SECTION, {})
        return with_changes(load(cls), **{k: v for k, v in own.items() if k not in given.get(cls.SECTION, {})})

    return loading


def _devices(gpus: str, hardware: str) -> tuple[Device, int]:
    """Return the device that `--gpus` and `--device` name, or this machine's, and how many there are.

    Raises:
        UsageError: one of them cannot be understood.
    """
    from rrcli.models import devices

    count, size = 1, 0.0
    if gpus:
        found = re.fullmatch(r"(\d+)(?:x(\d+(?:\.\d+)?))?", gpus.strip().lower())
        if found is None or not int(found[1]) or (found[2] and not float(found[2])):
            raise UsageError(f"--gpus is '{gpus}'", "Write how many there are and the GiB of each, such as 8x80.")
        count, size = int(found[1]), float(found[2] or 0)
    if hardware:
        device = devices.named(hardware)
        return (replace(device, memory=int(size * GIB)) if size else device), count
    if size:
        return devices.with_memory(size), count
    device, there = devices.this_machine()
    if gpus and device.kind == "cpu":
        raise UsageError(
            f"--gpus {gpus} does not say what they are", "Write the GiB of each, such as 8x80, or --device."
        )
    return device, count if gpus else there


def _chosen(estimate: TimedEstimate, work: Workload, memory: list[Memory], room: int) -> dict[str, Arrangement]:
    """Return for each command the fastest arrangement that fits; of equally fast ones the first."""
    found: dict[str, tuple[float, Arrangement]] = {}
    for one in memory:
        if one.total > room:
            continue
        seconds = estimate.slowness(one.command, work, one.arrangement)
        if one.command not in found or seconds < found[one.command][0]:
            found[one.command] = seconds, one.arrangement
    return {command: arrangement for command, (_, arrangement) in found.items()}


def _would_fit(
    estimate: Estimate, possible: list[Arrangement], room: int, count: int, chosen: Mapping[str, Arrangement], *,
    cut: bool,
) -> list[str]:  # fmt: skip
    """Return options with which everything would fit, each alone, as far as some are found.

    Args:
        cut: whether weights can be cut into parts.
    """
    from rrcli.models.shares import Arrangement

    def fits(other: Estimate, ways: list[Arrangement]) -> bool:
        memory = [one for way in ways for one in other.memory(way, room) if one.command not in chosen]
        return {one.command for one in memory} <= {one.command for one in memory if one.total <= room}

    settings, found = estimate.training, list[str]()
    train = any(name.startswith("train") for name in estimate.trained if name not in chosen)
    rows = max(1, settings.batch_size // max(1, count))
    fewer: list[dict[str, Any]] = [
        {"gradient_checkpointing": True},
        {"gradient_accumulation": rows},
        {"gradient_checkpointing": True, "gradient_accumulation": rows},
        {"gradient_checkpointing": True, "gradient_accumulation": rows, "max_length": max(8, settings.max_length // 4)},
    ]
    phases = [{"phase": phase} for phase in "ba" if phase < settings.phase]
    for tries in (fewer, [phase | changes for phase in phases for changes in ({}, *fewer)]) if train else ():
        for changes in tries:
            if fits(estimate.with_training(**changes), possible):
                found.append(" ".join(_written(name, value) for name, value in changes.items()))
                break
    for more in MORE_DEVICES if room else ():
        if more > count and fits(estimate, [*[Arrangement(fsdp=more)] * cut, Arrangement(mapped=more)]):
            found.append(f"--gpus {more}x{estimate.device.memory / GIB:.3g}")
            break
    return found


def _written(name: str, value: Any) -> str:
    """Return an option as `rr plan` takes it."""
    flag = "--train-max-length" if name == "max_length" else f"--{name.replace('_', '-')}"
    return flag if value is True else f"{flag} {value}"


def _about(estimate: Estimate, name: str) -> dict[str, Any]:
    """Return what the model is, and what is added to it."""
    from rrcli.models.footprint import weights_of

    weights, recursion = weights_of(estimate.running), estimate.running.recursion
    training = {command: weights_of(*pair) for command, pair in estimate.trained.items()}
    return {
        "name": name,
        "family": estimate.skeleton.config.model_type,
        "layers": len(recursion.layers),
        "span": [recursion.start, recursion.end],
        "max_steps": estimate.config.max_steps,
        "parameters": sum(p.numel() for p in estimate.skeleton.parameters()),
        "sidecar": sum(p.numel() for p in recursion.parameters()),
        "trained": {command: one.trained for command, one in training.items()},
        "dtype": estimate.dtype,
        "weight_bytes": weights.base,
        "phase": estimate.training.phase,
        "batch_size": estimate.training.batch_size,
        "length": estimate.length,
        "gradient_checkpointing": estimate.training.gradient_checkpointing,
        "gradient_accumulation": estimate.training.gradient_accumulation,
        "context": estimate.context,
        "rows": estimate.rows,
        "chunk_width": estimate.config.chunk_width,
    }
