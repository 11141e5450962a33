"""Training on data of every form, and runs that differ in form alone and must be the same."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from statistics import median_low

import pytest
import torch

import rrcli
from rrcli.data.rendering import encode_prompt
from rrcli.data.tasks import Task, prompt_of
from rrcli.errors import Interrupted, RRError
from rrcli.files import TRAINER_STATE
from rrcli.reporting import Silent
from rrcli.services import train as service
from rrcli.settings import TrainSettings, with_changes
from training_runs import ActsAfter, assert_same_weights, curve, weights

SETTINGS = TrainSettings(
    steps=3, batch_size=8, lr=1e-4, sidecar_lr=1e-4, warmup_steps=2, save_interval=3, eval_interval=0, max_length=96
)


changed = partial(with_changes, SETTINGS)


def talks(file: Path, count: int = 60) -> str:
    rows = [
        {"messages": [{"role": "user", "content": f"{n} and 1?"}, {"role": "assistant", "content": str(n + 1)}]}
        for n in range(count)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file.name


# -- runs that must be the same ----------------------------------------------------------------------------------------


def own_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return the model's and the recursion's tensors, without the trainer's state."""
    return {name: tensor for name, tensor in weights(checkpoint).items() if not name.startswith(TRAINER_STATE)}


@pytest.mark.parametrize("mode", ["vanilla", "recursive"])
def test_one_part_two_parts_and_eight_parts_are_the_same_training(operated, mode):
    results = {}
    for parts in (1, 2, 8):
        settings = changed(run_name=f"{mode}_{parts}", gradient_accumulation=parts, lr=1e-5, sidecar_lr=1e-5)
        checkpoint = service.train(settings, mode, operated, Silent()).checkpoint
        results[parts] = (curve(operated, f"{mode}_{parts}"), own_weights(checkpoint))
    losses, expected = results.pop(1)
    for other, found in results.values():
        assert other == pytest.approx(losses, rel=1e-6)
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6, msg=name)


def test_a_recursion_that_never_learns_is_vanilla(operated):
    """Its feedback stays zero, so every pass computes what pass 0 does, and so do the gradients of the last."""
    alone = {"masked_weight": 0.0, "halt_weight": 0.0, "ponder_weight": 0.0, "stability_weight": 0.0}
    # Its gradient is there, and would count in the norm that is clipped.
    alone |= {"max_grad_norm": 0.0, "lr": 1e-5}
    service.train(changed(run_name="plain", **alone), "vanilla", operated, Silent())
    service.train(changed(run_name="asleep", sidecar_lr=0.0, **alone), "recursive", operated, Silent())
    assert curve(operated, "asleep", "train/feedback_norm") == [0, 0, 0]
    assert curve(operated, "asleep") == pytest.approx(curve(operated, "plain"), rel=1e-6)
    depth_0 = curve(operated, "asleep", "train/depth_ce/0")
    assert curve(operated, "asleep", "train/depth_ce/1") == pytest.approx(depth_0, rel=1e-6)


@pytest.mark.parametrize("mode", ["vanilla", "recursive"])
def test_packed_rows_train_as_separate_ones(operated, mode):
    name = talks(operated / "talks.jsonl")
    options = {"data": name, "task_share": 0.5, "lr": 1e-5, "sidecar_lr": 1e-5, "max_length": 256}
    for packing in (False, True):
        service.train(changed(run_name=f"{mode}_{packing}", packing=packing, **options), mode, operated, Silent())
    tags = ["train/loss/total"] + ["train/loss/halt", "train/generation/avg_chunk_length"] * (mode == "recursive")
    for tag in tags:
        packed, separate = curve(operated, f"{mode}_True", tag), curve(operated, f"{mode}_False", tag)
        assert packed == pytest.approx(separate, rel=1e-4), tag


