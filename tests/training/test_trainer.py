"""The loop's ways out of trouble, its options, and runs that must be equal bit for bit."""

from __future__ import annotations

import json
import math
import shutil
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

import rrcli
from rrcli.errors import Interrupted, RRError, UsageError
from rrcli.experiment.planning import status_of
from rrcli.experiment.replicates import Replicate
from rrcli.experiment.workspace import Workspace
from rrcli.files import checkpoints
from rrcli.recursion import flops
from rrcli.reporting import Silent
from rrcli.services import train as service
from rrcli.services.eval import evaluate
from rrcli.settings import EvalSettings, TrainSettings, with_changes
from rrcli.training import red_flags
from rrcli.training import trainer as trainer_module
from rrcli.training.optimizer import learning_rate_factor
from rrcli.training.state import DepthCost
from training_runs import ActsAfter, assert_same_weights, curve, events, texts, weights

SETTINGS = TrainSettings(
    steps=4, batch_size=4, lr=1e-3, sidecar_lr=1e-3, warmup_steps=2, save_interval=4, eval_interval=0, max_length=64
)


changed = partial(with_changes, SETTINGS)

# -- out of memory -----------------------------------------------------------------------------------------------------


def raises_above(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real = trainer_module.compute_losses

    def small(readout, batch, *, plan):
        if len(batch.labels) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(readout, batch, plan=plan)

    monkeypatch.setattr(trainer_module, "compute_losses", small)


@pytest.mark.parametrize("mode", ["vanilla", "recursive"])
def test_out_of_memory_halves_the_parts_and_changes_no_loss(operated, monkeypatch, mode):
    service.train(changed(run_name=f"{mode}_roomy"), mode, operated, Silent(), restart=True)
    raises_above(1, monkeypatch)
    reporter = Silent()
    service.train(changed(run_name=f"{mode}_tight"), mode, operated, reporter, restart=True)
    roomy, tight = curve(operated, f"{mode}_roomy"), curve(operated, f"{mode}_tight")
    assert tight[0] == pytest.approx(roomy[0], rel=1e-5)
    assert tight == pytest.approx(roomy, rel=2e-3)
    assert [message for message in reporter.warnings if "out of memory" in message] == [
        "out of memory: going on with 2 examples at a time instead of 4",
        "out of memory: going on with 1 examples at a time instead of 2",
    ]
    assert "out of memory" in texts(operated, f"{mode}_tight", "train/red_flags")[0]


def test_no_memory_even_for_one_example_is_an_error(operated, monkeypatch):
    raises_above(0, monkeypatch)
    with pytest.raises(RRError, match="even with one example at a time") as error:
        service.train(changed(run_name="none"), "vanilla", operated, Silent())
    assert "--gradient-checkpointing" in error.value.hint


def test_no_memory_for_the_optimiser_saves_nothing_and_keeps_the_last_checkpoint(operated, monkeypatch):
    real = torch.optim.AdamW.step
    steps = []

    def third_fails(self, *arguments):
        steps.append(1)
        if len(steps) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", third_fails)
    with pytest.raises(RRError, match="out of memory in the optimiser's part of step 3, which is not saved") as error:
        service.train(changed(run_name="heavy", save_interval=1), "vanilla", operated, Silent())
    assert [path.name for path in checkpoints(operated / "checkpoints" / "heavy")] == ["step-000001", "step-000002"]
    assert "step-000002" in error.value.hint
    assert "--phase" in error.value.hint


# -- runs that must be equal -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["vanilla", "recursive"])
def test_parts_of_any_size_give_the_same_curve(operated, mode):
    curves = []
    for parts in (1, 2, 4):
        settings = changed(run_name=f"{mode}_parts_{parts}", gradient_accumulation=parts)
        service.train(settings, mode, operated, Silent(), restart=True)
        curves.append(curve(operated, settings.run_name))
    for other in curves[1:]:
        assert other[0] == pytest.approx(curves[0][0], rel=1e-5)
        assert other == pytest.approx(curves[0], rel=2e-3)


# Depths are drawn from the seed: with 9, depth 2 comes before the stop alone.
@pytest.mark.parametrize(
    "options",
    [{}, {"ema": 0.9}, {"dtype": "bfloat16"}, {"phase": "a"}, {"phase": "b", "ema": 0.5}, {"seed": 9}],
    ids=str,
)
def test_stopping_and_going_on_changes_no_bit(operated, options):
    whole = changed(run_name="whole", eval_interval=3, eval_samples=2, **options)
    straight = service.train(whole, "recursive", operated, Silent(), restart=True)

    parts = changed(run_name="parts", eval_interval=3, eval_samples=2, **options)
    with pytest.raises(Interrupted, match="stopped after step 2 of 4"):
        service.train(parts, "recursive", operated, ActsAfter(2), restart=True)
    resumed = service.train(parts, "recursive", operated, Silent())
    assert resumed.first_step == 2
    assert_same_weights(straight.checkpoint, resumed.checkpoint)
    logged = [json.loads((done.checkpoint / "metrics.json").read_text())["scalars"] for done in (straight, resumed)]
    timed = [tag for tag in logged[0] if "/performance/" in tag]
    assert {**logged[1], **dict.fromkeys(timed)} == {**logged[0], **dict.fromkeys(timed)}
    assert curve(operated, "whole") == curve(operated, "parts")
    assert [e.step for e in events(operated, "parts").Scalars("train/loss/total")] == [1, 2, 3, 4]


def test_recomputed_activations_change_no_loss(operated):
    service.train(changed(run_name="kept"), "recursive", operated, Silent(), restart=True)
    recomputing = changed(run_name="recomputed", gradient_checkpointing=True)
    service.train(recomputing, "recursive", operated, Silent(), restart=True)
    assert curve(operated, "recomputed") == pytest.approx(curve(operated, "kept"), rel=1e-5)


@pytest.mark.slow  # the compiler takes 30 s
def test_compiled_layers_change_no_loss(operated):
    service.train(changed(run_name="plain"), "vanilla", operated, Silent(), restart=True)
    service.train(changed(run_name="compiled", compile=True), "vanilla", operated, Silent(), restart=True)
    assert curve(operated, "compiled") == pytest.approx(curve(operated, "plain"), abs=1e-4)
    # Only compiled kernels round differently.
    assert curve(operated, "compiled") != curve(operated, "plain")


def test_compiling_without_a_compiler_is_an_error(operated, monkeypatch):
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "/nowhere/g++"))
    with pytest.raises(RRError, match="C\\+\\+ compiler") as error:
        service.train(changed(run_name="bare", compile=True, device="cpu"), "vanilla", operated, Silent())
    assert "--compile" in error.value.hint


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "middle", "end"), [("cosine", 0.55, 0.1), ("linear", 0.55, 0.1), ("constant", 1, 1)]
)
def test_schedules(schedule, middle, end):
    settings = changed(schedule=schedule, steps=110, warmup_steps=10)
    assert learning_rate_factor(4, settings) == 0.5
    assert learning_rate_factor(60, settings) == pytest.approx(middle)
    assert learning_rate_factor(110, settings) == pytest.approx(end)
    assert (learning_rate_factor(35, settings) == pytest.approx(0.775)) == (schedule == "linear")


