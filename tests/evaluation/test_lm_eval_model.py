"""lm-eval runs an export, and any run of rr, with rr's own numbers and answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import rrcli
from exports import base_model, exported, train
from rrcli.evaluation.harness import load_tasks, run_harness
from rrcli.reporting import Silent
from rrcli.settings import EvalSettings

pytest.importorskip("lm_eval")

TEXTS = ["Tom has a red ball.", "Once upon a time there was a cat in a house.", "Ann walks to the market."]
TASKS = {
    "local_texts": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"},
    "local_answers": {"output_type": "generate_until", "doc_to_text": "{{text}}", "doc_to_target": "x"},
}
PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a recursive run, its export in `out`, and two tasks in `tasks`."""
    folder = tmp_path_factory.mktemp("experiment")
    train(folder, base_model(folder / "base", "llama"))
    exported(folder)
    tasks = folder / "tasks"
    tasks.mkdir()
    (tasks / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    for name, task in TASKS.items():
        files = {"data_files": {"test": str(tasks / "text.jsonl")}, "cache_dir": str(folder / "cache")}
        metric = "exact_match" if "answers" in name else "byte_perplexity"
        more = (
            {"generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": False}}
            if "answers" in name
            else {}
        )
        task = task | {"task": name, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test"} | more
        (tasks / f"{name}.yaml").write_text(json.dumps(task | {"metric_list": [{"metric": metric}]}))
    return folder


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))


def measured(place: Path, model: str, arguments: str) -> tuple[float, list[str]]:
    """Return the perplexity and the answers that lm-eval finds."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(place / "tasks"), include_defaults=False),
        device="cpu",
        bootstrap_iters=0,
    )
    answers = [sample["resps"][0][0] for sample in found["samples"]["local_answers"]]
    return found["results"]["local_texts"]["byte_perplexity,none"], answers


def own(place: Path, depth: int) -> tuple[float, list[str]]:
    """Return what `rr eval --harness` finds."""
    model, tokenizer = rrcli.load(place / "out")
    model.recursion.depth = depth
    files = [str(place / "tasks" / f"{name}.yaml") for name in TASKS]
    metrics, records = run_harness(model, tokenizer, load_tasks(files), EvalSettings(chat_template=False), Silent())
    return metrics["harness/local_texts/byte_perplexity"]["value"], [r["output"] for r in records if r["output"]]


@pytest.mark.parametrize("depth", [2, 0])
def test_lm_eval_runs_an_export_and_a_run_with_rrs_own_numbers(place: Path, modules: None, depth: int) -> None:
    import rrcli.lm_eval

    perplexity, answers = own(place, depth)
    assert rrcli.lm_eval.NAME == "rr"
    # `hf` puts two start tokens before a text, where the embedded tokenizer has one of its own.
    export = f"pretrained={place / 'out'},trust_remote_code=True,depth={depth},add_bos_token=False"
    for model, arguments in (("hf", export), ("rr", f"run=finetuned_recursive,dir={place},depth={depth}")):
        found = measured(place, model, arguments)
        assert found[0] == pytest.approx(perplexity, rel=1e-6), model
        assert found[1] == answers, model


def test_the_command_line_knows_rr_and_the_entry_point_names_the_same(place: Path) -> None:
    import rrcli.lm_eval

    points = tomllib.loads(PYPROJECT.read_text())["project"]["entry-points"]["lm_eval.models"]
    assert points == {rrcli.lm_eval.NAME: rrcli.lm_eval.TARGET}
    command = [
        sys.executable,
        "-m",
        "rrcli.lm_eval",
        "--model",
        "rr",
        "--model_args",
        "run=finetuned_recursive,depth=1",
    ]
    command += ["--include_path", "tasks", "--tasks", "local_texts", "--device", "cpu", "--output_path", "found.json"]
    done = subprocess.run(command, cwd=place, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    [file] = place.glob("found*.json")
    results: dict[str, Any] = json.loads(file.read_text())["results"]
    assert results["local_texts"]["byte_perplexity,none"] == pytest.approx(own(place, 1)[0], rel=1e-6)
