"""Rows as other tools write them: read as trl reads them, or named; left out and counted where that is asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import rrcli
from rrcli.data.rendering import example_of, text_of
from rrcli.data.sources import Notes, read_documents
from rrcli.data.training_data import TrainingData
from rrcli.errors import RRError
from rrcli.evaluation.held_out import EvalData, showable
from rrcli.settings import EvalSettings, TrainSettings

ASK, SAY = {"role": "user", "content": "Where?"}, {"role": "assistant", "content": "There."}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "find"}}]}
FOUND = {"role": "tool", "tool_call_id": "c1", "content": "tree"}
TOOLS = [{"type": "function", "function": {"name": "find"}}]
TEMPLATE = (
    "{% if tools %}[{{ tools[0].function.name }}]{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% if m.tool_calls %}({{ m.tool_calls[0].function.name }}){% endif %}</{{ m.role }}>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED = TEMPLATE.replace(
    "<{{ m.role }}>{{ m.content }}",
    "<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}",
)


@pytest.fixture
def tokenizer() -> Any:
    return rrcli.load("default")[1]


def write(file: Path, *rows: Any) -> str:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    file.write_bytes(b"\n".join(lines) + b"\n")
    return file.name


def parts(message: dict[str, Any]) -> dict[str, Any]:
    return message | {"content": [{"type": "text", "text": message["content"][:3]}, message["content"][3:]]}


@pytest.mark.parametrize(
    ("row", "read"),
    [
        ({"messages": [ASK, CALL, FOUND, SAY]}, {"messages": [ASK, CALL | {"content": ""}, FOUND, SAY]}),
        ({"messages": [ASK, CALL]}, {"messages": [ASK, CALL | {"content": ""}]}),
        ({"messages": [parts(ASK), parts(SAY)]}, {"messages": [ASK, SAY]}),
        ({"conversations": [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": "There."}]}, None),
        ({"conversations": [ASK, SAY]}, None),
        ({"messages": [{"from": "user", "value": "Where?"}, {"from": "assistant", "value": "There."}]}, None),
        ({"prompt": [ASK], "completion": [SAY]}, {"prompt": [ASK], "completion": [SAY]}),
        ({"messages": [ASK, SAY], "tools": TOOLS}, {"messages": [ASK, SAY], "tools": TOOLS}),
        ({"messages": [ASK, SAY], "tools": json.dumps(TOOLS)}, {"messages": [ASK, SAY], "tools": TOOLS}),
        ({"messages": [ASK, SAY], "tools": []}, None),
    ],
)
def test_rows_of_other_tools_are_read(tmp_path: Path, row: dict[str, Any], read: dict[str, Any] | None) -> None:
    assert list(read_documents(write(tmp_path / "a.jsonl", row), tmp_path)) == [read or {"messages": [ASK, SAY]}]


def test_tables_of_other_tools_are_read(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [
        {"conversations": [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": "There."}], "tools": None},
        {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}], "tools": TOOLS},
        {"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": None}], "tools": None},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    with pytest.raises(RRError, match="row 3: message 2 has no 'value' that is text"):
        list(read_documents("a.parquet", tmp_path))
    found = list(read_documents("a.parquet", tmp_path, on_bad_row="skip"))
    assert [document.get("tools") for document in found] == [None, TOOLS]
    assert found[0] == {"messages": [ASK, SAY]}


BAD = [b"{", b"[1]", b'{"text": "\xff"}', {"text": None}, {"text": 5}, {"other": "x"}, b'{"text": "\\ud800"}']


@pytest.mark.parametrize("first", [False, True], ids=["later", "first"])
@pytest.mark.parametrize("row", BAD, ids=map(str, BAD))
def test_a_bad_row_is_an_error_or_left_out_and_counted(tmp_path: Path, row: Any, first: bool) -> None:
    good = {"text": "one"}
    name, line = write(tmp_path / "a.jsonl", *([row, good] if first else [good, row])), 1 if first else 2
    with pytest.raises(RRError, match=rf"a\.jsonl, line {line}: ") as error:
        list(read_documents(name, tmp_path))
    notes = Notes()
    assert list(read_documents(name, tmp_path, notes=notes, on_bad_row="skip")) == ["one"]
    assert notes.bad == 1
    said = f"a.jsonl: 1 row that cannot be read was left out (the first: {error.value.message})"
    assert notes.notice("a.jsonl") == said


def test_bad_rows_of_tables_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,completion\nWhy?, So.\nWhy?\nWhere?,\n")
    notes = Notes()
    expected = [{"prompt": "Why?", "completion": " So."}]
    assert list(read_documents("a.csv", tmp_path, notes=notes, on_bad_row="skip")) == expected
    assert notes.bad == 2
    assert "2 rows that cannot be read were left out (the first: " in notes.notice("a.csv")


def test_a_file_without_a_good_row_is_an_error(tmp_path: Path) -> None:
    name = write(tmp_path / "a.jsonl", {"text": 1}, {"text": 2})
    with pytest.raises(RRError, match=r"no row of the data a\.jsonl can be read \(the first: .*line 1: no object"):
        list(read_documents(name, tmp_path, on_bad_row="skip"))


@pytest.mark.parametrize("template", [None, TEMPLATE, MARKED], ids=["plain", "template", "marked"])
def test_of_a_conversation_in_two_parts_the_second_is_learned(tokenizer: Any, template: str | None) -> None:
    tokenizer.chat_template = template
    document = {"prompt": [ASK, SAY, ASK], "completion": [{"role": "assistant", "content": "Here."}]}
    ids, learned = example_of(tokenizer, document, TrainSettings())
    taught = tokenizer.decode([token for token, own in zip(ids, learned, strict=True) if own])
    assert "Here." in taught
    assert "There." not in taught
    text = text_of(tokenizer, document, EvalSettings())
    assert text.count("Where?") == 2
    assert text.rstrip().endswith("Here." if template is None else "Here.</assistant>")


def test_calls_and_tools_go_through_the_template(tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATE
    document = {"messages": [ASK, CALL | {"content": ""}], "tools": TOOLS}
    text = "[find]<user>Where?</user>\n<assistant>(find)</assistant>\n"
    assert text_of(tokenizer, document, EvalSettings()) == text
    ids, learned = example_of(tokenizer, document, TrainSettings())
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([t for t, own in zip(ids, learned, strict=True) if own]) == "(find)</assistant>\n"


def test_what_cannot_be_shown_without_a_template_is_an_error_or_left_out(tmp_path: Path, tokenizer: Any) -> None:
    good = [{"messages": [ASK | {"content": f"Where is {n}?"}, SAY]} for n in range(60)]
    bad = {"messages": [ASK, CALL | {"content": ""}, FOUND, SAY]}
    name = write(tmp_path / "a.jsonl", *good, bad)
    options = {"data": name, "task_share": 0.0, "batch_size": 60}
    with pytest.raises(RRError, match="the conversation 'Where\\?' uses tools and there is no template"):
        TrainingData(TrainSettings(**options), tmp_path, tokenizer).batch(0)
    data = TrainingData(TrainSettings(**options, on_bad_row="skip"), tmp_path, tokenizer)
    for step in range(3):
        data.batch(step)
    assert data.warning() == "conversations left out because they cannot be shown to this model: 1"
    write(
        tmp_path / "b.jsonl",
        *[bad | {"messages": [ASK | {"content": f"{n}?"}, *bad["messages"][1:]]} for n in range(60)],
    )
    options["data"] = "b.jsonl"
    with pytest.raises(RRError, match="uses tools and there is no template"):
        TrainingData(TrainSettings(**options, on_bad_row="skip"), tmp_path, tokenizer).batch(0)
    held_out = EvalData(documents=(good[0], bad), source=name, held_out=2)
    assert showable(held_out, tokenizer, EvalSettings()) is held_out
    shown = showable(held_out, tokenizer, EvalSettings(on_bad_row="skip"))
    assert (shown.documents, shown.held_out) == ((good[0],), 1)
    assert shown.notice.startswith(
        "a.jsonl: documents left out because they cannot be shown to this model: 1 (the first: "
    )
    with pytest.raises(RRError, match=r"no document of a\.jsonl can be shown to this model"):
        showable(EvalData(documents=(bad,), source=name), tokenizer, EvalSettings(on_bad_row="skip"))
