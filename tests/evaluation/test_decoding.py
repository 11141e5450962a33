"""Decoding in batches gives each prompt what stock `generate` gives it alone, whichever rows leave the batch."""

from __future__ import annotations

import pytest
import torch

import rrcli
from families import Letters, build, generate, tokens, wake
from rrcli.errors import RRError
from rrcli.evaluation import decoding
from rrcli.evaluation.decoding import decode
from rrcli.recursion.abilities import takes_padding
from rrcli.recursion.config import RecursionConfig
from rrcli.recursion.engine import attach

NEW = 14
FAMILIES = ("llama", "gemma3_text", "gpt2", "qwen3_next", "falcon_h1", "mamba2", "lfm2")
LENGTHS = (3, 9, 5, 7, 4, 8, 6, 9)


def prompts_of(lengths=LENGTHS):
    return [tokens(1, length, seed=seed)[0].tolist() for seed, length in enumerate(lengths)]


def alone(model, prompts, new_tokens=NEW):
    return [generate(model, torch.tensor([p]), max_new_tokens=new_tokens)[0, len(p) :].tolist() for p in prompts]


def decoded(model, prompts, tokenizer=None, **options):
    """Decode at the depth that the model is set to; one batch is large enough."""
    recursion = getattr(model, "recursion", None)
    options = {
        "depth": 0 if recursion is None else recursion.depth,
        "new_tokens": NEW,
        "batch_tokens": 10_000,
    } | options
    return decode(model, tokenizer or Letters(), prompts, **options)


def counted(model, monkeypatch):
    """Record the rows of every call of `generate`, but for those that try out whether it hides padding."""
    takes_padding(model)
    rows, plain = [], model.generate

    def count(*args, **options):
        rows.append(len(options["input_ids"]))
        return plain(*args, **options)

    monkeypatch.setattr(model, "generate", count)
    return rows