def test_packing_that_is_not_exact_is_refused_before_it_trains(operated, monkeypatch):
    from rrcli.data import packing

    monkeypatch.setattr(packing, "pack", lambda examples, length, pad: _joined(examples))
    with pytest.raises(RRError, match="--packing is not exact for this 'llama' model"):
        service.train(changed(run_name="leaks", packing=True), "vanilla", operated, Silent())
    assert not (operated / "checkpoints" / "leaks").exists()


def _joined(examples):
    """Lay all examples into one row in which they see one another."""
    from rrcli.recursion.batch import Batch

    ids = torch.tensor([[token for example in examples for token in example[0]]])
    numbers = torch.tensor([[n for n, example in enumerate(examples) for _ in example[0]]])
    return Batch(ids, torch.ones_like(ids), ids, torch.arange(ids.shape[1])[None], numbers)


@pytest.mark.parametrize("options", [{}, {"packing": True}], ids=["separate", "packed"])
def test_going_on_over_the_end_of_an_epoch_changes_no_bit(operated, options):
    options |= {"data": talks(operated / "few.jsonl", 40), "task_share": 0.0, "steps": 10}
    straight = service.train(changed(run_name="whole", **options), "recursive", operated, Silent(), restart=True)
    with pytest.raises(Interrupted, match="after step 5 of 10"):
        service.train(changed(run_name="parts", **options), "recursive", operated, ActsAfter(5), restart=True)
    resumed = service.train(changed(run_name="parts", **options), "recursive", operated, Silent())
    assert resumed.first_step == 5
    assert_same_weights(straight.checkpoint, resumed.checkpoint)
    assert curve(operated, "whole") == curve(operated, "parts")


# -- what is told ------------------------------------------------------------------------------------------------------


def test_examples_that_are_cut_are_counted(operated):
    reporter = Silent()
    service.train(changed(run_name="cut", task_share=0.0, max_length=16), "vanilla", operated, reporter)
    assert "24 of 24 examples were longer than 16 tokens and were cut" in reporter.warnings


def test_no_example_is_longer_than_the_context(operated):
    context = rrcli.load("default")[0].config.max_position_embeddings
    (operated / "long.jsonl").write_text(
        "".join(json.dumps({"text": f"{n} " + "Tom ran. " * 400}) + "\n" for n in range(50))
    )
    reporter = Silent()
    settings = changed(run_name="long", data="long.jsonl", task_share=0.0, max_length=4096, batch_size=1, steps=2)
    service.train(settings, "vanilla", operated, reporter)
    said = f"--max-length is 4096, but the model's context is {context} tokens: examples are cut to those"
    assert said in reporter.warnings
    assert f"2 of 2 examples were longer than {context} tokens and were cut" in reporter.warnings


def test_a_step_always_has_something_to_learn(operated):
    """A single example, of a length that the prompts of some problems fill, and of others always do."""
    task = "chain_sum:min_terms=2,max_terms=4,min_digits=2,max_digits=4"
    tokenizer = rrcli.load("default")[1]
    problems = Task(task).problems(40, seed=0, side="train")
    length = median_low(len(encode_prompt(tokenizer, prompt_of(problem.question))) for problem in problems)
    settings = {"batch_size": 1, "steps": 12, "max_length": length, "task_share": 1.0, "run_name": "short"}
    reporter = Silent()
    service.train(changed(task=(task,), **settings), "recursive", operated, reporter)
    assert len(curve(operated, "short")) == 12
    assert [message for message in reporter.warnings if "had nothing to learn within it" in message]
    task = "chain_sum:min_terms=9,max_terms=9,min_digits=4,max_digits=4"
    with pytest.raises(RRError, match=f"64 examples in a row of {task} leave nothing to learn in {length} tokens"):
        service.train(changed(task=(task,), **settings), "recursive", operated, Silent(), restart=True)


def test_empty_data_is_an_error(operated):
    (operated / "empty.jsonl").write_text("\n")
    with pytest.raises(RRError, match=r"empty\.jsonl is empty"):
        service.train(changed(run_name="empty", data="empty.jsonl"), "vanilla", operated, Silent())
