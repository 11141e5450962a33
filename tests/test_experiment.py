"""The whole experiment, as a user runs it: the installed `rr`, in a temporary folder, on the embedded model."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from browser import browser, errors, screen, visible_lines
from commands import RR, rr, rr_process
from rrcli.files import checkpoints, write_json
from rrcli.tracker import LAYOUT

STAGES = ("baseline", "after_surgery", "finetuned_vanilla", "finetuned_recursive")
SMALL = {
    "RR_SURGERY_MAX_STEPS": "2",
    "RR_TRAIN_STEPS": "6",
    "RR_TRAIN_BATCH_SIZE": "4",
    "RR_TRAIN_SAVE_INTERVAL": "2",
    "RR_TRAIN_EVAL_INTERVAL": "3",
    "RR_TRAIN_EVAL_SAMPLES": "4",
    "RR_EVAL_PROBLEMS": "6",
    "RR_EVAL_MAX_SAMPLES": "12",
    "RR_COSTS_ROUNDS": "1",
}


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("experiment")
    done = rr_process("run", folder=folder, **SMALL)
    assert done.returncode == 0, done.stderr
    return folder, done


def results(folder: Path, stage: str) -> dict:
    return json.loads((folder / "eval_results" / f"{stage}_results.json").read_text())


def test_run_measures_four_stages_and_compares(experiment):
    folder, done = experiment
    assert all(stage in done.stdout for stage in STAGES)
    assert "Surgery preserved the baseline exactly" in done.stdout
    assert "Cost of recursion compared with vanilla fine-tuning" in done.stdout
    for stage in STAGES:
        found = results(folder, stage)
        assert found["schema"] == 1
        assert found["stage"] == stage
        assert found["provenance"]["seed"] == 0
        assert {"perplexity", "token_accuracy", "bits_per_byte", "reasoning_accuracy", "distinct_2", "rep_4"} <= set(
            found["metrics"]
        )
        assert found["metrics"]["perplexity"]["low"] < found["metrics"]["perplexity"]["value"]
        assert len(found["records"]["documents"]) == 12
        assert len(found["records"]["generations"]) == 4


def test_recursive_stages_are_measured_at_every_depth(experiment):
    folder, _ = experiment
    for stage, depths in (("baseline", 1), ("after_surgery", 3), ("finetuned_vanilla", 1), ("finetuned_recursive", 3)):
        found = results(folder, stage)
        assert {len(values) for values in found["by_depth"].values()} == {depths}
        assert ("avg_refine_steps" in found["metrics"]) == (depths > 1)
    trained = results(folder, "finetuned_recursive")["by_depth"]["perplexity"]
    assert trained[0]["value"] != trained[2]["value"]


def test_surgery_changed_no_number(experiment):
    folder, _ = experiment
    before, after = results(folder, "baseline"), results(folder, "after_surgery")
    for a, b in zip(before["records"]["documents"], after["records"]["documents"], strict=True):
        assert b["nll"] == a["nll"] * 3
    for a, b in zip(before["records"]["problems"], after["records"]["problems"], strict=True):
        assert b["outputs"] == a["outputs"] * 3
    texts = [[r["text"] for r in found["records"]["generations"]] for found in (before, after)]
    assert texts[0] == texts[1]


def test_vanilla_and_recursive_saw_the_same_tokens(experiment):
    folder, _ = experiment
    vanilla, recursive = (results(folder, stage)["training"] for stage in STAGES[2:])
    assert vanilla["tokens"] == recursive["tokens"] > 0
    assert recursive["flops"] > 1.5 * vanilla["flops"]


def test_costs_are_measured_of_all_stages_in_turns_and_compared(experiment):
    folder, _ = experiment
    costs = json.loads((folder / "eval_results" / "costs.json").read_text())
    assert list(costs["stages"]) == list(STAGES)
    assert {"threads", "cores", "load", "hardware", "versions"} <= costs["provenance"].keys()
    assert "decode_flops_per_token" not in results(folder, "finetuned_recursive")["metrics"]
    shown = json.loads(rr("compare", "--json", folder=folder).stdout)
    assert not [text for text in (*shown["warnings"], *shown["sentences"]) if "rr costs" in text]
    rows = {row["name"]: row for row in shown["rows"]}
    stock, operated, vanilla, recursive = (cell["value"] for cell in rows["decode_flops_per_token"]["cells"])
    assert stock == vanilla == rows["decode_flops_per_token"]["by_depth"][1][0]
    assert recursive > operated > 2 * stock
    assert rows["time_per_output_token"]["cells"][0]["low"] > 0
    assert "evaluation/finetuned_recursive/decode_flops_per_token" not in rows
    sizes = [cell["value"] for cell in rows["memory_mb"]["cells"]]
    assert sizes[2] == pytest.approx(sizes[0], rel=0.1)
    # A model that was made again has other costs: those that are known are not shown for it.
    value = results(folder, "finetuned_vanilla")
    file = folder / "eval_results" / "finetuned_vanilla_results.json"
    write_json(file, value | {"model": value["model"] | {"fingerprint": "other"}})
    try:
        shown = json.loads(rr("compare", "--json", folder=folder).stdout)
    finally:
        write_json(file, value)
    assert [text for text in shown["warnings"] if "costs of another model, depth or exit of finetuned_vanilla" in text]
    row = next(row for row in shown["rows"] if row["name"] == "decode_flops_per_token")
    assert [cell["value"] is None for cell in row["cells"]] == [False, False, True, False]


def test_a_second_run_does_nothing_and_a_changed_setting_redoes_what_depends_on_it(experiment):
    folder, _ = experiment
    again = rr("run", folder=folder, **SMALL)
    assert again.stderr.count("done already") == 10
    plan = json.loads(rr("run", "--dry-run", "--json", folder=folder, **SMALL, RR_TRAIN_LR="0.0003").stdout)["steps"]
    assert [step["status"] for step in plan] == ["done"] * 4 + ["stale"] * 6
    plan = json.loads(rr("run", "--dry-run", "--json", "--lr", "0.0003", folder=folder, **SMALL).stdout)["steps"]
    assert [step["status"] for step in plan] == ["stale"] + ["done"] * 3 + ["stale"] * 6
    plan = json.loads(rr("run", "--dry-run", "--json", folder=folder, **SMALL | {"RR_SURGERY_MAX_STEPS": "1"}).stdout)[
        "steps"
    ]
    assert [step["status"] for step in plan] == ["done", "done", *["stale"] * 2, "done", "done", *["stale"] * 4]


def test_tensorboard_has_the_guides_tags(experiment):
    folder, _ = experiment
    events = EventAccumulator(str(folder / "logs" / "finetuned_recursive")).Reload()
    tags = set(events.Tags()["scalars"])
    losses = {f"train/loss/{name}" for name in ("total", "final_ce", "masked_ce", "halt", "ponder", "stability")}
    generation = {f"train/generation/{name}" for name in ("avg_refine_steps", "commit_rate", "avg_chunk_length")}
    performance = {"train/performance/tokens_per_sec", "train/performance/memory_mb"}
    assert losses | generation | performance <= tags
    assert {tag for tag in tags if re.match("train/loss.*", tag)} == losses
    assert {"final/perplexity", "final/reasoning_accuracy", "depth/perplexity"} <= tags
    assert [event.step for event in events.Scalars("depth/perplexity")] == [0, 1, 2]
    assert "evaluation/finetuned_recursive/generations" in events.Tags()["images"]
    assert [event.step for event in events.Scalars("train/loss/total")] == [1, 2, 3, 4, 5, 6]
    assert {"evaluation/finetuned_recursive/perplexity", "evaluation/during_training/reasoning_accuracy"} <= tags
    baseline = EventAccumulator(str(folder / "logs" / "baseline")).Reload()
    logged = baseline.Scalars("evaluation/baseline/perplexity")[0].value
    assert logged == pytest.approx(results(folder, "baseline")["metrics"]["perplexity"]["value"], rel=1e-6)


def test_tensorboard_shows_the_dashboards_in_a_browser(experiment):
    folder, _ = experiment
    process = subprocess.Popen(
        [RR, "board", "--json", "--port", "0"], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        with browser() as opened:
            address = json.loads(process.stdout.readline())["url"]
            screen(opened, 1280)
            shown = tab(opened, address, "custom_scalars", "train/loss/total (finetuned_recursive)")
            categories = [line for line in shown if line in LAYOUT]
            assert categories == list(LAYOUT)
            assert "train/loss/total (finetuned_vanilla)" in shown
            assert "train/loss/total (baseline)" not in shown
            # Every run is a row, with the metrics of the finished stage beside them.
            accuracy = results(folder, "finetuned_recursive")["metrics"]["reasoning_accuracy"]["value"]
            shown = tab(opened, address, "hparams", "finetuned_recursive")  # rows come after the columns
            columns = {"lr", "final/perplexity", "final/reasoning_accuracy"}
            assert {"finetuned_recursive", "finetuned_vanilla"} | columns <= set(shown)
            assert any(
                re.fullmatch(r"[\d.]{6,}", line) and float(line) == pytest.approx(accuracy, rel=1e-3) for line in shown
            )
            tab(opened, address, "images", "evaluation/finetuned_recursive/generations")
            assert errors(opened) == []
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=120)
    assert process.returncode == 0


def tab(opened, address, name, awaited):
    """Open a tab of TensorBoard and return its lines of text as soon as one of them is the awaited one."""
    opened.get("about:blank")
    opened.get(f"{address}/#{name}")
    deadline = time.monotonic() + 180
    lines = []
    while awaited not in lines:
        assert time.monotonic() < deadline, lines
        time.sleep(0.3)
        lines = visible_lines(opened)
    return lines


def test_checkpoints_load_with_the_stock_library(experiment):
    folder, _ = experiment
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import rrcli

    last = checkpoints(folder / "checkpoints" / "finetuned_recursive")[-1]
    assert last.name == "step-000006"
    assert (last / "metrics.json").is_file()
    assert not list(last.rglob("*.bin")) + list(last.rglob("*.pt")) + list(last.rglob("*.pkl"))
    ours, tokenizer = rrcli.load(last)
    stock = AutoModelForCausalLM.from_pretrained(last, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(last)("Tom has a ball.", return_tensors="pt")["input_ids"]
    assert tokenizer("Tom has a ball.")["input_ids"] == ids[0].tolist()
    with torch.no_grad():
        ours.recursion.depth = 0
        assert torch.equal(ours(ids).logits, stock(ids).logits)
        ours.recursion.depth = 2
        assert not torch.equal(ours(ids).logits, stock(ids).logits)


def test_compare_needs_no_option_and_takes_stages_in_any_order(experiment):
    folder, _ = experiment
    done = rr("compare", "baseline", "finetuned_recursive", folder=folder)
    assert done.returncode == 0
    assert "Reasoning accuracy" in done.stdout
    swapped = json.loads(rr("compare", "finetuned_recursive", "baseline", "--json", folder=folder).stdout)
    assert swapped["stages"] == ["finetuned_recursive", "baseline"]


def test_a_baseline_eval_is_the_same_again(experiment, tmp_path):
    folder, _ = experiment
    done = rr(
        "eval", "--output-dir", str(tmp_path), "--skip-performance", "--log-dir", str(tmp_path), folder=folder, **SMALL
    )
    assert done.returncode == 0, done.stderr
    again = json.loads((tmp_path / "baseline_results.json").read_text())
    assert again["records"] == results(folder, "baseline")["records"]


def test_a_missing_stage_names_the_command_that_makes_it(tmp_path):
    assert rr("setup", folder=tmp_path).returncode == 0
    for stage, maker in (("after_surgery", "rr surgery"), ("finetuned_vanilla", "rr train --mode vanilla")):
        done = rr("eval", "--stage", stage, folder=tmp_path)
        assert done.returncode == 1
        assert f"'{maker}' makes it" in done.stderr
    done = rr("train", "--mode", "recursive", folder=tmp_path)
    assert done.returncode == 1
    assert "'rr surgery' makes it" in done.stderr
    assert not (tmp_path / "eval_results" / "after_surgery_results.json").exists()


def test_setup_checks_and_says_what_failed(tmp_path):
    done = rr("setup", "--json", folder=tmp_path)
    found = json.loads(done.stdout)
    assert done.returncode == 0
    assert found["schema"] == "rr.setup/1"
    assert {check["name"] for check in found["checks"]} >= {"versions", "device", "memory", "disk", "tensorboard"}
    assert all((tmp_path / name).is_dir() for name in ("logs", "checkpoints", "eval_results"))
    assert (tmp_path / "rr.toml").is_file()
    (tmp_path / "empty").mkdir()
    done = rr("setup", "--model", "empty", folder=tmp_path)
    assert done.returncode == 3
    assert "config.json" in done.stdout


def test_setup_says_that_a_generator_has_too_few_problems_for_all_seeds(tmp_path):
    few = "leg_counting:min_animals=1,max_animals=1,min_instances=1,max_instances=3"

    def said(*options: str, **environment: str) -> str:
        done = rr("setup", "--json", "--overwrite", "--task", few, *options, folder=tmp_path, **environment)
        assert done.returncode == 0, done.stdout
        return next(check["found"] for check in json.loads(done.stdout)["checks"] if check["name"] == "data")

    found = said()
    count = re.search(r"yields only (\d+) distinct test problems, 250 were asked for. Ask for fewer problems", found)[1]
    assert "yields only" not in said(RR_EVAL_PROBLEMS=count)
    assert f"too few test problems for {count} of every seed's own" in said("--seeds", "3", RR_EVAL_PROBLEMS=count)


def test_use_recursive_attaches_a_fresh_recursion_to_a_plain_model(experiment, tmp_path):
    """The guide evaluates stage after_surgery on the base model's own folder."""
    folder, _ = experiment
    from rrcli.demo import defaults

    done = rr(
        *("eval", "--model-path", str(defaults.MODEL_DIR), "--stage", "after_surgery", "--use-recursive"),
        *("--output-dir", str(tmp_path), "--log-dir", str(tmp_path), "--skip-performance", "--skip-generation"),
        folder=folder,
        **SMALL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    again = json.loads((tmp_path / "after_surgery_results.json").read_text())
    assert again["model"]["depth"] == 2
    assert again["records"]["documents"] == results(folder, "after_surgery")["records"]["documents"]
