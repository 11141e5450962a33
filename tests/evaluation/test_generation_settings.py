"""What a model's own generation config asks for reaches no answer, except where a text ends; it is said once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from families import Letters, build, tokens, wake
from rrcli.demo import MODEL_DIR
from rrcli.evaluation import performance
from rrcli.evaluation.decoding import decode
from rrcli.evaluation.generation_settings import unfollowed_settings
from rrcli.evaluation.performance import measure_performance
from rrcli.evaluation.pictures import generate_traced
from rrcli.recursion.chunked_decoding import ChunkedDecoding
from rrcli.recursion.config import RecursionConfig
from rrcli.recursion.engine import attach
from rrcli.reporting import Silent
from rrcli.services.eval import evaluate
from rrcli.services.generate import generate
from rrcli.settings import EvalSettings, GenerateSettings

NEW = 12
OWN: tuple[dict[str, Any], ...] = (
    {"use_cache": False},
    {"cache_implementation": "static"},
    {"min_new_tokens": 9},
    {"min_length": 14},
    {"num_return_sequences": 2, "do_sample": True},
    {"num_beams": 3, "num_return_sequences": 2},
    {"stop_strings": ["a", "b", "c"]},
    {"prompt_lookup_num_tokens": 3},
    {"return_dict_in_generate": True, "output_scores": True, "output_hidden_states": True},
    {"repetition_penalty": 1.5},
    {"no_repeat_ngram_size": 1},
    {"suppress_tokens": list(range(20))},
    {"begin_suppress_tokens": list(range(20))},
    {"forced_eos_token_id": 5},
    {"bad_words_ids": [[3], [4]]},
    {"exponential_decay_length_penalty": [1, 2.0]},
    {"guidance_scale": 2.0},
    {"max_time": 1e-9},
)
PROMPTS = [tokens(1, length, seed=seed)[0].tolist() for seed, length in enumerate((5, 9, 7, 4))]


def ids(own: dict[str, Any]) -> str:
    return ",".join(own)


class Alphabet(Letters):
    """Letters that also reads: one token for each character."""

    bos_token_id = None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [3 + ord(letter) % 90 for letter in text]}

    def convert_ids_to_tokens(self, number: int) -> str:
        return str(number)


@pytest.fixture(scope="module")
def model() -> Any:
    found = build("llama")
    wake(attach(found, RecursionConfig(max_steps=2)))
    return found


def answers(model: Any, depth: int) -> list[list[int]]:
    batches = decode(model, Alphabet(), PROMPTS, depth=depth, new_tokens=NEW, batch_tokens=10_000)
    found = {answer.number: answer.tokens for batch in batches for answer in batch}
    return [found[number] for number in range(len(PROMPTS))]


@pytest.mark.parametrize("own", OWN, ids=ids)
@torch.no_grad()
def test_answers_are_the_most_likely_tokens_whatever_the_model_asks_for(
    own: dict[str, Any], model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At depth 0 `generate` decodes, at depth 2 chunks do; an end token that rows reach early makes them leave."""
    plain = [answers(model, depth) for depth in (0, 2)]
    end = plain[0][0][3]
    ended = GenerationConfig(eos_token_id=end)
    monkeypatch.setattr(model, "generation_config", ended)
    expected = [answers(model, depth) for depth in (0, 2)]
    assert len(expected[0][0]) <= 3
    assert expected[0] != plain[0]
    text = generate_traced(model, Alphabet(), "abcdef", 6)
    asking = GenerationConfig(**own, eos_token_id=end)
    monkeypatch.setattr(model, "generation_config", asking)
    assert [answers(model, depth) for depth in (0, 2)] == expected
    assert generate_traced(model, Alphabet(), "abcdef", 6) == text
    assert model.generation_config is asking
    said = unfollowed_settings(model)
    assert all((name in said) == (name not in ("do_sample", "num_beams")) for name in own)


def test_nothing_is_said_where_nothing_is_asked_for(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampling is what greedy decoding leaves out by its name."""
    own = GenerationConfig(
        do_sample=True, temperature=0.6, top_k=20, repetition_penalty=1.0, use_cache=True, max_new_tokens=5
    )
    monkeypatch.setattr(model, "generation_config", own)
    assert unfollowed_settings(model) == ""


def test_speed_is_measured_without_them_too(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        model, "generation_config", GenerationConfig(use_cache=False, prompt_lookup_num_tokens=2, stop_strings=["a"])
    )
    monkeypatch.setattr(performance, "ROUNDS", 1)
    monkeypatch.setattr(performance, "DECODE_TOKENS", 4)
    found = measure_performance(model, Alphabet(), ["abcdefgh" * 9], depth=2, reporter=Silent())
    assert found["decode/avg_chunk_length"]["value"] >= 1


@torch.no_grad()
def test_a_users_own_call_without_a_cache_writes_the_same_text(model: Any) -> None:
    inputs = torch.tensor([PROMPTS[0]])
    options = {"attention_mask": torch.ones_like(inputs), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(inputs, custom_generate=ChunkedDecoding(), **options)
    chunked = ChunkedDecoding()
    assert torch.equal(model.generate(inputs, custom_generate=chunked, use_cache=False, **options), cached)
    assert len(chunked.traces[0].passes) == 6


@pytest.fixture(scope="module")
def asking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with a generation config that asks for much."""
    folder = tmp_path_factory.mktemp("asking") / "model"
    shutil.copytree(MODEL_DIR, folder)
    own = {"eos_token_id": 0, "repetition_penalty": 1.9, "min_new_tokens": 60, "stop_strings": ["e"]}
    (folder / "generation_config.json").write_text(json.dumps(own))
    return folder


@pytest.mark.filterwarnings("ignore:Unfeasible length constraints:UserWarning")  # what the settings ask for
def test_every_command_says_it_once_and_holds_to_what_the_user_asks_for(asking: Path, tmp_path: Path) -> None:
    reporter, notes = Silent(), []
    reporter.note = notes.append  # type: ignore[method-assign]
    texts = []
    for model in ("default", str(asking)):
        settings = GenerateSettings(model=model, max_new_tokens=20, stop=(" the",))
        texts.append(generate(settings, "Once upon a time", tmp_path, lambda piece: None, reporter=reporter).text)
    assert texts[0] == texts[1]
    assert " the" not in texts[0]
    assert len(notes) == 1
    assert "repetition_penalty = 1.9" in notes[0]
    records = []
    for model in ("default", str(asking)):
        notes.clear()
        limits = EvalSettings(
            model=model, problems=2, max_new_tokens=16, skip_perplexity=True, skip_performance=True, tensorboard=False
        )
        records.append(evaluate(limits, "baseline", tmp_path, reporter).results["records"])
        assert sum("min_new_tokens = 60" in note for note in notes) == (model != "default")
    assert records[0] == records[1]
