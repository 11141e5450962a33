"""Scoring text: what interrupts it, what it runs out of, and what it must not lose on the way."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import rrcli
from families import attach_random
from rrcli.data import batching
from rrcli.data.batching import affordable, halving
from rrcli.errors import RRError
from rrcli.evaluation.evaluate import evaluate_model
from rrcli.evaluation.perplexity import PART, score_documents
from rrcli.evaluation.samples import SampleLog
from rrcli.recursion import tiles
from rrcli.recursion.readout import Readout
from rrcli.reporting import Silent
from rrcli.settings import EvalSettings

STORY = "Ann walks to the market. She buys a loaf of bread, two apples and a cup of tea. Then she goes home again. "
TEXTS = [
    "Tom has a red ball. He gives the ball to Ann.",
    "Once upon a time there was a small cat that lived in a very old house near the river.",
    STORY * 5,
    "The dog ran.",
    "Ben is tall. " * 7,
    STORY,
]
SETTINGS = EvalSettings(max_length=32, batch_tokens=96)


@pytest.fixture(scope="module")
def default():
    """The embedded model with two passes that do something."""
    model, tokenizer = rrcli.load("default")
    attach_random(model, 0.05)
    return model, tokenizer


def scored(default, *, texts=TEXTS, settings=SETTINGS, log=None, reporter=None):
    recursion = getattr(default[0], "recursion", None)
    depth = 0 if recursion is None else recursion.depth
    with torch.no_grad():
        records, chunks = score_documents(
            *default, texts, depth=depth, settings=settings, reporter=reporter or Silent(), log=log
        )
    return json.dumps(records), chunks


def count_batches(monkeypatch, fail_after=None):
    """Return a list that grows by the rows of every forward; optionally raise at one."""
    rows, score = [], Readout.score

    def counted(self, ids, *others, **options):
        rows.append(len(ids))
        if fail_after is not None and len(rows) > fail_after:
            raise KeyboardInterrupt
        return score(self, ids, *others, **options)

    monkeypatch.setattr(Readout, "score", counted)
    return rows


# -- interrupted -------------------------------------------------------------------------------------------------------


def test_two_runs_give_the_same_bytes(default):
    assert scored(default) == scored(default)


@pytest.mark.parametrize("batches_done", [0, 1, 3])
def test_going_on_gives_the_bytes_of_never_having_stopped(default, batches_done, monkeypatch, tmp_path):
    whole = scored(default)
    file = tmp_path / "baseline_samples.jsonl"
    with monkeypatch.context() as patch, SampleLog(file, "key") as log:
        count_batches(patch, fail_after=1 + batches_done)  # the first one is the check's
        with pytest.raises(KeyboardInterrupt):
            scored(default, log=log)
    with SampleLog(file, "key") as log:
        assert len(log.done(PART, lambda *_: True)) == batches_done
        rows = count_batches(monkeypatch)
        assert scored(default, log=log) == whole
    with SampleLog(file, "key") as log:
        entries = log.done(PART, lambda *_: True)
        assert len(entries) == batches_done + len(rows) - 1
        rows.clear()
        assert scored(default, log=log) == whole
        assert rows == []
    assert [entry["windows"][0][0] for entry in entries][:1] == [2], "the longest first"


def test_a_budget_that_memory_lowered_is_kept_when_it_goes_on(default, monkeypatch, tmp_path):
    scarce = SimpleNamespace(available=60 * Readout(default[0]).bytes_per_token(32) * 2)
    with monkeypatch.context() as patch:
        patch.setattr(batching.psutil, "virtual_memory", lambda: scarce)
        whole = scored(default)
        count_batches(patch, fail_after=3)
        with SampleLog(tmp_path / "s.jsonl", "key") as log, pytest.raises(KeyboardInterrupt):
            scored(default, log=log)
    # Memory is there again, but other cuts would round otherwise.
    with SampleLog(tmp_path / "s.jsonl", "key") as log:
        assert {entry["batch_tokens"] for entry in log.done(PART, lambda *_: True)} == {48}
        assert scored(default, log=log) == whole
    with SampleLog(tmp_path / "s.jsonl", "key") as log:
        assert {entry["batch_tokens"] for entry in log.done(PART, lambda *_: True)} == {48}


def test_an_evaluation_passes_its_log_on(default, tmp_path):
    only_text = EvalSettings(max_length=32, skip_reasoning=True, skip_generation=True, skip_performance=True)
    with SampleLog(tmp_path / "s.jsonl", "key") as log:
        found = evaluate_model(*default, TEXTS, settings=only_text, log=log)
    with SampleLog(tmp_path / "s.jsonl", "key") as log:
        entries = log.done(PART, lambda *_: True)
    assert sum(tokens for entry in entries for _, tokens in entry["windows"]) == found["metrics"]["tokens"]["value"]


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 2])
def test_a_batch_that_does_not_fit_is_halved_and_only_that_batch(default, most, monkeypatch):
    """A model that is out of memory for long rows, more than `most` of them at a time."""
    forward, limit = default[0].model.forward, 1000
    shapes: list[tuple[int, ...]] = []

    def limited(*args, input_ids=None, **kwargs):
        if input_ids.shape[1] > 24 and len(input_ids) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        shapes.append(tuple(input_ids.shape))
        return forward(*args, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(Readout, "choose_way", lambda *_, **__: None)
    monkeypatch.setattr(default[0].model, "forward", limited)
    whole, chunks = scored(default)
    before, limit = shapes.copy(), most
    shapes.clear()
    found, found_chunks = scored(default)
    for a, b in zip(json.loads(found), json.loads(whole), strict=True):
        assert a["nll"] == pytest.approx(b["nll"], rel=1e-6)
        assert a["correct"] == b["correct"]
    for bins, found_bins in zip(chunks.reliability, found_chunks.reliability, strict=True):
        assert found_bins == pytest.approx(bins, rel=1e-6)
    assert replace(found_chunks, reliability=[]) == replace(chunks, reliability=[])
    assert max(rows for rows, _ in before) == 3
    assert max(rows for rows, length in shapes if length > 24) == most
    assert [shape for shape in shapes if shape[1] <= 24] == [shape for shape in before if shape[1] <= 24]
    limit = 0
    with pytest.raises(RRError, match=r"out of memory for a single row of \d+ tokens"):
        scored(default)


def test_halves_of_halves_keep_their_order():
    seen = []

    def run(batch):
        seen.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError
        return list(batch)

    def too_large(item):
        return RRError(f"{item} is too large")

    assert halving(run, [1, 2, 3, 4, 5, 6, 7], too_large) == [[1, 2], [3, 4], [5, 6], [7]]
    assert seen == [7, 4, 2, 2, 3, 2, 1]
    with pytest.raises(RRError, match="8 is too large"):
        halving(lambda _: run([1, 2, 3]), [8], too_large)


def with_tokens_on(device: str) -> SimpleNamespace:
    """Return as much of a model as tells on which device its tokens have to be."""
    weight = SimpleNamespace(device=torch.device(device))
    return SimpleNamespace(get_input_embeddings=lambda: SimpleNamespace(parameters=lambda: iter([weight])))


@pytest.mark.parametrize(
    ("available", "lowered"), [(10**12, 512), (2 * 512 * 1000, 512), (2 * 500 * 1000, 256), (0, 1)]
)
def test_a_cpus_memory_bounds_a_batch_and_the_user_is_told_once(available, lowered, monkeypatch):
    monkeypatch.setattr(batching.psutil, "virtual_memory", lambda: SimpleNamespace(available=available))
    reporter = Silent()
    assert affordable(with_tokens_on("cpu"), 8192, 1000, reporter) == lowered
    assert len(reporter.warnings) == (lowered < 512)
    assert affordable(with_tokens_on("cuda"), 8192, 1000, Silent()) == 8192


def test_the_estimate_covers_what_a_batch_really_takes(default, monkeypatch):
    """Tensors that are alive at once while a batch is scored, from torch's own profiler of memory."""
    model = default[0]
    ids = torch.randint(3, 200, (16, 64))
    mask, readout = torch.ones_like(ids), Readout(model)
    monkeypatch.setattr(tiles, "ROWS", 16)  # so that the buffer, which does not grow, is small
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        readout.score(ids, mask, mask.bool(), targets=ids.flatten())
    alive = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    assert 0.2 < peak / (ids.numel() * readout.bytes_per_token(64)) <= 1


