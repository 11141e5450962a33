"""`rr eval` around the measuring: files that results depend on, problems that were trained on, what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import rrcli
from rrcli.data.splits import SPLIT_RULE
from rrcli.errors import RRError, UsageError
from rrcli.experiment.identity import data_identity
from rrcli.reporting import Silent
from rrcli.services import eval as service
from rrcli.services import surgery, train
from rrcli.settings import EvalSettings, SurgerySettings, TrainSettings

QUICK = {"skip_perplexity": True, "skip_generation": True, "skip_performance": True, "tensorboard": False}


class Listening(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def write(path: Path, numbers: range) -> None:
    lines = [{"question": f"What is {i} + {i}?", "answer": f"{i} twice is {2 * i}. #### {2 * i}"} for i in numbers]
    path.write_text("\n".join(map(json.dumps, lines)))


def test_the_share_of_a_file_that_is_evaluated_is_said(tmp_path):
    write(tmp_path / "a.jsonl", range(100))
    for spec, count in (("a.jsonl", None), ("a.jsonl:held_out=all", 100)):
        reporter = Listening()
        result = service.evaluate(EvalSettings(task=(spec,), **QUICK), "baseline", tmp_path, reporter)
        n = result.results["metrics"]["reasoning_accuracy"]["n"]
        assert n == count if count else 0 < n < 50
        assert f"{spec}: {n} of its 100 problems are evaluated" in reporter.notes[0]
        assert result.results["metrics"]["reasoning_accuracy/a.jsonl"]["n"] == n


def test_problems_that_were_trained_on_are_not_evaluated(tmp_path):
    write(tmp_path / "train.jsonl", range(60))
    write(tmp_path / "test.jsonl", range(40, 90))
    short = {"steps": 1, "batch_size": 1, "eval_interval": 0, "max_length": 64, "task_share": 1.0}
    train.train(TrainSettings(task=("train.jsonl",), **short), "vanilla", tmp_path, Silent())

    def evaluate(*specs: str) -> dict:
        settings = EvalSettings(task=specs, problems=100, **QUICK)
        return service.evaluate(settings, "finetuned_vanilla", tmp_path, Silent()).results

    assert evaluate("train.jsonl")["metrics"]["reasoning_accuracy"]["n"] < 30
    for spec in ("train.jsonl:held_out=all", "test.jsonl:held_out=all"):
        with pytest.raises(RRError, match=r"was trained on \d+ of the problems") as caught:
            evaluate(spec)
        assert spec in caught.value.message
        assert "test side" in caught.value.hint

    both = ("train.jsonl", "test.jsonl:held_out=all")
    reporter = Listening()
    train.train(TrainSettings(task=both, **short), "vanilla", tmp_path, reporter, restart=True)
    [used] = [int(note.split()[1]) for note in reporter.notes if note.startswith("train.jsonl: ")]
    assert 0 < used <= 40, "20 of the 60 stand in the test set, some of the others are held out"
    assert evaluate(*both)["metrics"]["reasoning_accuracy/test.jsonl"]["n"] == 50


def test_a_checkpoint_of_another_split_is_not_evaluated(tmp_path):
    """It may have been trained on what is now the test side: an error, not a number."""
    short = {"steps": 1, "batch_size": 1, "eval_interval": 0, "max_length": 32}
    checkpoint = train.train(TrainSettings(**short), "vanilla", tmp_path, Silent()).checkpoint
    file = checkpoint / "metrics.json"
    metrics = json.loads(file.read_text())
    assert metrics["training"].pop("split") == SPLIT_RULE
    file.write_text(json.dumps(metrics))
    with pytest.raises(RRError, match="split data by another rule") as caught:
        service.evaluate(EvalSettings(**QUICK), "finetuned_vanilla", tmp_path, Silent())
    assert "rr run" in caught.value.hint


def test_the_rule_of_the_split_belongs_to_what_data_is(tmp_path, monkeypatch):
    before = data_identity(EvalSettings(), tmp_path)
    monkeypatch.setattr("rrcli.experiment.identity.SPLIT_RULE", "another")
    assert data_identity(EvalSettings(), tmp_path) != before


def test_results_are_identified_by_what_files_hold(tmp_path):
    write(tmp_path / "a.jsonl", range(60))
    (tmp_path / "p.txt").write_text("Once\n")
    (tmp_path / "t.yaml").write_text("task: t\n")
    settings = EvalSettings(task=("a.jsonl",), prompts="p.txt", harness=("t.yaml,arc_easy",))
    found = [data_identity(settings, tmp_path)]
    for name in ("a.jsonl", "p.txt", "t.yaml"):
        with (tmp_path / name).open("a") as file:
            file.write("\n")
        found.append(data_identity(settings, tmp_path))
    assert len(set(found)) == 4
    assert data_identity(settings, tmp_path) == found[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": ("absent.jsonl",)}, r"absent\.jsonl does not exist"),
        ({"prompts": "absent.txt"}, r"absent\.txt do not exist"),
        ({"harness": ("absent.yaml",)}, r"absent\.yaml does not exist"),
        ({"harness": ("arc_easy",)}, "needs lm-eval"),
        ({"stop": ("",)}, "--stop is empty"),
        ({"task": ("a.jsonl:held_out=all",), "num_fewshot": 2}, "training side"),
    ],
)
def test_what_is_not_there_is_said_before_a_model_is_loaded(tmp_path, monkeypatch, options, message):
    write(tmp_path / "a.jsonl", range(60))
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    monkeypatch.setattr(service, "load_for", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(UsageError, match=message):
        service.evaluate(EvalSettings(**options), "baseline", tmp_path, Silent())


def test_an_evaluation_that_was_cut_off_goes_on(tmp_path, monkeypatch):
    """Also with a recursion, and not from a log of other settings."""
    surgery.surgery(SurgerySettings(), tmp_path, Silent())
    settings = EvalSettings(
        problems=8, max_new_tokens=6, batch_tokens=400, skip_perplexity=True, skip_performance=True, tensorboard=False
    )
    whole = service.evaluate(settings, "after_surgery", tmp_path, Silent()).results

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rrcli.evaluation.evaluate.continue_prompts", interrupted)
    with pytest.raises(KeyboardInterrupt):
        service.evaluate(settings, "after_surgery", tmp_path, Silent())
    monkeypatch.undo()
    monkeypatch.setattr("rrcli.evaluation.answers.judge", lambda *_: pytest.fail("an answer was computed again"))
    resumed = service.evaluate(settings, "after_surgery", tmp_path, Silent()).results
    for name in ("records", "metrics", "by_depth"):
        assert json.dumps(resumed[name]) == json.dumps(whole[name])


def test_conversations_are_trained_and_evaluated_through_one_template(tmp_path):
    model, tokenizer = rrcli.load("default")
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    model.save_pretrained(tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    rows = [
        {"messages": [{"role": "user", "content": f"{n} and 1?"}, {"role": "assistant", "content": f"It is {n + 1}."}]}
        for n in range(60)
    ]
    (tmp_path / "talks.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = {"model": "chat", "data": "talks.jsonl", "task": ("chain_sum",)}
    settings = TrainSettings(**common, steps=1, batch_size=2, eval_interval=1, eval_samples=2)
    train.train(settings, "vanilla", tmp_path, Silent())
    options = common | {"problems": 2, "skip_generation": True, "skip_performance": True, "tensorboard": False}
    perplexities = []
    for chat in (True, False):
        reporter = Silent()
        found = service.evaluate(
            EvalSettings(**options, chat_template=chat), "finetuned_vanilla", tmp_path, reporter
        ).results
        [prompt, _] = [record["prompt"] for record in found["records"]["problems"]]
        assert prompt.startswith("<user>State" if chat else "Question: State")
        warned = "shown problems through the chat template in training, which is not how they are asked here"
        assert [message for message in reporter.warnings if warned in message] == [f"the model was {warned}"] * (
            not chat
        )
        perplexities.append(found["metrics"]["perplexity"]["value"])
    assert perplexities[0] != perplexities[1]
