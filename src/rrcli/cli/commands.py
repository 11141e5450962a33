"""The commands. Each reads its command line, loads its settings, calls one service, and shows the result."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from rrcli import settings
from rrcli.cli.options import FILES, OUTPUT, Context, app, command, run_flags, section_flags
from rrcli.errors import CheckFailed, RRError, UsageError
from rrcli.settings import STAGES, CommonSettings
from rrcli.training.launching import speaks
from rrcli.ui import console, results
from rrcli.ui.console import TerminalReporter

__all__ = ["app"]

STAGE_HELP = f"Stage: {', '.join(STAGES)}."
# Groups of common options, for the commands that do not read all of them.
PLACEMENT = ("device", "dtype", "quantize", "parallel", "device_map", "max_memory")
LOADING = ("model", *PLACEMENT, "trust_remote_code", "seed", "checkpoint_dir")
LOGS = ("log_dir", "output_dir")
# Of the commands that hand a model on.
EXPORTING = ("trust_remote_code", "seed", "checkpoint_dir", "output_dir")
TEXT = ("data", "eval_data", "text_field", "on_bad_row", "template_date")
DATA = (*TEXT, "task")
# The options of `rr run` that decide what an experiment takes.
PLANNED = (
    *("model", "data", "eval_data", "text_field", "task", "dtype", "quantize", "trust_remote_code", "seed", "seeds"),
    *(
        "equal_flops",
        "span",
        "max_steps",
        "cell_width",
        "chunk_width",
        "phase",
        "steps",
        "batch_size",
        "train_max_length",
    ),
    *(
        "train_max_steps",
        "lora_rank",
        "lora_experts",
        "ema",
        "gradient_accumulation",
        "gradient_checkpointing",
        "packing",
        "task_share",
    ),
    *("supervised_share", "eval_interval", "eval_samples"),
    *("problems", "max_samples", "samples", "eval_max_length", "max_new_tokens", "batch_tokens"),
    *("skip_perplexity", "skip_reasoning", "skip_performance"),
)
# Suffix of a file -> the form of a comparison; and those forms that hold its values alone, without its texts.
FORMS = {".json": "json", ".csv": "csv", ".md": "markdown", ".tex": "latex", ".parquet": "parquet"}
VALUES_ALONE = ("csv", "latex", "parquet")
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.", rich_help_panel=OUTPUT)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what exists already.", rich_help_panel=FILES)]
Merge = Annotated[
    bool, typer.Option("--merge", help="Add the LoRA adapters of a model without recursion to its weights.")
]
Exportable = Annotated[
    str, typer.Argument(metavar="RUN", help="Stage, name of a run, folder of a checkpoint, or export.")
]
Stage = Annotated[str, typer.Option("--stage", help=STAGE_HELP)]
EXPERIMENT, LOOK, SHARE = "Run the experiment", "Look at the results", "Use the model elsewhere"


@command(EXPERIMENT, section_flags(CommonSettings, None), writes=True)
def setup(ctx: Context, overwrite: Overwrite = False, json: Json = False) -> None:
    """Create folders and rr.toml, and check that everything is there."""
    from rrcli.services import setup as service

    loaded = ctx.load(CommonSettings, use_file=not overwrite)
    result = service.setup(loaded, ctx.directory, TerminalReporter(), given=ctx.given, overwrite=overwrite)
    if json:
        console.show_json("setup", {"ok": result.ok, "checks": [vars(check) for check in result.checks]})
    else:
        results.show_setup(result)
    failed = [check.name for check in result.checks if not check.ok]
    if failed:
        raise CheckFailed(f"failed: {', '.join(failed)}", "Correct what the table says, then run 'rr setup' again.")
    if not json:
        console.show_next("Settings:", result.settings_file, "rr eval --stage baseline   (or 'rr run' for everything)")


@command(EXPERIMENT, section_flags(settings.SurgerySettings, LOADING), writes=True)
def surgery(
    ctx: Context,
    overwrite: Overwrite = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write nothing.")] = False,
    verify: Annotated[
        bool,
        typer.Option(help="Prove on probe prompts that no logit changed; without this proof, weights are not loaded."),
    ] = True,
    hash: Annotated[
        bool, typer.Option("--hash", help="Record the SHA-256 of every weight file of the base, which reads them all.")
    ] = False,
    export: Annotated[
        Path | None,
        typer.Option(
            "--export", help="Also make this folder, which needs no other: base (hard links), tokenizer and sidecar.",
            rich_help_panel=FILES, show_default=False,
        ),
    ] = None,
    json: Json = False,
) -> None:  # fmt: skip
    """Attach a zero-initialised recursion to the base model, and prove that nothing changed."""
    from rrcli.services import surgery as service

    result = service.surgery(
        ctx.load(settings.SurgerySettings), ctx.directory, TerminalReporter(),
        overwrite=overwrite, dry_run=dry_run, verify=verify, hash_weights=hash, export=export,
    )  # fmt: skip
    if not speaks():
        return
    if json:
        console.show_json("surgery", asdict(result))
        return
    results.show_surgery(result)
    if result.export:
        results.show_export(result.export)
    if result.folder:
        console.show_next("Sidecar:", result.folder, "rr eval --stage after_surgery")


@command(EXPERIMENT, section_flags(settings.TrainSettings, (*LOADING, *DATA, "log_dir", "tracker")), writes=True)
def train(
    ctx: Context,
    mode: Annotated[str, typer.Option("--mode", help="Training mode: recursive or vanilla.")] = "recursive",
    restart: Annotated[
        bool, typer.Option("--restart", help="Delete the run's checkpoints and start again.", rich_help_panel=FILES)
    ] = False,
    match_flops: Annotated[
        str,
        typer.Option(
            "--match-flops",
            help="Train vanilla until it has spent the FLOPs of the run of this name.",
            rich_help_panel=settings.OPTIMISER,
        ),
    ] = "",
    json: Json = False,
) -> None:
    """Fine-tune with or without recursion; continues from the last checkpoint."""
    from rrcli.experiment.replicates import RECURSIVE_STAGE, replicate
    from rrcli.services import train as service

    loaded = ctx.load(settings.TrainSettings)
    result = service.train(loaded, mode, ctx.directory, TerminalReporter(), restart=restart, match_flops=match_flops)
    if not speaks():
        return
    if json:
        console.show_json("train", vars(result))
        return
    results.show_train(result)
    one = replicate(result.stage, loaded)
    other = "" if result.run == one.name else f" --model {result.checkpoint}"
    choice = " --choose-exit" if one.stage == RECURSIVE_STAGE else ""
    command = f"rr eval --stage {one.stage}{choice}{one.flag}{other}"
    console.show_next("Checkpoint:", result.checkpoint, command)


@command(EXPERIMENT, section_flags(settings.EvalSettings, (*LOADING, *DATA, *LOGS, "tracker")), writes=True)
def eval(
    ctx: Context,
    stage: Stage = "baseline",
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "--model-path", "--model-name",
            help="Model to measure as this stage. \\[default: the stage's own]",
            rich_help_panel=settings.MODEL, show_default=False,
        ),
    ] = None,
    use_recursive: Annotated[
        bool | None,
        typer.Option(
            "--use-recursive/--no-use-recursive",
            help="Measure with recursion; --no-use-recursive measures without. \\[default: as the stage]",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
) -> None:  # fmt: skip
    """Measure a stage: perplexity, accuracy, reasoning, generations, speed."""
    from rrcli.comparison.preservation import require_preserved
    from rrcli.services import eval as service

    loaded = ctx.load(settings.EvalSettings)
    if loaded.exits or loaded.choose_exit:
        _eval_exits(ctx, loaded, stage, model, json)
        return
    result = service.evaluate(
        loaded, stage, ctx.directory, TerminalReporter(), model=model, use_recursive=use_recursive
    )
    if not speaks():
        return
    if json:
        console.show_json("evaluation", {key: value for key, value in result.results.items() if key != "schema"})
    else:
        results.show_eval(result)
    require_preserved(result.preserved)
    if json:
        return
    command = "rr surgery" if stage == "baseline" else f"rr compare baseline {stage}"
    console.show_next("Results:", result.file, command)


def _eval_exits(ctx: Context, loaded: settings.EvalSettings, stage: str, model: str | None, json: bool) -> None:
    from rrcli.experiment.exits import choose_exit, measure_exits
    from rrcli.experiment.replicates import replicate

    one = replicate(stage, loaded)
    command = f"rr eval --stage {one.stage}{one.flag}" + (f" --model {model}" if model else "")
    if not loaded.exits:
        chosen = choose_exit(loaded, stage, ctx.directory, TerminalReporter(), model=model)
        if not speaks():
            return
        if json:
            console.show_json("exit", chosen.to_dict())
        else:
            results.show_exit(chosen)
            console.show_next("Checkpoint:", chosen.checkpoint, command)
        return
    result = measure_exits(loaded, stage, ctx.directory, TerminalReporter(), model=model)
    if not speaks():
        return
    if json:
        console.show_json(
            "exits", {key: value for key, value in result.results.items() if key not in ("schema", "kind")}
        )
        return
    results.show_exits(result)
    console.show_next("Exits:", result.file, command)


@command(EXPERIMENT, section_flags(settings.CostsSettings, (*LOADING, *TEXT, *LOGS, "tracker")), writes=True)
def costs(
    ctx: Context,
    stages: Annotated[
        list[str] | None, typer.Argument(help=r"Stages to measure. \[default: all that have a model]")
    ] = None,
    json: Json = False,
) -> None:
    """Measure speed, memory and FLOPs of several stages in turns, a process for each.

    Speeds that were measured one after the other differ because the machine does: only these can be compared. What is
    measured at which depth follows the options of rr eval in rr.toml.
    """
    from rrcli.services import costs as service
    from rrcli.ui.comparison import show_costs

    loaded, evaluation = ctx.load(settings.CostsSettings), ctx.load(settings.EvalSettings)
    result = service.costs(loaded, evaluation, stages or [], ctx.directory, TerminalReporter())
    if json:
        console.show_json("costs", {key: value for key, value in result.costs.items() if key != "schema"})
        return
    show_costs(result)
    console.show_next("Costs:", result.file, "rr compare")


@command(LOOK, section_flags(settings.CompareSettings, LOGS))
def compare(
    ctx: Context,
    stages: Annotated[
        list[str] | None, typer.Argument(help="Stages or results files; the first is the reference. \\[default: all]")
    ] = None,
    json: Json = False,
) -> None:
    """Compare stages: which differences are shown, which may be noise, and what they cost."""
    from rrcli.services import compare as service

    loaded = ctx.load(settings.CompareSettings)
    form = _form(loaded, json)
    _show_comparison(service.compare(loaded, stages or [], ctx.directory), loaded, ctx.directory, form)


@command(LOOK, section_flags(settings.GenerateSettings, LOADING))
def generate(
    ctx: Context,
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads standard input.")],
    stage: Annotated[str | None, typer.Option("--stage", help=f"{STAGE_HELP} \\[default: the last one made]")] = None,
    trace: Annotated[
        bool,
        typer.Option("--trace", help="Colour each token by its passes; underline what a later pass changed."),
    ] = False,
    json: Json = False,
) -> None:
    """Continue a prompt; a recursive model drafts, refines and commits chunks."""
    from rrcli.services import generate as service

    text = _standard_input() if prompt == "-" else prompt
    loaded, writer = ctx.load(settings.GenerateSettings), console.PieceWriter(text, trace=trace)
    emit = (lambda piece: None) if json else writer
    result = service.generate(loaded, text, ctx.directory, emit, stage=stage, reporter=TerminalReporter())
    if not speaks():
        return
    if json:
        console.show_json("generation", result.to_dict())
        return
    writer.end()
    results.show_generation(result, trace=trace)


@command(SHARE, section_flags(CommonSettings, EXPORTING))
def export(
    ctx: Context,
    name: Exportable,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="New folder.")],
    merge: Merge = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Make a folder of a model that needs no other, for transformers, lm-eval and peft.

    AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True) loads it with its recursion, where rrcli is
    installed. Weight files are hard links where they can be.
    """
    from rrcli.services import export as service

    result = service.export(
        ctx.load(CommonSettings), name, folder, ctx.directory, TerminalReporter(),
        overwrite=overwrite, merge=merge, comparison=_comparison_text(ctx),
    )  # fmt: skip
    if json:
        console.show_json("export", asdict(result))
    else:
        results.show_exported(result)


