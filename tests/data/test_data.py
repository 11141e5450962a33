"""Both sides of the split: what is evaluated, and training batches that follow from seed and step alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import median_low
from typing import Any

import pytest

from rrcli.data.batching import collate
from rrcli.data.rendering import encode_prompt
from rrcli.data.splits import side_of
from rrcli.data.tasks import Task, prompt_of
from rrcli.data.training_data import TRAINING_SEEDS, TrainingData, source_fingerprint, task_specs, training_seed
from rrcli.demo import defaults
from rrcli.errors import RRError, UsageError
from rrcli.evaluation.held_out import held_out_data
from rrcli.recursion.batch import IGNORED, Batch
from rrcli.settings import CommonSettings, EvalSettings, TrainSettings


def write(file: Path, content: str | bytes) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def jsonl(*texts: str) -> str:
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)


def test_the_fingerprint_of_a_source_follows_its_bytes_and_tasks(tmp_path: Path) -> None:
    file = write(tmp_path / "data.txt", "one")
    settings = CommonSettings(data="data.txt")
    seen = {source_fingerprint(settings, tmp_path)}
    assert {source_fingerprint(replace(settings, seed=5), tmp_path)} == seen
    seen.add(source_fingerprint(replace(settings, task=("gcd",)), tmp_path))
    write(file, "onf")
    seen.add(source_fingerprint(settings, tmp_path))
    assert len(seen) == 3


# -- the evaluation side -----------------------------------------------------------------------------------------------

TEXTS = [f"This is story number {i}. It is about {i * 7} birds." for i in range(200)]


@pytest.fixture
def stories(tmp_path: Path) -> Path:
    write(tmp_path / "stories.jsonl", jsonl(*TEXTS))
    return tmp_path


def test_evaluation_takes_exactly_what_is_held_out(stories: Path) -> None:
    data = held_out_data(EvalSettings(data="stories.jsonl", task=("gcd",)), stories, problems_per_task=7)
    assert list(data.documents) == [text for text in TEXTS if side_of(text) == "test"]
    assert [task.name for task in data.tasks] == ["gcd"]
    assert len(data.problems) == 7
    assert all(side_of(problem.question) == "test" for problem in data.problems)
    assert data.prompts


def test_evaluation_takes_the_same_sample_of_documents_for_every_seed(stories: Path) -> None:
    def sample(seed: int, count: int) -> tuple[str, ...]:
        settings = EvalSettings(data="stories.jsonl", seed=seed)
        return held_out_data(settings, stories, 1, count, reasoning=False).documents

    assert sample(0, 5) == sample(0, 5) == sample(1, 5)
    assert len(set(sample(0, 5))) == 5
    assert sample(0, 1000) == sample(1, 0)
    data = held_out_data(EvalSettings(data="stories.jsonl"), stories, 1, 5, reasoning=False)
    assert (len(data.documents), data.held_out) == (5, len(sample(0, 0)))


def test_without_reasoning_no_problem_is_made(stories: Path) -> None:
    data = held_out_data(EvalSettings(data="stories.jsonl"), stories, 5, reasoning=False)
    assert (data.tasks, data.problems) == ((), ())


def test_validation_does_without_what_a_small_source_lacks(tmp_path: Path) -> None:
    """It may even be empty, which is for the caller to judge."""
    write(tmp_path / "data.jsonl", jsonl(*[text for text in TEXTS if side_of(text) != "validation"]))
    settings = EvalSettings(data="data.jsonl", task=("chain_sum",))
    data = held_out_data(settings, tmp_path, 9, side="validation")
    assert (data.documents, len(data.problems)) == ((), 9)
    assert {side_of(problem.question) for problem in data.problems} == {"validation"}
    assert data.notice == "nothing to validate with in: data.jsonl"
    assert not data.empty
    assert held_out_data(settings, tmp_path, 9, side="validation", reasoning=False).empty
    write(tmp_path / "data.jsonl", jsonl(*TEXTS))
    data = held_out_data(settings, tmp_path, 9, side="validation")
    assert list(data.documents) == [text for text in TEXTS if side_of(text) == "validation"]
    write(tmp_path / "p.jsonl", '{"question": "q", "answer": "1"}\n')
    whole = EvalSettings(data="data.jsonl", task=("p.jsonl:held_out=all",))
    assert (
        held_out_data(whole, tmp_path, 9, side="validation").notice
        == "nothing to validate with in: p.jsonl:held_out=all"
    )


def test_nothing_held_out_is_told(tmp_path: Path) -> None:
    write(tmp_path / "data.txt", next(text for text in TEXTS if side_of(text) == "train"))
    with pytest.raises(RRError, match="is on the test side"):
        held_out_data(EvalSettings(data="data.txt"), tmp_path, 1)


def test_the_embedded_tasks_are_used_where_none_is_named() -> None:
    assert task_specs(CommonSettings()) == defaults.TASKS
    assert task_specs(CommonSettings(task=("gcd",))) == ("gcd",)


def test_what_is_left_out_is_told(stories: Path) -> None:
    settings = EvalSettings(data="stories.jsonl")
    assert held_out_data(settings, stories, 1, reasoning=False).notice == ""
    write(stories / "stories.jsonl", jsonl(*TEXTS, "", *TEXTS[:3]))
    notice = held_out_data(settings, stories, 1, reasoning=False).notice
    assert notice == "stories.jsonl: 1 empty and 3 repeated documents were left out"


# -- the training side -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    transformers = pytest.importorskip("transformers")
    if not (defaults.MODEL_DIR / "tokenizer.json").exists():
        pytest.skip("the embedded tokenizer is not there")
    return transformers.AutoTokenizer.from_pretrained(defaults.MODEL_DIR)


def training(directory: Path, tokenizer: Any, **changes: Any) -> TrainingData:
    chosen = {"data": "stories.jsonl", "task": ("chain_sum:max_digits=1",), "max_length": 96} | changes
    return TrainingData(TrainSettings(**chosen), directory, tokenizer)


def rows(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """Return (ids, labels) of each example without its padding."""
    lengths = batch.attention_mask.sum(1).tolist()
    ids, labels = batch.input_ids.tolist(), batch.labels.tolist()
    return [(i[:n], t[:n]) for i, t, n in zip(ids, labels, lengths, strict=True)]


def test_a_batch_follows_from_seed_and_step_alone(stories: Path, tokenizer: Any) -> None:
    first, second = training(stories, tokenizer), training(stories, tokenizer)
    straight = [first.batch(step) for step in range(4)]
    for step in (3, 0, 2, 1):
        again = second.batch(step)
        for name in ("input_ids", "attention_mask", "labels"):
            assert getattr(again, name).equal(getattr(straight[step], name))
    assert rows(first.batch(0)) != rows(first.batch(1))
    for share in (0.0, 1.0):
        drawn = [training(stories, tokenizer, task_share=share, seed=seed).batch(0) for seed in (0, 1)]
        assert rows(drawn[0]) != rows(drawn[1])


def test_what_a_run_cannot_see_does_not_change_its_batches(stories: Path, tokenizer: Any) -> None:
    """Vanilla and recursive runs differ in these options; their tokens must not."""
    plain = training(stories, tokenizer).batch(5)
    other = training(stories, tokenizer, lr=1.0, max_steps=3, phase="a", run_name="x", gradient_accumulation=4).batch(5)
    assert rows(plain) == rows(other)


def test_a_problem_has_its_prompt_masked_and_its_answer_as_labels(stories: Path, tokenizer: Any) -> None:
    data = training(stories, tokenizer, task_share=1.0)
    task = Task("chain_sum:max_digits=1")
    questions = {}
    for step in range(3):
        for ids, labels in rows(data.batch(step)):
            text = tokenizer.decode(ids, skip_special_tokens=True)
            question, _, answer = text.removeprefix("Question: ").partition("\nAnswer: ")
            prompt = encode_prompt(tokenizer, prompt_of(question))
            assert ids[: len(prompt)] == prompt
            assert labels[: len(prompt) - 1] == [IGNORED] * (len(prompt) - 1)
            assert labels[len(prompt) - 1 : -1] == ids[len(prompt) :]
            assert labels[-1] == IGNORED
            assert ids[-1] == tokenizer.eos_token_id
            assert side_of(question) == "train"
            questions[question] = answer
    assert len(questions) > 20
    known = {p.question: p for p in task.stream(0, limit=64 * 400, side="train")}
    scored = [task.score(answer, known[question]) for question, answer in questions.items() if question in known]
    assert scored
    assert set(scored) == {1.0}


def test_a_document_has_its_own_tokens_shifted_as_labels(stories: Path, tokenizer: Any) -> None:
    data = training(stories, tokenizer, task_share=0.0)
    assert data.tasks == []
    for step in range(3):
        batch = data.batch(step)
        assert batch.tokens == sum(len(ids) - 1 for ids, _ in rows(batch))
        for ids, labels in rows(batch):
            assert labels == [*ids[1:], IGNORED]
            text = tokenizer.decode(ids, skip_special_tokens=True)
            assert text in TEXTS
            assert side_of(text) == "train"


@pytest.mark.parametrize(("share", "problems"), [(0.0, 0), (1.0, 100), (0.3, 30), (0.75, 75)])
def test_task_share_is_kept_exactly_and_evenly(stories: Path, tokenizer: Any, share: float, problems: int) -> None:
    data = training(stories, tokenizer, task_share=share)
    texts = [tokenizer.decode(data.example(number)[0], skip_special_tokens=True) for number in range(100)]
    asked = [text.startswith("Question: ") for text in texts]
    assert sum(asked) == problems
    assert abs(sum(asked[:50]) - problems / 2) <= 1


def test_an_epoch_shows_every_document_once_and_the_next_in_another_order(stories: Path, tokenizer: Any) -> None:
    data = training(stories, tokenizer, task_share=0.5)
    shown = [tokenizer.decode(data.example(2 * n)[0], skip_special_tokens=True) for n in range(2 * len(data.documents))]
    first, second = shown[: len(data.documents)], shown[len(data.documents) :]
    assert sorted(first) == sorted(second) == sorted(text for text in TEXTS if side_of(text) == "train")
    assert first != second


# -- training and evaluation never meet --------------------------------------------------------------------------------


def test_a_problem_of_the_evaluation_that_turns_up_in_training_stops_it(
    stories: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The split already keeps them apart: break it, as a fault of a task would."""
    data = training(stories, tokenizer, task_share=1.0)
    held_out = Task("chain_sum:max_digits=1").problems(1, seed=0, side="test")
    monkeypatch.setattr(Task, "stream", lambda *_, **__: iter(held_out))
    with pytest.raises(RRError, match="kept for evaluation turned up in training"):
        data.batch(0)


