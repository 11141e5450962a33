"""Every command under every placement: what is typed, what it leaves behind, and how far that is from one device's.

An experiment of a family is made on one device first, with a recursion and adapters that do something. Every placement
gets a copy of its folder, runs the same commands there, and is compared by the files that they wrote.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from commands import rr
from families import build, wake
from rrcli.demo.defaults import MODEL_DIR
from rrcli.files import SIDECAR, checkpoints, read_json
from rrcli.models.loading import load
from rrcli.models.placement import Placement
from rrcli.schemas import Results
from training_runs import curve

FAMILIES = ("llama", "kimi_linear", "qwen3_moe", "falcon_h1")
ONE, ON_DISK, FOUR_BITS, COPIES = "one device", "--device-map FILE", "--quantize 4bit", "--num-processes 2"
# Name -> what is added to each command. A file says which modules lie in memory and which on disk.
PLACEMENTS: dict[str, list[str]] = {
    ONE: [],
    "--parallel fsdp=2": ["--parallel", "fsdp=2"],
    "--parallel tp=2": ["--parallel", "tp=2"],
    "--parallel fsdp=2,ep=2": ["--parallel", "fsdp=2,ep=2"],
    "--parallel tp=2,ep=2": ["--parallel", "tp=2,ep=2"],
    ON_DISK: ["--device-map", "map.json"],
    FOUR_BITS: ["--quantize", "4bit"],
    COPIES: ["--num-processes", "2"],
}
COMMANDS = ("surgery", "eval", "train a", "train b", "train c", "generate")
# Layer 1 is read from disk each time it runs.
DEVICE_MAP = {"model": "cpu", "lm_head": "cpu", "model.layers.1": "disk"}
# Sizes that two processes can share, and that bitsandbytes can quantise: matrices of whole blocks of 64 weights.
SIZES: dict[str, Any] = {
    "vocab_size": 1024, "max_position_embeddings": 128, "num_hidden_layers": 2, "hidden_size": 64, "head_dim": 16,
    "intermediate_size": 128,
}  # fmt: skip
MORE_SIZES: dict[str, dict[str, Any]] = {
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"], "moe_intermediate_size": 64},
    "qwen3_moe": {"moe_intermediate_size": 64},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_d_head": 16},
}
STEPS, LEARNING_RATE, FEEDBACK = 3, 0.01, 0.3
OPTIONS = f"""
[common]
model = "base"
data = "../text.jsonl"
task = ["../problems.jsonl"]
[train]
steps = {STEPS}
lr = {LEARNING_RATE}
batch_size = 4
warmup_steps = 1
eval_interval = 0
max_length = 64
task_share = 1.0
lora_rank = 4
[eval]
problems = 2
max_samples = 3
max_new_tokens = 4
batch_tokens = 200
prompts = "../prompts.txt"
skip_performance = true
[generate]
max_new_tokens = 12
"""
# Most that a result may be from that of one device; see `apart`. Products of parts are summed in another order.
TOLERANCE = {"surgery": 0.0, "eval": 1e-5, "train": 1e-4, "generate": 0.0}
VERIFIED, ADAPTED, STARTS = "verified", "finetuned_recursive", ("after_surgery", "finetuned_recursive")


@dataclass(frozen=True)
class Cell:
    """One command of one family under one placement."""

    family: str
    placement: str
    command: str

    @property
    def processes(self) -> int:
        """How many processes share the work."""
        return 2 if self.placement == COPIES or "=2" in self.placement else 1

    @property
    def reference(self) -> str:
        """The placement that its results are compared with: one device, of the weights that 4 bits stand for."""
        return "rounded weights" if self.placement == FOUR_BITS else ONE

    def lines(self) -> list[list[str]]:
        """Return the command lines, without `rr`."""
        placed = ["--device", "cpu", *PLACEMENTS.get(self.placement, [])]
        if self.command == "surgery":
            return [["surgery", "--checkpoint-dir", VERIFIED, "--json", *placed]]
        if self.command == "generate":
            return [["generate", "One morning,", "--stage", ADAPTED, "--json", *placed]]
        if self.command == "eval":
            return [["eval", "--stage", ADAPTED, "--json", *placed]]
        phase = self.command.split()[1]
        # As many micro-batches as two processes have together, so that the sums are the same.
        shares = 2 if "fsdp" in self.placement or self.placement == COPIES else 1
        parts = f"--gradient-accumulation={2 // shares}"
        return [["train", "--phase", phase, "--run-name", phase, parts, "--json", *placed]]


@dataclass(frozen=True)
class Done:
    """What a command line ended with."""

    code: int
    out: str
    err: str

    @property
    def reason(self) -> str:
        """What the command says was wrong: its error, with the next step."""
        if found := re.search(r"error: (.*?)\nhint: (.*)$", self.err.strip(), re.S):
            return ". ".join(" ".join(part.split()) for part in found.groups())
        found = re.search(r"No such option: \S+", self.err)
        return found[0] if found else ""


@dataclass(frozen=True)
class Outcome:
    """What a cell shows.

    Attributes:
        kind: works, refused or fault. said: why, or what is wrong.
        difference: from one device, where it works; None for that device itself.
    """

    kind: str
    said: str = ""
    difference: float | None = None

    def __str__(self) -> str:
        if self.kind != "works":
            return f"{self.kind}: {self.said}"
        if self.difference is None:
            return "works"
        return "works, exact" if self.difference == 0 else f"works, {self.difference:.0e}"


def perform(cell: Cell, root: Path) -> list[Done]:
    """Run a cell's command lines in its folder, up to the first one that fails."""
    found: list[Done] = []
    for line in cell.lines():
        done = rr(*line, folder=folder_of(cell, root))
        found.append(Done(done.returncode, done.stdout, done.stderr))
        if done.returncode:
            break
    return found


