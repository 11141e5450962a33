"""Declare every option of every command, in one place: its type, default, help, limits and what it reaches.

The command line and the `rr.toml` that `rr setup` writes are both made from these dataclasses; `configuration` fills
them.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import Field, dataclass, field, fields, replace
from enum import Flag, auto
from typing import Any, TypeVar

from rrcli.recursion.config import LossWeights, RecursionConfig, parse_span

STAGES = ("baseline", "after_surgery", "finetuned_vanilla", "finetuned_recursive", "vanilla_equal_flops")


# The panels of `--help`, in the order in which they are shown. The first holds the options of every day.
EVERYDAY = "Options"
MODEL = "Model and data"
EXAMPLES = "Training examples"
OPTIMISER = "Optimiser"
RECURSION = "Recursion"
LORA = "LoRA (phase b)"
LOSS = "Losses of recursive training"
PERPLEXITY = "Perplexity"
PROBLEMS = "Reasoning problems"
PARTS = "What is measured"
TRACKING = "Evaluation, checkpoints and logs during training"
COMPUTE = "Device, speed and memory"
SAMPLING = "Sampling"
CLAIMS = "Claims"
GATES = "Gates"
FILES = "Files and folders"
OUTPUT = "Output"
PANELS = (
    *(EVERYDAY, MODEL, EXAMPLES, OPTIMISER, RECURSION, LORA, LOSS, PERPLEXITY, PROBLEMS, PARTS, TRACKING),
    *(COMPUTE, SAMPLING, CLAIMS, GATES, FILES, OUTPUT),
)


class Reach(Flag):
    """Which results an option changes.

    A result is stale for `rr run` when an option that reaches it has another value than when the result was made; see
    `experiment.identity`.

    Attributes:
        SIDECAR: the sidecar that `rr surgery` makes. WEIGHTS: the weights that `rr train` makes. NUMBERS: the numbers
            that `rr eval` measures. EXIT: the exit that is chosen for a recursive checkpoint.
        CONTENT: none by its name; it names a model, data or tasks, which are identified by their content, or a date,
            which counts where there is one.
        NOTHING: none; it decides how fast or where something is done, or what else is shown or kept.
    """

    NOTHING = 0
    SIDECAR = auto()
    WEIGHTS = auto()
    NUMBERS = auto()
    EXIT = auto()
    CONTENT = auto()


NOTHING, SIDECAR, WEIGHTS, CONTENT = Reach.NOTHING, Reach.SIDECAR, Reach.WEIGHTS, Reach.CONTENT
NUMBERS, EXIT = Reach.NUMBERS, Reach.EXIT


def option(
    default: Any,
    help: str,
    *,
    reaches: Reach,
    only: str = "",
    in_run: str | None = "",
    panel: str = EVERYDAY,
    choices: tuple[str, ...] = (),
    minimum: float | None = None,
    maximum: float | None = None,
    aliases: tuple[str, ...] = (),
) -> Any:
    """Declare one option; everything that is known about it goes into the field's metadata.

    Args:
        reaches: which results it changes. only: what that is limited to: the training "recursive" or "lora" (phase b),
            the evaluation "sampled" (with sampled answers), or a base that is "quantised" while it is read.
        in_run: its name in `rr run`, which has the options of several commands; "" = its own name, None = `rr run` does
            not offer it. One option of `rr run` sets all options that have its name.
        panel: where `--help` shows it. aliases: further names on the command line, which `--help` does not show.
    """
    metadata: dict[str, Any] = {"help": help, "reaches": reaches, "only": only, "in_run": in_run, "panel": panel}
    metadata |= {"aliases": aliases, "choices": choices, "minimum": minimum, "maximum": maximum}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class CommonSettings:
    """What every stage shares, so that stages stay comparable. Section `[common]`."""

    SECTION = "common"

    model: str = option(
        "default",
        "Base model: 'default' (embedded), a hub id (also NAME@REVISION), a folder or a .gguf file.",
        reaches=CONTENT,
        panel=MODEL,
        aliases=("--model-path", "--model-name"),
    )
    data: str = option(
        "default",
        "Text: 'default' (embedded), a .txt, .jsonl, .csv or .parquet file, a folder of these, "
        "hf://NAME[:CONFIG[:SPLIT]] for a dataset of the hub, or - for standard input. A row may also hold a prompt "
        "and a completion, or messages: then only the completion, or what the assistant says, is learned. One tenth "
        "is for evaluation, one twentieth for validation during training. Several: a.jsonl=0.7,hf://x=0.3, with their "
        "shares of the texts that training shows.",
        reaches=CONTENT,
        panel=MODEL,
    )
    eval_data: str = option(
        "",
        "Text to evaluate on instead of a tenth of --data, in the same forms: all of it is evaluated, and nothing that "
        "is in it is trained on.",
        reaches=CONTENT,
        panel=MODEL,
    )
    text_field: str = option(
        "text",
        "Field or column that holds the text, in .jsonl, .csv and .parquet files and datasets of the hub.",
        reaches=CONTENT,
        panel=MODEL,
    )
    on_bad_row: str = option(
        "error",
        "What to do with a row of --data that cannot be read: error, or skip to leave it out and count it.",
        reaches=NOTHING,
        panel=MODEL,
        choices=("error", "skip"),
    )
    task: tuple[str, ...] = option(
        (),
        "Reasoning task: NAME[:key=value,...] of reasoning-gym, a .jsonl, .csv or .parquet file, or hf://NAME[:CONFIG] "
        "for a dataset of the hub. Options follow after a colon: question, answer, solution and choices name fields; "
        "grade=exact, number, math, choice, regex:PATTERN or MODULE:FUNCTION says how answers are judged (code of your "
        "own is imported and run). One tenth of a file is evaluated, one twentieth is for validation, the rest is "
        "trained on; held_out=all evaluates all of it; a dataset's own splits are kept. Repeat for several tasks. "
        "[default: the embedded tasks]",
        reaches=CONTENT,
        panel=MODEL,
    )
    device: str = option("auto", "Device: auto, cpu, cuda, cuda:1 or mps.", reaches=NUMBERS | EXIT, panel=COMPUTE)
    dtype: str = option(
        "auto",
        "Data type of the weights: auto (float32 on a CPU, elsewhere as stored), float32, bfloat16 or float16.",
        reaches=WEIGHTS | NUMBERS | EXIT,
        panel=COMPUTE,
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    quantize: str = option(
        "none",
        "Quantise the frozen base while it is read, by bitsandbytes: 4bit (NF4), 8bit, or none. A checkpoint that is "
        "quantised already needs no option.",
        reaches=WEIGHTS | NUMBERS | EXIT,
        only="quantised",
        panel=COMPUTE,
        choices=("none", "4bit", "8bit"),
    )
    trust_remote_code: bool = option(False, "Run Python code that comes with the model.", reaches=NOTHING, panel=MODEL)
    parallel: str = option(
        "",
        "Cut the model into parts among several processes, one GPU each: fsdp=8 (each layer is put together while it "
        "runs), tp=8 (each matrix is shared), ep=8 (experts are shared), replicas=2 (the whole twice), or several: "
        "fsdp=4,tp=2. Starts the processes on this machine; torchrun and accelerate launch start them themselves.",
        reaches=NOTHING,
        panel=COMPUTE,
    )
    device_map: str = option(
        "auto",
        "Where the layers lie in one process: auto (on the device if they fit there, else also on other GPUs, in the "
        "CPU's memory and on disk), balanced (evenly over all GPUs), or a JSON file of modules and devices.",
        reaches=NOTHING,
        panel=COMPUTE,
    )
    max_memory: str = option(
        "",
        "Most memory that the weights may take on each device, such as cuda:0=70GiB,cpu=100GiB; what is free on those "
        "that are not named.",
        reaches=NOTHING,
        panel=COMPUTE,
    )
    template_date: str = option(
        "",
        "Date that the chat template writes as today's, if it writes one, as YYYY-MM-DD. [default: the day of the "
        "experiment's first evaluation or training, which is kept in template_date.txt]",
        reaches=CONTENT,
        panel=MODEL,
    )
    seed: int = option(
        0,
        "Random seed; in an experiment with several seeds, the one that is meant.",
        reaches=SIDECAR | WEIGHTS | NUMBERS | EXIT,
        minimum=0,
    )
    seeds: tuple[int, ...] = option(
        (),
        "Seeds of the experiment: 3 for 0, 1 and 2, or a list such as 0,5,7. Every training is repeated with each seed "
        "and measured on that seed's own problems; baseline and surgery come once. [default: the one of --seed]",
        reaches=NUMBERS,
    )
    equal_flops: bool = option(
        False,
        "Also train vanilla until it has spent as many FLOPs as recursion: the stage vanilla_equal_flops. With several "
        "seeds it is always made.",
        reaches=NOTHING,
    )
    log_dir: str = option("logs", "Folder for TensorBoard logs.", reaches=NOTHING, panel=FILES)
    checkpoint_dir: str = option(
        "checkpoints", "Folder for the results of surgery and for training checkpoints.", reaches=NOTHING, panel=FILES
    )
    output_dir: str = option("eval_results", "Folder for evaluation results.", reaches=NOTHING, panel=FILES)
    tracker: tuple[str, ...] = option(
        (),
        "Tracker that gets the scalars of TensorBoard too, under the same tags: wandb, trackio, mlflow, swanlab, "
        "comet_ml, clearml, aim or dvclive. Its package has to be installed. Repeat for several.",
        reaches=NOTHING,
        panel=TRACKING,
    )

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """The seeds of the experiment: those of `seeds`, else the one of `seed`."""
        return self.seeds or (self.seed,)


@dataclass(frozen=True)
class SurgerySettings(CommonSettings):
    """Section `[surgery]`."""

    SECTION = "surgery"

    span: str = option("all", "Decoder layers that are run again: 'all', or START:END.", reaches=SIDECAR)
    max_steps: int = option(
        RecursionConfig.max_steps,
        "Most passes after the first one (pass 0), from 1 to 8.",
        reaches=SIDECAR,
        minimum=1,
        maximum=8,
    )
    cell_width: int = option(
        0, "Inner width of the feedback cell; 0 = the model's hidden size.", reaches=SIDECAR, minimum=0
    )
    relative_feedback: bool = option(
        RecursionConfig.relative_feedback,
        "Multiply the feedback, at each position, by the root mean square of the span's input: one --sidecar-lr then "
        "means the same at every layer.",
        reaches=SIDECAR,
    )
    chunk_width: int = option(
        RecursionConfig.chunk_width,
        "Tokens that are drafted and refined together.",
        reaches=SIDECAR,
        minimum=1,
    )

    @property
    def recursion(self) -> RecursionConfig:
        """The recursion that these options describe."""
        return RecursionConfig(
            max_steps=self.max_steps,
            span=parse_span(self.span),
            cell_width=self.cell_width or None,
            chunk_width=self.chunk_width,
            seed=self.seed,
            relative_feedback=self.relative_feedback,
        )


@dataclass(frozen=True)
class TrainSettings(CommonSettings):
    """Section `[train]`."""

    SECTION = "train"

    phase: str = option(
        "c",
        "What is trained: a = the sidecar, with the base frozen; b = the sidecar, and LoRA on the span (use an --lr of "
        "about 2e-4); c = everything. In vanilla training: b = the same LoRA, c = everything.",
        reaches=WEIGHTS,
        choices=("a", "b", "c"),
    )
    steps: int = option(300, "Optimiser steps.", reaches=WEIGHTS, minimum=1)
    batch_size: int = option(8, "Examples per optimiser step.", reaches=WEIGHTS, minimum=1)
    lr: float = option(2e-5, "Peak learning rate.", reaches=WEIGHTS, minimum=0)
    max_length: int = option(
        256,
        "Maximum length of an example, in tokens; longer ones are cut.",
        reaches=WEIGHTS,
        minimum=8,
        in_run="train_max_length",
    )
    run_name: str = option(
        "",
        "Name of the run's folder under logs and checkpoints. [default: the stage that is trained]",
        reaches=NOTHING,
        in_run=None,
    )
    task_share: float = option(
        0.75,
        "Share of reasoning problems among the examples; the rest is text.",
        reaches=WEIGHTS,
        panel=EXAMPLES,
        minimum=0,
        maximum=1,
    )
    chat_template: bool = option(
        True,
        "Format problems and conversations with the tokenizer's chat template, if it has one.",
        reaches=WEIGHTS,
        panel=EXAMPLES,
    )
    packing: bool = option(
        False,
        "Pack several short examples into one row of the maximum length; they do not attend to one another.",
        reaches=WEIGHTS,
        panel=EXAMPLES,
    )
    sidecar_lr: float = option(
        1e-3,
        "Peak learning rate of the feedback cell and the boundary head.",
        reaches=WEIGHTS,
        only="recursive",
        panel=OPTIMISER,
        minimum=0,
    )
    warmup_steps: int = option(20, "Steps of linear warm-up.", reaches=WEIGHTS, panel=OPTIMISER, minimum=0)
    schedule: str = option(
        "cosine",
        "Learning rate after the warm-up: cosine or linear decay to a tenth of the peak, or constant.",
        reaches=WEIGHTS,
        panel=OPTIMISER,
        choices=("cosine", "linear", "constant"),
    )
    weight_decay: float = option(
        0.0, "Weight decay of AdamW, applied to matrices.", reaches=WEIGHTS, panel=OPTIMISER, minimum=0
    )
    max_grad_norm: float = option(
        1.0, "Maximum norm of the gradient; 0 = no clipping.", reaches=WEIGHTS, panel=OPTIMISER, minimum=0
    )
    ema: float = option(
        0.0,
        "Decay of an exponential moving average of the weights, for example 0.999; the average is what is evaluated "
        "and saved. 0 = off.",
        reaches=WEIGHTS,
        panel=OPTIMISER,
        minimum=0,
        maximum=0.99999,
    )
    max_steps: int = option(
        0,
        "Most passes after pass 0 in training; 0 = as many as surgery made.",
        reaches=WEIGHTS,
        only="recursive",
        panel=RECURSION,
        minimum=0,
        in_run="train_max_steps",
    )
    chunk_width: int = option(
        0,
        "Window of the chunk metrics, in tokens; 0 = the chunk width of the surgery.",
        reaches=WEIGHTS,
        only="recursive",
        panel=RECURSION,
        minimum=0,
        in_run="train_chunk_width",
    )
    lora_rank: int = option(16, "Rank of the adapters.", reaches=WEIGHTS, only="lora", panel=LORA, minimum=1)
    lora_alpha: int = option(
        32, "Scale of the adapters: alpha / rank.", reaches=WEIGHTS, only="lora", panel=LORA, minimum=1
    )
    lora_experts: bool = option(
        False,
        "Adapt the experts of a mixture too, with adapters of this rank for each expert; without it they stay as they "
        "are.",
        reaches=WEIGHTS,
        only="lora",
        panel=LORA,
    )
    final_weight: float = option(
        LossWeights.final,
        "Weight of final_ce, the cross-entropy of the last pass.",
        reaches=WEIGHTS,
        panel=LOSS,
        minimum=0,
    )
    masked_weight: float = option(
        LossWeights.masked,
        "Weight of masked_ce, the cross-entropy of the earlier passes.",
        reaches=WEIGHTS,
        only="recursive",
        panel=LOSS,
        minimum=0,
    )
    halt_weight: float = option(
        LossWeights.halt,
        "Weight of halt, the boundary head's own loss.",
        reaches=WEIGHTS,
        only="recursive",
        panel=LOSS,
        minimum=0,
    )
    ponder_weight: float = option(
        LossWeights.ponder,
        "Weight of ponder, the expected number of passes, after its warm-up.",
        reaches=WEIGHTS,
        only="recursive",
        panel=LOSS,
        minimum=0,
    )
    stability_weight: float = option(
        LossWeights.stability,
        "Weight of stability, the loss of a pass that is worse than the one before it.",
        reaches=WEIGHTS,
        only="recursive",
        panel=LOSS,
        minimum=0,
    )
    supervised_share: float = option(
        LossWeights.share,
        "Share of the positions that masked_ce is computed on.",
        reaches=WEIGHTS,
        only="recursive",
        panel=LOSS,
        minimum=0,
        maximum=1,
    )
    commit_margin: float = option(
        LossWeights.margin,
        "A further pass counts as useful for a token if it lowers the token's loss by more than this, in nats.",
        reaches=WEIGHTS,
        only="recursive",
        panel=LOSS,
    )
    eval_interval: int = option(
        100, "Steps between evaluations; 0 = no evaluation.", reaches=NOTHING, panel=TRACKING, minimum=0
    )
    eval_samples: int = option(
        64, "Documents, and problems per task, in these evaluations.", reaches=NOTHING, panel=TRACKING, minimum=1
    )
    save_interval: int = option(100, "Steps between checkpoints.", reaches=NOTHING, panel=TRACKING, minimum=1)
    keep: int = option(
        2, "Number of last checkpoints to keep; the best one is kept too.", reaches=NOTHING, panel=TRACKING, minimum=1
    )
    load_best: bool = option(
        False,
        "Use the checkpoint with the lowest perplexity on the validation side instead of the last one.",
        reaches=NOTHING,
        panel=TRACKING,
    )
    histograms: int = option(
        0,
        "Steps between histograms of parameters and gradients in TensorBoard; 0 = none.",
        reaches=NOTHING,
        panel=TRACKING,
        minimum=0,
    )
    callback: str = option(
        "",
        "Function that is called after every step, as MODULE:FUNCTION; for metrics of your own.",
        reaches=NOTHING,
        panel=TRACKING,
    )
    num_processes: int = option(
        1,
        "Processes that share every batch, one GPU for each; torchrun and accelerate launch set it themselves.",
        reaches=NOTHING,
        panel=COMPUTE,
        minimum=1,
    )
    gradient_accumulation: int = option(
        1, "Micro-batches per optimiser step.", reaches=WEIGHTS, panel=COMPUTE, minimum=1
    )
    gradient_checkpointing: bool = option(
        False, "Recompute activations in the backward pass: less memory, more time.", reaches=NOTHING, panel=COMPUTE
    )
    compile: bool = option(
        False,
        "Compile the decoder layers with torch.compile; the first steps take up to a minute longer.",
        reaches=NOTHING,
        panel=COMPUTE,
    )


EXIT_HELP = (
    "When a token stops being refined: RULE:THRESHOLD with head, probability, margin, contraction or depth; unchanged; "
    "or none, for every pass. [default: what was chosen for the checkpoint; see --choose-exit]"
)


@dataclass(frozen=True)
class EvalSettings(CommonSettings):
    """Section `[eval]`."""

    SECTION = "eval"

    problems: int = option(
        250, "Problems per reasoning task; of a file, at most this many.", reaches=NUMBERS | EXIT, minimum=1
    )
    max_samples: int = option(
        0,
        "Documents to score, the same for every seed, and problems per --harness task; 0 = all.",
        reaches=NUMBERS | EXIT,
        minimum=0,
    )
    harness: tuple[str, ...] = option(
        (),
        "Tasks of lm-evaluation-harness: names, separated by commas, or .yaml files or folders of these. Repeat for "
        "several.",
        reaches=NUMBERS,
    )
    depth: int = option(
        -1,
        "Passes after pass 0 in recursive stages, also more than were trained (at most 8); -1 = as trained, with the "
        "exit of the checkpoint.",
        reaches=NUMBERS,
        panel=RECURSION,
        minimum=-1,
    )
    exit: str = option("", EXIT_HELP, reaches=NUMBERS, panel=RECURSION)
    choose_exit: bool = option(
        False,
        "Choose an exit on the validation side instead, and write it into the checkpoint; rr run does so before it "
        "measures.",
        reaches=NOTHING,
        panel=RECURSION,
        in_run=None,
    )
    exits: bool = option(
        False,
        "Compare all exit rules on both sides instead, and choose one as --choose-exit does.",
        reaches=NOTHING,
        panel=RECURSION,
        in_run=None,
    )
    exit_loss: float = option(
        1.0,
        "What the exit may lose against the best fixed depth: so many points of accuracy, and percent of perplexity. 0 "
        "= no exit is chosen.",
        reaches=EXIT,
        panel=RECURSION,
        minimum=0,
        maximum=100,
    )
    max_length: int = option(
        0,
        "Length of a window, in tokens; 0 = the model's context, at most 1024.",
        reaches=NUMBERS | EXIT,
        panel=PERPLEXITY,
        minimum=0,
        in_run="eval_max_length",
    )
    stride: int = option(
        0,
        "Tokens from one window to the next; 0 = the window's length.",
        reaches=NUMBERS | EXIT,
        panel=PERPLEXITY,
        minimum=0,
    )
    num_fewshot: int = option(
        -1,
        "Solved examples before each problem; -1 = none, and for --harness what the task says.",
        reaches=NUMBERS | EXIT,
        panel=PROBLEMS,
        minimum=-1,
    )
    max_new_tokens: int = option(
        48, "Maximum length of an answer, in tokens.", reaches=NUMBERS | EXIT, panel=PROBLEMS, minimum=1
    )
    stop: tuple[str, ...] = option(
        ("\nQuestion:",),
        "String that ends an answer, with \\n for a line break. Repeat for several.",
        reaches=NUMBERS | EXIT,
        panel=PROBLEMS,
    )
    chat_template: bool = option(
        True,
        "Format problems with the tokenizer's chat template, if it has one.",
        reaches=NUMBERS | EXIT,
        panel=PROBLEMS,
    )
    samples: int = option(
        0,
        "Sampled answers to each problem, beside the most likely one, for avg@k (the share of right ones) and pass@k "
        "(one of k is right); 0 = none.",
        reaches=NUMBERS,
        only="sampled",
        panel=PROBLEMS,
        minimum=0,
    )
    temperature: float = option(
        0.7, "Temperature of sampled answers.", reaches=NUMBERS, only="sampled", panel=PROBLEMS, minimum=0.01
    )
    prompts: str = option(
        "",
        "Prompts for the sample generations: a .txt file with one on each line, or a .jsonl file with the field "
        "'prompt'. [default: embedded]",
        reaches=NUMBERS,
        panel=PARTS,
    )
    skip_perplexity: bool = option(
        False, "Leave out perplexity and token accuracy.", reaches=NUMBERS | EXIT, panel=PARTS
    )
    skip_reasoning: bool = option(False, "Leave out reasoning accuracy.", reaches=NUMBERS | EXIT, panel=PARTS)
    skip_generation: bool = option(False, "Leave out the sample generations.", reaches=NUMBERS, panel=PARTS)
    skip_performance: bool = option(
        False, "Leave out speed, memory and FLOPs; rr run then leaves out rr costs.", reaches=NOTHING, panel=PARTS
    )
    tensorboard: bool = option(True, "Log the results to TensorBoard.", reaches=NOTHING, panel=PARTS)
    batch_tokens: int = option(8192, "Tokens per batch.", reaches=NUMBERS | EXIT, panel=COMPUTE, minimum=1)
    num_processes: int = option(
        1,
        "Processes that share out documents and problems, one GPU for each, with the whole model in each; the results "
        "are those of one. torchrun and accelerate launch set it themselves.",
        reaches=NOTHING,
        panel=COMPUTE,
        minimum=1,
    )


@dataclass(frozen=True)
class CostsSettings(CommonSettings):
    """Section `[costs]`."""

    SECTION = "costs"

    rounds: int = option(3, "Rounds; in each, every stage is timed once.", reaches=NOTHING, minimum=1)


@dataclass(frozen=True)
class PlanSettings(CommonSettings):
    """Section `[plan]`."""

    SECTION = "plan"

    gpus: str = option(
        "",
        "Devices to plan for: how many, and the GiB of each, such as 8x80 or 1x24. [default: those of this machine]",
        reaches=NOTHING,
    )
    context: int = option(
        2048, "Tokens of a text that is generated, with its prompt; at most the model's context.", reaches=NOTHING,
        minimum=1,
    )  # fmt: skip
    rows: int = option(1, "Texts that are generated at a time, on each device.", reaches=NOTHING, minimum=1)
    efficiency: float = option(
        0.4,
        "Share of a device's published figures that programs reach: 0.3 to 0.5 is usual.",
        reaches=NOTHING,
        minimum=0.01,
        maximum=1,
    )


@dataclass(frozen=True)
class GenerateSettings(CommonSettings):
    """Section `[generate]`."""

    SECTION = "generate"

    max_new_tokens: int = option(128, "Maximum number of new tokens.", reaches=NOTHING, minimum=1)
    stop: tuple[str, ...] = option(
        (), "String at which the text ends, with \\n for a line break. Repeat for several.", reaches=NOTHING
    )
    depth: int = option(
        -1,
        "Passes after pass 0 in recursive stages, also more than were trained (at most 8); -1 = as trained, with the "
        "exit of the checkpoint.",
        reaches=NOTHING,
        panel=RECURSION,
        minimum=-1,
    )
    exit: str = option("", EXIT_HELP, reaches=NOTHING, panel=RECURSION)
    chunk_width: int = option(
        0,
        "Tokens that are drafted and refined together; 0 = the chunk width of the surgery.",
        reaches=NOTHING,
        panel=RECURSION,
        minimum=0,
    )
    temperature: float = option(
        0.0, "Sampling temperature; 0 = always the most likely token.", reaches=NOTHING, panel=SAMPLING, minimum=0
    )
    top_p: float = option(
        1.0,
        "Sample from the most likely tokens that together have this probability.",
        reaches=NOTHING,
        panel=SAMPLING,
        minimum=0,
        maximum=1,
    )
    top_k: int = option(
        0, "Sample from this many of the most likely tokens; 0 = all.", reaches=NOTHING, panel=SAMPLING, minimum=0
    )


@dataclass(frozen=True)
class CompareSettings(CommonSettings):
    """Section `[compare]`."""

    SECTION = "compare"

    primary: tuple[str, ...] = option(
        (
            "reasoning_accuracy: finetuned_recursive > finetuned_vanilla",
            "perplexity: finetuned_recursive < finetuned_vanilla + 1 %",
        ),
        "Claim that the experiment stands for; declare it before the first evaluation of a fine-tuned stage. Form: "
        "METRIC: STAGE > STAGE, or < ; '+ MARGIN' or '- MARGIN' after it; or METRIC: STAGE ~ STAGE within MARGIN "
        "(equivalent). Repeat for several; they are corrected together, all else is exploratory.",
        reaches=NOTHING,
        panel=CLAIMS,
    )
    margin: tuple[str, ...] = option(
        ("reasoning_accuracy: 1 point", "perplexity: 1 %"),
        "Difference up to which two stages are equivalent, as METRIC: MARGIN. Repeat for several metrics.",
        reaches=NOTHING,
        panel=CLAIMS,
    )
    alpha: float = option(
        0.05,
        "Significance level of all primary claims together (family-wise error rate).",
        reaches=NOTHING,
        panel=CLAIMS,
        minimum=0.0001,
        maximum=0.5,
    )
    generations: bool = option(
        False,
        "Also show texts: the stages' continuations of each prompt, side by side, and problems that recursion fixed or "
        "broke (of other stages: the last beside the first).",
        reaches=NOTHING,
        in_run=None,
    )
    gate: tuple[str, ...] = option(
        (),
        "Condition on the measured values; exit code 3 if it does not hold. Form: SIDE > SIDE, or with < >= <= ==; a "
        "side is STAGE.METRIC, NUMBER * STAGE.METRIC or a number. Or a claim as in --primary, which has to be shown. "
        "Repeat for several.",
        reaches=NOTHING,
        panel=GATES,
    )
    gate_significant: bool = option(
        False,
        "A gate holds only if the test shows the difference too, at the corrected level.",
        reaches=NOTHING,
        panel=GATES,
    )
    format: str = option(
        "auto",
        "Format of the output: table, json, csv, markdown, latex, parquet, or auto (by the suffix of --out: .json, "
        ".csv, .md, .tex or .parquet; else a table). csv and parquet have a row for each value.",
        reaches=NOTHING,
        panel=OUTPUT,
        choices=("auto", "table", "json", "csv", "markdown", "latex", "parquet"),
        in_run=None,
    )
    out: str = option("", "File to write to instead of the screen.", reaches=NOTHING, panel=OUTPUT, in_run=None)
    report: str = option(
        "",
        "Also write a report with charts to this .html file (needs the extra 'report').",
        reaches=NOTHING,
        panel=OUTPUT,
        in_run=None,
    )


@dataclass(frozen=True)
class BoardSettings(CommonSettings):
    """Section `[board]`."""

    SECTION = "board"

    port: int = option(
        6006, "Port to listen on; the next free one if it is taken.", reaches=NOTHING, minimum=0, maximum=65535
    )
    host: str = option("127.0.0.1", "Address to listen on.", reaches=NOTHING)
    reload_interval: int = option(5, "Seconds between two looks at the logs.", reaches=NOTHING, minimum=1)
    open: bool = option(False, "Also open the address in a browser.", reaches=NOTHING)


@dataclass(frozen=True)
class ServeSettings(CommonSettings):
    """Section `[serve]`."""

    SECTION = "serve"

    port: int = option(
        8000, "Port to listen on; the next free one if it is taken.", reaches=NOTHING, minimum=0, maximum=65535
    )


SECTIONS: tuple[type[CommonSettings], ...] = (
    CommonSettings,
    SurgerySettings,
    TrainSettings,
    EvalSettings,
    CostsSettings,
    PlanSettings,
    GenerateSettings,
    CompareSettings,
    BoardSettings,
    ServeSettings,
)

# The commands that `rr run` performs after `rr setup`.
PERFORMED: tuple[type[CommonSettings], ...] = (
    SurgerySettings,
    TrainSettings,
    EvalSettings,
    CostsSettings,
    CompareSettings,
)

S = TypeVar("S", bound=CommonSettings)


def flag_name(key: str) -> str:
    """Return how an option is written on the command line: `max_steps` -> `--max-steps`."""
    return "--" + key.replace("_", "-")


def own_fields(cls: type[CommonSettings]) -> list[Field[Any]]:
    """Return the options that a section adds to the common ones (all of them for the common section)."""
    common = {item.name for item in fields(CommonSettings)} if cls is not CommonSettings else set()
    return [item for item in fields(cls) if item.name not in common]


def reaching(settings: CommonSettings, what: Reach, kinds: Collection[str] = ()) -> dict[str, Any]:
    """Return the options that reach a result, with their values: first those of the section, then the common ones.

    Args:
        kinds: what kind of training or evaluation it is, see `option`: for example "recursive" and "lora".
    """
    kinds = {*kinds, *(["quantised"] if settings.quantize != "none" else [])}
    items = dict.fromkeys((*own_fields(type(settings)), *fields(CommonSettings)))
    found = [item for item in items if what in item.metadata["reaches"] and item.metadata["only"] in ("", *kinds)]
    return {item.name: getattr(settings, item.name) for item in found}


def with_changes(settings: S, **changes: Any) -> S:
    """Return a copy with some values replaced."""
    return replace(settings, **changes)
