"""Problems from files: what is read, what is refused by file and line, and which side of the split it is on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import rrcli
from rrcli.data.problem_files import FileTask, open_task, trained_questions
from rrcli.data.splits import side_of
from rrcli.data.tasks import Problem, Task
from rrcli.data.training_data import TrainingData
from rrcli.errors import RRError, UsageError
from rrcli.evaluation.held_out import held_out_data
from rrcli.evaluation.judging import Judgement, judge
from rrcli.evaluation.metrics import task_labels
from rrcli.settings import EvalSettings, TrainSettings


def write(path: Path, count: int = 200, start: int = 0) -> Path:
    lines = [{"question": f"What is {i} + {i}?", "answer": 2 * i} for i in range(start, start + count)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


# -- reading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "expected", "solution"),
    [
        (42, "42", ""),
        (-0.5, "-0.5", ""),
        (1e22, "10000000000000000000000", ""),
        (" Paris ", "Paris", ""),
        ("1,000", "1,000", ""),
        ("He has 3 + 4 = <<3+4=7>>7.\n#### 7", "7", "He has 3 + 4 = <<3+4=7>>7.\n#### 7"),
    ],
)
def test_answers_are_numbers_or_texts(tmp_path, answer, expected, solution):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"question": " q\u2028 ", "answer": answer, "more": [1]}) + "\r\n\n")
    [problem] = FileTask("a.jsonl", tmp_path).all
    assert (problem.question, problem.answer, problem.solution) == ("q", expected, solution)
    assert problem.target == (solution or expected)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"[1, 2]", "line 3: no JSON object"),
        (b'"text"', "line 3: no JSON object"),
        (b'{"question": "q"', "line 3: no JSON "),
        (b'{"answer": "a"}', "line 3: no 'question'"),
        (b'{"question": 3, "answer": "a"}', "line 3: no 'question'"),
        (b'{"question": "  ", "answer": "a"}', "line 3: no 'question'"),
        (b'{"question": "q"}', "line 3: no 'answer'"),
        (b'{"question": "q", "answer": null}', "line 3: no 'answer'"),
        (b'{"question": "q", "answer": true}', "line 3: no 'answer'"),
        (b'{"question": "q", "answer": NaN}', "line 3: no 'answer'"),
        (b'{"question": "q", "answer": ["a"]}', "line 3: no 'answer'"),
        (b'{"question": "q", "answer": " "}', "line 3: no 'answer'"),
        (b'{"question": "q", "answer": "so ####"}', "line 3: no answer after '####'"),
        (b'{"question": "\xff", "answer": 1}', "line 3: byte 0xff is not UTF-8"),
    ],
)
def test_a_line_that_is_no_problem_is_named(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"question": "q", "answer": 1}\n\n' + line + b'\n{"question": "r", "answer": 1}\n')
    with pytest.raises(RRError, match=message) as caught:
        FileTask("a.jsonl", tmp_path)
    assert str(path) in caught.value.message
    assert caught.value.hint


def test_an_empty_file_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n \n")
    with pytest.raises(RRError, match=r"a\.jsonl is empty"):
        FileTask("a.jsonl", tmp_path)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("absent.jsonl", r"absent\.jsonl does not exist"),
        ("a.jsonl:held_out=some", "held_out is 'some'"),
        ("a.jsonl:heldout=all", "has no option 'heldout'"),
        ("a.jsonl:examples=absent.jsonl", r"absent\.jsonl does not exist"),
        ("a.jsonl:held_out", "has no value"),
    ],
)
def test_a_task_that_means_nothing_is_a_usage_error(tmp_path, spec, message):
    write(tmp_path / "a.jsonl")
    with pytest.raises(UsageError, match=message):
        open_task(spec, tmp_path)


def test_a_question_that_repeats_is_one_problem(tmp_path):
    lines = [json.dumps({"question": q, "answer": n}) for n, q in enumerate(["q", "r", " q", "q"])]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    task = FileTask("a.jsonl", tmp_path)
    assert [(problem.question, problem.answer) for problem in task.all] == [("q", "0"), ("r", "1")]
    assert task.repeated == 2
    settings = EvalSettings(task=("a.jsonl:held_out=all",))
    data = held_out_data(settings, tmp_path, 9)
    assert len(data.problems) == 2
    assert data.notice == "a.jsonl:held_out=all: 2 repeated questions were left out"


def test_names_of_files_are_shown_without_their_folders():
    assert task_labels(["data/a.jsonl:held_out=all", "chain_sum:x=1"]) == {
        "data/a.jsonl:held_out=all": "a.jsonl",
        "chain_sum:x=1": "chain_sum",
    }


# -- the split ---------------------------------------------------------------------------------------------------------


def test_a_file_is_split_like_everything_else(tmp_path):
    write(tmp_path / "a.jsonl")
    task = FileTask("a.jsonl", tmp_path)
    evaluated, trained = task.on("test"), task.on("train")
    assert len(evaluated) + len(task.on("validation")) + len(trained) == 200
    for side in ("train", "validation", "test"):
        assert {side_of(problem.question) for problem in task.on(side)} == {side}
    assert 5 < len(evaluated) < 60
    assert {p.question for p in task.stream(0, 3000, side="train")} == {p.question for p in trained}
    assert task.problems(1000, 0, side="test") == task.problems(1000, 0, side="test")
    assert task.problems(1000, 0, side="test")[:4] == task.problems(4, 0, side="test")
    assert {p.key for p in task.problems(1000, 1, side="test")} == {p.key for p in evaluated}
    assert task.problems(4, 1, side="test") == task.problems(4, 0, side="test"), "every seed has the same problems"
    assert not {p.key for p in task.examples(20)} & {p.key for p in evaluated}


def test_a_test_set_is_evaluated_whole_and_never_trained_on(tmp_path):
    write(tmp_path / "train.jsonl")
    write(tmp_path / "test.jsonl", 60, start=100)  # 60 questions of train.jsonl stand in it too
    specs = ("train.jsonl", "test.jsonl:held_out=all")
    data = held_out_data(EvalSettings(task=specs), tmp_path, 1000)
    tested = {p.question for p in data.problems if p.task == specs[1]}
    assert len(tested) == 60

    tokenizer = rrcli.load("default")[1]
    settings = TrainSettings(task=specs, task_share=1.0, batch_size=100, max_length=64)
    training = TrainingData(settings, tmp_path, tokenizer)
    seen = {
        tokenizer.decode(row[mask.bool()]).partition("\n")[0].removeprefix("Question: ")
        for step in range(12)
        for batch in [training.batch(step)]
        for row, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
    }
    everything = {p.question for p in FileTask("train.jsonl", tmp_path).all}
    expected = {question for question in everything - tested if side_of(question) == "train"}
    assert {question.removeprefix(tokenizer.bos_token or "") for question in seen} == expected
    trained = trained_questions(specs, tmp_path)
    assert {question for question in everything if question in trained} == expected


def test_training_on_test_sets_alone_is_refused(tmp_path):
    write(tmp_path / "test.jsonl")
    tokenizer = rrcli.load("default")[1]
    settings = TrainSettings(task=("test.jsonl:held_out=all",))
    with pytest.raises(UsageError, match="no problem to train on") as caught:
        TrainingData(settings, tmp_path, tokenizer)
    assert "--task-share 0" in caught.value.hint


def test_training_shows_the_solution_where_there_is_one(tmp_path):
    lines = [json.dumps({"question": f"q{i}", "answer": f"It is {i}. #### {i}"}) for i in range(60)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    tokenizer = rrcli.load("default")[1]
    settings = TrainSettings(task=("a.jsonl",), task_share=1.0, batch_size=4, max_length=64)
    batch = TrainingData(settings, tmp_path, tokenizer).batch(0)
    assert all("It is" in tokenizer.decode(row) for row in batch.input_ids)


def test_solved_examples_of_a_test_set_come_from_another_file(tmp_path):
    write(tmp_path / "train.jsonl", 50)
    write(tmp_path / "test.jsonl", 40, start=20)
    task = FileTask("test.jsonl:held_out=all,examples=train.jsonl", tmp_path)
    tested = {p.question for p in task.all}
    examples = task.examples(20)
    assert len(examples) == 20
    assert not {p.question for p in examples} & tested
    assert examples == task.examples(20)
    with pytest.raises(UsageError, match=r"--num-fewshot is 21, but .* has 20 solved examples"):
        task.examples(21)
    with pytest.raises(UsageError, match=r"none of the 40 problems .* training side") as caught:
        FileTask("test.jsonl:held_out=all", tmp_path).examples(1)
    assert "examples=" in caught.value.hint


def test_a_file_without_held_out_problems_says_how_to_evaluate_it(tmp_path):
    trained = [i for i in range(99) if side_of(f"What is {i} + {i}?") == "train"][:3]
    lines = [json.dumps({"question": f"What is {i} + {i}?", "answer": i}) for i in trained]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(UsageError, match=r"none of the 3 problems .* test side") as caught:
        FileTask("a.jsonl", tmp_path).problems(5, 0, side="test")
    assert "a.jsonl:held_out=all" in caught.value.hint


# -- judging -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "output", "verdict"),
    [
        ("7", " 7", Judgement("7", True, True, 1.0)),
        ("7", "7.0", Judgement("7.0", True, True, 1.0)),
        ("1,000", "1000", Judgement("1000", True, True, 1.0)),
        ("7", "3 + 4 = 7\n#### 7", Judgement("7", True, True, 1.0)),
        ("7", "so <answer>7</answer> or 8", Judgement("7", True, True, 1.0)),
        ("7", "There are 3 and 4, that is 7.", Judgement("7", False, True, 1.0)),
        ("1000", "It is $1,000.", Judgement("$1,000", False, True, 1.0)),
        ("4", "10-4", Judgement("10-4", False, False, 0.0)),
        ("-4", "It is -4", Judgement("-4", False, True, 1.0)),
        ("7", "7 or 8", Judgement("7 or 8", False, False, 0.0)),
        ("7", "", Judgement("", False, False, 0.0)),
        ("Paris", " paris.", Judgement("paris.", True, True, 1.0)),
        ("Paris", "It is Paris", Judgement("It is Paris", False, False, 0.0)),
        ("New  York", "new york", Judgement("new york", True, True, 1.0)),
    ],
)
def test_answers_of_files_are_judged(tmp_path, answer, output, verdict):
    write(tmp_path / "a.jsonl")
    assert judge(FileTask("a.jsonl", tmp_path), Problem("a.jsonl", "q", answer), output) == verdict


def test_answers_of_generators_are_judged_by_their_own_scorer():
    task = Task("chain_sum:min_terms=2,max_terms=2,min_digits=1,max_digits=1")
    [problem] = task.problems(1, 0, side="test")
    right, wrong = problem.answer, int(problem.answer) + 1
    for output, expected in (
        (f" {right}", (True, True)),
        (f"The answer is {right}.", (False, True)),
        (f"<answer>{right}</answer>", (True, True)),
        (f" {wrong}", (False, False)),
        ("", (False, False)),
    ):
        verdict = judge(task, problem, output)
        assert (verdict.strict, verdict.correct) == expected
