"""What is measured with tokenizers of several kinds: where texts end, what is judged, and after what it is scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from made_tokenizers import chain, like_llama_2, with_special_tokens
from rrcli.data.final_answers import tagged
from rrcli.data.tokens import encode_prompt, text_ids
from rrcli.evaluation.decoding import Decoded, decode
from rrcli.evaluation.perplexity import score_documents
from rrcli.evaluation.pictures import generate_traced
from rrcli.evaluation.relevance import relevance
from rrcli.evaluation.tracing import pieces
from rrcli.recursion.config import RecursionConfig
from rrcli.recursion.engine import attach
from rrcli.reporting import Silent
from rrcli.services.eval import evaluate
from rrcli.services.generate import generate
from rrcli.settings import EvalSettings, GenerateSettings

PROMPT = "Question: x\nAnswer:"
WORDS = "Here is the cat . The dog sat on the mat . Where is the cat ? " * 30
NO_NAMES: dict[str, Any] = {"bos_token": None, "eos_token": None, "pad_token": None}


def decoded(model: Any, tokenizer: Any, prompt: str, *stop: str, depth: int = 0, new_tokens: int = 12) -> Decoded:
    prompts = [encode_prompt(tokenizer, prompt)]
    [batch] = decode(model, tokenizer, prompts, depth=depth, new_tokens=new_tokens, batch_tokens=1000, stop=stop)
    return batch[0]


# -- special tokens ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("stop", ["<|im_end|>", "> 3", "7<|", " 5 4", " 7", "end"])
def test_stop_strings_end_a_text_where_those_of_transformers_do(stop: str, depth: int) -> None:
    tokenizer = with_special_tokens("<|im_end|>")
    model = chain(text_ids(tokenizer, ": 7<|im_end|> 3 5 4"), len(tokenizer))
    inputs = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    written = model.generate(
        inputs, max_new_tokens=12, do_sample=False, stop_strings=[stop], tokenizer=tokenizer, pad_token_id=0
    )[0, inputs.shape[1] :]
    if depth:
        attach(model, RecursionConfig(max_steps=depth))
    found = decoded(model, tokenizer, PROMPT, stop, depth=depth)
    assert found.tokens == written.tolist()
    assert found.ended
    assert found.text == tokenizer.decode(written).partition(stop)[0]


def test_a_start_token_that_is_named_as_a_stop_string_is_found() -> None:
    """As SmolLM2-Instruct's <|im_start|>, which is its BOS."""
    tokenizer = with_special_tokens("<|im_start|>", "<|im_end|>", bos_token="<|im_start|>", eos_token="<|im_end|>")
    model = chain(text_ids(tokenizer, ": 7<|im_start|> 3<|im_end|>"), len(tokenizer))
    assert decoded(model, tokenizer, PROMPT, "<|im_start|>").text == " 7"
    assert decoded(model, tokenizer, PROMPT).text == " 7 3"


@pytest.mark.parametrize("depth", [0, 2])
def test_marks_that_are_special_tokens_are_judged_with_the_text(depth: int) -> None:
    tokenizer = with_special_tokens("<think>", "</think>", "<answer>", "</answer>")
    text = "<think> no</think><answer> 7</answer><|endoftext|>"
    model = chain(text_ids(tokenizer, ":" + text), len(tokenizer))
    if depth:
        attach(model, RecursionConfig(max_steps=depth))
    found = decoded(model, tokenizer, PROMPT, depth=depth)
    assert (found.text, found.ended) == (text.removesuffix("<|endoftext|>"), True)
    assert tagged(found.text) == "7"
    assert "".join(piece.text for piece in generate_traced(model, tokenizer, PROMPT, 12)) == found.text


# -- ends --------------------------------------------------------------------------------------------------------------


