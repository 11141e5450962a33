"""What a checkpoint gives on the validation side, at every depth, from one scoring of each answer.

An answer counts as right if each of its tokens, with the end token, is the most likely one after those before it: then
greedy decoding gives it. Beside it stand the nats of the answer, which tell recipes apart sooner, and those of text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import rrcli
from rrcli.configuration import load
from rrcli.data.batching import batches, collate
from rrcli.data.rendering import solved_problem
from rrcli.data.tokens import scored_after, text_ids
from rrcli.evaluation.held_out import held_out_data
from rrcli.experiment.workspace import used_checkpoint
from rrcli.files import METRICS_FILE, read_json
from rrcli.recursion.batch import IGNORED
from rrcli.recursion.readout import Readout
from rrcli.schemas import CheckpointMetrics
from rrcli.settings import TrainSettings, with_changes

DOCUMENTS, DOCUMENT_TOKENS, BATCH_TOKENS = 64, 128, 768


def validated(folder: Path, stage: str, *, problems: int, name: str, dtype: str = "bfloat16") -> dict[str, Any]:
    """Return what the checkpoint of a stage gives on the validation side.

    Args:
        problems: of each task.

    Returns:
        `name`; `right` and `nats` (task -> a list for each problem, with an entry for each depth); `text_nats` (nats a
        token at each depth); `training` (costs); `scalars` (the last values of the training's logs).
    """
    checkpoint = used_checkpoint(folder / "checkpoints" / stage)
    model, tokenizer = rrcli.load(checkpoint, dtype=dtype, directory=folder)
    settings = with_changes(load(TrainSettings, folder), chat_template=False)
    data = held_out_data(settings, folder, problems, DOCUMENTS, side="validation")
    found: dict[str, Any] = {"name": name, "right": {}, "nats": {}}
    for task in data.tasks:
        asked = [problem for problem in data.problems if problem.task == task.spec]
        scored = _scored(model, [solved_problem(tokenizer, problem, settings) for problem in asked])
        found["right"][task.spec] = [[bool(right.all()) for right in each["right"]] for each in scored]
        found["nats"][task.spec] = [each["losses"].sum(1).tolist() for each in scored]
    texts = []
    for document in data.texts(tokenizer, settings):
        start, rest = scored_after(tokenizer, text_ids(tokenizer, document)[:DOCUMENT_TOKENS])
        texts.append(([*start, *rest], [False, *(True for _ in rest)]))
    scored = _scored(model, texts)
    tokens = sum(each["losses"].shape[1] for each in scored)
    found["text_nats"] = (sum(each["losses"].sum(1) for each in scored) / tokens).tolist()
    metrics = read_json(checkpoint / METRICS_FILE, "rr train", CheckpointMetrics)
    return found | {"training": metrics["training"], "scalars": metrics.get("scalars", {})}


def _scored(model: Any, examples: list[tuple[list[int], list[bool]]]) -> list[dict[str, torch.Tensor]]:
    """Return for each example `losses` and `right`, both `[depth, learned token]`."""
    readout, found = Readout(model), dict[int, dict[str, torch.Tensor]]()
    order = sorted(range(len(examples)), key=lambda number: -len(examples[number][0]))
    for numbers in batches(order, BATCH_TOKENS, lambda number: len(examples[number][0])):
        rows = []
        for ids, learned in (examples[number] for number in numbers):
            after = zip(ids[1:], learned[1:], strict=True)
            rows.append((ids, [token if own else IGNORED for token, own in after] + [IGNORED]))
        batch = collate(rows, pad=0)
        targets = batch.labels[batch.loss_bearing]
        scores = readout.score(batch.input_ids, batch.attention_mask, batch.loss_bearing, targets=targets)
        row = batch.loss_bearing.nonzero()[:, 0]
        for place, number in enumerate(numbers):
            own = row == place
            found[number] = {"losses": scores.losses[:, own], "right": (scores.predictions == targets)[:, own]}
    return [found[number] for number in range(len(examples))]