def ended(cell: Cell, root: Path) -> list[Done]:
    """Return what the command lines of a reference ended with."""
    kept = folder_of(cell, root, cell.reference) / f"{cell.command}.json"
    return [Done(**one) for one in json.loads(kept.read_text())]


def clear(cell: Cell, root: Path) -> None:
    """Remove what a cell's commands have written, if they ran before."""
    folder = folder_of(cell, root)
    phase = cell.command.split()[-1]
    of = {"surgery": [VERIFIED], "eval": ["eval_results"], "generate": []}
    for name in of.get(cell.command, [f"checkpoints/{phase}", f"logs/{phase}"]):
        shutil.rmtree(folder / name, ignore_errors=True)


def folder_of(cell: Cell, root: Path, placement: str | None = None) -> Path:
    """Return the folder of an experiment."""
    return root / cell.family / re.sub(r"\W+", "-", placement or cell.placement).strip("-")


# -- experiments -------------------------------------------------------------------------------------------------------


def prepare(family: str, placements: Sequence[str], root: Path) -> None:
    """Make a family's experiment on one device, and a copy of what the commands start from for each placement."""
    first = Cell(family, ONE, "")
    base = folder_of(first, root) / "base"
    build(family, **SIZES | MORE_SIZES.get(family, {})).save_pretrained(base)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(MODEL_DIR) / name, base)
    (base.parent / "rr.toml").write_text(OPTIONS)
    (base.parent / "map.json").write_text(json.dumps(DEVICE_MAP))
    _write_data(root / family)
    _run_alone(family, ONE, root)
    for placement in placements:
        one = Cell(family, placement, "")
        if placement == ONE:
            continue
        start, folder = folder_of(first, root), folder_of(one, root)
        for part in ("base", "rr.toml", "map.json", *(f"checkpoints/{stage}" for stage in STARTS)):
            _copy(start / part, folder / part)
        if one.reference != ONE:  # the same experiment on what its weights stand for, and the adapters of that one
            rounded = folder_of(one, root, one.reference)
            for part in ("base", "rr.toml"):
                _copy(start / part, rounded / part)
            _round_weights(rounded / "base")
            if apart(*(load_file(f / "base" / "model.safetensors") for f in (rounded, folder))) < 1e-3:
                raise RuntimeError(f"no weight of {family} was rounded to 4 bits")
            _run_alone(family, one.reference, root)
            for file in (rounded / "checkpoints" / ADAPTED).rglob("*.safetensors"):
                shutil.copy(file, folder / file.relative_to(rounded))


def _write_data(folder: Path) -> None:
    """Write a few texts, problems and a prompt, so that reading them takes no time."""
    with (Path(MODEL_DIR).parent / "text.jsonl").open() as texts:
        (folder / "text.jsonl").write_text("".join(itertools.islice(texts, 60)))
    sums = [(a, b) for a in range(2, 12) for b in range(a + 1, a + 7)]
    rows = [json.dumps({"question": f"Add {a} and {b}.", "answer": str(a + b)}) for a, b in sums]
    (folder / "problems.jsonl").write_text("\n".join(rows))
    (folder / "prompts.txt").write_text("Tom has a red ball.\n")


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copy(source, target)


def _run_alone(family: str, placement: str, root: Path) -> None:
    """Run all commands on one device: what the placements are compared with."""
    cells = {command: Cell(family, placement, command) for command in COMMANDS}
    folder = folder_of(cells["eval"], root)
    _require(cells["surgery"], root)
    sidecar = folder / "checkpoints" / "after_surgery"
    shutil.copytree(folder / VERIFIED / "after_surgery", sidecar)
    model, _ = load(sidecar, device="cpu", directory=folder)
    save_file(wake(model.recursion, FEEDBACK).state_dict(), sidecar / SIDECAR)
    for command in ("train a", "train b", "train c"):
        _require(cells[command], root)
    shutil.copytree(folder / "checkpoints" / "b", folder / "checkpoints" / ADAPTED)
    for command in ("eval", "generate"):
        _require(cells[command], root)


def _require(cell: Cell, root: Path) -> None:
    done = perform(cell, root)
    if done[-1].code:
        raise RuntimeError(f"{cell}: {done[-1]}")
    (folder_of(cell, root) / f"{cell.command}.json").write_text(json.dumps([asdict(one) for one in done]))


