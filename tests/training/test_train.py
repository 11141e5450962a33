"""Training: runs that should be equivalent give the same losses, and what must not change does not."""

from __future__ import annotations

import json
import shutil
from functools import partial

import pytest
import torch
from transformers import PreTrainedModel

import rrcli
from rrcli import configuration
from rrcli.data.splits import side_of
from rrcli.data.training_data import TrainingData
from rrcli.demo.defaults import MODEL_DIR
from rrcli.errors import RRError, UsageError
from rrcli.evaluation.held_out import held_out_data
from rrcli.experiment.planning import plan, status_of
from rrcli.experiment.replicates import Replicate
from rrcli.experiment.training_run import prepare_training
from rrcli.files import checkpoints
from rrcli.recursion.batch import IGNORED
from rrcli.reporting import Silent
from rrcli.services import train as service
from rrcli.services.eval import evaluate
from rrcli.services.surgery import surgery
from rrcli.settings import EvalSettings, SurgerySettings, TrainSettings, with_changes
from rrcli.training import step_plan, trainer
from rrcli.training.optimizer import learning_rate_factor
from training_runs import curve

SETTINGS = TrainSettings(
    steps=4, batch_size=4, lr=1e-3, sidecar_lr=1e-3, warmup_steps=2, save_interval=4, eval_interval=0, max_length=96
)


changed = partial(with_changes, SETTINGS)


def test_vanilla_equals_a_plain_loop(tmp_path):
    service.train(SETTINGS, "vanilla", tmp_path, Silent())
    model, tokenizer = rrcli.load("default")
    data = TrainingData(SETTINGS, tmp_path, tokenizer)
    model.train()
    matrices = list(model.parameters())
    optimizer = torch.optim.AdamW(matrices, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)
    expected = []
    for step in range(SETTINGS.steps):
        optimizer.param_groups[0]["lr"] = SETTINGS.lr * learning_rate_factor(step, SETTINGS)
        batch = data.batch(step)
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), SETTINGS.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    found = curve(tmp_path, "finetuned_vanilla")
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert found == pytest.approx(expected, rel=1e-3)


def test_recursive_at_depth_0_equals_vanilla(operated, monkeypatch):
    service.train(SETTINGS, "vanilla", operated, Silent())
    monkeypatch.setattr(step_plan, "sampled_depth", lambda *_: 0)
    service.train(SETTINGS, "recursive", operated, Silent(), restart=True)
    assert curve(operated, "finetuned_recursive") == pytest.approx(curve(operated, "finetuned_vanilla"), rel=1e-6)


def test_parts_of_a_batch_weigh_as_the_whole(tmp_path):
    service.train(changed(run_name="whole"), "vanilla", tmp_path, Silent())
    service.train(changed(run_name="parts", gradient_accumulation=4), "vanilla", tmp_path, Silent())
    whole, parts = curve(tmp_path, "whole"), curve(tmp_path, "parts")
    assert parts[0] == pytest.approx(whole[0], rel=1e-6)
    # Adam divides a gradient by its own size, so rounding grows with every step.
    assert parts == pytest.approx(whole, rel=1e-3)


@pytest.mark.parametrize("phase", ["a", "b"])
def test_a_frozen_base_stays_the_base_at_depth_0(operated, phase):
    settings = changed(phase=phase, steps=6, commit_margin=0.3)
    result = service.train(settings, "recursive", operated, Silent(), restart=True)
    assert not (result.checkpoint / "model.safetensors").exists()
    model, tokenizer = rrcli.load(result.checkpoint)
    assert model.recursion.config.commit_margin == 0.3  # for calibration, and for whoever goes on with it
    base, _ = rrcli.load("default")
    ids = torch.tensor([tokenizer("Tom has a red ball.")["input_ids"]])
    with torch.no_grad():
        model.recursion.depth = 0
        assert torch.equal(model(ids).logits, base(ids).logits)
        model.recursion.depth = 1
        assert not torch.equal(model(ids).logits, base(ids).logits)
    norms = curve(operated, "finetuned_recursive", "train/feedback_norm")
    assert norms[0] == 0 < norms[1] < norms[-1]