# -- nothing is lost ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [0, 7, 32])
def test_a_document_longer_than_the_context_is_scored_once_and_whole(default, stride):
    model, tokenizer = default
    settings = EvalSettings(max_length=32, stride=stride)
    records = json.loads(scored(default, texts=[STORY * 5], settings=settings)[0])
    ids = tokenizer(STORY * 5, add_special_tokens=False)["input_ids"]
    assert len(ids) > 4 * 32
    assert records[0]["tokens"] == len(ids)
    # Token by token, each after as much context as its window has.
    expected, stream, begin = 0.0, [tokenizer.bos_token_id, *ids], 0
    while begin < len(ids):
        end = min(begin + (32 if begin == 0 else stride or 32), len(ids))
        window = torch.tensor([stream[max(0, end - 32) : end]])
        with torch.no_grad(), model.recursion.at_depth(0):
            logits = model(window).logits[0, begin - end :].double().log_softmax(-1)
        expected -= float(logits.gather(1, torch.tensor(ids[begin:end])[:, None]).sum())
        begin = end
    assert records[0]["nll"][0] == pytest.approx(expected, rel=1e-6)


def test_a_document_without_tokens_is_named(default):
    reporter = Silent()
    with_empty, _ = scored(default, texts=[TEXTS[0], "", TEXTS[1], ""], reporter=reporter)
    assert with_empty == scored(default, texts=[TEXTS[0], TEXTS[1]])[0]
    [warning] = reporter.warnings
    assert "2 ('')" in warning
    assert "4 ('')" in warning


