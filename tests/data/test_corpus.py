"""Several sources with weights, and text of one's own to evaluate on: shares, sides, and what may not be trained on."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import rrcli
from rrcli.data.corpus import Corpus, Source, shared_out, sources_of
from rrcli.data.splits import side_of
from rrcli.data.training_data import TrainingData, source_fingerprint
from rrcli.errors import RRError, UsageError
from rrcli.evaluation.held_out import held_out_data
from rrcli.settings import EvalSettings, TrainSettings


def write(folder: Path, name: str, texts: list[str]) -> list[str]:
    (folder / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return texts


def stories(of: str, count: int = 100) -> list[str]:
    return [f"Here is a story about {of} number {i} that ends well." for i in range(count)]


def training(folder: Path, **options: object) -> TrainingData:
    settings = TrainSettings(task_share=0.0, max_length=64, **options)  # type: ignore[arg-type]
    return TrainingData(settings, folder, rrcli.load("default")[1])


# -- several sources ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "sources"),
    [
        ("default", [Source("default")]),
        ("a,b.txt", [Source("a,b.txt")]),
        ("x=1.jsonl", [Source("x=1.jsonl")]),
        ("a.jsonl=0.7, hf://x/y:c:train=0.3", [Source("a.jsonl", 0.7), Source("hf://x/y:c:train", 0.3)]),
        ("a=2,b=1.,c=.5", [Source("a", 2), Source("b", 1), Source("c", 0.5)]),
    ],
)
def test_sources_and_weights(data: str, sources: list[Source]) -> None:
    assert list(sources_of(data)) == sources


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("a.jsonl=0.5,b.jsonl", "has no weight"),
        ("a.jsonl=1,a.jsonl=2", "named twice"),
        ("a.jsonl=1,b.jsonl=0", "weight 0"),
    ],
)
def test_weights_that_mean_nothing(data: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        sources_of(data)
    assert caught.value.hint


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=5))
def test_every_source_has_its_share_of_every_beginning(weights: list[float]) -> None:
    counts = Counter[int]()
    for place in range(200):
        number, own = shared_out(place, weights)
        assert own == counts[number], "each source is asked for its own places in their order"
        counts[number] += 1
        for other, weight in enumerate(weights):
            assert abs(counts[other] - (place + 1) * weight / sum(weights)) < len(weights)


def test_training_shows_the_shares_of_several_sources(tmp_path: Path) -> None:
    red, blue = write(tmp_path, "red.jsonl", stories("red", 300)), write(tmp_path, "blue.jsonl", stories("blue", 40))
    data = training(tmp_path, data="red.jsonl=3,blue.jsonl=1")
    shown = [data.documents.in_order(place, 0) for place in range(400)]
    counts = Counter("red" if text in red else "blue" for text in shown)
    assert counts == {"red": 300, "blue": 100}
    trained = [text for text in red if side_of(text) == "train"]
    assert set(shown[: len(trained) * 4 // 3 + 4]) >= set(trained), "every document of a source comes once in its epoch"
    assert set(data.documents) == {text for text in [*red, *blue] if side_of(text) == "train"}
    tested = held_out_data(EvalSettings(data="red.jsonl=3,blue.jsonl=1"), tmp_path, 1, reasoning=False)
    assert set(tested.documents) == {text for text in [*red, *blue] if side_of(text) == "test"}


def test_a_document_of_two_sources_counts_for_the_first(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", stories("red"))
    write(tmp_path, "b.jsonl", [*stories("red", 10), *stories("blue")])
    corpus = Corpus(TrainSettings(data="a.jsonl=1,b.jsonl=1"), tmp_path)
    assert Counter(number for _, _, number in corpus.read()) == {0: 100, 1: 100}
    assert corpus.notice == "b.jsonl: 10 repeated documents were left out"


def test_a_source_without_training_documents_is_named(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", stories("red"))
    write(tmp_path, "b.jsonl", [next(text for text in stories("blue") if side_of(text) == "test")])
    with pytest.raises(RRError, match=r"no document of b\.jsonl is on the training side"):
        training(tmp_path, data="a.jsonl=1,b.jsonl=1")


# -- text to evaluate on -----------------------------------------------------------------------------------------------


def test_text_of_ones_own_is_evaluated_whole_and_the_rest_trained_on(tmp_path: Path) -> None:
    red, blue = write(tmp_path, "red.jsonl", stories("red", 200)), write(tmp_path, "blue.jsonl", stories("blue", 30))
    options = {"data": "red.jsonl", "eval_data": "blue.jsonl"}
    tested = held_out_data(EvalSettings(**options), tmp_path, 1, reasoning=False)
    assert set(tested.documents) == set(blue)
    assert tested.source == "blue.jsonl"
    validated = held_out_data(EvalSettings(**options), tmp_path, 1, side="validation", reasoning=False).documents
    assert set(validated) == {text for text in red if side_of(text) == "validation"}
    assert set(training(tmp_path, **options).documents) == set(red) - set(validated)


def test_nothing_of_it_is_trained_on_in_any_form(tmp_path: Path) -> None:
    shared = stories("blue", 30)
    chat = {"messages": [{"role": "user", "content": shared[2]}, {"role": "assistant", "content": "I see."}]}
    write(tmp_path, "train.jsonl", [*stories("red", 60), shared[0], shared[1].upper() + " "])
    (tmp_path / "chats.jsonl").write_text(json.dumps(chat) + "\n" + json.dumps(chat | {"id": 1}).replace("blue", "red"))
    write(tmp_path, "test.jsonl", shared)
    data = training(tmp_path, data="train.jsonl=1,chats.jsonl=1", eval_data="test.jsonl")
    assert "train.jsonl: 1 repeated documents were left out" in data.notice
    assert "2 documents were left out, because test.jsonl has them or near-twins of them" in data.notice
    assert len(data.documents) == sum(side_of(text) != "validation" for text in stories("red", 60)) + 1


def test_its_problems_are_not_trained_on(tmp_path: Path) -> None:
    rows = [{"question": f"What is {i} and {i + 5}?", "answer": i} for i in range(80)]
    (tmp_path / "task.jsonl").write_text("\n".join(map(json.dumps, rows)))
    write(tmp_path, "train.jsonl", stories("red"))
    asked = [str(row["question"]) for row in rows[:20]]
    write(tmp_path, "test.jsonl", asked)
    settings = TrainSettings(
        data="train.jsonl", eval_data="test.jsonl", task=("task.jsonl",), task_share=1.0, batch_size=50, max_length=64
    )
    tokenizer = rrcli.load("default")[1]
    data = TrainingData(settings, tmp_path, tokenizer)
    shown = {tokenizer.decode(data.example(number)[0]) for number in range(400)}
    assert any("What is 25 and 30?" in text for text in shown)
    assert not [text for text, question in itertools.product(shown, asked) if question in text]


def test_the_identity_covers_weights_and_the_text_to_evaluate_on(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path, f"{name}.jsonl", stories(name))
    options = [
        {"data": "a.jsonl"},
        {"data": "a.jsonl", "eval_data": "b.jsonl"},
        {"data": "a.jsonl=1,b.jsonl=1"},
        {"data": "a.jsonl=1,b.jsonl=2"},
        {"data": "b.jsonl=1,a.jsonl=1"},
    ]
    seen = [source_fingerprint(EvalSettings(**each), tmp_path) for each in options]
    assert len(set(seen)) == len(seen)
    assert source_fingerprint(EvalSettings(data="a.jsonl=2,b.jsonl=2"), tmp_path) == seen[2]