def test_every_parameter_moves_in_phase_c(operated):
    result = service.train(SETTINGS, "recursive", operated, Silent(), restart=True)
    trained, _ = rrcli.load(result.checkpoint)
    before, _ = rrcli.load(operated / "checkpoints" / "after_surgery")
    for part in ("model", "recursion"):
        a = trained if part == "model" else trained.recursion
        b = before if part == "model" else before.recursion
        for (name, new), (_, old) in zip(a.named_parameters(), b.named_parameters(), strict=True):
            assert not torch.equal(new, old), name


def test_each_seed_trains_a_sidecar_of_its_own(operated):
    settings = changed(seeds=(0, 7), seed=7, steps=1, lr=0.0, sidecar_lr=0.0)
    result = service.train(settings, "recursive", operated, Silent())
    assert (result.run, result.stage, result.seed) == ("finetuned_recursive-seed7", "finetuned_recursive", 7)
    trained, tokenizer = rrcli.load(result.checkpoint)
    fresh, _ = rrcli.load("default")
    rrcli.attach(fresh, rrcli.RecursionConfig(seed=7))
    operated_on, _ = rrcli.load(operated / "checkpoints" / "after_surgery")
    assert trained.recursion.config.seed == 7
    for name, weights in trained.recursion.state_dict().items():
        assert torch.equal(weights, fresh.recursion.state_dict()[name]), name
    assert not torch.equal(trained.recursion.cell.w_in.weight, operated_on.recursion.cell.w_in.weight)
    ids = tokenizer("Tom has a ball.", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(trained(ids).logits, operated_on(ids).logits)


def test_more_passes_than_the_surgery_made_are_refused_and_as_many_are_the_same_run(operated, tmp_path):
    with pytest.raises(UsageError, match=r"the training is 5, but the surgery made .* at most 2") as caught:
        service.train(changed(max_steps=5), "recursive", operated, Silent())
    assert "rr surgery --overwrite --max-steps 5" in caught.value.hint
    with pytest.raises(UsageError, match=r"is 5, .* at most 2"):
        plan(tmp_path, lambda cls: configuration.load(cls, tmp_path, {"max_steps": 5} if cls is TrainSettings else {}))
    made = [
        prepare_training(changed(max_steps=steps, chunk_width=width), "recursive", operated)
        for steps, width in ((0, 0), (2, 0), (0, 16), (1, 0))
    ]
    assert made[0].inputs == made[1].inputs == made[2].inputs != made[3].inputs
    assert (made[0].settings.max_steps, made[0].settings.chunk_width) == (2, 16)


def test_intervals_read_the_validation_side_and_nothing_of_the_test_side(operated, monkeypatch):
    seen = []

    def measured(model, tokenizer, data, *_, **__):
        seen.append(data)
        return {"metrics": {"perplexity": {"value": 2.0}}}

    monkeypatch.setattr(trainer, "evaluate_model", measured)
    service.train(changed(run_name="intervals", steps=2, eval_interval=1), "vanilla", operated, Silent())
    assert len(seen) == 2
    expected = held_out_data(SETTINGS, operated, 64, 64, side="validation")
    assert [p.key for p in seen[0].problems] == [p.key for p in expected.problems]
    assert seen[0].documents == expected.documents
    tested = held_out_data(SETTINGS, operated, 64)
    assert {p.question for p in tested.problems}.isdisjoint(p.question for p in seen[0].problems)
    assert set(tested.documents).isdisjoint(seen[0].documents)


def test_depth_is_the_same_for_everyone_who_asks():
    drawn = [step_plan.sampled_depth(0, step, 3) for step in range(300)]
    assert drawn == [step_plan.sampled_depth(0, step, 3) for step in range(300)]
    assert set(drawn) == {1, 2, 3}
    assert drawn != [step_plan.sampled_depth(1, step, 3) for step in range(300)]


def test_a_loss_that_is_not_finite_stops_before_the_step_and_keeps_the_checkpoint(tmp_path):
    service.train(changed(steps=2, save_interval=1), "vanilla", tmp_path, Silent())
    [last] = checkpoints(tmp_path / "checkpoints" / "finetuned_vanilla")[-1:]
    model, tokenizer = rrcli.load(last)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    broken = tmp_path / "broken"
    model.save_pretrained(broken)
    tokenizer.save_pretrained(broken)
    with pytest.raises(RRError, match=r"in step 1 \(batch 0 of seed 0\); no weight was changed"):
        service.train(changed(model=str(broken), run_name="broken_run"), "vanilla", tmp_path, Silent())
    assert checkpoints(tmp_path / "checkpoints" / "broken_run") == []
    assert checkpoints(tmp_path / "checkpoints" / "finetuned_vanilla")[-1] == last


def test_a_run_of_other_settings_is_not_continued(tmp_path):
    service.train(changed(steps=2), "vanilla", tmp_path, Silent())
    with pytest.raises(RRError, match="other settings") as error:
        service.train(changed(steps=2, lr=5e-4), "vanilla", tmp_path, Silent())
    assert "--restart" in error.value.hint
    service.train(changed(steps=2, lr=5e-4), "vanilla", tmp_path, Silent(), restart=True)


def test_a_finished_run_is_left_alone(tmp_path):
    first = service.train(changed(steps=2), "vanilla", tmp_path, Silent())
    stamp = (first.checkpoint / "model.safetensors").stat().st_mtime_ns
    again = service.train(changed(steps=2), "vanilla", tmp_path, Silent())
    assert again.first_step == 2
    assert (again.checkpoint / "model.safetensors").stat().st_mtime_ns == stamp


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    service.train(changed(steps=5, save_interval=1, keep=2), "vanilla", tmp_path, Silent())
    assert [p.name for p in checkpoints(tmp_path / "checkpoints" / "finetuned_vanilla")] == [
        "step-000004",
        "step-000005",
    ]
    saved = json.loads((tmp_path / "checkpoints" / "finetuned_vanilla" / "step-000005" / "metrics.json").read_text())
    assert saved["training"]["steps"] == 5
    assert saved["scalars"]["train/loss/total"]["step"] == 5


@pytest.mark.parametrize(
    ("values", "mode", "match_flops", "message"),
    [
        ({"phase": "a"}, "vanilla", "", "nothing to train"),
        ({"run_name": "baseline"}, "vanilla", "", "is that of another stage or seed"),
        ({"run_name": "Vanilla_Equal_FLOPs"}, "vanilla", "", "is that of another stage or seed"),
        ({"run_name": "finetuned_vanilla-seed1"}, "vanilla", "", "is that of another stage or seed"),
        ({"run_name": "../outside"}, "vanilla", "", "is not a plain name"),
        ({}, "vanilla", "my_run", "--match-flops my_run needs a name for the run"),
        ({}, "recursive", "absent", "--match-flops is for vanilla training"),
        ({"batch_size": 3, "num_processes": 2}, "vanilla", "", "--batch-size 3 cannot be shared out evenly among 2"),
        ({"callback": "nowhere"}, "vanilla", "", "--callback is 'nowhere'"),
        ({"callback": "not_there:f"}, "vanilla", "", "cannot be imported"),
        ({"callback": "json:no_such"}, "vanilla", "", "no function 'no_such'"),
    ],
)
def test_settings_that_mean_nothing_are_refused_before_a_model_is_loaded(
    tmp_path, monkeypatch, values, mode, match_flops, message
):
    monkeypatch.setattr(service, "load_for", lambda *_: pytest.fail("the model was loaded"))
    (tmp_path / "checkpoints" / "after_surgery").mkdir(parents=True)
    with pytest.raises(UsageError) as error:
        service.train(changed(**values), mode, tmp_path, Silent(), match_flops=match_flops)
    assert message in f"{error.value.message} {error.value.hint}"
    assert not list((tmp_path / "checkpoints").glob("*/*"))


@pytest.mark.parametrize("base_says", [True, False])
def test_checkpointing_activations_leaves_the_configuration_as_the_base_has_it(tmp_path, base_says):
    base = shutil.copytree(MODEL_DIR, tmp_path / "model")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"use_cache": base_says}))
    for name, on in (("kept", False), ("recomputed", True)):
        settings = changed(model="model", steps=2, run_name=name, gradient_checkpointing=on)
        result = service.train(settings, "vanilla", tmp_path, Silent())
        assert json.loads((result.checkpoint / "config.json").read_text())["use_cache"] is base_says
    assert curve(tmp_path, "kept") == pytest.approx(curve(tmp_path, "recomputed"), rel=1e-5)