def test_the_average_is_what_is_saved_and_the_raw_weights_are_those_of_no_average(operated):
    plain = service.train(changed(run_name="raw"), "vanilla", operated, Silent(), restart=True)
    averaged = service.train(changed(run_name="averaged", ema=0.9), "vanilla", operated, Silent(), restart=True)
    state = load_file(averaged.checkpoint / "trainer_state" / "weights.safetensors")
    raw, mean = weights(plain.checkpoint), weights(averaged.checkpoint)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(state[f"raw/model.{name}"], raw[f"model.safetensors:{name}"])
    assert torch.equal(state[f"average/model.{name}"], mean[f"model.safetensors:{name}"])
    assert not torch.equal(state[f"raw/model.{name}"], state[f"average/model.{name}"])
    assert not (plain.checkpoint / "trainer_state" / "weights.safetensors").exists()


@pytest.mark.parametrize(("mode", "phase"), [("vanilla", "c"), ("recursive", "c"), ("recursive", "a")])
def test_bfloat16_learns_what_its_own_rounding_would_lose(operated, mode, phase):
    settings = changed(run_name="half", dtype="bfloat16", lr=1e-6, sidecar_lr=1e-6, steps=3, phase=phase)
    result = service.train(settings, mode, operated, Silent(), restart=True)
    saved = weights(result.checkpoint)
    raw = {name.partition(":raw/")[2]: t for name, t in saved.items() if ":raw/" in name}
    assert all(t.dtype == torch.float32 for t in raw.values())
    moved = [t for t in raw.values() if t.dim() == 2 and not torch.equal(t, t.bfloat16().float())]
    assert len(moved) >= (5 if phase == "c" else 1)
    model, _ = rrcli.load(result.checkpoint, dtype="auto")
    assert result.losses["total"] == pytest.approx(curve(operated, "half")[-1])
    if phase == "c":
        assert {t.dtype for n, t in saved.items() if n.startswith("model.safe")} == {torch.bfloat16}
    loaded = {f"model.{name}": tensor for name, tensor in model.named_parameters()}
    if mode == "recursive":
        loaded |= {f"recursion.{name}": tensor for name, tensor in model.recursion.named_parameters()}
    for name, tensor in raw.items():
        assert torch.equal(loaded[name], tensor.bfloat16()), name


