"""What a model is shown: the same question in training and in evaluation, and of a conversation what is learned."""

from __future__ import annotations

from typing import Any

import pytest

from rrcli.data.rendering import encode_question, example_of, question_text, solved_problem, text_of
from rrcli.data.tasks import Problem
from rrcli.demo import defaults
from rrcli.errors import RRError
from rrcli.settings import EvalSettings, TrainSettings

transformers = pytest.importorskip("transformers")

CHAT = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{%- if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}</{{ m.role }}>\n{% endgeneration %}{% else %}{{ m.content }}</{{ m.role }}>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
# As Qwen3's: an empty thought stands in front of the last answer alone.
THINKING = (
    "{% for m in messages %}<{{ m.role }}>{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}"
    "{{ m.content }}</{{ m.role }}>\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
NO_MARKS = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
STRICT = "{% for m in messages %}{{ raise_exception('roles must alternate') }}{% endfor %}"
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How are you?"},
    {"role": "assistant", "content": "Well."},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "Better."},
]
SETTINGS = TrainSettings()


@pytest.fixture
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(defaults.MODEL_DIR)


def learned(tokenizer: Any, example: tuple[list[int], list[bool]]) -> list[str]:
    """Return the texts of the runs of learned tokens."""
    runs: list[list[int]] = []
    before = False
    for token, own in zip(*example, strict=True):
        if own and not before:
            runs.append([])
        if own:
            runs[-1].append(token)
        before = own
    return [tokenizer.decode(run) for run in runs]


# -- problems ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [None, CHAT, MARKED, THINKING, NO_MARKS])
@pytest.mark.parametrize("chat", [True, False])
def test_training_asks_as_evaluation_does(tokenizer: Any, template: str | None, chat: bool) -> None:
    tokenizer.chat_template = template
    problem = Problem("t", "1 + 1?", "2", {}, "It is 2. #### 2")
    evaluation = EvalSettings(chat_template=chat)
    asked = encode_question(tokenizer, question_text(tokenizer, problem.question, (), evaluation), evaluation)
    ids, own = solved_problem(tokenizer, problem, TrainSettings(chat_template=chat))
    assert ids[: len(asked)] == asked
    assert own == [False] * len(asked) + [True] * (len(ids) - len(asked))
    answer = tokenizer.decode(ids[len(asked) :])
    ends = tokenizer.eos_token
    expected = {CHAT: "It is 2. #### 2</assistant>\n", MARKED: "It is 2. #### 2</assistant>\n"}
    expected[THINKING] = "<think></think>It is 2. #### 2</assistant>\n"
    expected[NO_MARKS] = f"It is 2. #### 2\n{ends}"
    assert answer == (expected[template] if chat and template else f" It is 2. #### 2{ends}")


# -- documents ---------------------------------------------------------------------------------------------------------


def test_a_text_is_learned_whole(tokenizer: Any) -> None:
    ids, own = example_of(tokenizer, "Tom ran.", SETTINGS)
    assert own == [False] + [True] * (len(ids) - 1)
    assert learned(tokenizer, (ids, own)) == [f"Tom ran.{tokenizer.eos_token}"]


def test_of_a_prompt_and_its_completion_the_completion_is_learned(tokenizer: Any) -> None:
    tokenizer.chat_template = CHAT  # has no say here
    document = {"prompt": "Tom has a", "completion": " red ball."}
    ids, own = example_of(tokenizer, document, SETTINGS)
    prompt = tokenizer("Tom has a")["input_ids"]
    assert ids[: len(prompt)] == prompt
    assert learned(tokenizer, (ids, own)) == [f" red ball.{tokenizer.eos_token}"]
    assert text_of(tokenizer, document, EvalSettings()) == "Tom has a red ball."


@pytest.mark.parametrize("template", [CHAT, MARKED])
def test_the_turns_of_the_assistant_are_learned_with_their_ends(tokenizer: Any, template: str) -> None:
    tokenizer.chat_template = template
    example = example_of(tokenizer, {"messages": TALK}, SETTINGS)
    assert learned(tokenizer, example) == ["Well.</assistant>\n", "Better.</assistant>\n"]
    assert tokenizer.decode(example[0]) == tokenizer.apply_chat_template(TALK, tokenize=False)
    tokenizer.chat_template = CHAT
    assert example[0] == example_of(tokenizer, {"messages": TALK}, SETTINGS)[0]
    text = text_of(tokenizer, {"messages": TALK}, EvalSettings())
    assert text.startswith("<system>Be brief.</system>")


def test_a_thought_that_only_the_last_turn_has_is_learned_there(tokenizer: Any) -> None:
    tokenizer.chat_template = THINKING
    example = example_of(tokenizer, {"messages": TALK}, SETTINGS)
    assert learned(tokenizer, example) == ["Well.</assistant>\n", "<think></think>Better.</assistant>\n"]


def test_a_turn_that_others_change_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{% if loop.last or m.role != 'assistant' %}<{{ m.role }}>{{ m.content }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    with pytest.raises(RRError, match=r"writes turn 3 of 'Be brief\.' in another way when others follow"):
        example_of(tokenizer, {"messages": TALK}, SETTINGS)


def test_a_template_that_marks_no_end_gets_the_end_token(tokenizer: Any) -> None:
    tokenizer.chat_template = NO_MARKS
    example = example_of(tokenizer, {"messages": TALK}, SETTINGS)
    assert learned(tokenizer, example)[-1] == f"Better.\n{tokenizer.eos_token}"


@pytest.mark.parametrize("off", [False, True])
def test_without_a_template_a_conversation_has_the_form_of_problems(tokenizer: Any, off: bool) -> None:
    tokenizer.chat_template = CHAT if off else None
    settings, end = TrainSettings(chat_template=not off), tokenizer.eos_token
    example = example_of(tokenizer, {"messages": TALK}, settings)
    assert learned(tokenizer, example) == [f" Well.{end}", f" Better.{end}"]
    form = "Be brief.\n\nQuestion: How are you?\nAnswer: Well.\n\nQuestion: And now?\nAnswer: Better."
    assert text_of(tokenizer, {"messages": TALK}, EvalSettings(chat_template=not off)) == form
    assert tokenizer.decode(example[0], skip_special_tokens=True) == form


def test_other_roles_need_a_template(tokenizer: Any) -> None:
    with pytest.raises(RRError, match="role 'tool'"):
        example_of(tokenizer, {"messages": [{"role": "tool", "content": "x"}, *TALK]}, SETTINGS)


@pytest.mark.parametrize("mark", ["", "{% generation %}{% endgeneration %}"])
def test_what_a_template_refuses_is_named(tokenizer: Any, mark: str) -> None:
    tokenizer.chat_template = STRICT + mark
    with pytest.raises(RRError, match=r"refuses the conversation 'Be brief\.': roles must alternate") as error:
        example_of(tokenizer, {"messages": TALK}, SETTINGS)
    assert "--no-chat-template" in error.value.hint
