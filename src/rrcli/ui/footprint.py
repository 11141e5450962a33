"""What `rr plan` shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table

from rrcli.comparison import formats
from rrcli.ui.console import bytes_text, escape, out, show_pairs

if TYPE_CHECKING:
    from rrcli.services.plan import PlanResult

# Part of what a device holds -> how the table calls it.
HELD = {
    "base": "weights",
    "sidecar": "sidecar, LoRA",
    "gradients": "gradients",
    "optimiser": "optimiser",
    "together": "put together",
    "activations": "activations",
    "logits": "logits",
    "caches": "caches",
}


def show_footprint(result: PlanResult) -> None:
    """Print what an experiment takes: memory by part and by placement, speed, and the stages' hours."""
    about, device = result.model, result.device
    trained = ", ".join(f"{name.removeprefix('train ')} {count:,}" for name, count in about["trained"].items())
    extras = [f"{about['gradient_accumulation']} parts"] * (about["gradient_accumulation"] > 1)
    extras += ["activations recomputed"] * about["gradient_checkpointing"]
    held = "" if about["quantised"] == "none" else f", quantised ({about['quantised']})"
    show_pairs(
        {
            "Model": f"{about['name']}: {about['family']}, {about['parameters']:,} parameters, {about['dtype']}{held}",
            "Recursion": f"{about['sidecar']:,} parameters, layers {about['span'][0]}:{about['span'][1]} of "
            f"{about['layers']}, up to {about['max_steps']} passes after pass 0",
            "Training": f"phase {about['phase']}: {trained} weights; {about['batch_size']} examples of at most "
            f"{about['length']} tokens" + "".join(f", {extra}" for extra in extras),
            "Devices": f"{result.count} x {device.name}, {bytes_text(device.memory)} each, of which "
            f"{bytes_text(result.room)} may be filled",
        }
    )
    commands = list(dict.fromkeys(one.command for one in result.memory))
    shown = {
        command: min(
            (one for one in result.memory if one.command == command),
            key=lambda one: (one.arrangement != result.chosen.get(one.command), one.total),
        )
        for command in commands
    }
    table = Table(box=SIMPLE_HEAD, title="memory of a device", title_justify="left")
    table.add_column("")
    for command in commands:
        table.add_column(command, justify="right")
    table.add_row("placement", *[str(one.arrangement).removeprefix("--parallel ") for one in shown.values()])
    table.add_row("texts at a time", *[str(one.rows) for one in shown.values()], end_section=True)
    for part, name in HELD.items():
        sizes = [getattr(one, part) for one in shown.values()]
        if any(sizes):
            table.add_row(name, *[bytes_text(size) if size else "-" for size in sizes])
    table.add_section()
    table.add_row("together", *[_fitting(one.total, result.room) for one in shown.values()])
    out().print(table)
    _show_placements(result, commands)
    table = Table(box=SIMPLE_HEAD, title="speed, at most", title_justify="left")
    for name in ("", "Depth", "MFLOP/token", "Tokens/s", "Bound by"):
        table.add_column(name, justify="right" if name in ("Depth", "MFLOP/token", "Tokens/s") else "left")
    for pace in result.paces:
        numbers = formats.number(pace.flops / 1e6), formats.number(pace.tokens_per_second)
        depth = f"1-{pace.depth}" if pace.what.startswith("train") and pace.depth > 1 else str(pace.depth)
        table.add_row(pace.what, depth, *numbers, pace.bound)
    if result.paces:
        out().print(table)
    if result.stages:
        _show_hours(result)
    caches = ", ".join(f"{bytes_text(size)} at depth {depth}" for depth, size in enumerate(result.caches))
    texts = "a text" if about["rows"] == 1 else f"{about['rows']} texts"
    lines = [f"Caches of {texts} of {about['context']:,} tokens: {caches}."]
    lines.append(
        f"Times are bounds at {result.efficiency:.0%} of what {device.name} can do ({device.source}); loading, saving "
        "and waiting are not in them."
    )
    out().print(f"[dim]{escape(' '.join(lines))}[/dim]")


def _show_placements(result: PlanResult, commands: list[str]) -> None:
    """Print what a device holds in each command, in every arrangement."""
    arrangements = list(dict.fromkeys(one.arrangement for one in result.memory))
    if len(arrangements) == 1:
        return
    table = Table(box=SIMPLE_HEAD, title="memory of a device, by placement", title_justify="left")
    table.add_column("Placement", no_wrap=True)
    for command in commands:
        table.add_column(command, justify="right")
    found = {(one.arrangement, one.command): one.total for one in result.memory}
    for arrangement in arrangements:
        sizes = [found.get((arrangement, command)) for command in commands]
        table.add_row(str(arrangement), *["-" if size is None else _fitting(size, result.room) for size in sizes])
    out().print(table)


def _show_hours(result: PlanResult) -> None:
    """Print what each command of the experiment takes, and all of them."""
    table = Table(box=SIMPLE_HEAD, title="rr run, at least", title_justify="left")
    for name in ("Command", "Times", "TFLOP", "Time", "Device hours"):
        table.add_column(name, justify="left" if name == "Command" else "right")
    for stage in result.stages:
        hours = stage.seconds * result.count / 3600
        table.add_row(
            stage.command, str(stage.times), formats.number(stage.flops / 1e12), _duration(stage.seconds),
            formats.number(hours),
        )  # fmt: skip
    table.add_section()
    flops = sum(stage.flops for stage in result.stages) / 1e12
    hours = result.seconds * result.count / 3600
    table.add_row("everything", "", formats.number(flops), _duration(result.seconds), formats.number(hours))
    out().print(table)


def _fitting(size: int, room: int) -> str:
    """Return a size, green where there is room for it; what does not fit is marked, also without colours."""
    return f"[green]{bytes_text(size)}[/green]" if size <= room else f"[red]{bytes_text(size)} no[/red]"


def _duration(seconds: float) -> str:
    """Return seconds in the unit in which they are easiest to read."""
    for limit, divisor, unit in ((100, 1, "s"), (6000, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{formats.number(seconds / divisor)} {unit}"
    return f"{formats.number(seconds / 86400)} d"