def test_float16_is_refused(operated):
    with pytest.raises(UsageError, match="float16") as error:
        service.train(changed(run_name="fp16", dtype="float16"), "vanilla", operated, Silent())
    assert "bfloat16" in error.value.hint


def test_histograms_hyper_parameters_and_generations_are_in_the_runs_own_folder(operated):
    settings = changed(run_name="board", histograms=2, eval_interval=2, eval_samples=2)
    service.train(settings, "recursive", operated, Silent(), restart=True)
    found = events(operated, "board")
    histograms = found.Tags()["histograms"]
    assert "parameters/recursion.cell.w_out.weight" in histograms
    assert "gradients/recursion.cell.w_out.weight" in histograms
    assert [e.step for e in found.Histograms("gradients/recursion.cell.w_out.weight")] == [2, 4]
    assert found.PluginTagToContent("hparams").keys() >= {"_hparams_/experiment", "_hparams_/session_start_info"}
    assert "evaluation/during_training/generations/text_summary" in found.Tags()["tensors"]
    assert found.Tags()["images"] == ["evaluation/during_training/generations"]
    assert not [path for path in (operated / "logs" / "board").iterdir() if path.is_dir()]


def test_the_best_checkpoint_stays_beside_the_last(operated, monkeypatch):
    perplexities = iter([5.0, 3.0, 4.0, 4.5, 4.2, 4.1])
    monkeypatch.setattr(
        trainer_module, "evaluate_model", lambda *_, **__: {"metrics": {"perplexity": {"value": next(perplexities)}}}
    )
    settings = changed(run_name="best", steps=6, eval_interval=1, save_interval=1, keep=1)
    service.train(settings, "vanilla", operated, Silent(), restart=True)
    kept = checkpoints(operated / "checkpoints" / "best")
    assert [path.name for path in kept] == ["step-000002", "step-000006"]
    marks = [json.loads((path / "metrics.json").read_text())["best"] for path in kept]
    assert marks == [True, False]


def test_the_best_checkpoint_is_used_where_it_is_asked_for_and_the_whole_run_is_paid_for(tmp_path, monkeypatch):
    perplexities = iter([5.0, 3.0, 4.0])
    with monkeypatch.context() as patched:
        patched.setattr(
            trainer_module,
            "evaluate_model",
            lambda *_, **__: {"metrics": {"perplexity": {"value": next(perplexities)}}},
        )
        settings = changed(steps=3, eval_interval=1, keep=1)
        service.train(settings, "vanilla", tmp_path, Silent())
    workspace, one = Workspace(tmp_path, settings), Replicate("finetuned_vanilla", 0)

    def status(**changes):
        step = status_of("train", one, tmp_path, lambda cls: changed(**changes) if cls is TrainSettings else cls())
        return f"{step.status} {step.detail}".strip()

    plain, best = ({"steps": 3, "eval_interval": 1, "load_best": on} for on in (False, True))
    assert workspace.stage_model(one.stage).path.name == "step-000003"
    assert (status(**plain), status(**best)) == ("done", "unfinished another checkpoint is to be used")
    service.train(changed(**best), "vanilla", tmp_path, Silent())
    assert workspace.stage_model(one.stage).path.name == "step-000002"
    assert workspace.resolve("checkpoints/finetuned_vanilla").path.name == "step-000002"
    assert (status(**plain), status(**best)) == ("unfinished another checkpoint is to be used", "done")
    limits = EvalSettings(max_samples=2, skip_reasoning=True, skip_generation=True, skip_performance=True)
    measured = evaluate(limits, one.stage, tmp_path, Silent()).results
    assert measured["model"]["source"].endswith("step-000002")
    assert measured["training"]["steps"] == 3
    shutil.rmtree(tmp_path / "checkpoints" / "finetuned_vanilla" / "step-000002")
    with pytest.raises(RRError, match="that of step 2, is gone"):
        workspace.stage_model(one.stage)
    service.train(changed(**plain), "vanilla", tmp_path, Silent())
    assert workspace.stage_model(one.stage).path.name == "step-000003"
    with pytest.raises(UsageError, match="--load-best needs measurements in training"):
        service.train(changed(load_best=True, eval_interval=0), "vanilla", tmp_path, Silent())


