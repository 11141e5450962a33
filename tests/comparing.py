"""Results made by hand, as `rr eval` would write them, and looks into what `rr compare` makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from rrcli.comparison.claims import read_declaration
from rrcli.comparison.comparison import Comparison
from rrcli.comparison.results import Cell, Judgement
from rrcli.evaluation import metrics
from rrcli.experiment.declarations import record
from rrcli.experiment.workspace import Workspace
from rrcli.files import finite, write_json
from rrcli.services.compare import compare
from rrcli.settings import CompareSettings

DOCUMENTS, PROBLEMS = 80, 200


def results(stage: str, *, gain: float = 0.0, solved: int = 0, spoiled: int = 0, wobble: float = 0.0) -> dict[str, Any]:
    """Return what `rr eval` writes, for a model that differs from the baseline as asked.

    Args:
        gain: nats per token by which every document is better. wobble: how much that varies over documents.
        solved, spoiled: problems that are newly right, newly wrong; the baseline has 80 of 200.
    """
    rng = np.random.default_rng(0)
    tokens = rng.integers(20, 200, DOCUMENTS)
    level = 2.0 + 0.4 * rng.standard_normal(DOCUMENTS)
    change = gain + wobble * rng.standard_normal(DOCUMENTS)
    documents = [
        {
            "key": f"d{i}",
            "tokens": int(tokens[i]),
            "words": int(tokens[i]) // 2,
            "bytes": 4 * int(tokens[i]),
            "nll": [float(tokens[i] * (level[i] - change[i]))],
            "correct": [int(tokens[i] * min(1.0, 0.4 + change[i] / 4))],
        }
        for i in range(DOCUMENTS)
    ]
    right = [(i < 80 and i >= spoiled) or 80 <= i < 80 + solved for i in range(PROBLEMS)]
    problems = [
        {
            "key": f"p{i}",
            "task": "chain_sum" if i % 2 else "leg_counting:max_animals=2",
            "correct": [hit],
            "strict": [hit],
            "outputs": [str(hit)],
        }
        for i, hit in enumerate(right)
    ]
    text = "a" if gain or solved or spoiled or wobble else "the same"
    generations = [
        {"key": f"g{i}", "text": text, "length": 20 + i, "finished": True, "distinct_2": 0.9, "rep_4": 0.1}
        for i in range(4)
    ]
    records = {"documents": documents, "problems": problems, "generations": generations}
    speed = {
        "decode_tokens_per_sec": {"value": 50.0, "low": 45.0, "high": 52.0, "n": 5},
        "time_per_output_token": {"value": 20.0, "low": 19.0, "high": 22.0, "n": 5},
        "memory_mb": {"value": 800.0},
        "decode_flops_per_token": {"value": 12.0},
    }
    trained = {"tokens": 40_000, "seconds": 60.0, "flops": 2e12} if stage not in ("baseline", "after_surgery") else None
    return {
        "schema": 1,
        "kind": "evaluation",
        "stage": stage,
        "model": {"tokenizer": "t1", "fingerprint": stage, "recursion": None, "depth": 0},
        "data": {"fingerprint": "f1", "source": "default"},
        "settings": {"max_length": 0, "stride": 0, "max_new_tokens": 48, "chat_template": True},
        "provenance": {"seed": 0, "dtype": "float32", "device": "cpu", "hardware": "Xeon"}
        | {"versions": {"torch": "2.13"}},
        "training": trained,
        "metrics": metrics.from_records(records) | speed,
        "by_depth": metrics.by_depth(records),
        "records": records,
    }


def publish(directory: Path, *stages: dict[str, Any]) -> None:
    for value in stages:
        write_json(directory / "eval_results" / f"{value['stage']}_results.json", finite(value))


def compared(directory: Path, *stages: dict[str, Any], **options: Any) -> Comparison:
    """Publish results and compare them, with options of `[compare]` that were declared before."""
    settings = CompareSettings(**options)
    record(Workspace(directory, settings), read_declaration(settings).texts)
    publish(directory, *stages)
    return compare(settings, [], directory)


def cell(comparison: Comparison, name: str, stage: str) -> Cell:
    row = next(row for row in comparison.rows if row.metric.name == name)
    return row.cells[comparison.labels.index(stage)]


def judged(comparison: Comparison, metric: str) -> Judgement:
    """Return what is said of the only primary claim about a metric."""
    (found,) = [each for each in comparison.judgements if each.claim.metric.name == metric]
    return found


def sentence(comparison: Comparison, *parts: str) -> str:
    found = [text for text in comparison.sentences if all(part in text for part in parts)]
    assert len(found) == 1, comparison.sentences
    return found[0]


def four_stages() -> list[dict[str, Any]]:
    recursive = results("finetuned_recursive", gain=0.12, solved=60, spoiled=2, wobble=0.03)
    recursive["metrics"]["decode_flops_per_token"]["value"] = 30.0
    recursive["metrics"]["time_per_output_token"]["value"] = 50.0
    recursive["training"]["flops"] = 5e12
    return [
        results("baseline"),
        results("after_surgery"),
        results("finetuned_vanilla", gain=0.1, solved=30, spoiled=5, wobble=0.03),
        recursive,
    ]


def stage_results(stage: str, better: float = 0.0) -> dict[str, Any]:
    """Return the smallest results that can be compared: 40 documents, better by `better` nats per token."""
    records = {
        "documents": [
            {"key": str(i), "tokens": 10 + i, "words": 5, "bytes": 40, "correct": [4]}
            | {"nll": [(10 + i) * (2.0 - better - i / 1e4)]}
            for i in range(40)
        ]
    }
    return {
        "schema": 1,
        "stage": stage,
        "model": {"tokenizer": "t"},
        "data": {"fingerprint": "f"},
        "provenance": {"seed": 0, "dtype": "float32", "device": "cpu", "versions": {}},
        "metrics": metrics.from_records(records),
        "records": records,
    }
