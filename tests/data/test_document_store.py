"""Documents by number, in memory or on disk, in the order of their epochs."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from random import Random

import pytest

from rrcli.data.document_store import DocumentStore
from rrcli.data.training_data import TrainingData
from rrcli.errors import RRError
from rrcli.settings import TrainSettings, with_changes

DOCUMENTS = ["one", "", "zwei \u00e4", {"prompt": "a", "completion": "b"}, "\u4e09" * 50]


@pytest.mark.parametrize("limit", [1, 10, 2**20])
def test_documents_are_the_same_in_memory_and_on_disk(
    limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rrcli.data.document_store.MEMORY_BYTES", limit)
    store = DocumentStore(iter(DOCUMENTS), tmp_path)
    assert list(store) == DOCUMENTS
    assert [store[i] for i in (4, 0, -1)] == [DOCUMENTS[4], DOCUMENTS[0], DOCUMENTS[-1]]
    assert store[1:3] == DOCUMENTS[1:3]
    assert Random(3).sample(store, 2) == Random(3).sample(DOCUMENTS, 2)
    with pytest.raises(IndexError):
        store[5]
    assert not DocumentStore([], tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_order_follows_from_seed_and_epoch(tmp_path: Path) -> None:
    numbers = [str(n) for n in range(50)]
    store, other = DocumentStore(numbers, tmp_path), DocumentStore(numbers, tmp_path)
    shown = [store.in_order(place, seed=3) for place in range(200)]
    epochs = [shown[begin : begin + 50] for begin in range(0, 200, 50)]
    assert all(sorted(epoch) == sorted(numbers) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert [other.in_order(place, seed=3) for place in (170, 3, 60)] == [shown[170], shown[3], shown[60]]
    assert [other.in_order(place, seed=4) for place in range(50)] != epochs[0]


def test_a_disk_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    monkeypatch.setattr("rrcli.data.document_store.MEMORY_BYTES", 10)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(RRError, match=r"cannot write .*[\d,]+ bytes free"):
            DocumentStore(["x" * 1000] * 100, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class Letters:
    """A tokenizer whose tokens are bytes."""

    bos_token_id = eos_token_id = pad_token_id = 0

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}


def test_a_file_larger_than_memory_is_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """48 MB of documents take less than a tenth of it, and any batch is the same for who comes anew."""
    monkeypatch.setattr("rrcli.data.document_store.MEMORY_BYTES", 2**20)
    with (tmp_path / "large.jsonl").open("w") as file:
        for number in range(12_000):
            file.write(json.dumps({"text": f"{number} " + "word " * 800}) + "\n")
    settings = TrainSettings(data="large.jsonl", task_share=0.0, max_length=64)
    # What is imported on the way would count as the file's memory.
    (tmp_path / "small.jsonl").write_text("".join(json.dumps({"text": f"{n} words"}) + "\n" for n in range(99)))
    TrainingData(with_changes(settings, data="small.jsonl"), tmp_path, Letters()).batch(0)
    tracemalloc.start()
    try:
        data = TrainingData(settings, tmp_path, Letters())
        shown = [data.batch(step).input_ids for step in range(5)]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(data.documents) > 10_000
    assert (tmp_path / "large.jsonl").stat().st_size > 48_000_000
    assert peak < 4_800_000
    again = TrainingData(settings, tmp_path, Letters())
    assert again.batch(3).input_ids.equal(shown[3])