# -- callbacks ---------------------------------------------------------------------------------------------------------


def test_a_callback_adds_a_metric_and_its_error_stops_at_a_saved_step(operated):
    (operated / "my_metrics.py").write_text(
        "def log(context):\n"
        "    context.tracker.log_scalar('custom/my_metric', context.step * 2.0, context.step)\n"
        "    assert context.losses['total'] > 0 and hasattr(context.model, 'generate')\n"
        "def broken(context):\n"
        "    if context.step == 2: raise ValueError('no such thing')\n"
    )
    service.train(changed(run_name="custom", callback="my_metrics:log"), "vanilla", operated, Silent(), restart=True)
    assert curve(operated, "custom", "custom/my_metric") == [2, 4, 6, 8]
    saved = checkpoints(operated / "checkpoints" / "custom")[-1] / "metrics.json"
    assert json.loads(saved.read_text())["scalars"]["custom/my_metric"] == {"value": 8.0, "step": 4}
    settings = changed(run_name="broken", callback="my_metrics:broken")
    with pytest.raises(RRError, match="my_metrics:broken failed in step 2: ValueError: no such thing"):
        service.train(settings, "vanilla", operated, Silent(), restart=True)
    assert [p.name for p in checkpoints(operated / "checkpoints" / "broken")] == ["step-000002"]
    assert service.train(changed(run_name="broken"), "vanilla", operated, Silent()).first_step == 2


# -- equal FLOPs -------------------------------------------------------------------------------------------------------


def test_vanilla_trains_to_the_flops_of_a_recursive_run(operated):
    spent = service.train(changed(run_name="twice", steps=8), "recursive", operated, Silent(), restart=True).flops
    matching = changed(run_name="as_much")
    result = service.train(matching, "vanilla", operated, Silent(), match_flops="twice")
    assert result.run == "as_much"
    assert result.steps > 8
    assert result.flops == pytest.approx(spent, rel=0.1)
    rates = curve(operated, "as_much", "train/lr")
    assert rates == pytest.approx(
        [SETTINGS.lr * learning_rate_factor(s, changed(steps=result.steps)) for s in range(result.steps)]
    )
    again = service.train(matching, "vanilla", operated, Silent(), match_flops="twice")
    assert again.first_step == again.steps == result.steps


def test_ever_fewer_steps_are_counted():
    assert [step for step in range(40) if DepthCost(steps=step).due] == [0, 1, 2, 4, 8, 16, 32]


@pytest.mark.parametrize("mode", ["vanilla", "recursive"])
def test_the_steps_that_are_counted_stand_for_all(operated, monkeypatch, mode):
    """Batches differ in length and in how many of their positions bear loss."""
    settings = changed(run_name=f"{mode}_counted", steps=24, save_interval=24)
    partly = service.train(settings, mode, operated, Silent(), restart=True)
    monkeypatch.setattr(DepthCost, "due", True)
    wholly = service.train(settings, mode, operated, Silent(), restart=True)
    assert partly.flops == pytest.approx(wholly.flops, rel=0.02)


def test_what_cannot_be_counted_is_said_and_cannot_be_matched(operated, monkeypatch):
    monkeypatch.delitem(flops.OWN_FORMULAS, "aten::_scaled_dot_product_flash_attention_for_cpu_backward")
    reporter, settings = Silent(), changed(run_name="blind", save_interval=2)
    service.train(settings, "recursive", operated, reporter, restart=True)
    name = "aten::_scaled_dot_product_flash_attention_for_cpu_backward"
    assert [message for message in reporter.warnings if "FLOPs" in message] == [
        f"the training FLOPs leave out what rr cannot count: {name}"
    ]
    with pytest.raises(RRError, match=f"FLOPs of the run 'blind' leave out {name}"):
        service.train(changed(run_name="x"), "vanilla", operated, Silent(), match_flops="blind")


