"""Every option of every command, in one place: its type, default, help and limits.

A value comes from, in rising order: the default here, `rr.toml`, the environment (`RR_<SECTION>_<NAME>`), the command
line. The command line and the written `rr.toml` are both made from these dataclasses.
"""

from __future__ import annotations

import json
import math
import os
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from rrcli.errors import UsageError, suggest
from rrcli.recursion.config import LossWeights, RecursionConfig

SETTINGS_FILE = "rr.toml"
BOOLEANS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
STAGES = ("baseline", "after_surgery", "finetuned_vanilla", "finetuned_recursive")


def option(
    default: Any,
    help: str,
    *,
    panel: str = "Options",
    choices: tuple[str, ...] = (),
    minimum: float | None = None,
    maximum: float | None = None,
    aliases: tuple[str, ...] = (),
) -> Any:
    """Declare one option; everything that is known about it goes into the field's metadata."""
    metadata = {"help": help, "panel": panel, "choices": choices, "minimum": minimum, "maximum": maximum}
    metadata |= {"aliases": aliases}
    return field(default=default, metadata=metadata)


MODEL = "Model and data"
FILES = "Files and folders"
LOSS = "Losses"
LORA = "LoRA (phase b)"
GATES = "Gates"
OUTPUT = "Output"


@dataclass(frozen=True)
class CommonSettings:
    """What every stage shares, so that stages stay comparable. Section `[common]`."""

    SECTION = "common"

    model: str = option(
        "default",
        "Base model: 'default' (embedded), a hub id, a folder or a .gguf file.",
        panel=MODEL,
        aliases=("--model-path", "--model-name"),
    )
    data: str = option(
        "default",
        "Text: 'default' (embedded), a .txt, .jsonl, .csv or .parquet file, a folder of them, "
        "hf://NAME[:CONFIG[:SPLIT]] for a data set of the hub, or - for standard input. Rows may also be prompt and "
        "completion, or messages: then the completion, or what the assistant says, is trained on. "
        "One tenth is held out for evaluation.",
        panel=MODEL,
    )
    text_field: str = option(
        "text", "Field or column that holds the text, in .jsonl, .csv, .parquet and the hub.", panel=MODEL
    )
    task: tuple[str, ...] = option(
        (),
        "Reasoning task: NAME[:key=value,...] of reasoning-gym, or a .jsonl file of question and answer, of which one "
        "tenth is evaluated and the rest trained on (FILE.jsonl:held_out=all evaluates all of it and trains on none); "
        "repeat for several. [default: embedded]",
        panel=MODEL,
    )
    device: str = option("auto", "Where to compute: auto, cpu, cuda, cuda:1, mps.", panel=MODEL)
    dtype: str = option(
        "auto",
        "Number format of the weights.",
        panel=MODEL,
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    trust_remote_code: bool = option(False, "Run code that comes with the model.", panel=MODEL)
    seed: int = option(0, "Seed of everything that is drawn.", minimum=0)
    log_dir: str = option("logs", "TensorBoard logs.", panel=FILES)
    checkpoint_dir: str = option("checkpoints", "Surgery results and training checkpoints.", panel=FILES)
    output_dir: str = option("eval_results", "Evaluation results.", panel=FILES)


@dataclass(frozen=True)
class SetupSettings(CommonSettings):
    """`rr setup` writes the file and has no section of its own."""

    SECTION = "setup"


@dataclass(frozen=True)
class SurgerySettings(CommonSettings):
    """Section `[surgery]`."""

    SECTION = "surgery"

    span: str = option("all", "Decoder layers to run again: 'all' or START:END.")
    max_steps: int = option(RecursionConfig.max_steps, "The most passes after pass 0 (1 to 8).", minimum=1, maximum=8)
    cell_width: int = option(0, "Inner width of the feedback cell; 0 = the hidden size.", minimum=0)
    chunk_width: int = option(
        RecursionConfig.chunk_width, "Positions drafted and refined together, in tokens.", minimum=1
    )


@dataclass(frozen=True)
class TrainSettings(CommonSettings):
    """Section `[train]`."""

    SECTION = "train"

    steps: int = option(300, "Optimiser steps.", minimum=1)
    batch_size: int = option(8, "Examples in a step.", minimum=1)
    gradient_accumulation: int = option(1, "Parts that a step's batch is computed in.", minimum=1)
    lr: float = option(2e-5, "Peak learning rate (AdamW).", minimum=0)
    sidecar_lr: float = option(1e-3, "Peak learning rate of the feedback cell and the boundary head.", minimum=0)
    warmup_steps: int = option(20, "Steps of linear warm-up; the schedule follows.", minimum=0)
    schedule: str = option(
        "cosine",
        "Learning rate after the warm-up: cosine or linear to a tenth, or constant.",
        choices=("cosine", "linear", "constant"),
    )
    ema: float = option(
        0.0,
        "Average the weights over steps with this decay, e.g. 0.999, and evaluate and save the average; 0 = off.",
        minimum=0,
        maximum=0.99999,
    )
    num_processes: int = option(
        1,
        "Processes that share every batch, one GPU each; torchrun and accelerate launch set it themselves.",
        minimum=1,
    )
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass to save memory.")
    compile: bool = option(
        False, "Compile the decoder layers (torch.compile); the first step of each kind takes up to a minute longer."
    )
    weight_decay: float = option(0.0, "AdamW's weight decay, on matrices.", minimum=0)
    max_grad_norm: float = option(1.0, "Clip the gradient's norm to this; 0 = never.", minimum=0)
    max_length: int = option(256, "Longest example, in tokens; longer text is cut.", minimum=8)
    packing: bool = option(
        False, "Lay several short examples into one row of --max-length, where they do not see one another."
    )
    chat_template: bool = option(
        True, "Show problems and conversations through the tokenizer's chat template, if it has one."
    )
    task_share: float = option(0.75, "Share of reasoning problems in a batch; the rest is text.", minimum=0, maximum=1)
    phase: str = option(
        "c",
        "What trains: a = the sidecar, base frozen; b = a and LoRA on the span, which wants an --lr of about 2e-4; "
        "c = everything. Vanilla: b = the same LoRA, c = everything.",
        choices=("a", "b", "c"),
    )
    max_steps: int = option(0, "Train with at most this many passes; 0 = all that surgery made.", minimum=0)
    chunk_width: int = option(0, "Window of the chunk metrics, in tokens; 0 = as surgery set it.", minimum=0)
    eval_interval: int = option(100, "Evaluate every so many steps; 0 = never.", minimum=0)
    eval_samples: int = option(64, "Documents, and problems per task, in these evaluations.", minimum=1)
    save_interval: int = option(100, "Save a checkpoint every so many steps.", minimum=1)
    keep: int = option(2, "Checkpoints to keep, beside the best one.", minimum=1)
    histograms: int = option(0, "Log histograms of parameters and gradients every so many steps; 0 = never.", minimum=0)
    callback: str = option("", "MODULE:FUNCTION that is called after every step, for metrics of your own.")
    run_name: str = option(
        "", "Folder name under logs and checkpoints. [default: the stage that it trains]", panel=FILES
    )
    lora_rank: int = option(16, "Rank of the adapters.", panel=LORA, minimum=1)
    lora_alpha: int = option(32, "Adapters are scaled by alpha / rank.", panel=LORA, minimum=1)
    final_weight: float = option(LossWeights.final, "Weight of final_ce.", panel=LOSS, minimum=0)
    masked_weight: float = option(LossWeights.masked, "Weight of masked_ce.", panel=LOSS, minimum=0)
    halt_weight: float = option(LossWeights.halt, "Weight of halt.", panel=LOSS, minimum=0)
    ponder_weight: float = option(LossWeights.ponder, "Weight of ponder, after its warm-up.", panel=LOSS, minimum=0)
    stability_weight: float = option(LossWeights.stability, "Weight of stability.", panel=LOSS, minimum=0)
    supervised_share: float = option(
        LossWeights.share, "Share of positions that intermediate passes learn from.", panel=LOSS, minimum=0, maximum=1
    )
    commit_margin: float = option(
        LossWeights.margin, "A pass must gain more than this to be worth it, in nats.", panel=LOSS
    )


@dataclass(frozen=True)
class EvalSettings(CommonSettings):
    """Section `[eval]`."""

    SECTION = "eval"

    max_length: int = option(
        0, "Window of the perplexity, in tokens; 0 = the model's context, at most 1024.", minimum=0
    )
    stride: int = option(0, "Tokens that a window moves on by; 0 = the window's length.", minimum=0)
    max_samples: int = option(
        0, "Score only this many documents (a seeded choice), and problems of a --harness task; 0 = all.", minimum=0
    )
    problems: int = option(250, "Problems per reasoning task; of a file, at most these.", minimum=1)
    num_fewshot: int = option(
        -1, "Solved examples before each problem; -1 = none, and for --harness as the task says.", minimum=-1
    )
    stop: tuple[str, ...] = option(
        ("\nQuestion:",), "Text that ends an answer, with \\n for a line break; repeat for several."
    )
    max_new_tokens: int = option(48, "Longest answer, in tokens.", minimum=1)
    prompts: str = option(
        "", "Prompts to continue: a .txt file, one on each line, or a .jsonl file with 'prompt'. [default: embedded]"
    )
    harness: tuple[str, ...] = option(
        (), "Tasks of lm-evaluation-harness by name, comma-separated, or local task .yaml files or folders of them."
    )
    batch_tokens: int = option(8192, "Tokens in a batch.", minimum=1)
    depth: int = option(-1, "Passes after pass 0 for recursive stages; -1 = all.", minimum=-1)
    chat_template: bool = option(True, "Ask through the tokenizer's chat template, if it has one.")
    skip_perplexity: bool = option(False, "Leave out perplexity and token accuracy.")
    skip_reasoning: bool = option(False, "Leave out reasoning accuracy.")
    skip_generation: bool = option(False, "Leave out the sample generations.")
    skip_performance: bool = option(False, "Leave out speed, memory and FLOPs.")
    tensorboard: bool = option(True, "Log the results for TensorBoard.")


@dataclass(frozen=True)
class GenerateSettings(CommonSettings):
    """Section `[generate]`."""

    SECTION = "generate"

    max_new_tokens: int = option(128, "Longest continuation, in tokens.", minimum=1)
    temperature: float = option(0.0, "Sample at this temperature; 0 = always the most likely token.", minimum=0)
    top_p: float = option(1.0, "Sample from the likeliest tokens that hold this share.", minimum=0, maximum=1)
    top_k: int = option(0, "Sample from this many of the likeliest tokens; 0 = all.", minimum=0)
    depth: int = option(-1, "Passes after pass 0 for recursive stages; -1 = all.", minimum=-1)
    chunk_width: int = option(0, "Tokens drafted and refined together; 0 = as surgery set it.", minimum=0)
    stop: tuple[str, ...] = option((), "Text to end in front of, with \\n for a line break; repeat for several.")


@dataclass(frozen=True)
class CompareSettings(CommonSettings):
    """Section `[compare]`."""

    SECTION = "compare"

    alpha: float = option(0.05, "Family-wise error rate of the verdicts.", minimum=0, maximum=1)
    generations: bool = option(False, "Also show what the stages wrote after each prompt, side by side.")
    gate: tuple[str, ...] = option(
        (),
        "Fail (exit code 3) unless this holds of the values shown, noise or not: SIDE > SIDE, or < >= <= ==; a side is "
        "STAGE.METRIC, NUMBER * STAGE.METRIC or a number; repeat for several.",
        panel=GATES,
    )
    gate_significant: bool = option(
        False, "A gate also needs the paired test to show the difference, at alpha.", panel=GATES
    )
    format: str = option(
        "auto",
        "Form of the output; auto = table, or as the suffix of --out says.",
        panel=OUTPUT,
        choices=("auto", "table", "json", "csv", "markdown"),
    )
    out: str = option("", "Write to this file in place of the screen.", panel=OUTPUT)
    report: str = option("", "Also write a report with charts to this .html file (extra: report).", panel=OUTPUT)


@dataclass(frozen=True)
class BoardSettings(CommonSettings):
    """Section `[board]`."""

    SECTION = "board"

    port: int = option(6006, "First port to try.", minimum=0, maximum=65535)
    host: str = option("127.0.0.1", "Address to listen on.")
    reload_interval: int = option(5, "Seconds between looks at the logs.", minimum=1)
    open: bool = option(False, "Also open it in the browser.")


SECTIONS: tuple[type[CommonSettings], ...] = (
    CommonSettings,
    SurgerySettings,
    TrainSettings,
    EvalSettings,
    GenerateSettings,
    CompareSettings,
    BoardSettings,
)

S = TypeVar("S", bound=CommonSettings)


def own_fields(cls: type[CommonSettings]) -> list[Field[Any]]:
    """Return the options that a section adds to the common ones (all of them for the common section)."""
    common = {item.name for item in fields(CommonSettings)} if cls is not CommonSettings else set()
    return [item for item in fields(cls) if item.name not in common]


def load(
    cls: type[S],
    directory: Path,
    flags: Mapping[str, Any] | None = None,
    *,
    environment: Mapping[str, str] | None = None,
    use_file: bool = True,
) -> S:
    """Build the settings of one command from every source.

    Args:
        flags: what stood on the command line; None for options that were not given.
        environment: the process's own if not given.
        use_file: whether to read `rr.toml`.

    Raises:
        UsageError: an unknown key in `rr.toml` or a value out of its type or limits, with the place it stands.
    """
    file = read_file(directory) if use_file else {}
    environment = os.environ if environment is None else environment
    values: dict[str, tuple[Any, str]] = {}
    sections: tuple[type[CommonSettings], ...] = tuple(dict.fromkeys((CommonSettings, cls)))
    for section in sections:
        for item in own_fields(section):
            key = item.name
            if key in file.get(section.SECTION, {}):
                values[key] = (file[section.SECTION][key], f"{SETTINGS_FILE} [{section.SECTION}] {key}")
            for variable in (f"RR_{section.SECTION}_{key}".upper(),) + (
                (f"RR_{key}".upper(),) if section is CommonSettings else ()
            ):
                if variable in environment:
                    values[key] = (environment[variable], variable)
    for key, value in (flags or {}).items():
        if value is not None:
            values[key] = (value, "--" + key.replace("_", "-"))
    types = get_type_hints(cls)
    checked = {
        item.name: _check(item, types[item.name], *values[item.name]) for item in fields(cls) if item.name in values
    }
    return cls(**checked)


def read_file(directory: Path) -> dict[str, dict[str, Any]]:
    """Return the sections of `rr.toml`, or nothing where there is none.

    Raises:
        UsageError: no valid TOML, or an unknown section or key.
    """
    path = directory / SETTINGS_FILE
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid TOML: {error}", "Correct it, or run 'rr setup --overwrite'.") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    known = {section.SECTION: [item.name for item in own_fields(section)] for section in SECTIONS}
    home = {key: section for section, keys in reversed(known.items()) for key in keys}
    for name, table in document.items():
        if not isinstance(table, dict):
            section = name if name in known else home.get(name)
            hint = f"Put it under [{section}]." if section else suggest(name, home)
            raise UsageError(f"'{name}' in {path} stands outside a section", hint)
        if name not in known:
            raise UsageError(f"unknown section [{name}] in {path}", suggest(name, known))
        for key in table:
            if key not in known[name]:
                hint = f"It belongs in [{home[key]}]." if key in home else suggest(key, known[name])
                raise UsageError(f"unknown key '{key}' in {path}, section [{name}]", hint)
    return document


def write_file(common: CommonSettings, changes: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the text of an `rr.toml` that holds every option with its help, at its default or its changed value."""
    lines = ["# Options of every rr command. Flags and RR_<SECTION>_<NAME> variables override them."]
    for section in SECTIONS:
        lines += ["", f"[{section.SECTION}]"]
        for item in own_fields(section):
            value = getattr(common, item.name) if section is CommonSettings else item.default
            value = changes.get(section.SECTION, {}).get(item.name, value)
            lines += [f"# {item.metadata['help']}", f"{item.name} = {_toml(value)}"]
    return "\n".join(lines) + "\n"


def with_changes(settings: S, **changes: Any) -> S:
    """Return a copy with some values replaced."""
    return replace(settings, **changes)


def _check(item: Field[Any], kind: Any, value: Any, place: str) -> Any:
    try:
        value = _convert(kind, value)
    except (TypeError, ValueError) as error:
        name = getattr(kind, "__name__", str(kind)).replace("tuple", "list of strings")
        raise UsageError(f"{place} is {value!r}, which is no {name}") from error
    choices, minimum = item.metadata["choices"], item.metadata["minimum"]
    if choices and value not in choices:
        raise UsageError(f"{place} is '{value}'", suggest(str(value), choices))
    if minimum is not None and value < minimum:
        raise UsageError(f"{place} is {value}", f"It must be at least {minimum:g}.")
    maximum = item.metadata["maximum"]
    if maximum is not None and value > maximum:
        raise UsageError(f"{place} is {value}", f"It must be at most {maximum:g}.")
    return value


def _convert(kind: Any, value: Any) -> Any:
    if kind is bool:
        value = BOOLEANS.get(value.lower(), value) if isinstance(value, str) else value
        if not isinstance(value, bool):
            raise TypeError(value)
        return value
    if kind in (int, float):
        if isinstance(value, bool) or (kind is int and isinstance(value, float)):
            raise TypeError(value)
        number = kind(value)
        if not math.isfinite(number):
            raise ValueError(value)
        return number
    if kind is str:
        if not isinstance(value, str):
            raise TypeError(value)
        return value
    if isinstance(value, str):  # from the environment
        return tuple(part.strip() for part in value.split(";") if part.strip())
    if not all(isinstance(part, str) for part in value):
        raise TypeError(value)
    return tuple(value)


def _toml(value: Any) -> str:
    if value is MISSING:
        raise AssertionError("every option has a default")
    text = json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)
    return text.replace("\x7f", "\\u007f")  # JSON leaves it as it is, TOML forbids it
