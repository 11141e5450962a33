"""Models and tokenizers that do not quite fit: too many tokens, too few, a short context, sizes under other names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders
from tokenizers import models as vocabularies
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import rrcli
from rrcli.data.splits import side_of
from rrcli.data.training_data import TrainingData
from rrcli.demo import MODEL_DIR
from rrcli.errors import CheckFailed, RRError
from rrcli.evaluation.answers import continue_prompts, solve_problems
from rrcli.evaluation.decoding import room_for
from rrcli.evaluation.held_out import PROMPTS, EvalData, held_out_data
from rrcli.evaluation.performance import measure_performance
from rrcli.evaluation.perplexity import score_documents
from rrcli.evaluation.pictures import generate_traced
from rrcli.evaluation.relevance import relevance
from rrcli.models.loading import load_tokenizer
from rrcli.models.source import ModelSource
from rrcli.models.verification import reference, verify
from rrcli.recursion.config import RecursionConfig
from rrcli.recursion.engine import attach
from rrcli.recursion.facts import context_length, described, hidden_size, vocabulary
from rrcli.reporting import Silent
from rrcli.services.generate import generate
from rrcli.settings import EvalSettings, GenerateSettings, TrainSettings

EXTRA = "<image_soft_token>"
CHATML = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
STRICT = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
STRICT += "<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"


def model_of(family: str, **config: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **config)).float().eval()


def gpt2(positions: int) -> Any:
    return model_of(
        "gpt2", vocab_size=1024, n_embd=32, n_layer=2, n_head=4, n_positions=positions, bos_token_id=0, eos_token_id=0
    )


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, whose tokenizer has one token more than the embedding has rows."""
    folder = tmp_path_factory.mktemp("larger") / "model"
    shutil.copytree(MODEL_DIR, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": 1024, "content": EXTRA})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


# -- tokens without an embedding ---------------------------------------------------------------------------------------


def test_a_token_without_an_embedding_is_named_with_its_text(larger: Path, tmp_path: Path) -> None:
    model, tokenizer = rrcli.load(larger)
    settings = EvalSettings()
    assert score_documents(model, tokenizer, ["Tom has."], depth=0, settings=settings, reporter=Silent())[0]
    said = rf"document 2 \('A {EXTRA}'\) holds the token '{EXTRA}' with id 1,024, but .* ends at id 1,023"
    with pytest.raises(RRError, match=said):
        score_documents(model, tokenizer, ["Tom has.", f"A {EXTRA}"], depth=0, settings=settings, reporter=Silent())
    with pytest.raises(RRError, match="the document 'A <image"):
        measure_performance(model, tokenizer, [f"A {EXTRA}"], depth=0, reporter=Silent())
    with pytest.raises(RRError, match="the prompt 'A <image"):
        continue_prompts(model, tokenizer, [f"A {EXTRA}"], depth=0, settings=settings, reporter=Silent())
    with pytest.raises(RRError, match="the prompt holds the token"):
        generate(GenerateSettings(model=str(larger)), f"A {EXTRA}", tmp_path, lambda piece: None)
    with pytest.raises(RRError, match="the continuation"):
        relevance(model, tokenizer, [{"prompt": "A", "text": EXTRA}], reporter=Silent())
    (tmp_path / "p.jsonl").write_text(json.dumps({"question": f"What is {EXTRA}?", "answer": "1"}) + "\n")
    data = held_out_data(EvalSettings(task=("p.jsonl:held_out=all",)), tmp_path, 5)
    with pytest.raises(RRError, match=r"a problem of 'p\.jsonl:held_out=all' \('What is <image"):
        solve_problems(model, tokenizer, data, depth=0, settings=settings, reporter=Silent())


def test_training_stops_at_such_a_text_alone(larger: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(ModelSource("larger", larger))
    texts = [text for i in range(60) if side_of(text := f"Text {i} of a cat.") == "train"]
    settings = TrainSettings(data="t.jsonl", task_share=0)
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert TrainingData(settings, tmp_path, tokenizer, vocabulary=1024).batch(0)
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text + EXTRA}) + "\n" for text in texts))
    with pytest.raises(RRError, match=rf"an example of t\.jsonl \('.*Text .*cat.*'\.\.\.\) holds the token '{EXTRA}'"):
        TrainingData(settings, tmp_path, tokenizer, vocabulary=1024).batch(0)