def test_matching_needs_a_run_that_has_ended(operated, tmp_path):
    with pytest.raises(RRError, match="'absent' has no checkpoint"):
        service.train(changed(run_name="x"), "vanilla", tmp_path, Silent(), match_flops="absent")
    some = changed(run_name="part_of_it", save_interval=1, keep=9)
    service.train(some, "vanilla", operated, Silent())
    for later in checkpoints(operated / "checkpoints" / "part_of_it")[2:]:
        shutil.rmtree(later)
    with pytest.raises(RRError, match="'part_of_it' is at step 2 of 4"):
        service.train(changed(run_name="x"), "vanilla", operated, Silent(), match_flops="part_of_it")


# -- a disk that is full ----------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_last_checkpoint_and_says_how_much_is_free(operated):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    full = ActsAfter(3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1])))
    settings = changed(run_name="full", save_interval=2)
    try:
        with pytest.raises(RRError, match=r"cannot write .*step-000004: .*[\d,]+ bytes free") as error:
            service.train(settings, "vanilla", operated, full, restart=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert error.value.exit_code == 1
    folder = operated / "checkpoints" / "full"
    assert [path.name for path in folder.iterdir()] == ["step-000002"]
    assert str(folder / "step-000002") in error.value.hint
    rrcli.load(folder / "step-000002")
    assert service.train(settings, "vanilla", operated, Silent()).first_step == 2


# -- red flags, through real runs --------------------------------------------------------------------------------------


def test_red_flags_reach_the_screen_and_tensorboard(operated, monkeypatch):
    monkeypatch.setattr(red_flags, "FIRST_JUDGEMENT", 10)
    reporter = Silent()
    settings = changed(run_name="off", steps=21, batch_size=2, lr=0.0, sidecar_lr=0.0)
    monkeypatch.setattr(trainer_module, "memory_use", lambda _: (2.0**20, 0.95))
    service.train(settings, "recursive", operated, reporter, restart=True)
    said = texts(operated, "off", "train/red_flags")
    for name in (red_flags.SILENTLY_OFF, red_flags.MEMORY, red_flags.ALWAYS_MAX):
        assert [m for m in reporter.warnings if m.startswith(name)], name
        assert len([m for m in said if m.startswith(name)]) == 1


@pytest.mark.parametrize(("lr", "seen"), [(0.0, True), (1e-3, False)])
def test_a_loss_that_does_not_fall_is_seen(operated, monkeypatch, lr, seen):
    """Every batch is the same text, so the loss stays exactly where it is, or falls in every step."""
    monkeypatch.setattr(red_flags, "FIRST_JUDGEMENT", 12)
    (operated / "same.jsonl").write_text(json.dumps({"text": "Tom has a red ball."}) + "\n")
    reporter, name = Silent(), f"flat-{lr}"
    settings = changed(run_name=name, data="same.jsonl", task_share=0.0, steps=12, batch_size=2, lr=lr, warmup_steps=0)
    service.train(settings, "vanilla", operated, reporter, restart=True)
    losses = curve(operated, name, "train/loss/final_ce")
    assert (losses == [losses[0]] * 12) == seen
    assert (losses == sorted(losses, reverse=True)) or seen
    said = [message for message in reporter.warnings if message.startswith(red_flags.NOT_FALLING)]
    assert len(said) == seen
    assert all("try a higher --lr" in message for message in said)
    assert not said or texts(operated, name, "train/red_flags") == said


def test_a_learning_rate_that_is_too_high_is_seen(operated):
    """The warm-up is long, so the rate is harmless at first: the loss has a low point from which it can explode."""
    reporter = Silent()
    settings = changed(run_name="wild", steps=70, batch_size=8, lr=0.3, warmup_steps=600, schedule="constant")
    service.train(settings, "vanilla", operated, reporter, restart=True)
    assert [m for m in reporter.warnings if m.startswith("loss exploding")]
    assert math.isfinite(curve(operated, "wild")[-1])


def test_a_learning_rate_that_ruins_the_model_at_once_is_seen(operated):
    """The loss has no low point; what gives it away is that a guess among all tokens would do better."""
    reporter = Silent()
    settings = changed(run_name="ruined", steps=30, batch_size=2, lr=1.0, warmup_steps=0, schedule="constant")
    service.train(settings, "vanilla", operated, reporter, restart=True)
    [said] = [m for m in reporter.warnings if m.startswith("loss exploding")]
    assert "more than a guess takes (6.93)" in said
