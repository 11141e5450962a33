"""Questions as they are put, answers as they are recorded, and evaluations that go on where they were cut off."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace

import pytest

import rrcli
from families import attach_random
from rrcli.data.problem_files import FileTask
from rrcli.data.prompts import read_prompts, stop_strings
from rrcli.data.rendering import question_text
from rrcli.data.tasks import Problem, Task
from rrcli.errors import RRError, UsageError
from rrcli.evaluation import answers
from rrcli.evaluation.answers import continue_prompts, solve_problems
from rrcli.evaluation.held_out import EvalData
from rrcli.evaluation.samples import SampleLog
from rrcli.reporting import Silent
from rrcli.settings import EvalSettings

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SPEC = "row_steps:min_steps=1,max_steps=3"


@pytest.fixture
def default():
    return rrcli.load("default")


def data_of(count=24):
    task = Task(SPEC)
    return EvalData(tasks=(task,), problems=tuple(task.problems(count, 0, side="test")))


# -- how a question is put ---------------------------------------------------------------------------------------------


def test_solved_examples_stand_in_front_of_a_plain_question(default):
    _, tokenizer = default
    examples = [Problem("t", "1 + 1?", "2"), Problem("t", "2 + 2?", "4", {}, "2 + 2 is 4. #### 4")]
    assert question_text(tokenizer, "3 + 3?", examples, EvalSettings()) == (
        "Question: 1 + 1?\nAnswer: 2\n\nQuestion: 2 + 2?\nAnswer: 2 + 2 is 4. #### 4\n\nQuestion: 3 + 3?\nAnswer:"
    )


def test_solved_examples_are_turns_of_a_chat(default):
    _, tokenizer = default
    tokenizer.chat_template = CHAT
    example = [Problem("t", "1 + 1?", "2")]
    assert question_text(tokenizer, "3 + 3?", example, EvalSettings()) == (
        "<user>1 + 1?</user><assistant>2</assistant><user>3 + 3?</user><assistant>"
    )
    plain = question_text(tokenizer, "3 + 3?", example, EvalSettings(chat_template=False))
    assert plain == "Question: 1 + 1?\nAnswer: 2\n\nQuestion: 3 + 3?\nAnswer:"


def test_examples_are_the_same_for_every_problem_and_from_the_training_side(default):
    model, tokenizer = default
    data = data_of(6)
    settings = EvalSettings(num_fewshot=3, max_new_tokens=4)
    records = solve_problems(model, tokenizer, data, depth=0, settings=settings, reporter=Silent())
    heads = {record["prompt"].rpartition("Question:")[0] for record in records}
    assert len(heads) == 1
    [head] = heads
    assert head.count("Question:") == 3
    trained = {p.question for p in data.tasks[0].examples(3)}
    assert {part.partition("\nAnswer:")[0].strip() for part in head.split("Question:")[1:]} == trained
    assert not any(problem.question in head for problem in data.problems)
    assert solve_problems(model, tokenizer, data, depth=0, settings=settings, reporter=Silent()) == records


def test_stop_strings_are_typed_as_in_a_shell():
    assert stop_strings(EvalSettings().stop) == ["\nQuestion:"]
    assert stop_strings(("\\n\\tX", "</s>")) == ["\n\tX", "</s>"]
    assert stop_strings(()) == []
    with pytest.raises(UsageError, match="--stop is empty"):
        stop_strings(("a", ""))


# -- what is recorded --------------------------------------------------------------------------------------------------


def test_every_depth_is_recorded_and_equals_a_run_at_that_depth(default):
    model, tokenizer = default
    attach_random(model, 0.03)
    data, settings = data_of(), EvalSettings(max_new_tokens=24)
    records = solve_problems(model, tokenizer, data, depth=2, settings=settings, reporter=Silent())
    assert len({tuple(record["outputs"]) for record in records if len(set(record["outputs"])) > 1}) > 1
    model.recursion.detach()
    stock = solve_problems(model, tokenizer, data, depth=0, settings=settings, reporter=Silent())
    for record, plain, problem in zip(records, stock, data.problems, strict=True):
        assert [len(record[name]) for name in ("outputs", "extracted", "strict", "correct", "score", "length")] == [
            3
        ] * 6
        assert record["outputs"][0] == plain["outputs"][0]
        assert record["extracted"][0] == plain["outputs"][0].strip()
        assert record["key"] == problem.key
        assert record["prompt"] == f"Question: {problem.question}\nAnswer:"
        assert record["answer"] == problem.answer
    assert 0 < sum(record["correct"][0] for record in records) <= len(records)


def test_a_stop_string_and_the_cap_are_told_apart(default):
    model, tokenizer = default
    data = data_of(8)
    settings = EvalSettings(max_new_tokens=24)
    for record in solve_problems(model, tokenizer, data, depth=0, settings=settings, reporter=Silent()):
        assert record["ended"] == [True]
        assert record["length"][0] < 24
    for record in solve_problems(
        model, tokenizer, data, depth=0, settings=EvalSettings(max_new_tokens=1), reporter=Silent()
    ):
        assert record["length"] == [1]


def test_a_prompt_longer_than_the_context_is_cut_on_the_left_and_said(default, monkeypatch):
    model, tokenizer = default
    data, listening = data_of(5), Silent()
    expected = solve_problems(
        model, tokenizer, data, depth=0, settings=EvalSettings(max_new_tokens=4), reporter=Silent()
    )
    monkeypatch.setattr(answers, "context_length", lambda model: 12)
    lengths = [len(tokenizer(record["prompt"])["input_ids"]) for record in expected]
    cut = solve_problems(model, tokenizer, data, depth=0, settings=EvalSettings(max_new_tokens=4), reporter=listening)
    assert len(cut) == 5
    assert listening.warnings == [
        f"{sum(n > 8 for n in lengths)} of 5 prompts were cut on the left to 8 tokens, to fit the context"
    ]
    with pytest.raises(UsageError, match="12 new tokens do not fit"):
        solve_problems(model, tokenizer, data, depth=0, settings=EvalSettings(max_new_tokens=12), reporter=Silent())


# -- going on ----------------------------------------------------------------------------------------------------------


class CutOff(Exception):
    pass


class Failing(SampleLog):
    """A log that is cut off when it is to write its n-th batch."""

    def __init__(self, path, n):
        super().__init__(path, "key")
        self.n, self.appended = n, 0

    def append(self, part, entries):
        if self.appended == self.n:
            raise CutOff
        self.appended += 1
        super().append(part, entries)


@pytest.mark.parametrize("after", [0, 1, 4, 7])
def test_answers_go_on_where_they_were_cut_off(default, tmp_path, after):
    model, tokenizer = default
    attach_random(model, 0.03)
    data, settings = data_of(), EvalSettings(max_new_tokens=6, batch_tokens=260)
    path = tmp_path / "whole.jsonl"
    with Failing(path, math.inf) as log:
        whole = solve_problems(model, tokenizer, data, depth=2, settings=settings, reporter=Silent(), log=log)
    at_depth_0 = log.appended / 3
    cut = tmp_path / "cut.jsonl"
    with pytest.raises(CutOff), Failing(cut, after) as log:
        solve_problems(model, tokenizer, data, depth=2, settings=settings, reporter=Silent(), log=log)
    assert model.recursion.depth == 2
    asked = Counter()
    plain = model.generate

    def count(*args, **options):
        asked[model.recursion.depth] += 1
        return plain(*args, **options)

    model.generate = count
    with Failing(cut, math.inf) as log:
        resumed = solve_problems(model, tokenizer, data, depth=2, settings=settings, reporter=Silent(), log=log)
    assert json.dumps(resumed) == json.dumps(whole)
    assert cut.read_bytes() == path.read_bytes()
    assert (asked[0] > 0) == (after < at_depth_0), "what was logged is not computed again"


def test_a_set_more_leaves_what_the_others_gave_and_what_they_logged(default, tmp_path):
    model, tokenizer = default
    attach_random(model, 0.03)
    settings = EvalSettings(max_new_tokens=6, batch_tokens=260)
    both = replace(data_of(), sets=(10, 14))

    def solved(data, path, **options):
        with SampleLog(path, str(data.sets), **options) as log:
            found = log.found
            records = solve_problems(model, tokenizer, data, depth=1, settings=settings, reporter=Silent(), log=log)
            log.end()
        return records, found

    whole, _ = solved(both, tmp_path / "whole.jsonl")
    first, _ = solved(replace(both, problems=both.problems[:10], sets=(10,)), tmp_path / "grown.jsonl")
    grown, found = solved(both, tmp_path / "grown.jsonl", extends=["(10,)"])
    assert found == 2 * 10
    assert json.dumps(grown) == json.dumps(whole)
    assert json.dumps(grown[:10]) == json.dumps(first)
    assert (tmp_path / "grown.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize("after", [0, 1, 2])
def test_generations_go_on_where_they_were_cut_off(default, tmp_path, after):
    model, tokenizer = default
    prompts = ["Once upon a time", "Tom", "Ann has a red ball and", "The dog", "A cat sat"]
    settings = EvalSettings(batch_tokens=110)
    path, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    with SampleLog(path, "key") as log:
        whole = continue_prompts(model, tokenizer, prompts, depth=0, settings=settings, reporter=Silent(), log=log)
    assert [record["prompt"] for record in whole] == prompts
    with pytest.raises(CutOff), Failing(cut, after) as log:
        continue_prompts(model, tokenizer, prompts, depth=0, settings=settings, reporter=Silent(), log=log)
    with SampleLog(cut, "key") as log:
        resumed = continue_prompts(model, tokenizer, prompts, depth=0, settings=settings, reporter=Silent(), log=log)
    assert json.dumps(resumed) == json.dumps(whole)
    assert cut.read_bytes() == path.read_bytes()


def test_problems_of_a_file_go_through_the_same_path(default, tmp_path):
    model, tokenizer = default
    lines = [json.dumps({"question": p.question, "answer": p.answer}) for p in data_of(6).problems]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    task = FileTask("a.jsonl:held_out=all", tmp_path)
    settings = EvalSettings(max_new_tokens=6)
    ours = solve_problems(
        model,
        tokenizer,
        EvalData(tasks=(task,), problems=tuple(task.all)),
        depth=0,
        settings=settings,
        reporter=Silent(),
    )
    generated = solve_problems(model, tokenizer, data_of(6), depth=0, settings=settings, reporter=Silent())
    for name in ("outputs", "correct", "strict"):
        assert [record[name] for record in ours] == [record[name] for record in generated]


# -- prompts -----------------------------------------------------------------------------------------------------------


def test_prompts_are_lines_or_objects(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"Once\r\n\n  Tom has\nOnce\n")
    assert read_prompts("a.txt", tmp_path) == ("Once", "  Tom has")
    (tmp_path / "a.jsonl").write_text('{"prompt": "One\\nTwo"}\n\n{"prompt": "Three", "n": 1}\n')
    assert read_prompts("a.jsonl", tmp_path) == ("One\nTwo", "Three")


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("a.txt", b"\n \n", RRError, "is empty"),
        ("a.txt", b"x\n\xff\n", RRError, "line 2: byte 0xff is not UTF-8"),
        ("a.jsonl", b'{"prompt": "x"}\n{"text": "y"}\n', RRError, "line 2: no 'prompt'"),
        ("a.jsonl", b'{"prompt": " "}\n', RRError, "line 1: no 'prompt'"),
        ("a.jsonl", b"[]\n", RRError, "line 1: no JSON object"),
        ("a.csv", b"x\n", UsageError, "unknown kind"),
        ("absent.txt", None, UsageError, "do not exist"),
    ],
)
def test_prompts_that_cannot_be_read_are_named(tmp_path, name, content, error, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message) as caught:
        read_prompts(name, tmp_path)
    assert name in caught.value.message
    assert caught.value.hint