# -- a short context ---------------------------------------------------------------------------------------------------


def test_nothing_goes_beyond_the_positions_of_a_model() -> None:
    """Learned positions: one more would be an IndexError."""
    _, tokenizer = rrcli.load("default")
    reporter, texts = Silent(), ["Tom has a red ball and a cat. " * 9]
    for positions in (12, 48, 64):
        model = gpt2(positions)
        reporter.warnings.clear()
        settings = EvalSettings(max_length=256)
        records, _ = score_documents(model, tokenizer, texts, depth=0, settings=settings, reporter=reporter)
        assert records[0]["tokens"] > 64
        found = continue_prompts(model, tokenizer, PROMPTS, depth=0, settings=settings, reporter=reporter)
        assert max(record["length"] for record in found) <= positions // 2
        assert any(f"--max-length is 256, but the model's context is {positions}" in text for text in reporter.warnings)
        said = f"sample generations have {positions // 2} tokens, not 48: the model's context is {positions}"
        assert said in reporter.warnings
        assert measure_performance(model, tokenizer, texts, depth=0, reporter=reporter)
        assert generate_traced(model, tokenizer, texts[0], 48)
        assert relevance(model, tokenizer, found, reporter=reporter)
    assert room_for(gpt2(96), 48) == 48


# -- few tokens or none ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dna() -> tuple[Any, Any]:
    """A model and a tokenizer of DNA letters, which makes no token of anything else."""
    letters = {"<eos>": 0, "A": 1, "C": 2, "G": 3, "T": 4}
    reader = Tokenizer(vocabularies.BPE(vocab=letters, merges=[]))
    reader.add_special_tokens(["<eos>"])
    reader.decoder = decoders.Fuse()
    model = model_of(
        "llama", vocab_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        intermediate_size=64, max_position_embeddings=256, bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return model, PreTrainedTokenizerFast(tokenizer_object=reader, eos_token="<eos>")


def test_prompts_without_a_token_are_left_out_and_named(dna: tuple[Any, Any]) -> None:
    reporter, settings = Silent(), EvalSettings()
    found = continue_prompts(*dna, ["Once upon", "GATTACA"], depth=0, settings=settings, reporter=reporter)
    assert [record["prompt"] for record in found] == ["GATTACA"]
    assert "'Once upon'" in reporter.warnings[0]
    with pytest.raises(CheckFailed, match="no token of any document"):
        score_documents(*dna, ["hello", "you"], depth=0, settings=settings, reporter=reporter)
    with pytest.raises(RRError, match="no token of any document"):
        measure_performance(*dna, ["hello"], depth=0, reporter=reporter)


def test_surgery_is_verified_with_tokens_of_the_model_where_the_probes_have_none(dna: tuple[Any, Any]) -> None:
    model, tokenizer = dna
    before = reference(model, tokenizer)
    attach(model, RecursionConfig(max_steps=2))
    try:
        assert verify(model, tokenizer, before, reporter=Silent()) == [0, 1, 2]
        with torch.no_grad():
            model.recursion.cell.w_out.weight.fill_(0.1)
        with pytest.raises(CheckFailed, match="surgery changes the model"):
            verify(model, tokenizer, before, reporter=Silent())
    finally:
        model.recursion.detach()


def test_a_problem_without_a_token_is_refused(dna: tuple[Any, Any], tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(json.dumps({"question": "hello", "answer": "A"}) + "\n")
    settings = EvalSettings(task=("p.jsonl:held_out=all",))
    data: EvalData = held_out_data(settings, tmp_path, 5)
    dna[1].chat_template = "{{ messages[0].content }}"
    try:
        with pytest.raises(RRError, match="makes no token of a problem of 'p"):
            solve_problems(*dna, data, depth=0, settings=settings, reporter=Silent())
    finally:
        dna[1].chat_template = None


# -- sizes under other names -------------------------------------------------------------------------------------------

TEXT = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
TEXT |= {"num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 77, "pad_token_id": 0}
VISION = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
SIZES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("llama", TEXT),
    ("gpt2", {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 77}),
    ("mpt", {"vocab_size": 96, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 77}),
    (
        "gemma3",
        {
            "text_config": TEXT | {"model_type": "gemma3_text"},
            "vision_config": VISION | {"image_size": 28, "patch_size": 14},
            "mm_tokens_per_image": 4,
        },
    ),
)


@pytest.mark.parametrize(("family", "config"), SIZES, ids=[family for family, _ in SIZES])
def test_sizes_are_read_under_whatever_name_a_family_has(family: str, config: dict[str, Any]) -> None:
    model = model_of(family, **config)
    assert (vocabulary(model), context_length(model), hidden_size(model)) == (96, 77, 32)
    assert described(model.config).endswith(", 2 layers, hidden size 32")


def test_a_model_without_a_limit_has_a_default_one() -> None:
    model = model_of("mamba", vocab_size=96, hidden_size=16, num_hidden_layers=1, state_size=4)
    assert context_length(model) == 2048


# -- chat templates ----------------------------------------------------------------------------------------------------


def conversations(tmp_path: Path, *, system: int) -> TrainSettings:
    """Write conversations, of which the training side has one with a system turn."""
    asked = [text for i in range(60) if side_of(text := f"Where is cat {i}?") == "train"]
    rows = [[{"role": "user", "content": text}, {"role": "assistant", "content": "Here."}] for text in asked]
    rows[system] = [{"role": "system", "content": "Be kind."}, *rows[system]]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return TrainSettings(data="t.jsonl", task_share=0)


def test_what_a_template_refuses_is_found_before_the_first_step(tmp_path: Path) -> None:
    _, tokenizer = rrcli.load("default")
    settings = conversations(tmp_path, system=40)
    tokenizer.chat_template = CHATML
    assert TrainingData(settings, tmp_path, tokenizer)
    tokenizer.chat_template = STRICT
    with pytest.raises(RRError, match=r"refuses the conversation 'Be kind\.': no system turns"):
        TrainingData(settings, tmp_path, tokenizer)


def test_templates_of_which_none_is_the_default_are_named(tmp_path: Path) -> None:
    _, tokenizer = rrcli.load("default")
    tokenizer.chat_template = {"chat": CHATML, "tool_use": CHATML}
    settings = conversations(tmp_path, system=0)
    with pytest.raises(RRError, match=r"several chat templates \(chat, tool_use\), and none is named 'default'"):
        TrainingData(settings, tmp_path, tokenizer)
    tokenizer.chat_template |= {"default": CHATML}
    assert TrainingData(settings, tmp_path, tokenizer)


# -- tokenizers that panic ---------------------------------------------------------------------------------------------

BROKEN: dict[str, dict[str, Any]] = {
    "panics when it is read": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "panics in use": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "none", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        }
    },
    "goes beyond its text": {"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "x"}},
    "is no tokenizer": {"model": []},
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_tokenizer_that_panics_is_refused_at_the_door(kind: str, tmp_path: Path) -> None:
    shutil.copytree(MODEL_DIR, tmp_path / "model")
    file = tmp_path / "model" / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | BROKEN[kind]))
    with pytest.raises(RRError, match="cannot read the tokenizer of"):
        load_tokenizer(ModelSource("broken", tmp_path / "model"))