def test_every_command_ends_a_text_at_the_same_tokens(tmp_path: Path) -> None:
    tokenizer = with_special_tokens("<a>", "<b>", "<c>", eos_token="<a>", pad_token="<a>")
    for end, of_model, of_generation in (("<b>", "<b>", "<c>"), ("<c>", "<b>", "<c>"), ("<a>", "<b>", "<c>")):
        folder = tmp_path / end.strip("<>")
        model = chain(text_ids(tokenizer, f"x 7{end} 3"), len(tokenizer))
        model.config.eos_token_id = tokenizer.convert_tokens_to_ids(of_model)
        model.generation_config.eos_token_id = [tokenizer.convert_tokens_to_ids(of_generation)]
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        lines = [json.dumps({"text": f"Text number {number} of many."}) for number in range(60)]
        (folder / "t.jsonl").write_text("\n".join(lines))
        (folder / "prompts.txt").write_text("Question: x")
        common: dict[str, Any] = {"model": str(folder / "model"), "data": "t.jsonl", "device": "cpu"}
        settings = EvalSettings(
            **common, prompts="prompts.txt", skip_perplexity=True, skip_reasoning=True, skip_performance=True,
            tensorboard=False,
        )  # fmt: skip
        [record] = evaluate(settings, "baseline", folder, Silent()).results["records"]["generations"]
        written = generate(GenerateSettings(**common), "Question: x", folder, lambda _: None, stage="baseline")
        assert (record["text"], record["finished"]) == (" 7", True)
        assert written.text == record["text"]
        assert "different end tokens are named" in written.notice


# -- texts that begin in the middle ------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [0, 2])
def test_a_continuation_keeps_the_space_of_its_first_word(depth: int) -> None:
    tokenizer = like_llama_2(WORDS)
    whole = text_ids(tokenizer, "the cat sat")
    model = chain([*whole, tokenizer.eos_token_id], len(tokenizer))
    if depth:
        attach(model, RecursionConfig(max_steps=depth))
    prompt = "Here is the"
    found = decoded(model, tokenizer, prompt, depth=depth)
    inputs = tokenizer(prompt, return_tensors="pt")["input_ids"]
    written = model.generate(inputs, max_new_tokens=12, do_sample=False, eos_token_id=2, pad_token_id=2)[0]
    assert found.text == tokenizer.decode(written, skip_special_tokens=True).removeprefix(prompt) == " cat sat"
    ids = written.tolist()
    parts = pieces(tokenizer, [(t, 0, False) for t in ids[inputs.shape[1] :]], prompt=ids[: inputs.shape[1]])
    assert "".join(part.text for part in parts) == " cat sat"
    stopped = decoded(model, tokenizer, prompt, " cat", depth=depth)
    assert (stopped.text, stopped.ended, len(stopped.tokens)) == ("", True, 1)
    assert decoded(model, tokenizer, prompt, "is the", depth=depth).text == " cat sat", "no prompt holds a stop string"


def test_relevance_is_measured_on_the_tokens_that_follow_the_prompt() -> None:
    tokenizer = like_llama_2(WORDS)
    torch.manual_seed(0)
    model = chain([], len(tokenizer))
    model.lm_head.weight.data.normal_(std=0.1)
    ids = text_ids(tokenizer, "Here is the cat")[3:]
    terms = []
    for context in (encode_prompt(tokenizer, "Here is the"), [tokenizer.bos_token_id]):
        with torch.no_grad():
            logits = model(torch.tensor([context + ids])).logits[0, len(context) - 1 : -1]
        terms.append(float(logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).sum()))
    records = [{"prompt": "Here is the", "text": " cat"}]
    assert relevance(model, tokenizer, records, reporter=Silent()) == pytest.approx(
        [(terms[0] - terms[1]) / len(ids)], abs=1e-5
    )


# -- tokenizers that name no start -------------------------------------------------------------------------------------


def test_without_a_start_token_a_documents_nats_do_not_depend_on_the_others() -> None:
    tokenizer = with_special_tokens(**NO_NAMES)
    model = chain([], len(tokenizer))
    model.lm_head.weight.data.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    texts = ["Once upon a time there was a cat.", "Tom ran.", "One day, Tom saw a dog.", "x"]
    reporter = Silent()

    def scored(documents: list[str]) -> dict[str, Any]:
        settings = EvalSettings(max_length=4)
        records, _ = score_documents(model, tokenizer, documents, depth=0, settings=settings, reporter=reporter)
        return {record["key"]: record for record in records}

    whole = scored(texts)
    keys = list(whole)
    assert "document 4 ('x')" in reporter.warnings[0]
    assert scored(texts[2:] + texts[:1]) == {key: whole[key] for key in (keys[2], keys[0])}
    ids = text_ids(tokenizer, texts[1])
    with torch.no_grad():
        logs = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])
    record = whole[keys[1]]
    assert record["tokens"] == len(ids) - 1
    assert record["nll"] == pytest.approx([-float(logs.sum())], rel=1e-5)