@command(SHARE, section_flags(settings.ServeSettings, ("device", "dtype", *EXPORTING[:-1])))
def serve(
    ctx: Context,
    name: Exportable,
    json: Json = False,
) -> None:
    """Serve a model on this machine with transformers' own server, in the form of OpenAI's API.

    It listens on 127.0.0.1 and answers one request at a time, without continuous batching, which would leave the
    recursion out. Ctrl-C ends it.
    """
    from rrcli.services import serve as service

    started = (lambda served: console.show_json("serve", vars(served))) if json else results.show_served
    service.serve(ctx.load(settings.ServeSettings), name, ctx.directory, TerminalReporter(), started=started)


@command(SHARE, section_flags(CommonSettings, EXPORTING))
def push(
    ctx: Context,
    name: Exportable,
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Repository of the hub: OWNER/NAME.")],
    public: Annotated[bool, typer.Option("--public", help="Let everybody see a repository that is made here.")] = False,
    merge: Merge = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Upload also where something else lies.", rich_help_panel=FILES)
    ] = False,
    json: Json = False,
) -> None:
    """Upload a model to the Hugging Face hub, as rr export makes it, in one commit.

    A new repository is private unless --public is given. 'hf auth login' logs in.
    """
    from rrcli.services import push as service

    result = service.push(
        ctx.load(CommonSettings), name, repo, ctx.directory, TerminalReporter(),
        public=public, overwrite=overwrite, merge=merge, comparison=_comparison_text(ctx),
    )  # fmt: skip
    if json:
        console.show_json("push", asdict(result))
    else:
        results.show_pushed(result)


