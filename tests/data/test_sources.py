"""Every kind of text source: what is read, what is left out and counted, and how broken parts are named."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from test_data import jsonl, write

from rrcli.data import sources
from rrcli.data.sources import Notes, fingerprint, read_documents, source_files
from rrcli.demo import defaults
from rrcli.errors import RRError, UsageError


@pytest.mark.parametrize(
    ("content", "documents"),
    [
        ("one\n\ntwo\n", ["one", "two"]),
        ("one\nstill one\n\n\n\n  two  \n\n", ["one\nstill one", "two"]),
        (b"one\r\nstill one\r\n\r\ntwo\r\n", ["one\nstill one", "two"]),
        ("one\n\none\n\ntwo", ["one", "two"]),
        ("no line break", ["no line break"]),
        ("zwei \u00e4\n\n\u4e09", ["zwei \u00e4", "\u4e09"]),
    ],
)
def test_text_is_cut_at_blank_lines(tmp_path: Path, content: str | bytes, documents: list[str]) -> None:
    write(tmp_path / "data.txt", content)
    assert list(read_documents("data.txt", tmp_path)) == documents


def test_a_line_of_spaces_is_blank(tmp_path: Path) -> None:
    write(tmp_path / "data.txt", "one\n  \ntwo\n \t\r\nthree")
    assert list(read_documents("data.txt", tmp_path)) == ["one", "two", "three"]


def test_jsonl_has_a_document_on_each_line(tmp_path: Path) -> None:
    first = '{"text": "one\\n\\nstill one"}'
    write(tmp_path / "data.jsonl", first + '\r\n\r\n{"text": " two ", "other": [1]}\n{"text": ""}\n' + first)
    assert list(read_documents("data.jsonl", tmp_path)) == ["one\n\nstill one", "two"]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_jsonl_is_cut_at_line_feeds_only(tmp_path: Path, separator: str) -> None:
    write(tmp_path / "data.jsonl", jsonl(f"one{separator}still one", "two"))
    assert list(read_documents("data.jsonl", tmp_path)) == [f"one{separator}still one", "two"]


@pytest.mark.parametrize(("name", "content"), [("data.txt", "one\n\ntwo"), ("data.jsonl", jsonl("one", "two"))])
def test_a_byte_order_mark_is_not_text(tmp_path: Path, name: str, content: str) -> None:
    write(tmp_path / name, b"\xef\xbb\xbf" + content.encode())
    assert list(read_documents(name, tmp_path)) == ["one", "two"]


def test_a_folder_is_read_in_order_and_without_repeats(tmp_path: Path) -> None:
    write(tmp_path / "texts" / "b.txt", "from b\n\nshared")
    write(tmp_path / "texts" / "a" / "a.jsonl", jsonl("from a", "shared"))
    write(tmp_path / "texts" / "ignored.md", "not data")
    assert list(read_documents("texts", tmp_path)) == ["from a", "shared", "from b"]
    assert list(read_documents(str(tmp_path / "texts"), Path("/"))) == ["from a", "shared", "from b"]


def test_the_embedded_text_is_there() -> None:
    documents = list(read_documents("default", Path("/nowhere")))
    assert len(documents) > 500
    assert len(set(documents)) == len(documents)
    assert source_files("default", Path("/nowhere")) == [defaults.TEXT_FILE]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.txt", "", "is empty"),
        ("data.txt", "\n\n  \n", "is empty"),
        ("data.jsonl", "", "is empty"),
        ("data.jsonl", '{"text": "  "}\n', "is empty"),
        ("data.txt", b"one\ntwo\nthr\xe9e\n", r"data\.txt, line 3: byte 0xe9 is not UTF-8"),
        ("data.jsonl", '{"text": "one"}\n\n{"text": \n', r"data\.jsonl, line 3: no JSON"),
        ("data.jsonl", '{"text": "one"}\n{"txt": "two"}\n', r"data\.jsonl, line 2: no object with a 'text'"),
        ("data.jsonl", '{"text": 3}\n', r"data\.jsonl, line 1: no object with a 'text'"),
        ("data.jsonl", '["text"]\n', r"data\.jsonl, line 1: no JSON object"),
    ],
)
def test_broken_data_is_named_by_file_and_line(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    write(tmp_path / name, content)
    with pytest.raises(RRError, match=message) as caught:
        list(read_documents(name, tmp_path))
    assert caught.value.exit_code == 1
    assert caught.value.hint


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("absent.txt", "does not exist"),
        ("data.md", "unknown kind"),
        ("wikitext:test", "does not exist"),
        ("empty", "holds no .txt or"),
    ],
)
def test_a_source_that_is_none_is_refused(tmp_path: Path, spec: str, message: str) -> None:
    write(tmp_path / "data.md", "a")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=message):
        list(read_documents(spec, tmp_path))


# -- what is left out --------------------------------------------------------------------------------------------------


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    write(tmp_path / "a" / "1.jsonl", jsonl("one", "", "two", "one "))
    write(tmp_path / "a" / "2.csv", "text\none\n  \nthree\n")
    notes = Notes()
    assert list(read_documents("a", tmp_path, notes=notes)) == ["one", "two", "three"]
    assert notes == Notes(empty=2, repeated=2)
    assert notes.notice("a") == "a: 2 empty and 2 repeated documents were left out"
    assert Notes().notice("a") == ""


# -- the field ---------------------------------------------------------------------------------------------------------


def write_parquet(file: Path, **columns: list[Any]) -> Path:
    parquet.write_table(pyarrow.table(columns), file)
    return file


def test_every_kind_reads_the_field_that_was_named(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", '{"text": "no", "body": "one"}\n')
    write(tmp_path / "b.csv", "text,body\nno,one\n")
    write_parquet(tmp_path / "c.parquet", text=["no"], body=["one"])
    for name in ("a.jsonl", "b.csv", "c.parquet"):
        assert list(read_documents(name, tmp_path, "body")) == ["one"]
        assert list(read_documents(name, tmp_path)) == ["no"]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_field_that_is_missing_is_named_with_those_there_are(tmp_path: Path, kind: str) -> None:
    write(tmp_path / "a.jsonl", '{"id": 3, "body": "one"}\n')
    write(tmp_path / "a.csv", "id,body\n3,one\n")
    write_parquet(tmp_path / "a.parquet", id=[3], body=["one"])
    with pytest.raises(RRError, match=rf"a\.{kind}.*'text'.*id, body") as caught:
        list(read_documents(f"a.{kind}", tmp_path))
    assert "--text-field" in caught.value.hint
    assert "body" in caught.value.hint


def test_half_a_surrogate_pair_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", jsonl("one") + '{"text": "\\ud83d\\ude00"}\n{"text": "\\ud83d"}\n')
    with pytest.raises(RRError, match=r"a\.jsonl, line 3: half of a surrogate pair"):
        list(read_documents("a.jsonl", tmp_path))


# -- CSV ---------------------------------------------------------------------------------------------------------------


def test_csv_holds_quoted_commas_line_breaks_and_quotes(tmp_path: Path) -> None:
    content = 'id,text\r\n1,"one, ""two""\nthree"\r\n\r\n2,four\u2028five\r\n3,"' + "x" * 200_000 + '"\r\n'
    write(tmp_path / "a.csv", b"\xef\xbb\xbf" + content.encode())
    assert list(read_documents("a.csv", tmp_path)) == ['one, "two"\nthree', "four\u2028five", "x" * 200_000]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"a\.csv, line 1: no header"),
        ("text\n", "is empty"),
        ("one\ntwo\n", r"line 1: no column 'text' \(it has one\)"),
        ("text,text\na,b\n", r"line 1: two columns 'text' \(it has text, text\)"),
        ("id,text\n1,one\n2,two,three\n", r"line 3: 3 columns, the header has 2"),
        ("id,text\n1,one\n2\n", r"line 3: 1 columns, the header has 2"),
        ('id,text\n1,one\n2,"two\nthree\n4,four\n', r"the record that begins in line 3 is not valid CSV"),
        ('id,text\n1,"one\ntwo"\n2,"two" three\n', r"the record that begins in line 4 is not valid CSV"),
        (b"text\none\ntw\xf6\n", r"a\.csv, line 3: byte 0xf6 is not UTF-8"),
    ],
)
def test_broken_csv_is_named_by_its_line(tmp_path: Path, content: str | bytes, message: str) -> None:
    write(tmp_path / "a.csv", content)
    with pytest.raises(RRError, match=message) as caught:
        list(read_documents("a.csv", tmp_path))
    assert caught.value.hint


# -- Parquet -----------------------------------------------------------------------------------------------------------


def test_parquet_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"document {i}" for i in range(50)]
    kinds = {"plain": pyarrow.string(), "large": pyarrow.large_string()}
    kinds["dictionary"] = pyarrow.dictionary(pyarrow.int32(), pyarrow.string())
    for name, kind in kinds.items():
        column = pyarrow.array(texts, pyarrow.string()).cast(kind)
        parquet.write_table(pyarrow.table({"text": column}), tmp_path / f"{name}.parquet", row_group_size=7)
        assert list(read_documents(f"{name}.parquet", tmp_path)) == texts
    monkeypatch.setattr("rrcli.data.rows.PARQUET_ROWS", 3)
    assert list(read_documents("plain.parquet", tmp_path)) == texts


def test_a_null_is_an_empty_document(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", text=["one", None, "two", ""])
    notes = Notes()
    assert list(read_documents("a.parquet", tmp_path, notes=notes)) == ["one", "two"]
    assert notes.empty == 2


def test_broken_parquet_is_named(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", text=[f"document {i} {'x' * i}" for i in range(500)])
    whole = file.read_bytes()
    broken = (b"", b"no parquet", whole[: len(whole) // 2], whole[:-1], b"PAR1" + bytes(len(whole)) + b"PAR1",
              whole[:200] + bytes(400) + whole[600:])  # fmt: skip
    for content in broken:
        file.write_bytes(content)
        with pytest.raises(RRError, match=r"cannot read .*a\.parquet") as caught:
            list(read_documents("a.parquet", tmp_path))
        assert caught.value.exit_code == 1


def test_a_parquet_column_that_is_no_text(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", text=[1, 2], body=["one", "two"])
    with pytest.raises(RRError, match="column 'text' holds int64, not text") as caught:
        list(read_documents("a.parquet", tmp_path))
    assert "--text-field body" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "module", "extra"), [("a.parquet", "pyarrow", "parquet"), ("hf://x", "datasets", "datasets")]
)
def test_a_missing_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str, extra: str
) -> None:
    (tmp_path / "a.parquet").touch()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=f"needs the extra '{extra}'") as caught:
        list(read_documents(name, tmp_path))
    assert caught.value.hint == f"pip install 'rrcli[{extra}]'"


# -- the hub -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def data_set(tmp_path: Path) -> Path:
    """Make a data set of two configurations, one of them with two splits, as a repository of the hub holds it."""
    folder = tmp_path / "birds"
    for name, texts in (("plain/train", ["one", "two"]), ("plain/test", ["three"]), ("other/train", ["four", None])):
        file = folder / f"{name}-00000-of-00001.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_parquet(file, text=texts, number=list(range(len(texts))))
    configs = "".join(
        f"- config_name: {config}\n  data_files:\n"
        + "".join(f"  - split: {split}\n    path: {config}/{split}-*\n" for split in splits)
        for config, splits in (("plain", ("train", "test")), ("other", ("train",)))
    )
    write(folder / "README.md", f"---\nconfigs:\n{configs}---\n")
    return tmp_path


@pytest.mark.parametrize(
    ("spec", "documents"),
    [
        ("hf://./birds:plain", ["one", "two"]),
        ("hf://./birds:plain:test", ["three"]),
        ("hf://./birds:other:train", ["four"]),
    ],
)
def test_a_data_set_is_streamed_by_configuration_and_split(data_set: Path, spec: str, documents: list[str]) -> None:
    assert list(read_documents(spec, data_set)) == documents
    assert list(read_documents(spec.replace("./birds", str(data_set / "birds")), Path("/"))) == documents


def test_a_plain_folder_of_parquet_is_a_data_set_too(tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    write_parquet(tmp_path / "flat" / "train.parquet", text=["one"])
    assert list(read_documents("hf://./flat", tmp_path)) == ["one"]


@pytest.mark.parametrize(
    ("spec", "field", "message"),
    [
        ("hf://./birds:plain:dev", "text", r"cannot read hf://\./birds:plain:dev: .*dev"),
        ("hf://./birds:plan", "text", r"cannot read hf://\./birds:plan: .*plan"),
        ("hf://./absent", "text", r"cannot read hf://\./absent"),
        ("hf://./birds:plain", "body", r"no column 'body' \(it has text, number\)"),
        ("hf://./birds:plain", "number", "row 1: 'number' holds a number, not text"),
    ],
)
def test_a_data_set_that_cannot_be_read_is_named(data_set: Path, spec: str, field: str, message: str) -> None:
    with pytest.raises(RRError, match=message) as caught:
        list(read_documents(spec, data_set, field))
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("spec", ["hf://", "hf://a/b:c:d:e"])
def test_a_data_set_name_that_means_nothing(tmp_path: Path, spec: str) -> None:
    with pytest.raises(UsageError, match="cannot be read") as caught:
        list(read_documents(spec, tmp_path))
    assert "hf://NAME[:CONFIG[:SPLIT]]" in caught.value.hint


# -- standard input ----------------------------------------------------------------------------------------------------


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Any:
    def give(content: bytes) -> None:
        sources._stdin.cache_clear()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))

    yield give
    sources._stdin.cache_clear()


@pytest.mark.parametrize(
    ("content", "documents"),
    [
        ("one\n\ntwo\nstill two\n", ["one", "two\nstill two"]),
        ('\n{"text": "one\\n\\ntwo"}\n{"text": "three"}\n', ["one\n\ntwo", "three"]),
        ("{curly} but no object\n\nthree", ["{curly} but no object", "three"]),
    ],
)
def test_standard_input_is_text_or_json_lines(stdin: Any, content: str, documents: list[str]) -> None:
    stdin(content.encode())
    first = fingerprint("-", Path("/"))
    assert list(read_documents("-", Path("/"))) == documents
    assert list(read_documents("-", Path("/"))) == documents
    assert fingerprint("-", Path("/")) == first


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"a\n\xff", "standard input, line 2: byte 0xff is not UTF-8"),
        (b'{"text": "one"}\n{"txt": "two"}', "standard input, line 2"),
    ],
)
def test_broken_standard_input_is_named(stdin: Any, content: bytes, message: str) -> None:
    stdin(content)
    with pytest.raises(RRError, match=message):
        list(read_documents("-", Path("/")))


def test_a_terminal_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, stdin: Any) -> None:
    stdin(b"")
    monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
    with pytest.raises(UsageError, match="which is a terminal"):
        list(read_documents("-", Path("/")))


# -- identity ----------------------------------------------------------------------------------------------------------


def test_the_fingerprint_covers_every_kind(tmp_path: Path, stdin: Any) -> None:
    write(tmp_path / "a.jsonl", jsonl("one"))
    write_parquet(tmp_path / "b.parquet", text=["one"])
    stdin(b"one")
    seen = [fingerprint(spec, tmp_path) for spec in ("a.jsonl", "b.parquet", "-", "hf://a/b", "hf://a/b:c")]
    seen += [fingerprint(spec, tmp_path, "body") for spec in ("a.jsonl", "b.parquet", "hf://a/b")]
    stdin(b"two")
    seen.append(fingerprint("-", tmp_path))
    write(tmp_path / "a.jsonl", jsonl("two three"))
    write_parquet(tmp_path / "b.parquet", text=["two", "three"])
    seen += [fingerprint(spec, tmp_path) for spec in ("a.jsonl", "b.parquet")]
    assert len(set(seen)) == len(seen) == 11


def test_text_does_not_depend_on_the_field(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "one")
    assert fingerprint("a.txt", tmp_path) == fingerprint("a.txt", tmp_path, "body")


def test_a_large_file_is_read_as_a_stream(tmp_path: Path) -> None:
    """The first documents come without the rest being read: what follows them is broken."""
    file = tmp_path / "a.jsonl"
    with file.open("w") as out:
        out.writelines(json.dumps({"text": f"document {i}"}) + "\n" for i in range(20_000))
        out.write("{torn")
    documents = read_documents("a.jsonl", tmp_path)
    assert [next(documents) for _ in range(20_000)][-1] == "document 19999"
    with pytest.raises(RRError, match="line 20001"):
        next(documents)
