"""Make the embedded model: `python -m tools.demo_model.pretrain [--output DIR] [--seed 0] [--steps N] [--threads N]`.

From one seed it writes the stories, trains the tokenizer on them and on the tasks' prompts, trains a small Llama on
both, measures it on held-out stories and problems, and publishes `text.jsonl` and `model/` (with `training_curve.json`
in it) in DIR. The same seed, thread count and library versions give the same weights.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rrcli.data.tasks import Problem, Task, prompt_of
from rrcli.demo.defaults import MODEL_DIR, PRETRAIN_TASKS, TASKS, TEXT_FILE
from tools.demo_model.text import load_stories, save_stories, write_stories
from tools.demo_model.tokenizer import CONTEXT, train_tokenizer

STORIES = 4000
# What the tokenizer learns from: problems of these tasks, so many of each.
TOKENIZER_TASKS = (
    *PRETRAIN_TASKS,
    "row_steps:min_steps=1,max_steps=2",
    "row_steps:min_steps=3,max_steps=4",
    "row_shift:min_steps=3,max_steps=4",
)
TOKENIZER_PROBLEMS = 1500

STEPS = 1000
STORIES_PER_STEP, PROBLEMS_PER_STEP = 20, 57
MICRO_BATCHES = 2
PEAK_LR, FINAL_LR_SHARE, WARMUP_STEPS = 3e-3, 0.05, 100
WEIGHT_DECAY, BETAS, MAX_GRAD_NORM = 0.01, (0.9, 0.98), 1.0

# A story has thirty times the tokens of a short answer, so stories are weighted by token and answers as a whole.
# Otherwise the stories, and the tasks with long answers, would dominate the loss.
STORY_TOKEN_WEIGHT, ANSWER_WEIGHT = 0.1, 6.0

EVAL_PROBLEMS, EVAL_SEED, EVAL_BATCH, MAX_ANSWER_TOKENS = 300, 7, 100, 24


@dataclass(frozen=True)
class Document:
    """Token ids, and for each the weight of its prediction in the loss."""

    ids: list[int]
    weights: list[float]


def main(arguments: list[str] | None = None) -> None:
    """Run the whole recipe and publish its files."""
    parser = argparse.ArgumentParser(description="Make the embedded model from a seed.")
    parser.add_argument("--output", type=Path, default=MODEL_DIR.parent, help="folder for text.jsonl and model/")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)

    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.output, prefix=".pretrain-") as name:
        staging = Path(name)
        text_file = staging / TEXT_FILE.name
        save_stories(write_stories(STORIES, options.seed), text_file)
        stories = load_stories(text_file, side="train")
        tokenizer = train_tokenizer([*stories, *prompts_for_tokenizer(options.seed)])
        # Saved before measuring, because the file would record the padding of the measured batches too.
        tokenizer.save_pretrained(staging / MODEL_DIR.name)
        model = create_model(tokenizer)
        print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens, {len(stories)} training stories")

        curve = train(model, document_batches(tokenizer, stories, options.seed, options.steps), options.steps)
        result = {
            "seed": options.seed,
            "threads": options.threads,
            "parameters": model.num_parameters(),
            "pretrain_tasks": list(PRETRAIN_TASKS),
            "curve": curve,
            "held_out_perplexity": perplexity(model, tokenizer, load_stories(text_file, side="test")),
            "accuracy": {spec: accuracy(model, tokenizer, spec) for spec in dict.fromkeys(PRETRAIN_TASKS + TASKS)},
        }
        print(json.dumps({key: result[key] for key in ("held_out_perplexity", "accuracy")}, indent=2))

        model.save_pretrained(staging / MODEL_DIR.name)
        # safetensors writes a private file, which an installed package could not read.
        (staging / MODEL_DIR.name / "model.safetensors").chmod(0o644)
        curve_file = staging / MODEL_DIR.name / "training_curve.json"
        curve_file.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        publish(staging, options.output)


def prompts_for_tokenizer(seed: int) -> Iterator[str]:
    """Yield training problems of TOKENIZER_TASKS with their answers, and rows of all digits.

    The tasks have three digits; with these rows, each of the ten is a token of its own after a space too.
    """
    yield from [" ".join(map(str, range(10)))] * TOKENIZER_PROBLEMS
    for spec in TOKENIZER_TASKS:
        stream = Task(spec).stream(seed, limit=2 * TOKENIZER_PROBLEMS, side="train")
        for problem in islice(stream, TOKENIZER_PROBLEMS):
            yield f"{prompt_of(problem.question)} {problem.answer}"


def create_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return a freshly initialised Llama of about 140,000 parameters."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=80,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=5,
        num_key_value_heads=5,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def document_batches(
    tokenizer: PreTrainedTokenizerFast, stories: list[str], seed: int, steps: int
) -> Iterator[list[Document]]:
    """Yield `steps` batches: stories in shuffled epochs, problems of all tasks in equal parts.

    Half of the documents begin with end-of-text, as in a packed stream; the other half begin without it, as prompts do.
    """
    rng = random.Random(seed)
    # Twice as many candidates as are needed, because the held-out ones are skipped.
    limit = 2 * math.ceil(steps * PROBLEMS_PER_STEP / len(PRETRAIN_TASKS))
    streams = cycle([Task(spec).stream(seed, limit, side="train") for spec in PRETRAIN_TASKS])
    shuffled = endless(stories, rng)
    for _ in range(steps):
        batch = [story_document(tokenizer, story) for story in islice(shuffled, STORIES_PER_STEP)]
        batch += [problem_document(tokenizer, next(stream)) for stream in islice(streams, PROBLEMS_PER_STEP)]
        yield [after_end_of_text(tokenizer, document) if rng.random() < 0.5 else document for document in batch]


def endless(stories: list[str], rng: random.Random) -> Iterator[str]:
    """Yield the stories for ever, every epoch in a new order."""
    while True:
        yield from rng.sample(stories, len(stories))


def story_document(tokenizer: PreTrainedTokenizerFast, story: str) -> Document:
    """Return a story whose every token counts."""
    ids = [*tokenizer(story).input_ids, tokenizer.eos_token_id]
    return Document(ids, [STORY_TOKEN_WEIGHT] * len(ids))


def problem_document(tokenizer: PreTrainedTokenizerFast, problem: Problem) -> Document:
    """Return a problem of which only the answer and the end-of-text after it count."""
    question = tokenizer(prompt_of(problem.question)).input_ids
    answer = [*tokenizer(f" {problem.answer}").input_ids, tokenizer.eos_token_id]
    return Document(question + answer, [0.0] * len(question) + [ANSWER_WEIGHT / len(answer)] * len(answer))


def after_end_of_text(tokenizer: PreTrainedTokenizerFast, document: Document) -> Document:
    """Return the document with end-of-text before it."""
    return Document([tokenizer.eos_token_id, *document.ids], [0.0, *document.weights])


def train(model: LlamaForCausalLM, batches: Iterator[list[Document]], steps: int) -> list[dict[str, float]]:
    """Train in place with AdamW and a cosine schedule; return the curve, one point per 100 steps.

    `loss` is the weighted mean cross-entropy (nats) since the previous point, `tokens` all tokens so far.
    """
    decay = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    rest = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": decay, "weight_decay": WEIGHT_DECAY}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, betas=BETAS)
    curve: list[dict[str, float]] = []
    start, tokens, losses = time.perf_counter(), 0, []
    model.train()
    for step, batch in enumerate(batches, start=1):
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * schedule(step, steps)
        optimizer.zero_grad()
        losses.append(backward(model, batch))
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        tokens += sum(len(document.ids) for document in batch)
        if step % 100 == 0 or step == steps:
            seconds = time.perf_counter() - start
            loss = sum(losses) / len(losses)
            losses.clear()
            curve.append({"step": step, "loss": round(loss, 4), "tokens": tokens, "seconds": round(seconds, 1)})
            print(f"step {step:5d}  loss {loss:.4f}  {tokens / seconds:,.0f} tokens/s", flush=True)
    model.eval()
    return curve


def schedule(step: int, steps: int) -> float:
    """Return the share of the peak learning rate at `step`: linear warm-up, then a cosine."""
    progress = step / steps
    cosine = FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * 0.5 * (1 + math.cos(math.pi * progress))
    return min(1.0, step / WARMUP_STEPS) * cosine


def backward(model: LlamaForCausalLM, batch: list[Document]) -> float:
    """Add the gradient of the batch's weighted mean cross-entropy; return that mean.

    The batch runs in parts of similar length, so that little is spent on padding. Padding stands on the right, where
    causal attention never looks, so no attention mask is needed.
    """
    total_weight = sum(sum(document.weights) for document in batch)
    batch = sorted(batch, key=lambda document: len(document.ids))
    size = math.ceil(len(batch) / MICRO_BATCHES)
    total = 0.0
    for part in (batch[begin : begin + size] for begin in range(0, len(batch), size)):
        length = max(len(document.ids) for document in part)
        ids = torch.tensor([document.ids + [0] * (length - len(document.ids)) for document in part])
        weights = torch.tensor([document.weights + [0.0] * (length - len(document.ids)) for document in part])[:, 1:]
        counts = weights > 0
        hidden = model.model(ids).last_hidden_state[:, :-1][counts]
        losses = cross_entropy(model.lm_head(hidden), ids[:, 1:][counts], reduction="none")
        loss = (losses * weights[counts]).sum() / total_weight
        loss.backward()
        total += loss.item()
    return total


@torch.inference_mode()
def perplexity(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, stories: list[str]) -> float:
    """Return exp of total NLL over total tokens; every story token is scored once, given end-of-text before it."""
    nll, count = 0.0, 0
    for story in stories:
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(story).input_ids]])
        nll += cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    return math.exp(nll / count)


@torch.inference_mode()
def accuracy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, spec: str) -> float:
    """Return the share of held-out problems of a task that greedy decoding answers correctly."""
    task = Task(spec)
    problems = task.problems(EVAL_PROBLEMS, EVAL_SEED, side="test")
    correct = 0
    for begin in range(0, len(problems), EVAL_BATCH):
        part = problems[begin : begin + EVAL_BATCH]
        prompts = [prompt_of(problem.question) for problem in part]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        output = model.generate(**inputs, max_new_tokens=MAX_ANSWER_TOKENS, do_sample=False)
        answers = tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        correct += sum(
            task.score(answer.strip(), problem) == 1.0 for answer, problem in zip(answers, part, strict=True)
        )
    return correct / len(problems)


def publish(staging: Path, output: Path) -> None:
    """Move everything in `staging` to `output`, replacing what is there."""
    for item in sorted(staging.iterdir()):
        target = output / item.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(item, target)


if __name__ == "__main__":
    main()
