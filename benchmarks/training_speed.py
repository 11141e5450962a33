"""A training step against transformers' Trainer, recursive against vanilla, and memory against all logits at once.

    python benchmarks/training_speed.py [--rounds N] [--steps K] [--batch B] [--tokens T]

SmolLM2-135M (fp32, all weights train, torch's default threads) on random tokens, every one of which bears loss. A round
trains K steps vanilla, K steps with transformers' Trainer (its defaults, but the same AdamW hyper-parameters, no
logging and no saving, while `rr` logs every step), and K steps recursive at each depth; the order turns from round to
round. A step is timed from one request for a batch to the next, the first one of a round is left out.

Memory is what one forward and backward of a small model (4 layers, vocabulary 49,152) at depth 2 adds at its peak to
the resident set of a process of its own: with the losses of `rr`, and with the same losses from the logits of all
positions of all passes at once.

Claims: vanilla's tokens/s are at least 0.95 times those of transformers' Trainer; a recursive step takes at most 1.15
times a vanilla step times the ratio of their FLOPs; memory is at most 0.5 times. Medians of all steps are compared.
Exits with 3 if one does not hold.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from engine_overhead import smollm2
from torch.nn import functional as F

import rrcli
from rrcli.allocator import keep_freed_memory
from rrcli.evaluation.peak_memory import peak_resident_mb, reset_peak_resident
from rrcli.recursion.batch import IGNORED, Batch
from rrcli.recursion.config import LossWeights
from rrcli.recursion.losses import StepPlan, compute_losses, sample_windows
from rrcli.recursion.readout import Readout
from rrcli.reporting import Silent
from rrcli.settings import TrainSettings
from rrcli.tracker import MetricsTracker
from rrcli.training import step_plan
from rrcli.training.optimizer import BETAS
from rrcli.training.trainer import Trainer

SPEED, RECURSION, MEMORY = 0.95, 1.15, 0.5
DEPTHS = (1, 2)
LEARNING_RATE = 1e-5


class Batches:
    """Random tokens, the same for everybody; notes when each batch was asked for."""

    def __init__(self, vocabulary: int, rows: int, tokens: int) -> None:
        self.shape, self.vocabulary = (rows, tokens), vocabulary
        self.asked: list[float] = []

    def batch(self, step: int) -> Batch:
        """Return the batch of a step."""
        self.asked.append(time.perf_counter())
        ids = torch.randint(0, self.vocabulary, self.shape, generator=torch.Generator().manual_seed(step))
        labels = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORED)], dim=1)
        return Batch(ids, torch.ones_like(ids), labels)

    def seconds(self) -> list[float]:
        """Return how long each step took, but for the first."""
        times, self.asked = [*self.asked, time.perf_counter()], []
        return [after - before for before, after in pairwise(times[1:])]


def ours(model: Any, data: Batches, steps: int, depth: int, folder: Path) -> tuple[list[float], float]:
    """Train with this package; return the seconds of the steps, and the FLOPs of one position."""
    settings = TrainSettings(
        steps=steps + 1, batch_size=data.shape[0], lr=LEARNING_RATE, sidecar_lr=LEARNING_RATE, warmup_steps=0,
        schedule="constant", eval_interval=0, save_interval=steps + 2,
    )  # fmt: skip
    recursion = rrcli.attach(model, rrcli.RecursionConfig(max_steps=max(DEPTHS))) if depth else None
    sampled, step_plan.sampled_depth = step_plan.sampled_depth, lambda *_: depth
    try:
        with MetricsTracker(folder / "logs") as tracker:
            trainer = Trainer(
                settings, model, None, name="benchmark", data=data, tracker=tracker, reporter=Silent(),  # type: ignore[arg-type]
                save=lambda *_: None,
            )  # fmt: skip
            trainer.train(0, [])
            seconds = data.seconds()
    finally:
        step_plan.sampled_depth = sampled
        model.zero_grad(set_to_none=True)
        if recursion is not None:
            recursion.detach()
    return seconds, trainer.state.costs[depth].per_position


def theirs(model: Any, data: Batches, steps: int, folder: Path) -> list[float]:
    """Train with transformers' Trainer; return the seconds of the steps."""
    from transformers import PrinterCallback, TrainingArguments
    from transformers import Trainer as TheirTrainer

    def collate(numbers: list[int]) -> dict[str, torch.Tensor]:
        batch = data.batch(numbers[0] // data.shape[0])
        # The model shifts labels by itself.
        return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": batch.input_ids}

    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"), per_device_train_batch_size=data.shape[0], max_steps=steps + 1,
        learning_rate=LEARNING_RATE, adam_beta1=BETAS[0], adam_beta2=BETAS[1], max_grad_norm=1.0,
        lr_scheduler_type="constant", logging_strategy="no", save_strategy="no", report_to=[], disable_tqdm=True,
        dataloader_pin_memory=False, use_cpu=model.device.type == "cpu", remove_unused_columns=False,
    )  # fmt: skip
    numbers = list(range((steps + 2) * data.shape[0]))
    trainer = TheirTrainer(model=model, args=arguments, data_collator=collate, train_dataset=numbers)
    trainer.remove_callback(PrinterCallback)
    trainer._get_train_sampler = lambda *_: None  # in order
    trainer.train()
    # The loader asks for a batch ahead of the first step.
    del data.asked[0]
    seconds = data.seconds()
    model.zero_grad(set_to_none=True)
    assert len(seconds) == steps, "the loader asks for batches in another way"
    return seconds