def test_a_refused_training_leaves_nothing_that_looks_like_a_model(tmp_path):
    run = tmp_path / "checkpoints" / "finetuned_vanilla"
    with pytest.raises(UsageError, match="float16"):
        service.train(changed(dtype="float16"), "vanilla", tmp_path, Silent())
    assert not run.exists()
    run.mkdir(parents=True)  # as a training that was killed leaves it
    with pytest.raises(RRError, match="has no model yet") as caught:
        evaluate(EvalSettings(), "finetuned_vanilla", tmp_path, Silent())
    assert "rr train --mode vanilla" in caught.value.hint


def test_a_checkpoint_that_cannot_be_read_back_is_not_published_and_the_older_ones_stay(tmp_path, monkeypatch):
    save, saved = PreTrainedModel.save_pretrained, []

    def save_once(model, folder, **options):
        saved.append(folder)
        if len(saved) == 1:
            save(model, folder, **options)
        else:
            model.config.save_pretrained(folder)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save_once)
    with pytest.raises(RRError, match=r"not what was to be saved: .* holds no weights") as caught:
        service.train(changed(steps=3, save_interval=1, keep=1), "vanilla", tmp_path, Silent())
    [left] = checkpoints(tmp_path / "checkpoints" / "finetuned_vanilla")
    assert left.name == "step-000001"
    assert f"The last good checkpoint is {left}" in caught.value.hint


