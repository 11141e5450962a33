"""The samples log: what was measured stays, whatever cuts an evaluation off."""

import json

import pytest

from rrcli.errors import RRError
from rrcli.evaluation.samples import SampleLog


def logged(path):
    return [json.loads(line) for line in path.read_text().rstrip("\n").split("\n")]


def test_goes_on_where_it_was_cut_off(tmp_path):
    path = tmp_path / "out" / "baseline_samples.jsonl"
    with SampleLog(path, "key") as log:
        assert log.done("problems") == []
        log.append("problems", [{"n": 1, "text": "a\r\nb\u2028c"}, {"n": 2}])
        log.append("documents", [{"n": 3}])
    with path.open("a") as file:
        file.write('{"part": "problems", "n"')  # a line that a power cut tore
    with SampleLog(path, "key") as log:
        assert [entry["n"] for entry in log.done("problems")] == [1, 2]
        assert log.found == 3
        assert log.done("problems")[0]["text"] == "a\r\nb\u2028c"
        log.append("problems", [{"n": 4}])
    assert [entry.get("n") for entry in logged(path)] == [None, 1, 2, 3, 4]


@pytest.mark.parametrize("change", ["another key", "ended", "no header", "no JSON"])
def test_begins_anew_and_keeps_the_old_file(tmp_path, change):
    path = tmp_path / "baseline_samples.jsonl"
    with SampleLog(path, "key") as log:
        log.append("problems", [{"n": 1}])
        if change == "ended":
            log.end()
    if change == "no header":
        path.write_text('{"part": "problems", "n": 1}\n')
    if change == "no JSON":
        path.write_text(path.read_text() + "x\n")
    before = path.read_text()
    with SampleLog(path, "other" if change == "another key" else "key") as log:
        assert log.done("problems") == []
    assert path.with_name(path.name + ".bak").read_text() == before
    assert len(logged(path)) == 1


def test_without_a_file_nothing_is_written():
    with SampleLog() as log:
        log.append("problems", [{"n": 1}])
        assert log.done("problems") == []


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RRError, match="file"):
        SampleLog(tmp_path / "file" / "x_samples.jsonl", "key")


def test_numbers_that_json_does_not_know_are_refused(tmp_path):
    with SampleLog(tmp_path / "s.jsonl", "key") as log, pytest.raises(ValueError, match="JSON"):
        log.append("documents", [{"nll": float("nan")}])