@torch.no_grad()
def _round_weights(base: Path) -> None:
    """Replace the weights of a base by those that they stand for once they are quantised to 4 bits."""
    model = load(base, device="cpu", placement=Placement(quantize="4bit"))[0]
    plain = load(base, device="cpu")[0]
    for name, module in model.named_modules():
        if type(module).__name__ == "Linear4bit":
            bias = 0 if module.bias is None else module.bias
            plain.get_submodule(name).weight.copy_((module(torch.eye(module.in_features)) - bias).T)
    plain.save_pretrained(base)


# -- what they show ----------------------------------------------------------------------------------------------------


def judge(cell: Cell, done: Sequence[Done], root: Path) -> Outcome:
    """Return what a cell's commands show: a refusal, a fault, or how far their results are from one device's."""
    last = done[-1]
    if last.code or "Traceback" in last.err:
        if last.code == 2 and last.reason and "Traceback" not in last.err:
            return Outcome("refused", last.reason)
        return Outcome("fault", f"exit code {last.code}: {last.err.strip()[-2000:]}")
    try:
        differences = _differences(cell, done, root)
    except Exception:
        return Outcome("fault", traceback.format_exc())
    name, worst = max(differences.items(), key=lambda pair: math.inf if math.isnan(pair[1]) else pair[1])
    if not worst <= TOLERANCE[cell.command.split()[0]]:
        return Outcome("fault", f"{name} differ by {worst:.3g}")
    if cell.placement == ON_DISK and "on disk" not in last.err:
        return Outcome("fault", "no layer was laid on disk")
    return Outcome("works", difference=None if cell.placement == cell.reference else worst)


def _differences(cell: Cell, done: Sequence[Done], root: Path) -> dict[str, float]:
    own, other = folder_of(cell, root), folder_of(cell, root, cell.reference)
    if cell.command == "surgery":
        made = json.loads(done[0].out)
        sidecars = [load_file(folder / VERIFIED / "after_surgery" / SIDECAR) for folder in (own, other)]
        return {"verified depths": float(made["verified_depths"] != [0, 1, 2]), "sidecars": apart(*sidecars)}
    if cell.command == "generate":
        texts = [json.loads(one[0].out)["text"] for one in (done, ended(cell, root))]
        return {"texts": float(texts[0] != texts[1] or not texts[0])}
    if cell.command == "eval":
        file = f"eval_results/{ADAPTED}_results.json"
        return _evaluations_apart(*(read_json(folder / file, "rr eval", Results) for folder in (own, other)))
    phase = cell.command.split()[1]
    losses = [_numbers(curve(folder, phase)) for folder in (own, other)]
    last = [checkpoints(folder / "checkpoints" / phase)[-1] for folder in (own, other)]
    weights = [
        {f"{f.name}:{name}": t for f in sorted(run.glob("*.safetensors")) for name, t in load_file(f).items()}
        for run in last
    ]
    start = load_file(other / "checkpoints" / "after_surgery" / SIDECAR)
    moved = apart({n: weights[1][f"{SIDECAR}:{n}"] for n in start}, start)
    found = {"losses": apart({"": losses[0]}, {"": losses[1]}), "weights": apart(*weights)}
    return found | {"weights before and after, which should": 0.0 if moved > LEARNING_RATE / 100 else math.nan}


def _evaluations_apart(a: Any, b: Any) -> dict[str, float]:
    nats = [_numbers(d["nll"] for d in result["records"]["documents"]) for result in (a, b)]
    if (nats[1].std(dim=1) == 0).any():
        raise ValueError("the depths do not differ, so nothing is shown")
    answers = [[p["outputs"] for p in result["records"]["problems"]] for result in (a, b)]
    texts = [[g["text"] for g in result["records"]["generations"]] for result in (a, b)]
    relevance = [_numbers(g["relevance"] for g in result["records"]["generations"]) for result in (a, b)]
    perplexity = [result["by_depth"]["perplexity"] for result in (a, b)]
    values = [_numbers(e["value"] if isinstance(e, dict) else e for e in one) for one in perplexity]
    return {
        "nats": apart({"": nats[0]}, {"": nats[1]}),
        "perplexities": apart({"": values[0]}, {"": values[1]}),
        "answers": float(answers[0] != answers[1] or not answers[0]),
        "texts": float(texts[0] != texts[1] or not texts[0]),
        "relevance": apart({"": relevance[0]}, {"": relevance[1]}),
    }


def _numbers(values: Iterable[Any]) -> torch.Tensor:
    return torch.tensor(list(values), dtype=torch.float64)


def apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Return the largest difference of two sets of tensors, each in its norm relative to that of the second set; nan if
    names or shapes differ.

    Not the largest of all elements: AdamW takes a step of full length in the direction of any gradient, so an element
    whose gradient is about as small as rounding may end anywhere in between.
    """
    if a.keys() != b.keys() or any(a[name].shape != b[name].shape for name in a):
        return math.nan
    return max(
        float((a[name].double() - b[name].double()).norm() / b[name].double().norm().clamp_min(1e-12)) for name in a
    )
