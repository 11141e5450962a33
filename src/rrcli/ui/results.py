"""What the other commands show when they are done, each from the result of its service."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from rrcli.comparison import formats
from rrcli.ui.console import bytes_text, err, escape, out, show_pairs

if TYPE_CHECKING:
    from rrcli.experiment.exits import ExitChosen, ExitsResult
    from rrcli.experiment.planning import Step
    from rrcli.services.board import Board, Found
    from rrcli.services.eval import EvalResult
    from rrcli.services.export import ExportResult
    from rrcli.services.generate import GenerateResult
    from rrcli.services.push import PushResult
    from rrcli.services.serve import Served
    from rrcli.services.setup import SetupResult
    from rrcli.services.status import Status
    from rrcli.services.surgery import SurgeryResult
    from rrcli.services.train import TrainResult

STATUS_STYLES = {"done": "green", "missing": "yellow", "stale": "yellow", "unfinished": "cyan", "impossible": "red"}


def show_setup(result: SetupResult) -> None:
    """Print the table of checks."""
    table = Table(box=SIMPLE_HEAD)
    for name in ("Check", "", "Found"):
        table.add_column(name, overflow="fold")
    for check in result.checks:
        mark = "[green]ok[/green]" if check.ok else "[red]failed[/red]"
        table.add_row(check.name, mark, escape(check.found + (f"\n{check.hint}" if check.hint else "")))
    out().print(table)


def show_surgery(result: SurgeryResult) -> None:
    """Print what was added, what it costs at every depth, and what was proved."""
    share = 100 * result.added_parameters / result.base_parameters
    rows = {
        "Family": result.family,
        "Layers": f"{result.layers}, of which {result.span[0]}:{result.span[1]} run again",
        "Passes after pass 0": f"up to {result.max_steps}",
        "Base": f"{result.base_parameters:,} parameters, {bytes_text(result.base_bytes)}",
        "Added": f"{result.added_parameters:,} parameters ({share:.2f} %), {bytes_text(result.sidecar_bytes)}",
        "Written": bytes_text(result.bytes_written) if result.folder else "nothing (--dry-run)",
        "Verified": (
            "logits bit-identical to the base's, cached and uncached, at depths "
            + ", ".join(map(str, result.verified_depths))
            if result.verified_depths
            else "only that the output projection is zero (--no-verify)"
        ),
    }
    show_pairs(rows)
    if result.costs is None:
        return
    costs = result.costs
    title = f"every pass for every token, {costs.dtype}: the most that a token can cost"
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left")
    for name in ("Depth", "Cache growth", "Cache, constant", "MFLOPs", "times depth 0"):
        table.add_column(name, justify="right")
    values = zip(costs.cache_bytes_per_token, costs.cache_bytes_constant, costs.flops_per_token, strict=True)
    for depth, (growth, constant, flops) in enumerate(values):
        times = f"{flops / costs.flops_per_token[0]:.2f}" if costs.flops_per_token[0] else "-"
        table.add_row(
            str(depth), f"{bytes_text(growth)}/token", bytes_text(constant), formats.number(flops / 1e6), times
        )
    out().print(table)
    out().print(
        f"[dim]{escape(costs.flops_formula)}. Recurrent and convolution states do not grow. Decoding drafts with pass "
        "0, refines in chunks and may leave by an exit: 'rr costs' counts what it runs.[/dim]"
    )


def show_export(folder: Any) -> None:
    """Say where the folder that stands alone is, and how to load it."""
    how = "from_pretrained: the base; with trust_remote_code=True: recursive"
    out().print(f"Export: [bold]{escape(str(folder))}[/bold] ({how})")


def show_exported(result: ExportResult) -> None:
    """Say what a folder that stands alone holds, and how it is loaded."""
    trust = ", trust_remote_code=True" if result.recursive else ""
    out().print(f"Export: [bold]{escape(str(result.folder))}[/bold] ({bytes_text(result.bytes)})", soft_wrap=True)
    loaded = f'AutoModelForCausalLM.from_pretrained("{result.folder}"{trust})'
    out().print(f"In Python: {escape(loaded)}", soft_wrap=True)
    if result.adapters is not None:
        out().print(f"Adapters for peft: {escape(str(result.adapters))}", soft_wrap=True)


def show_pushed(result: PushResult) -> None:
    """Say where a model was uploaded to, and who can see it."""
    seen = {None: "as before", True: "private", False: "public"}[result.private]
    what = f"{result.files} files, {bytes_text(result.bytes)}, commit {result.commit[:7]}, {seen}"
    out().print(f"Pushed: [bold]{escape(result.url)}[/bold] ({what})", soft_wrap=True)


def show_served(served: Served) -> None:
    """Print the address of the server, and how to ask it."""
    what = f"{escape(served.model)} on {served.device} in {served.dtype}"
    out().print(f"Serving {what}: [bold]{served.url}[/bold]   (Ctrl-C stops it)", soft_wrap=True)
    out().print(escape(served.curl), soft_wrap=True)
    if not served.listed:
        out().print("This version of transformers does not list the model in /v1/models; name it as above.")


def show_eval(result: EvalResult) -> None:
    """Print a stage's metrics, and a second table with their values at every depth if there is recursion."""
    from rrcli.evaluation.metrics import KNOWN, metrics_of

    metrics = result.results["metrics"]
    table = Table(box=SIMPLE_HEAD, title=result.stage, title_justify="left")
    for name in ("Metric", "Value", "95 % interval", "n"):
        table.add_column(name, justify="left" if name == "Metric" else "right")
    for metric in metrics_of(metrics):
        entry = metrics[metric.name]
        low, high = entry.get("low"), entry.get("high")
        number = functools.partial(formats.number, percent=metric.unit == "%")
        interval = f"{number(low)} to {number(high)}" if low is not None and high is not None else ""
        count = formats.number(entry["n"]) if "n" in entry else ""
        table.add_row(escape(metric.label), f"{number(entry['value'])} {metric.unit}".strip(), interval, count)
    out().print(table)
    if result.preserved is not None and not result.preserved.broken:  # a broken one is shown as an error
        style = "green" if result.preserved.exact else "yellow"
        out().print(f"[{style}]{escape(result.preserved.sentence())}[/{style}]", soft_wrap=True)
    depths = {name: values for name, values in result.results["by_depth"].items() if len(values) > 1}
    if depths:
        table = Table(box=SIMPLE_HEAD, title="by depth", title_justify="left")
        table.add_column("Metric")
        for depth in range(max(map(len, depths.values()))):
            table.add_column(f"pass {depth}", justify="right")
        for name, values in depths.items():
            table.add_row(KNOWN[name].label, *[formats.number(entry["value"]) for entry in values])
        out().print(table)