def test_the_seeds_of_training_and_evaluation_are_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    assert min(training_seed(seed, number) for seed in (0, 7, 2**29) for number in (0, 10**6)) >= TRAINING_SEEDS
    assert len({training_seed(0, number) for number in range(1000)}) == 1000
    task, asked = Task("chain_sum:max_digits=1"), list[int]()
    real = task._create
    monkeypatch.setattr(task, "_create", lambda seed, size: asked.append(seed + size) or real(seed, size))
    for seed in (0, 15, 16, 2**30, 2**40 + 1):
        task.problems(5, seed, side="test")
    assert max(asked) <= TRAINING_SEEDS
    with pytest.raises(UsageError, match="too many"):
        task.problems(TRAINING_SEEDS, 0, side="test")


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_conversation_that_asks_a_problem_of_the_test_set_is_left_out(
    tmp_path: Path, tokenizer: Any, share: float
) -> None:
    asked = [f"How many are {n} and {n}?" for n in range(60)]
    write(tmp_path / "test.jsonl", "".join(json.dumps({"question": q, "answer": "1"}) + "\n" for q in asked[:30]))
    pairs = [{"prompt": q, "completion": " many"} for q in asked]
    write(tmp_path / "data.jsonl", "".join(json.dumps(pair) + "\n" for pair in pairs))
    specs = ("test.jsonl:held_out=all", "chain_sum")
    data = training(tmp_path, tokenizer, data="data.jsonl", task=specs, task_share=share)
    assert [d["prompt"] for d in data.documents] == [q for q in asked[30:] if side_of(q) == "train"]


