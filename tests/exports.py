"""Small models that were "trained" without training, and their exports."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

import rrcli
from families import build, wake
from rrcli.demo import defaults
from rrcli.files import METRICS_FILE, publish_folder, write_json
from rrcli.models.manifest import write_exit
from rrcli.models.saving import save_folder
from rrcli.models.source import resolve
from rrcli.recursion.exits import ExitRule
from rrcli.recursion.lora import add_lora
from rrcli.reporting import Silent
from rrcli.services.export import ExportResult, export
from rrcli.settings import CommonSettings

PROMPTS = ("Tom has a red ball.", "Once upon a time there was")
NEW_TOKENS = 12


def base_model(folder: Path, family: str, **changes: Any) -> Path:
    """Write a random model of a family, with the embedded tokenizer, as somebody else would."""
    tokenizer = AutoTokenizer.from_pretrained(defaults.MODEL_DIR)
    model = build(family, vocab_size=len(tokenizer), max_position_embeddings=128, **changes)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def train(
    directory: Path,
    base: Path | str,
    *,
    run: str = "finetuned_recursive",
    recursive: bool = True,
    lora: bool = False,
    experts: bool = False,
    change: Callable[[Any], None] | None = None,
    exit: ExitRule | None = None,
) -> Path:
    """Write a checkpoint as a training does, with random weights in the recursion and the adapters.

    Args:
        experts: whether the experts have adapters too.
        change: changes the base's own weights, which are then the checkpoint's own (phase c).
    """
    model, tokenizer = rrcli.load(base)
    if recursive:
        wake(rrcli.attach(model, rrcli.RecursionConfig(max_steps=2, chunk_width=4)), std=0.05)
    if lora:
        adapters = add_lora(model, rank=4, alpha=8, experts=experts)
        with torch.no_grad():
            for parameter in adapters.parameters():
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(3))
    if change is not None:
        with torch.no_grad():
            change(model)
    source = resolve(str(base), directory)
    checkpoint = directory / "checkpoints" / run / "step-000002"
    with publish_folder(checkpoint) as target:
        save_folder(
            target, model, tokenizer,
            base=source, directory=directory, base_fingerprint=source.fingerprint(), own_weights=change is not None,
        )  # fmt: skip
        training = {"mode": "recursive" if recursive else "vanilla", "run": run, "phase": "c", "tasks": ["chain_sum"]}
        training["text"] = "/home/me/stories.jsonl"
        spent = {"tokens": 12345, "seconds": 7200.0, "flops": 1.5e12, "steps": 2}
        write_json(target / METRICS_FILE, {"schema": 1, "step": 2, "steps": 2, "training": training | spent})
    if exit is not None:
        rule = {"rule": exit.kind, "threshold": exit.threshold}
        choice = {"inputs": "", "chosen": rule, "best": None, "loss": 1.0, "why": "", "problems": 0, "documents": 0}
        write_exit(checkpoint, choice)  # type: ignore[arg-type]
    return checkpoint


def exported(
    directory: Path,
    name: str = "finetuned_recursive",
    target: str = "out",
    *,
    trust: bool = False,
    **options: Any,
) -> ExportResult:
    """Export a run of a working directory."""
    return export(CommonSettings(trust_remote_code=trust), name, Path(target), directory, Silent(), **options)


def own_tokens(folder: Path, prompts: tuple[str, ...] = PROMPTS, new_tokens: int = NEW_TOKENS) -> list[list[int]]:
    """Return the tokens with which rr itself goes on with each prompt, as `rr eval` decodes them."""
    from rrcli.data.tokens import encode_prompt
    from rrcli.evaluation.decoding import decode

    model, tokenizer = rrcli.load(folder)
    recursion = getattr(model, "recursion", None)
    found = decode(
        model,
        tokenizer,
        [encode_prompt(tokenizer, prompt) for prompt in prompts],
        depth=recursion.depth if recursion else 0,
        new_tokens=new_tokens,
        batch_tokens=1,  # one prompt at a time, as those who call `generate` do here
        exit=recursion.exit if recursion else None,
    )
    return [one.tokens for one in sorted(chain.from_iterable(found), key=lambda one: one.number)]


def generated(model: Any, tokenizer: Any, prompts: tuple[str, ...] = PROMPTS, **options: Any) -> list[list[int]]:
    """Return the tokens that `generate` goes on with, without the end token, greedily unless told otherwise."""
    found = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").to(model.device)
        new = model.generate(**ids, max_new_tokens=NEW_TOKENS, **{"do_sample": False} | options)
        new = new[0, ids["input_ids"].shape[1] :].tolist()
        ends = model.generation_config.eos_token_id
        found.append(new[:-1] if new and new[-1] in (ends if isinstance(ends, list) else [ends]) else new)
    return found