def _comparison_text(ctx: Context) -> str:
    """Return the comparison of what was measured as Markdown; '' where there is none."""
    from rrcli.services import compare as comparing
    from rrcli.ui.comparison import comparison_text

    loaded = replace(ctx.load(settings.CompareSettings), generations=False, report="", gate=())
    try:
        return comparison_text(comparing.compare(loaded, [], ctx.directory), "markdown")
    except RRError:
        return ""


@command(LOOK, section_flags(settings.BoardSettings, ("log_dir",)))
def board(
    ctx: Context,
    check: Annotated[
        bool, typer.Option("--check", help="Print the runs and tags that TensorBoard finds, and exit.")
    ] = False,
    json: Json = False,
) -> None:
    """Open TensorBoard on the logs."""
    from rrcli.services import board as service

    if check:
        found = service.check(ctx.load(settings.BoardSettings), ctx.directory)
        if json:
            console.show_json("board_check", vars(found))
        else:
            results.show_board_check(found)
        return
    started = (lambda board: console.show_json("board", vars(board))) if json else results.show_board
    service.board(ctx.load(settings.BoardSettings), ctx.directory, TerminalReporter(), started=started)


@command(EXPERIMENT, [*section_flags(settings.PlanSettings, ()), *(f for f in run_flags() if f.name in PLANNED)])
def plan(
    ctx: Context,
    device: Annotated[
        str,
        typer.Option(
            "--device",
            help="Device whose figures count: a100, h100, h200, b200, l40s, rtx4090, mi300x, or cpu (measured). "
            "\\[default: by the GiB of --gpus, else this machine's]",
            show_default=False,
        ),
    ] = "",
    json: Json = False,
) -> None:
    """Estimate memory, FLOPs and hours of the whole experiment, and say which placement fits, before weights are read.

    Exit code 1 if nothing fits.
    """
    from rrcli.services import plan as service
    from rrcli.ui.footprint import show_footprint

    result = service.plan(
        ctx.load(settings.PlanSettings),
        ctx.load,
        ctx.directory,
        TerminalReporter(),
        hardware=device,
        given=ctx.given,
    )
    if json:
        console.show_json("footprint", result.to_dict())
    else:
        show_footprint(result)
    if result.misfits:
        hint = f"What would fit: {'; or '.join(result.would_fit)}." if result.would_fit else ""
        devices = f"{result.count} x {result.device.memory / 2**30:.3g} GiB"
        raise RRError(f"{', '.join(result.misfits)}: does not fit on {devices}", hint)


