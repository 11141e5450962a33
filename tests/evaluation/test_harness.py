"""lm-eval's tasks on the very same model object: what they say, and that nothing is changed by asking."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

import rrcli
from families import attach_random
from made_tokenizers import chain, with_special_tokens
from rrcli.data.problem_files import FileTask
from rrcli.data.tasks import Task
from rrcli.demo import defaults
from rrcli.errors import RRError, UsageError
from rrcli.evaluation.answers import solve_problems
from rrcli.evaluation.evaluate import evaluate_model
from rrcli.evaluation.harness import HarnessTask, harness_tasks, load_tasks, run_harness, task_files
from rrcli.evaluation.held_out import EvalData
from rrcli.evaluation.samples import SampleLog
from rrcli.reporting import Silent
from rrcli.settings import EvalSettings

pytest.importorskip("lm_eval")

GENERATE = """
task: rows
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: generate_until
test_split: test
fewshot_split: test
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\nQuestion:"], max_gen_toks: 24, do_sample: false}}
filter_list:
  - {{name: strict, filter: [{{function: regex, regex_pattern: '(?s)^\\s*(.*?)\\s*$'}}, {{function: take_first}}]}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""
CHOICE = """
task: choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["{{{{answer}}}}", "none of them"]
doc_to_target: 0
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""
ROLLING = """
task: text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: bits_per_byte}}]
metadata: {{version: 1.0}}
"""
SETTINGS = EvalSettings(max_new_tokens=24, num_fewshot=-1)


def rows(count=40):
    """Yield problems that the embedded model can do, and as many that it cannot."""
    for spec in defaults.TASKS[:2]:
        for problem in Task(spec).problems(count // 2, seed=0, side="test"):
            yield problem.question, problem.answer


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"question": question, "answer": answer}) for question, answer in rows()))
    for name, text in (("generate", GENERATE), ("choice", CHOICE), ("rolling", ROLLING)):
        (tmp_path / f"{name}.yaml").write_text(text.format(file=file))
    return tmp_path


@pytest.mark.parametrize("depth", [None, 1, 2])
def test_generated_answers_and_exact_match_are_those_of_our_own_path(folder, depth):
    model, tokenizer = rrcli.load("default")
    if depth is not None:
        attach_random(model, 0.05).depth = depth
    task = FileTask("rows.jsonl:held_out=all", folder)
    data = EvalData(tasks=(task,), problems=tuple(task.all))
    ours = solve_problems(model, tokenizer, data, depth=depth or 0, settings=SETTINGS, reporter=Silent())
    metrics, samples = run_harness(model, tokenizer, load_tasks([str(folder / "generate.yaml")]), SETTINGS, Silent())
    assert [record["outputs"][-1].strip() for record in ours] == [sample["output"] for sample in samples]
    assert [float(record["strict"][-1]) for record in ours] == [sample["score"] for sample in samples]
    found = metrics["harness/rows/exact_match/strict"]
    assert found["value"] == sum(record["strict"][-1] for record in ours) / len(ours)
    assert found["low"] <= found["value"] <= found["high"]
    assert (found["n"], found["better"]) == (40, "higher")
    if depth is None:
        assert 0 < found["value"] < 1
    else:
        assert model.recursion.depth == depth


def test_of_a_models_own_settings_those_hold_that_hold_in_lm_eval(folder):
    """Penalties choose other tokens there too; what changes only how tokens are found would stop it."""
    model, tokenizer = rrcli.load("default")
    tasks, outputs = load_tasks([str(folder / "generate.yaml")]), []
    own = {"use_cache": False, "return_dict_in_generate": True, "stop_strings": ["1"], "prompt_lookup_num_tokens": 2}
    for settings in ({}, own, {"repetition_penalty": 5.0}):
        model.generation_config = GenerationConfig(**settings, eos_token_id=0, pad_token_id=0)
        outputs.append([record["output"] for record in run_harness(model, tokenizer, tasks, SETTINGS, Silent())[1]])
    plain, found, penalised = outputs
    assert found == plain
    assert penalised != plain


def test_a_request_with_a_token_that_the_model_does_not_know_is_named(folder):
    model, tokenizer = rrcli.load("default")
    tokenizer.add_tokens(["Question:"])
    with pytest.raises(RRError, match=r"lm-eval cannot run .*: the request 'Question: .* holds the token 'Question:'"):
        run_harness(model, tokenizer, load_tasks([str(folder / "generate.yaml")]), SETTINGS, Silent())


def test_the_recursion_takes_part_at_its_depth(folder):
    model, tokenizer = rrcli.load("default")
    tasks = load_tasks([str(folder / "rolling.yaml")])
    plain = run_harness(model, tokenizer, tasks, SETTINGS, Silent())[0]["harness/text/bits_per_byte"]["value"]
    attach_random(model, 0.05)
    values = []
    for depth in range(3):
        model.recursion.depth = depth
        tasks = load_tasks([str(folder / "rolling.yaml")])
        values.append(
            run_harness(model, tokenizer, tasks, SETTINGS, Silent())[0]["harness/text/bits_per_byte"]["value"]
        )
    assert values[0] == plain
    assert len(set(values)) == 3


def test_a_head_that_differs_from_the_embedding_stays(folder):
    model, tokenizer = rrcli.load("default")
    model.config.tie_word_embeddings = True
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone() * 1.5)
    before = model.lm_head.weight.clone()
    run_harness(model, tokenizer, load_tasks([str(folder / "choice.yaml")]), SETTINGS, Silent())
    assert torch.equal(model.lm_head.weight, before)
    assert "tie_weights" not in vars(model)
    model.tie_weights()
    assert not torch.equal(model.lm_head.weight, before), "without the guard the head is overwritten"


def test_results_reach_the_metrics_and_the_records(folder):
    model, tokenizer = rrcli.load("default")
    names = harness_tasks([".", "generate.yaml,choice.yaml"], folder)
    data = EvalData(harness=load_tasks(harness_tasks(["choice.yaml , generate.yaml"], folder)))
    assert len(names) == 3
    found = evaluate_model(model, tokenizer, data, settings=EvalSettings(max_samples=7))
    assert {"harness/choices/acc", "harness/rows/exact_match/strict"} <= found["metrics"].keys()
    assert found["metrics"]["harness/choices/acc"]["n"] == 7
    records = found["records"]["harness"]
    assert {record["task"] for record in records} == {"choices", "rows"}
    assert all(record["score"] in (0.0, 1.0) for record in records)
    assert len({(record["task"], record["metric"], record["key"]) for record in records}) == len(records) == 14


def test_a_folder_stands_for_all_of_its_tasks(folder):
    assert sorted(task.name for task in load_tasks(harness_tasks(["."], folder))) == ["choices", "rows", "text"]
    assert {file.name for file in task_files(["generate.yaml"], folder)} == {"generate.yaml"}
    assert {"choice.yaml", "rows.jsonl"} <= {file.name for file in task_files(["."], folder)}
    assert task_files(["gsm8k"], folder) == []


def test_solved_examples_are_put_in_front(folder):
    model, tokenizer = rrcli.load("default")
    prompts = []
    for shots in (-1, 2):
        [task] = load_tasks([str(folder / "generate.yaml")])
        run_harness(model, tokenizer, [task], EvalSettings(num_fewshot=shots, max_samples=3), Silent())
        prompts.append(task.loaded["tasks"]["rows"].instances[0].args[0])
    assert prompts[0].count("Question:") == 1
    assert prompts[1].count("Question:") == 3


def test_an_interrupted_run_goes_on_after_its_complete_tasks(folder, tmp_path, monkeypatch):
    model, tokenizer = rrcli.load("default")
    names = harness_tasks(["choice.yaml,generate.yaml"], folder)
    settings = EvalSettings(max_samples=5)
    whole = run_harness(model, tokenizer, load_tasks(names), settings, Silent())
    with SampleLog(tmp_path / "log.jsonl", "key") as log:
        run_harness(model, tokenizer, load_tasks(names)[:1], settings, Silent(), log=log)
    asked = []
    plain = model.generate
    monkeypatch.setattr(model, "generate", lambda *a, **o: asked.append(1) or plain(*a, **o))
    with SampleLog(tmp_path / "log.jsonl", "key") as log:
        assert run_harness(model, tokenizer, load_tasks(names), settings, Silent(), log=log) == whole
        assert [entry["name"] for entry in log.done("harness", lambda *_: True)] == [names[0]]
    assert asked


def test_out_of_memory_halves_the_batch(folder, monkeypatch):
    model, tokenizer = rrcli.load("default")
    plain, sizes, reporter = model.generate, [], Silent()

    def small(*args, **options):
        sizes.append(len(options["input_ids"]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("no memory in this test")
        return plain(*args, **options)

    settings = EvalSettings(max_samples=8)
    expected = run_harness(model, tokenizer, load_tasks([str(folder / "generate.yaml")]), settings, Silent())
    monkeypatch.setattr(model, "generate", small)
    found = run_harness(model, tokenizer, load_tasks([str(folder / "generate.yaml")]), settings, reporter)
    assert found == expected
    assert sizes == [8, 4, 2, 2, 2, 2]
    assert "batches of 2" in reporter.warnings[-1]


def test_a_tokenizer_that_closes_prompts_is_warned_of():
    tokenizer = with_special_tokens("[CLS]", "[SEP]", around=("[CLS]", "[SEP]"), bos_token="[CLS]", eos_token="[SEP]")
    closing, other = Silent(), Silent()
    run_harness(chain([], len(tokenizer)), tokenizer, (), EvalSettings(), closing)
    run_harness(*rrcli.load("default"), (), EvalSettings(), other)
    assert "puts an end token after every text" in closing.warnings[0]
    assert not other.warnings


# -- what cannot be had ------------------------------------------------------------------------------------------------


def test_an_unknown_task_is_a_usage_error_with_a_suggestion():
    with pytest.raises(UsageError, match="no task 'gsm8kk'") as caught:
        load_tasks(["gsm8kk"])
    assert caught.value.hint == "Did you mean 'gsm8k'?"


@pytest.mark.parametrize(
    ("name", "message"),
    [("nothere.yaml", "nothere.yaml does not exist"), ("a,,b", "empty name"), ("sub/folder", "does not exist")],
)
def test_a_name_that_means_nothing_is_a_usage_error(tmp_path, name, message):
    with pytest.raises(UsageError, match=message):
        harness_tasks([name], tmp_path)


def test_a_folder_without_tasks_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="holds no task"):
        load_tasks([str(tmp_path)])


def test_data_that_cannot_be_reached_is_named_with_its_task(folder):
    (folder / "remote.yaml").write_text(GENERATE.format(file="/not/there.jsonl").replace("task: rows", "task: gone"))
    with pytest.raises(RRError, match=r"remote\.yaml' cannot be loaded: .*not/there") as caught:
        load_tasks([str(folder / "remote.yaml")])
    assert "HF_HUB_OFFLINE" in caught.value.hint
    (folder / "broken.yaml").write_text("task: [")
    with pytest.raises(RRError, match=r"broken\.yaml' cannot be loaded"):
        load_tasks([str(folder / "broken.yaml")])


def test_what_lm_eval_refuses_is_told_in_its_words(folder):
    model, tokenizer = rrcli.load("default")
    text = GENERATE.format(file=folder / "rows.jsonl").replace("max_gen_toks: 24", "max_gen_toks: 99999")
    (folder / "long.yaml").write_text(text)
    with pytest.raises(RRError, match=r"lm-eval cannot run .*max"):
        run_harness(model, tokenizer, load_tasks([str(folder / "long.yaml")]), SETTINGS, Silent())


def test_without_lm_eval_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(UsageError) as caught:
        load_tasks(["gsm8k"])
    assert caught.value.hint == "pip install 'rrcli[harness]'"
    assert load_tasks([]) == ()


def test_a_loaded_task_is_named_as_it_was_asked_for(folder):
    [task] = load_tasks([str(folder / "choice.yaml")])
    assert isinstance(task, HarnessTask)
    assert task.name == str(folder / "choice.yaml")