def test_only_problems_need_no_training_document(tmp_path: Path, tokenizer: Any) -> None:
    write(tmp_path / "stories.jsonl", jsonl(*[text for text in TEXTS if side_of(text) == "test"]))
    assert training(tmp_path, tokenizer, task_share=1.0).batch(0).tokens > 0
    with pytest.raises(RRError, match=r"no document of .* is on the training side"):
        training(tmp_path, tokenizer, task_share=0.5)


def test_long_examples_are_cut_and_counted(stories: Path, tokenizer: Any) -> None:
    data = training(stories, tokenizer, task_share=0.0, max_length=8)
    batch = data.batch(0)
    assert batch.input_ids.shape == (8, 8)
    assert data.warning() == "8 of 8 examples were longer than 8 tokens and were cut"
    assert all(labels == [*ids[1:], IGNORED] for ids, labels in rows(batch))
    assert tokenizer.eos_token_id not in [ids[-1] for ids, _ in rows(batch)]


def test_an_example_with_nothing_to_learn_is_never_in_a_batch(stories: Path, tokenizer: Any) -> None:
    task = "chain_sum:min_terms=2,max_terms=4,min_digits=1,max_digits=3"
    problems = Task(task).problems(40, seed=0, side="train")
    # About half of the prompts leave no room for an answer.
    length = median_low(len(encode_prompt(tokenizer, prompt_of(problem.question))) for problem in problems)
    data = training(stories, tokenizer, task=(task,), task_share=1.0, max_length=length, batch_size=1)
    assert all(data.batch(step).tokens > 0 for step in range(40))
    assert data.skipped > 0
    assert "more had nothing to learn within it and were left out" in data.warning()
    again = training(stories, tokenizer, task=(task,), task_share=1.0, max_length=length, batch_size=1)
    assert rows(again.batch(30)) == rows(data.batch(30))


