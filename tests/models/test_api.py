"""The public API, and the guide's snippets as they are printed there."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import rrcli

CUSTOM_METRIC = 'metrics_tracker.log_scalar("custom/my_metric", value, step)'
PERIODIC = """
if step % eval_interval == 0:
    eval_results = evaluate_model(
        model, tokenizer, eval_data,
        metrics_tracker=metrics_tracker,
        step=step,
    )
"""
EXPORT = """
# Save checkpoint with metrics
metrics_tracker.save_checkpoint_metrics(checkpoint_path)
"""


def test_importing_the_package_loads_no_torch():
    code = (
        "import sys, rrcli; dir(rrcli); rrcli.RecursionConfig; "
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_every_public_name_exists_and_is_documented():
    for name in rrcli.__all__:
        assert getattr(rrcli, name).__doc__, name
    with pytest.raises(AttributeError):
        rrcli.no_such_thing  # noqa: B018


def test_the_guides_snippets_run_as_printed(tmp_path):
    model, tokenizer = rrcli.load("default")
    recursion = rrcli.attach(model, rrcli.RecursionConfig(max_steps=1))
    with rrcli.MetricsTracker(tmp_path / "logs") as tracker:
        checkpoint = tmp_path / "checkpoint"
        checkpoint.mkdir()
        scope = {
            "metrics_tracker": tracker,
            "evaluate_model": rrcli.evaluate_model,
            "model": model,
            "tokenizer": tokenizer,
            "eval_data": ["Tom has a red ball. He gave the ball to Ann.", "Once upon a time there was a cat."],
            "value": 0.25,
            "step": 100,
            "eval_interval": 50,
            "checkpoint_path": checkpoint,
        }
        for snippet in (CUSTOM_METRIC, PERIODIC, EXPORT):
            exec(snippet, scope)
    saved = json.loads((checkpoint / "metrics.json").read_text())["scalars"]
    assert saved["custom/my_metric"] == {"value": 0.25, "step": 100}
    perplexity = scope["eval_results"]["metrics"]["perplexity"]["value"]
    assert saved["evaluation/model/perplexity"] == {"value": pytest.approx(perplexity), "step": 100}
    depths = scope["eval_results"]["by_depth"]["perplexity"]
    assert depths[0]["value"] == depths[1]["value"] == perplexity
    assert recursion.depth == 1
    recursion.detach()
    assert not hasattr(model, "recursion")
    assert sum(p.numel() for p in recursion.parameters()) > 0


def test_evaluate_model_takes_the_name_of_a_text_source(tmp_path):
    model, tokenizer = rrcli.load("default")
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Ann saw {n} cats in the garden." for n in range(60)))
    from rrcli.settings import EvalSettings

    settings = EvalSettings(skip_reasoning=True, skip_generation=True, skip_performance=True)
    found = rrcli.evaluate_model(model, tokenizer, str(text), settings=settings)
    assert 1 <= len(found["records"]["documents"]) < 20