def test_what_was_trained_is_still_done_after_the_experiment_was_moved(tmp_path):
    before = tmp_path / "before"
    before.mkdir()
    shutil.copytree(MODEL_DIR, before / "model")
    flags = {"model": "./model", "steps": 1, "eval_interval": 0, "batch_size": 2, "phase": "a", "max_length": 64}
    surgery(configuration.load(SurgerySettings, before, {"model": "./model"}), before, Silent(), verify=False)
    service.train(configuration.load(TrainSettings, before, flags), "recursive", before, Silent())
    after = before.rename(tmp_path / "after")

    def load(cls):
        return configuration.load(cls, after, {k: v for k, v in flags.items() if k in cls.__dataclass_fields__})

    assert status_of("surgery", Replicate("after_surgery", 0), after, load).status == "done"
    assert status_of("train", Replicate("finetuned_recursive", 0), after, load).status == "done"


def test_a_small_source_without_validation_is_trained_without_measurements(tmp_path):
    """Measurements are not worth an error; a warning says what they miss."""
    texts = [text for n in range(60) if side_of(text := f"Tom has {n} red balls.") == "train"]
    (tmp_path / "data.txt").write_text("\n\n".join(texts))
    warnings: list[str] = []

    class Listening(Silent):
        def warn(self, message: str) -> None:
            warnings.append(message)

    settings = TrainSettings(
        data="data.txt", task_share=0, task=("q.jsonl:held_out=all",), steps=2, batch_size=2, eval_interval=1
    )
    (tmp_path / "q.jsonl").write_text('{"question": "q", "answer": 1}\n')
    service.train(settings, "vanilla", tmp_path, Listening())
    assert any("nothing to validate with in: q.jsonl:held_out=all, data.txt" in warning for warning in warnings)