def test_nothing_to_learn_at_all_is_an_error(stories: Path, tokenizer: Any) -> None:
    with pytest.raises(RRError, match="leave nothing to learn in 8 tokens") as error:
        training(stories, tokenizer, task_share=1.0, max_length=8).batch(0)
    assert "--max-length" in error.value.hint


def test_a_task_without_text_answers_is_refused(stories: Path, tokenizer: Any) -> None:
    with pytest.raises(RRError, match="graph_color"):
        training(stories, tokenizer, task=("graph_color",), task_share=1.0).batch(0)


def test_collate_pads_on_the_right() -> None:
    batch = collate([([1, 2, 3], [2, 3, IGNORED]), ([4], [IGNORED])], pad=9)
    assert batch.input_ids.tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.labels.tolist() == [[2, 3, IGNORED], [IGNORED] * 3]
    assert batch.tokens == 2


def test_batches_do_not_depend_on_where_texts_are(
    stories: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = rows(training(stories, tokenizer, task_share=0.0).batch(3))
    monkeypatch.setattr("rrcli.data.document_store.MEMORY_BYTES", 100)
    assert rows(training(stories, tokenizer, task_share=0.0).batch(3)) == inside


def test_seeds_that_would_share_problems_are_refused(tmp_path: Path, stories: Path) -> None:
    """One seed alone is told whose problems it has; an experiment of several would count them twice."""
    task = "chain_sum:min_terms=2,max_terms=2,min_digits=1,max_digits=1"
    settings = EvalSettings(data="stories.jsonl", task=(task,), seed=15)
    assert "seed 15 has those of seed " in held_out_data(settings, stories, 5).notice
    with pytest.raises(UsageError, match="too few test problems for 5 of every seed's own: seed") as caught:
        held_out_data(settings, stories, 5, seeds=tuple(range(16)))
    assert "fewer seeds" in caught.value.hint
    data = held_out_data(settings, stories, 5, seeds=(0, 1))
    assert len({problem.key for problem in data.problems}) == 10