@command(EXPERIMENT, run_flags(), writes=True)
def run(
    ctx: Context,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan, or the script of --slurm, and do nothing.")
    ] = False,
    slurm: Annotated[
        str,
        typer.Option(
            "--slurm",
            help="Do it in a job of SLURM: nodes=2,gpus=8,time=4h,partition=gpu and further options of sbatch. The "
            "processes on all machines share the work, as --parallel says. The job goes on when it is queued again.",
            rich_help_panel=settings.COMPUTE,
        ),
    ] = "",
    launcher: Annotated[
        str,
        typer.Option(
            "--launcher",
            help="Program that starts each training and evaluation, such as 'torchrun --nproc-per-node 8 -m rrcli'.",
            rich_help_panel=settings.COMPUTE,
        ),
    ] = "",
    json: Json = False,
) -> None:
    """Run the whole experiment: every stage that is missing or out of date, their costs, then the comparison.

    Options that are given here are written to rr.toml, as by 'rr setup', so that the next 'rr run' is of the same
    experiment. --max-steps and --chunk-width are those of the surgery, which training follows; --train-max-steps and
    --train-chunk-width train with others.
    """
    from rrcli.cli.performing import in_a_job, perform
    from rrcli.comparison.claims import read_declaration
    from rrcli.experiment.planning import plan, refuse_phase_a
    from rrcli.services import compare as comparing
    from rrcli.services import run as service

    for section in settings.PERFORMED:  # so that a wrong value is refused before any work is done
        ctx.load(section)
    refuse_phase_a(ctx.load(settings.TrainSettings))
    read_declaration(ctx.load(settings.CompareSettings))
    form = _form(ctx.load(settings.CompareSettings), json)
    if slurm:
        in_a_job(ctx, slurm, dry_run=dry_run, json=json)
        return
    if dry_run:
        steps = plan(ctx.directory, ctx.load, new_options=bool(ctx.given))
        if json:
            console.show_json("plan", {"steps": [step.to_dict() for step in steps]})
        else:
            results.show_plan(steps)
        return
    service.run(
        ctx.directory, ctx.load, TerminalReporter(),
        perform=lambda step: perform(step, ctx, launcher), new_options=bool(ctx.given),
    )  # fmt: skip
    loaded = ctx.load(settings.CompareSettings)
    result = comparing.compare(loaded, [], ctx.directory)
    _show_comparison(result, loaded, ctx.directory, form)
    if json:
        return
    console.show_next("Results:", ctx.directory / ctx.load(CommonSettings).output_dir, "rr board")