@pytest.mark.parametrize("way", ["stock", "every pass", "in chunks"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_rows_that_leave_change_no_other_row(family, way, monkeypatch):
    model, prompts = build(family), prompts_of()
    if way != "stock":
        wake(attach(model, RecursionConfig(max_steps=2)))
    if way == "every pass":
        monkeypatch.setattr(decoding, "_in_chunks", lambda *_: False)
    plain = alone(model, prompts)
    # End tokens that occur early in some texts and late or never in others.
    ends = {text[place] for text, place in zip(plain[::2], (1, 4, 7, 10), strict=True)}
    cuts = [next((i for i, token in enumerate(text) if token in ends), None) for text in plain]
    assert len(set(cuts)) > 2
    model.generation_config.eos_token_id = sorted(ends)
    rows = counted(model, monkeypatch)
    found = {d.number: d for batch in decoded(model, prompts) for d in batch}
    for number, (text, cut) in enumerate(zip(plain, cuts, strict=True)):
        assert found[number].tokens == text[:cut]
        assert found[number].ended == (cut is not None)
    if way == "in chunks" and decoding._in_chunks(model, 2):
        assert rows == [len(prompts)]  # rows leave inside the call
    elif family != "mamba2":  # its cache goes by a name under which `generate` cannot go on
        assert len(rows) > 1
        assert rows == sorted(rows, reverse=True)
        assert rows[-1] < rows[0]


@pytest.mark.parametrize("recursive", [False, True])
@torch.no_grad()
def test_where_padding_changes_tokens_only_prompts_of_one_length_share_a_batch(recursive, monkeypatch):
    model, prompts = build("minimax"), prompts_of()
    if recursive:
        wake(attach(model, RecursionConfig(max_steps=2)))
    plain = alone(model, prompts)
    rows = counted(model, monkeypatch)
    found = {d.number: d.tokens for batch in decoded(model, prompts) for d in batch}
    assert [found[number] for number in range(len(prompts))] == plain
    assert rows == [2, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("recursive", [False, True])
@torch.no_grad()
def test_a_stop_string_ends_a_row_and_cuts_its_text(recursive, monkeypatch):
    model, prompts, tokenizer = build("llama"), prompts_of(), Letters()
    if recursive:
        wake(attach(model, RecursionConfig(max_steps=2)))
    plain = [tokenizer.decode(text) for text in alone(model, prompts)]
    stop = [plain[0][3:5], plain[3][8:11], "never"]
    rows = counted(model, monkeypatch)
    found = {d.number: d for batch in decoded(model, prompts, tokenizer, stop=stop) for d in batch}
    for number, text in enumerate(plain):
        end = min((text.find(s) for s in stop if s in text), default=None)
        assert found[number].text == text[:end]
        assert found[number].ended == (end is not None)
    assert any(d.ended for d in found.values())
    assert not all(d.ended for d in found.values())
    assert (len(rows) > 1) != recursive


@pytest.mark.parametrize(
    ("depth", "dtype", "expected"),
    [(None, "float32", False), (0, "float32", False), (1, "float32", True), (1, "bfloat16", False)],
)
@torch.no_grad()
def test_chunks_are_for_passes_in_full_precision(depth, dtype, expected, monkeypatch):
    """Elsewhere there is nothing to draft for, or a chunk might choose another of two equal logits."""
    model, prompts = build("llama").to(getattr(torch, dtype)), prompts_of()
    if depth is not None:
        wake(attach(model, RecursionConfig(max_steps=2))).depth = depth
    used = []
    monkeypatch.setattr(
        decoding, "ChunkedDecoding", lambda **options: used.append(True) or rrcli.ChunkedDecoding(**options)
    )
    list(decoded(model, prompts))
    assert bool(used) == expected


def test_a_stop_string_may_lie_across_tokens_of_a_real_tokenizer():
    model, tokenizer = rrcli.load("default")
    prompt = tokenizer("Once upon a time")["input_ids"]
    [[whole]] = decoded(model, [prompt], tokenizer, new_tokens=20)
    stop = whole.text[len(whole.text) // 2 - 3 : len(whole.text) // 2 + 4]
    [[cut]] = decoded(model, [prompt], tokenizer, new_tokens=20, stop=[stop])
    assert cut.text == whole.text[: whole.text.find(stop)]
    assert cut.ended
    assert len(cut.tokens) < len(whole.tokens)


@torch.no_grad()
def test_a_cache_of_another_class_is_not_gone_on_with(monkeypatch):
    """What is left of a batch is then read again from its beginning."""
    model, prompts = build("llama"), prompts_of()
    plain = alone(model, prompts)
    model.generation_config.eos_token_id = sorted({text[2] for text in plain[:4]})
    ends = set(model.generation_config.eos_token_id)
    monkeypatch.setattr(decoding, "goes_on", lambda cache: False)
    rows = counted(model, monkeypatch)
    for batch in decoded(model, prompts):
        for d in batch:
            cut = next((i for i, token in enumerate(plain[d.number]) if token in ends), None)
            assert d.tokens == plain[d.number][:cut]
    assert len(rows) > 1


@torch.no_grad()
def test_running_out_of_memory_halves_the_batch(monkeypatch):
    model, prompts = build("llama"), prompts_of()
    expected = [[(d.number, d.tokens) for d in batch] for batch in decoded(model, prompts)]
    sizes, plain = [], model.generate

    def small(*args, **options):
        sizes.append(len(options["input_ids"]))
        if len(options["input_ids"]) > 3:
            raise torch.OutOfMemoryError("no memory in this test")
        return plain(*args, **options)

    monkeypatch.setattr(model, "generate", small)
    found = [[(d.number, d.tokens) for d in batch] for batch in decoded(model, prompts)]
    assert found == expected
    assert sizes == [8, 4, 2, 2, 4, 2, 2]

    def never(*args, **options):
        raise torch.OutOfMemoryError("no memory in this test")

    monkeypatch.setattr(model, "generate", never)
    with pytest.raises(RRError, match="memory runs out for a single prompt of 9 tokens") as caught:
        list(decoded(model, prompts))
    assert "--max-new-tokens" in caught.value.hint


@torch.no_grad()
def test_batches_are_bounded_and_the_first_answers_can_be_left_out():
    model, prompts = build("llama"), prompts_of()
    whole = list(decoded(model, prompts, new_tokens=3, batch_tokens=36))
    assert [len(batch) for batch in whole] == [3, 3, 2]
    assert [len(prompts[d.number]) for batch in whole for d in batch] == sorted(LENGTHS, reverse=True)
    assert list(decoded(model, prompts, new_tokens=3, batch_tokens=36, skip=3)) == whole[1:]
    assert list(decoded(model, prompts, new_tokens=3, batch_tokens=36, skip=8)) == []
