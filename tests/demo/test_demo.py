"""The embedded model: small, honest about where it comes from, and reproduced by its own script."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from rrcli.data.sources import read_documents
from rrcli.data.splits import side_of
from rrcli.data.tasks import Task
from rrcli.demo import defaults

sys.path.insert(0, str(Path(__file__).parents[2]))
from tools.demo_model import pretrain


def test_it_fits_into_the_wheel():
    folder = Path(defaults.__file__).parent
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts) < 8 * 2**20


def test_the_script_reproduces_text_and_tokenizer_and_repeats_its_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "EVAL_PROBLEMS", 4)
    monkeypatch.setattr("torch.set_num_threads", lambda _: None)  # of this whole test process
    for name in ("one", "two"):
        pretrain.main(["--output", str(tmp_path / name), "--steps", "2"])
    for file in ("text.jsonl", "model/tokenizer.json"):
        shipped = (defaults.MODEL_DIR.parent / file).read_bytes()
        assert (tmp_path / "one" / file).read_bytes() == shipped
    made, shipped = (
        json.loads((folder / "model" / "config.json").read_text()) | {"transformers_version": "any"}
        for folder in (tmp_path / "one", defaults.MODEL_DIR.parent)
    )
    assert made == shipped
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1] != defaults.MODEL_DIR.joinpath("model.safetensors").read_bytes()


def test_its_curve_tells_how_it_learned():
    curve = json.loads((defaults.MODEL_DIR / "training_curve.json").read_text())
    assert curve["held_out_perplexity"] < 3
    losses = [point["loss"] for point in curve["curve"]]
    assert losses[-1] < 0.2 * losses[0]


def test_training_text_and_held_out_text_are_both_there():
    documents = list(read_documents("default", Path()))
    held_out = [text for text in documents if side_of(text) == "test"]
    assert len(documents) > 3000
    assert 0.05 < len(held_out) / len(documents) < 0.15


@pytest.mark.parametrize("spec", defaults.TASKS)
def test_every_task_has_enough_held_out_problems(spec):
    assert len({problem.key for problem in Task(spec).problems(400, seed=7, side="test")}) == 400


def test_any_text_survives_the_tokenizer():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(defaults.MODEL_DIR)
    for text in ("Tom has 120 balls.", "naïve — café, 漢字 and \U0001f600", "a\n\n  b\tc", "0123456789"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("987")["input_ids"]) == 3, "every digit is a token of its own"
