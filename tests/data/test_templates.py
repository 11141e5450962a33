"""Conversations through templates in the forms of well-known families: the tokens and masks are transformers' own.

Each template has marks around what the assistant says, with which `return_assistant_tokens_mask` tells what is learned.
The same template without marks has to give the same, and so has one with them.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from transformers import AutoTokenizer

from rrcli.data.rendering import example_of
from rrcli.data.sources import read_documents
from rrcli.demo import defaults
from rrcli.errors import RRError
from rrcli.settings import TrainSettings

# ChatML, as Qwen's and SmolLM's: tools in the system turn, calls and their results in tags.
CHATML = """
{%- if tools or messages[0].role == 'system' %}{{- '<|im_start|>system\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content }}{%- endif %}
{%- if tools %}{{- '\n# Tools' }}{%- for tool in tools %}{{- '\n' + (tool | tojson) }}{%- endfor %}{%- endif %}
{{- '<|im_end|>\n' }}{%- endif %}
{%- for m in messages %}
{%- if m.role == 'user' %}{{- '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}
{%- elif m.role == 'tool' %}{{- '<|im_start|>user\n<result>' + m.content + '</result><|im_end|>\n' }}
{%- elif m.role == 'assistant' %}{{- '<|im_start|>assistant\n' }}{%- generation %}{{- m.content }}
{%- for call in m.tool_calls or [] %}{{- '<call>' + call.function.name }}
{%- for key, value in call.function.arguments.items() %}{{- ' ' + key + '=' + value | string }}{%- endfor %}
{{- '</call>' }}{%- endfor %}{{- '<|im_end|>\n' }}{%- endgeneration %}{%- endif %}
{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
# As Llama 3's: a start token, headers, every content without white space around it.
HEADERS = """{{- bos_token }}{%- for m in messages %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}
{%- if m.role == 'assistant' %}{%- generation %}{{- m.content | trim + '<|eot_id|>' }}{%- endgeneration %}
{%- else %}{{- m.content | trim + '<|eot_id|>' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"""
# As Gemma's: no system role, and the assistant is called model.
NO_SYSTEM = """{{- bos_token }}{%- if messages[0].role == 'system' %}{{- raise_exception('System role not supported') }}
{%- endif %}{%- for m in messages %}
{%- if m.role == 'assistant' %}{{- '<|im_start|>model\n' }}{%- generation %}{{- m.content | trim + '<|im_end|>\n' }}
{%- endgeneration %}{%- else %}{{- '<|im_start|>user\n' + m.content | trim + '<|im_end|>\n' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>model\n' }}{%- endif %}"""
TEMPLATES = {"chatml": CHATML, "headers": HEADERS, "no system": NO_SYSTEM}
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]

SYSTEM, ASK, SAY = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How are you, Tom?"},
    {"role": "assistant", "content": "I am very happy today."},
)
AGAIN, LATER = {"role": "user", "content": "And now?"}, {"role": "assistant", "content": "Better.\nMuch better!"}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


FOUND = {"role": "tool", "content": "a tree"}
TOOLS = [{"type": "function", "function": {"name": "find", "description": "Find it."}}]
TALKS = {
    "one turn": [ASK, SAY],
    "several turns": [ASK, SAY, AGAIN, LATER],
    "the user has the last word": [ASK, SAY, AGAIN],
    "a system prompt": [SYSTEM, ASK, SAY, AGAIN, LATER],
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    found = AutoTokenizer.from_pretrained(defaults.MODEL_DIR)
    found.add_special_tokens({"additional_special_tokens": SPECIAL})
    return found


def unmarked(template: str) -> str:
    return re.sub(r"\{%- (end)?generation %\}", "", template)


def expected(tokenizer: Any, messages: list[Any], tools: Any = None) -> tuple[list[int], list[bool]]:
    """Return what transformers itself gives for the marked template."""
    found = tokenizer.apply_chat_template(
        messages, tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return list(found["input_ids"]), [bool(own) for own in found["assistant_masks"]]


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_tokens_and_masks_are_those_of_transformers(tokenizer: Any, name: str, talk: str) -> None:
    messages = TALKS[talk]
    if name == "no system" and messages[0]["role"] == "system":
        pytest.skip("refused; see below")
    tokenizer.chat_template = TEMPLATES[name]
    ids, learned = expected(tokenizer, messages)
    assert sum(learned) > 3
    assert example_of(tokenizer, {"messages": messages}, TrainSettings()) == (ids, learned)
    tokenizer.chat_template = unmarked(TEMPLATES[name])
    end = len(ids) - learned[::-1].index(True)  # nothing is learned of what follows
    assert example_of(tokenizer, {"messages": messages}, TrainSettings()) == (ids[:end], learned[:end])


def test_calls_and_tools_are_those_of_transformers(tokenizer: Any) -> None:
    messages = [SYSTEM, ASK, call("find", what="cat"), FOUND, SAY, AGAIN, call("find", what="dog"), FOUND, LATER]
    tokenizer.chat_template = CHATML
    ids, learned = expected(tokenizer, messages, TOOLS)
    taught = tokenizer.decode([token for token, own in zip(ids, learned, strict=True) if own])
    assert taught.count("<call>find what=") == 2
    assert "a tree" not in taught
    for template in (CHATML, unmarked(CHATML)):
        tokenizer.chat_template = template
        assert example_of(tokenizer, {"messages": messages, "tools": TOOLS}, TrainSettings()) == (ids, learned)


def test_of_a_prompt_and_completion_the_completion_is_learned_as_trl_does(tokenizer: Any) -> None:
    """trl learns all tokens after those of the prompt with the cue for an answer."""
    prompt, completion = [SYSTEM, ASK, SAY, AGAIN], [LATER]
    for template in (CHATML, HEADERS):
        tokenizer.chat_template = unmarked(template)
        asked = tokenizer.apply_chat_template(prompt, tokenize=True, return_dict=True, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template([*prompt, *completion], tokenize=True, return_dict=True)
        given = len(asked["input_ids"])
        assert whole["input_ids"][:given] == asked["input_ids"]
        learned = [number >= given for number in range(len(whole["input_ids"]))]
        for each in (template, unmarked(template)):
            tokenizer.chat_template = each
            document = {"prompt": prompt, "completion": completion}
            assert example_of(tokenizer, document, TrainSettings()) == (list(whole["input_ids"]), learned)


@pytest.mark.parametrize("marks", [True, False])
def test_a_template_without_a_system_role_refuses_one_as_in_trl(tokenizer: Any, marks: bool) -> None:
    tokenizer.chat_template = NO_SYSTEM if marks else unmarked(NO_SYSTEM)
    with pytest.raises(RRError, match="System role not supported") as caught:
        example_of(tokenizer, {"messages": TALKS["a system prompt"]}, TrainSettings())
    assert caught.value.hint.startswith("It has no system role: put those words before the user's first ones.")
    assert "--on-bad-row skip" in caught.value.hint


def test_a_table_adds_nothing_to_calls(tokenizer: Any, tmp_path: Path) -> None:
    """In a column of calls each has the arguments of all; as in trl, those that hold nothing are left out."""
    talks = [[ASK, call("find", what="cat"), FOUND, SAY], [ASK, call("go", to="the park"), FOUND, SAY]]
    rows = [{"messages": talk, "tools": json.dumps(TOOLS)} for talk in talks]  # pyarrow may order keys in another way
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tokenizer.chat_template = unmarked(CHATML)
    shown = {
        name: [example_of(tokenizer, document, TrainSettings()) for document in read_documents(name, tmp_path)]
        for name in ("a.parquet", "a.jsonl")
    }
    assert shown["a.parquet"] == shown["a.jsonl"]