@pytest.mark.parametrize("way", ["tiles", "rows", "plain"])
def test_a_document_that_the_model_breaks_on_is_named_and_not_logged(default, way, monkeypatch, tmp_path):
    broken, tokenizer = rrcli.load("default")
    token = tokenizer(TEXTS[3], add_special_tokens=False)["input_ids"][-2]
    others = {i for text in TEXTS[:3] for i in tokenizer(text, add_special_tokens=False)["input_ids"]}
    assert token not in others
    broken.get_input_embeddings().register_forward_hook(
        lambda _, args, states: states.masked_fill((args[0] == token)[..., None], torch.nan)
    )

    def choose(self, *_, **__):
        self.way = way

    monkeypatch.setattr(Readout, "choose_way", choose)
    file = tmp_path / "s.jsonl"
    with SampleLog(file, "key") as log, pytest.raises(RRError, match=r"no finite probability to document 4 \('The dog"):
        scored((broken, tokenizer), texts=TEXTS[:4], settings=EvalSettings(batch_tokens=1), log=log)
    assert "NaN" not in file.read_text()


def test_a_fallback_is_said_once_and_changes_no_number(default, monkeypatch):
    reporter = Silent()
    monkeypatch.setattr(tiles, "COLUMNS", {"cpu": 256})
    hook = default[0].lm_head.register_forward_hook(lambda _, __, logits: logits / logits.amax(-1, keepdim=True).abs())
    try:
        found, _ = scored(default, reporter=reporter)
        plain = Readout(default[0])
        plain.way = "plain"
        ids = torch.tensor([[default[1].bos_token_id, *default[1](TEXTS[3], add_special_tokens=False)["input_ids"]]])
        where = torch.ones_like(ids, dtype=torch.bool)
        where[:, -1] = False
        losses = plain.score(ids, torch.ones_like(ids), where, targets=ids[0, 1:]).losses.double().sum(1)
    finally:
        hook.remove()
    assert json.loads(found)[3]["nll"] == pytest.approx(losses.tolist(), rel=1e-5)
    [warning] = reporter.warnings
    assert "scored by the head on whole rows" in warning
