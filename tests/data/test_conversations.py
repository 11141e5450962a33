"""Conversations in files: which kind a file is of, what is wrong with a row, and on which side of the split it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rrcli.data.conversations import asked
from rrcli.data.sources import Notes, read_documents
from rrcli.data.splits import side_of
from rrcli.errors import RRError
from rrcli.evaluation.held_out import held_out_data
from rrcli.settings import EvalSettings

PAIR = {"prompt": "How many?", "completion": " Two."}
ASK = [{"role": "user", "content": "How many?"}]
SHARED = {"conversations": [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": "Two."}]}
TALK = {"messages": [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Two."}]}


def jsonl(file: Path, *rows: Any) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file.name


@pytest.mark.parametrize("row", [PAIR, TALK], ids=["completion", "messages"])
def test_conversations_are_read_without_repeats_and_other_fields(tmp_path: Path, row: dict[str, Any]) -> None:
    name, notes = jsonl(tmp_path / "a.jsonl", row | {"id": 3}, row | {"id": 4}), Notes()
    assert list(read_documents(name, tmp_path, notes=notes)) == [row]
    assert notes.repeated == 1


def test_the_text_field_goes_before_conversations(tmp_path: Path) -> None:
    name = jsonl(tmp_path / "a.jsonl", PAIR | {"text": "one"})
    assert list(read_documents(name, tmp_path)) == ["one"]
    assert list(read_documents(name, tmp_path, "prompt")) == ["How many?"]


def test_every_file_of_a_folder_has_its_own_kind(tmp_path: Path) -> None:
    for name, row in {"a": PAIR, "b": TALK, "c": {"text": "three"}}.items():
        jsonl(tmp_path / f"{name}.jsonl", row)
    (tmp_path / "d.csv").write_text("completion,prompt,id\n Three.,Why?,1\n")
    expected = [PAIR, TALK, "three", {"prompt": "Why?", "completion": " Three."}]
    assert list(read_documents(".", tmp_path)) == expected


def test_tables_hold_conversations(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    named = [m | {"name": None} for m in TALK["messages"]]
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": named, "id": 1}]), tmp_path / "talk.parquet")
    parquet.write_table(pyarrow.Table.from_pylist([PAIR]), tmp_path / "pair.parquet")
    assert list(read_documents("talk.parquet", tmp_path)) == [TALK]
    assert list(read_documents("pair.parquet", tmp_path)) == [PAIR]


def test_data_sets_of_the_hub_hold_conversations(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "talks").mkdir()
    jsonl(tmp_path / "talks" / "train.jsonl", TALK | {"id": 1})
    assert list(read_documents("hf://./talks", tmp_path)) == [TALK]


@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [
        (PAIR, {"prompt": "How many?"}, "no 'completion' that is text"),
        (PAIR, {"prompt": "", "completion": "x"}, "no 'prompt' that is text"),
        (PAIR, {"prompt": [{"role": "user"}], "completion": []}, "message 1 of 'prompt' has no 'content' that is text"),
        (PAIR, PAIR | {"completion": TALK["messages"]}, r"no 'completion' that is text \(it is a list\)"),
        (PAIR, PAIR | {"completion": 4}, r"no 'completion' that is text \(it is a number\)"),
        (PAIR, {"prompt": ASK, "completion": ASK}, "'completion' has no message of the assistant to learn from"),
        (TALK, {"messages": [*TALK["messages"], {"role": "user", "content": [{"type": "image"}]}]}, "type is 'image'"),
        (TALK, {"messages": [*TALK["messages"], {"role": "user", "tool_calls": [{}]}]}, "message 3 has no 'content'"),
        (TALK, TALK | {"tools": "find"}, "no JSON|Expecting value"),
        (TALK, TALK | {"tools": ["find"]}, "'tools' is not a list of tools"),
        (SHARED, {"conversations": [{"from": "human", "value": 5}]}, r"no 'value' that is text \(it is a number\)"),
        (SHARED, {"conversations": None}, "'conversations' is not a list of messages"),
        (PAIR, TALK, "no 'prompt' that is text"),
        (TALK, {"text": "x"}, "'messages' is not a list of messages"),
        (TALK, {"messages": []}, "'messages' is not a list of messages"),
        (TALK, {"messages": ["Hi."]}, "message 1 has no 'role' that is text"),
        (TALK, {"messages": [*TALK["messages"], {"role": "user", "content": None}]}, "message 3 has no 'content'"),
        (TALK, {"messages": [{"role": "user", "content": "Hi."}]}, "no message of the assistant to learn from"),
        (TALK, {"messages": [{"role": "assistant", "content": "\ud800"}]}, "half of a surrogate pair"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, good: Any, bad: Any, message: str) -> None:
    name = jsonl(tmp_path / "a.jsonl", good, good, bad)
    with pytest.raises(RRError, match=message) as error:
        list(read_documents(name, tmp_path))
    assert f"{tmp_path / name}, line 3: " in error.value.message
    assert error.value.hint


def test_a_table_of_texts_has_no_messages(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("messages\nHi.\n")
    with pytest.raises(RRError, match=r"a.csv, line 1: a table has no messages"):
        list(read_documents("a.csv", tmp_path))


def test_a_conversation_is_split_by_what_it_asks(tmp_path: Path) -> None:
    """So all answers to one question are on one side, and it is the side of the problem that asks it."""
    assert asked(PAIR) == asked(TALK) == asked(PAIR | {"completion": " Three."}) == ["How many?"]
    assert asked({"messages": [{"role": "system", "content": "Be brief."}, *TALK["messages"]]}) == ["How many?"]
    assert asked({"messages": [{"role": "assistant", "content": "Hello."}]}) == ["Hello."]
    questions = [f"How many are {n} and {n}?" for n in range(60)]
    rows = [{"prompt": q, "completion": c} for q in questions for c in (" Two.", " Three.")]
    name = jsonl(tmp_path / "a.jsonl", *rows)
    held_out = held_out_data(EvalSettings(data=name), tmp_path, 1, reasoning=False).documents
    assert list(held_out) == [row for row in rows if side_of(row["prompt"]) == "test"]
    assert len(held_out) >= 4
