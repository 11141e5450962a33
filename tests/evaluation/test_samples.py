"""The samples log: what was measured stays, whatever cuts an evaluation off."""

import json
from pathlib import Path

import pytest

from rrcli.errors import RRError
from rrcli.evaluation.samples import SampleLog


def logged(path):
    return [json.loads(line) for line in path.read_text().rstrip("\n").split("\n")]


def anything(place, entry):
    return True


def answer(number, output=""):
    return {
        "number": number, "depth": 0, "key": f"p{number}", "output": output, "extracted": "", "strict": False,
        "correct": False, "score": 0.0, "length": 1, "ended": True,
    }  # fmt: skip


def prompt(number):
    return {
        "number": number, "key": f"g{number}", "prompt": "a", "text": "b", "length": 1, "finished": False,
        "distinct_2": 1.0, "rep_4": 0.0,
    }  # fmt: skip


def test_goes_on_where_it_was_cut_off(tmp_path):
    path = tmp_path / "out" / "baseline_samples.jsonl"
    with SampleLog(path, "key") as log:
        assert log.done("problems", anything) == []
        log.append("problems", [answer(1, "a\r\nb\u2028c"), answer(2)])
        log.append("generations", [prompt(3)])
    with path.open("a") as file:
        file.write('{"part": "problems", "number"')  # a line that a power cut tore
    with SampleLog(path, "key") as log:
        assert [entry["number"] for entry in log.done("problems", anything)] == [1, 2]
        assert log.found == 3
        assert log.done("problems", anything)[0]["output"] == "a\r\nb\u2028c"
        log.append("problems", [answer(4)])
    assert [entry.get("number") for entry in logged(path)] == [None, 1, 2, 3, 4]


@pytest.mark.parametrize("change", ["another key", "ended"])
def test_begins_anew_and_keeps_the_old_file(tmp_path, change):
    path = tmp_path / "baseline_samples.jsonl"
    with SampleLog(path, "key") as log:
        log.append("problems", [answer(1)])
        if change == "ended":
            log.end()
    before = path.read_text()
    with SampleLog(path, "other" if change == "another key" else "key") as log:
        assert log.done("problems", anything) == []
    assert path.with_name(path.name + ".bak").read_text() == before
    assert len(logged(path)) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[1:], "line 1: object missing required field `schema`"),
        (lambda lines: [*lines, "x"], "line 3: no JSON"),
        (lambda lines: [*lines, "[1]"], "line 3: expected `object`, got `array`"),
        (lambda lines: [*lines, '{"part": "problem"}'], "line 3: its part is 'problem'"),
        (lambda lines: [*lines, '{"part": ["problems"]}'], "line 3: its part is "),
        (lambda lines: [lines[0], lines[1].replace("true", "1")], "line 2: ended: expected `bool`, got `int`"),
        (lambda lines: [lines[0], lines[1].replace('"depth"', '"depht"')], "line 2: object missing .* `depth`"),
        (
            lambda lines: [lines[0], lines[1].replace('"number": 1', '"number": -1')],
            "line 2: number: expected `int` >= 0",
        ),
    ],
)
def test_a_damaged_log_is_an_error_that_names_the_line_and_loses_nothing(tmp_path, change, message):
    path = tmp_path / "baseline_samples.jsonl"
    with SampleLog(path, "key") as log:
        log.append("problems", [answer(1)])
    text = "".join(f"{line}\n" for line in change(path.read_text().splitlines()))
    path.write_text(text)
    with pytest.raises(RRError, match=message) as caught:
        SampleLog(path, "key")
    assert str(path) in caught.value.message
    assert path.read_text() == text


def test_what_a_complete_evaluation_logged_is_what_a_larger_one_begins_with(tmp_path):
    path = tmp_path / "baseline_samples.jsonl"
    with SampleLog(path, "one seed") as log:
        log.append("problems", [answer(1)])
        log.append("generations", [prompt(3)])
    with SampleLog(path, "two seeds", extends=["one seed"]) as log:
        assert log.found == 0  # it had not ended
    path.with_name(path.name + ".bak").replace(path)
    with SampleLog(path, "one seed") as log:
        log.end()
    with SampleLog(path, "two seeds", extends=["no seed", "one seed"]) as log:
        assert log.done("problems", anything) == [{"part": "problems", **answer(1)}]
        assert log.done("generations", anything) == [{"part": "generations", **prompt(3)}]
        log.append("problems", [answer(2)])
    with SampleLog(path, "two seeds") as log:  # and may be cut off in its turn
        assert log.found == 3
        log.end()
    assert [line.get("key") for line in logged(path)] == ["two seeds", "p1", "g3", "p2", None]


def test_without_a_file_nothing_is_written():
    with SampleLog() as log:
        log.append("problems", [{"n": 1}])
        assert log.done("problems", anything) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RRError, match="file"):
        SampleLog(tmp_path / "file" / "x_samples.jsonl", "key")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_said(tmp_path):
    (tmp_path / "s.jsonl").symlink_to("/dev/full")
    log = SampleLog()
    log._path, log._file = tmp_path / "s.jsonl", (tmp_path / "s.jsonl").open("a")
    with log, pytest.raises(RRError, match=r"cannot write .*s.jsonl: No space left on device"):
        log.append("documents", [{"n": 1}])


def test_numbers_that_json_does_not_know_are_refused(tmp_path):
    with SampleLog(tmp_path / "s.jsonl", "key") as log, pytest.raises(ValueError, match="JSON"):
        log.append("documents", [{"nll": float("nan")}])