def show_exits(result: ExitsResult) -> None:
    """Print the frontier of exit rules on the test side, and what was chosen."""
    points, n = result.results["test"], result.results["n"]
    counts = [f"{n['test'][part]:,} {part}" for part in ("problems", "documents", "tokens") if n["test"][part]]
    answers, base = bool(n["test"]["problems"]), next(p for p in points if p["name"] == "depth:0")
    cost, passes = ("mflop", "passes") if answers else ("text_mflop", "text_passes")
    table = Table(box=SIMPLE_HEAD, title=f"{result.stage}: exits on {', '.join(counts)}", title_justify="left")
    table.add_column("Exit")
    for name in (*(["Accuracy, %"] if answers else []), "Nats", "Passes", "MFLOP", "x pass 0"):
        table.add_column(name, justify="right")
    chosen = "" if result.chosen.rule is None else str(result.chosen.rule)
    last = ""
    for point in points:
        if last not in ("", point["rule"]):
            table.add_section()
        last = point["rule"]
        name = f"random, as {point['like'].partition(':')[2]}" if "like" in point else point["name"]
        cells = [formats.number(point["accuracy"]["value"] if point["accuracy"] else None, percent=True)] * answers
        cells += [formats.number(point[key]) for key in ("nats", passes, cost)]
        ratio = point[cost] / base[cost] if point[cost] is not None and base[cost] else None
        style = "bold green" if point["name"] == chosen else ""
        table.add_row(escape(name), *cells, formats.number(ratio), style=style)
    out().print(table)
    show_exit(result.chosen)


def show_exit(chosen: ExitChosen) -> None:
    """Print which exit was chosen, and what it does on the validation side."""
    out().print(escape(chosen.sentence()) + ".", soft_wrap=True)
    values = []
    for name, point in chosen.points.items():
        parts = [f"{formats.number(point['accuracy']['value'], percent=True)} % right"] if point["accuracy"] else []
        parts += [f"{formats.number(point['nats'])} nats a token"] if point["nats"] is not None else []
        cost, what = (point["mflop"], "an answer") if point["accuracy"] else (point["text_mflop"], "a token")
        values.append(f"{name} {', '.join([*parts, f'{formats.number(cost)} MFLOP {what}'])}")
    if values:
        out().print(f"Validation: {'; '.join(values)}.", soft_wrap=True)