@command(LOOK, section_flags(CommonSettings, ("checkpoint_dir", "output_dir")))
def status(ctx: Context, json: Json = False) -> None:
    """Show what is done, stale or missing, and which command comes next."""
    from rrcli.services import status as service

    found = service.status(ctx.directory, ctx.load)
    if json:
        console.show_json("status", asdict(found))
    else:
        results.show_status(found)


def _form(chosen: settings.CompareSettings, json: bool) -> str:
    """Return the form in which a comparison is shown or written; refuse one that cannot be, before it is computed."""
    form = "json" if json else chosen.format
    if form == "auto":
        form = FORMS.get(Path(chosen.out).suffix.lower(), "table")
    if chosen.generations and form in VALUES_ALONE:
        raise UsageError(f"--generations and --format {form} do not go together", "Take table, json or markdown.")
    if form == "parquet":
        from rrcli.comparison.tables import check_parquet

        check_parquet()
        if not chosen.out:
            raise UsageError("parquet cannot be shown on the screen", "Name a file: --out FILE.parquet.")
    return form


def _show_comparison(result: Any, chosen: settings.CompareSettings, directory: Path, form: str) -> None:
    """Show a comparison in the form that was asked for, or write it to a file; then fail if a gate does not hold."""
    from rrcli.comparison.gates import require_gates
    from rrcli.files import write_bytes, write_text
    from rrcli.ui.comparison import comparison_text, show_comparison

    if chosen.out:
        file = directory / Path(chosen.out).expanduser()
        if form == "parquet":
            from rrcli.comparison import written

            write_bytes(file, written.parquet(result))
        else:
            write_text(file, comparison_text(result, form))
        TerminalReporter().note(f"Comparison: {file}")
    elif form == "table":
        show_comparison(result)
    else:
        typer.echo(comparison_text(result, form), nl=False)
    if chosen.report:
        from rrcli.comparison.report import render
        from rrcli.experiment.workspace import Workspace

        page = directory / Path(chosen.report).expanduser()
        write_text(page, render(result, Workspace(directory, chosen).log_folder()))
        TerminalReporter().note(f"Report: {page}")
    if result.broken_surgery:
        raise CheckFailed(
            "surgery did not preserve the baseline, so nothing is said about recursion",
            "'rr setup' checks the installation; 'rr surgery --overwrite' and 'rr eval' make the stages again.",
        )
    require_gates(result.gates)


def _standard_input() -> str:
    """Return standard input as it is, but for the line ends at its end.

    Raises:
        UsageError: it is not UTF-8.
    """
    try:
        return typer.get_binary_stream("stdin").read().decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"standard input is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}"
        ) from None