def small_model() -> Any:
    """Return a random model with a large vocabulary and little else."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "vocab_size": 49152}
    return AutoModelForCausalLM.from_config(LlamaConfig(**shape, num_attention_heads=4, tie_word_embeddings=True))


def naive(readout: Readout, batch: Batch, depth: int) -> torch.Tensor:
    """Return the cross-entropies of all passes, weighted as in `compute_losses`, from all of their logits."""
    passes = readout.passes(batch.input_ids, batch.attention_mask)
    logits = [readout.logits(hidden.flatten(0, 1)) for hidden in passes.hidden]
    losses = [F.cross_entropy(one.float(), batch.labels.flatten()) for one in logits]
    return losses[-1] + LossWeights().masked * torch.stack(losses[:-1]).mean()


def added_alone(way: str, rows: int, tokens: int) -> None:
    """Compute one step's gradients and print how much memory that took at its peak, in MB."""
    model = small_model()
    recursion = rrcli.attach(model, rrcli.RecursionConfig(max_steps=max(DEPTHS)))
    readout, batch = Readout(model), Batches(49152, rows, tokens).batch(0)
    for parameter in [*model.parameters(), *recursion.parameters()]:
        parameter.grad = torch.zeros_like(parameter)
    reset_peak_resident()
    before = peak_resident_mb()
    if way == "naive":
        naive(readout, batch, max(DEPTHS)).backward()
    else:
        sampled = sample_windows(batch, width=16, share=0.5, generator=torch.Generator().manual_seed(0))
        plan = StepPlan(
            depth=max(DEPTHS), weights=LossWeights(), chunk_width=16, tokens=batch.tokens, sampled=int(sampled.sum())
        )
        compute_losses(readout, replace(batch, sampled=sampled), plan=plan).total.backward()
    print(json.dumps(peak_resident_mb() - before))


def added(way: str, options: argparse.Namespace) -> float:
    """Return what `added_alone` prints in a process of its own."""
    command = [sys.executable, __file__, "--alone", way, "--batch", str(options.batch), "--tokens", str(options.tokens)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    """Measure, print and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        added_alone(options.alone, options.batch, options.tokens)
        return 0
    keep_freed_memory()  # as `rr` does; the Trainer gains from it too
    memory = {way: added(way, options) for way in ("ours", "naive")}
    model = smollm2()
    # Its weights are plain floats by now; the Trainer would refuse what says that it was quantised.
    model.is_quantized, model.hf_quantizer = False, None
    data = Batches(model.config.vocab_size, options.batch, options.tokens)
    took: dict[str, list[float]] = {}
    flops: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def recursive(depth: int) -> list[float]:
            seconds, flops[depth] = ours(model, data, options.steps, depth, folder)
            return seconds

        ways: dict[str, Callable[[], list[float]]] = {
            "rr, vanilla": lambda: recursive(0),
            "transformers": lambda: theirs(model, data, options.steps, folder),
        } | {f"rr, depth {depth}": lambda depth=depth: recursive(depth) for depth in DEPTHS}
        for turn in range(options.rounds):
            for way in list(ways)[:: -1 if turn % 2 else 1]:
                took.setdefault(way, []).extend(ways[way]())

    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{parameters:.0f}M parameters, fp32, batch {options.batch} x {options.tokens} tokens")
    print(f"{torch.get_num_threads()} threads, {options.rounds} rounds of {options.steps} steps\n")
    print("| | seconds per step: median (range) | tokens/s |\n|---|---|---|")
    middle = {way: statistics.median(seconds) for way, seconds in took.items()}
    for way, seconds in took.items():
        speed = options.batch * options.tokens / middle[way]
        print(f"| {way} | {middle[way]:.3f} ({min(seconds):.3f} to {max(seconds):.3f}) | {speed:,.0f} |")
    print("\n| claim | found | holds |\n|---|---|---|")
    speed = middle["transformers"] / middle["rr, vanilla"]
    rows = [(f"vanilla / transformers, tokens per second >= {SPEED}", speed, speed >= SPEED)]
    for depth in DEPTHS:
        ratio = middle[f"rr, depth {depth}"] / middle["rr, vanilla"] / (flops[depth] / flops[0])
        words = f"depth {depth} / vanilla, time over FLOPs ({flops[depth] / flops[0]:.2f}x) <= {RECURSION}"
        rows.append((words, ratio, ratio <= RECURSION))
    share = memory["ours"] / memory["naive"]
    words = f"memory of the losses, {memory['ours']:,.0f} MB / {memory['naive']:,.0f} MB of all logits, <= {MEMORY}"
    rows.append((words, share, share <= MEMORY))
    for words, found, holds in rows:
        print(f"| {words} | {found:.2f} | {'yes' if holds else 'NO'} |")
    return 0 if all(holds for *_, holds in rows) else 3


if __name__ == "__main__":
    sys.exit(main())