def show_train(result: TrainResult) -> None:
    """Print what a training ended with."""
    if result.first_step == result.steps:
        out().print(f"The run was finished already at step {result.steps}.")
    rows = {"Run": result.run, "Steps": f"{result.steps:,}", "Training tokens": f"{result.tokens:,}"}
    rows["Training FLOPs"] = f"{result.flops:.3g}"
    rows["Training time"] = f"{result.seconds:.1f} s"
    show_pairs(rows | {f"Last {name}": f"{value:.4f}" for name, value in result.losses.items()})


def show_generation(result: GenerateResult, *, trace: bool) -> None:
    """Say what there is to know about a text; with a trace, say in one line how it came about."""
    if result.notice:
        err().print(f"[dim]{escape(result.notice)}[/dim]", soft_wrap=True)
    if not trace:
        return
    tokens = len(result.pieces)
    parts = [f"{result.stage}, depth {result.depth}", f"{tokens} tokens in {result.seconds:.1f} s"]
    if result.metrics:
        changed = sum(piece.changed for piece in result.pieces)
        parts.append(f"{result.metrics['avg_chunk_length']:.1f} committed per chunk")
        parts.append(f"{100 * result.metrics['commit_rate']:.0f} % of drafts whole")
        parts.append(f"{changed} changed by refining (underlined)")
    err().print(f"[dim]{escape('; '.join(parts))}[/dim]", soft_wrap=True)


def show_board(board: Board) -> None:
    """Print TensorBoard's address."""
    out().print(f"TensorBoard on [bold]{escape(str(board.log_dir))}[/bold]: [bold]{board.url}[/bold]", soft_wrap=True)
    out().print(f"From another machine: {escape(board.tunnel)}   (Ctrl-C stops it)", soft_wrap=True)


def show_board_check(found: Found) -> None:
    """Print the runs that TensorBoard shows and the tags of each, one a line."""
    for run, plugins in found.runs.items():
        counts = ", ".join(f"{len(tags)} {plugin}" for plugin, tags in plugins.items() if tags)
        out().print(f"[bold]{escape(run)}[/bold]: {counts or 'no data'}")
        for plugin, tags in plugins.items():
            for tag in tags:
                out().print(f"  {plugin:<10}  {escape(tag)}", soft_wrap=True)
    out().print(f"{len(found.runs)} runs in {escape(str(found.log_dir))}", soft_wrap=True)


def show_plan(steps: list[Step]) -> None:
    """Print what `rr run` would do."""
    table = Table(box=SIMPLE_HEAD)
    for name in ("", "Step", "Status", "Why"):
        table.add_column(name)
    for number, step in enumerate(steps, start=1):
        style = STATUS_STYLES[step.status]
        table.add_row(str(number), step.command, f"[{style}]{step.status}[/{style}]", escape(step.detail))
    out().print(table)


def show_status(status: Status) -> None:
    """Print the workspace, a line for each stage with its seeds and for each run, and the next command."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("Stage", no_wrap=True)
    table.add_column("Model", no_wrap=True)
    table.add_column("Results", no_wrap=True)
    for name in ("Step", "Size", "PPL", "Reas. %"):
        table.add_column(name, justify="right", no_wrap=True)
    marked = False
    lines = status.lines()
    for line in lines:
        states = [line.state(part) for part in ("model", "results")]
        shown = [f"[{STATUS_STYLES[state]}]{text}[/]" if text else "-" for text, state in states]
        cells = []
        for name, percent in (("perplexity", False), ("reasoning_accuracy", True)):
            value, during = line.metric(name)
            marked = marked or during
            cells.append(formats.number(value, percent=percent) + "*" * during)
        size = sum(member.bytes for member in line.members)
        table.add_row(escape(line.name), *shown, line.step, bytes_text(size, digits=1) if size else "-", *cells)
    console = out()
    console.print(table)
    for line in lines:
        for detail in line.details():
            console.print(f"{escape(line.name)}: {escape(detail)}", soft_wrap=True)
    if len(status.seeds) > 1:
        console.print(f"Seeds {', '.join(map(str, status.seeds))}; metrics are their means", soft_wrap=True)
    if marked:
        console.print("[dim]* measured during training, on a sample[/dim]", soft_wrap=True)
    console.print(f"Next: [bold]{escape(status.next)}[/bold]", soft_wrap=True)
