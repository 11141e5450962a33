"""Where texts begin and end as token ids, and which text ids stand for, for tokenizers of several kinds."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from made_tokenizers import like_llama_2, with_special_tokens
from rrcli.data.rendering import example_of, solved_problem
from rrcli.data.tasks import Problem
from rrcli.data.tokens import (
    Detokenizer,
    closed,
    encode_prompt,
    end_notice,
    end_tokens,
    piece_ids,
    scored_after,
    start_token,
    text_ids,
)
from rrcli.errors import RRError
from rrcli.settings import TrainSettings

pytest.importorskip("transformers")

WORDS = (
    "The cat sat on the mat . Where is the cat ? And the dog ? Under it . Question: Answer: What is 2 and 2 ? "
    "Here is the dog and the cat . Once upon a time there was a little girl . "
) * 20
# As Llama 2's: the turns are marked in plain text, and the end token closes each answer.
INSTRUCT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
TALK = [
    {"role": "user", "content": "Where is the cat?"},
    {"role": "assistant", "content": "On the mat."},
    {"role": "user", "content": "And the dog?"},
    {"role": "assistant", "content": "Under it."},
]
PLAIN = TrainSettings(chat_template=False)


@pytest.fixture(scope="module")
def llama() -> Any:
    return like_llama_2(WORDS)


@pytest.fixture(scope="module")
def closing() -> Any:
    """A tokenizer that writes [CLS] before and [SEP] after every text."""
    return with_special_tokens("[CLS]", "[SEP]", around=("[CLS]", "[SEP]"), bos_token="[CLS]", eos_token="[SEP]")


def model_of(generation: Any = None, config: Any = None, text_config: Any = None) -> Any:
    """Return what stands for a model that names end tokens in these places."""
    inner = SimpleNamespace(eos_token_id=text_config)
    outer = SimpleNamespace(eos_token_id=config, get_text_config=lambda: inner)
    return SimpleNamespace(config=outer, generation_config=SimpleNamespace(eos_token_id=generation))


# -- prompts and documents ---------------------------------------------------------------------------------------------


def test_a_prompt_is_never_closed(closing: Any) -> None:
    assert closing("Tom ran.")["input_ids"][-1] == closing.eos_token_id
    ids = encode_prompt(closing, "Tom ran.")
    assert ids == closing("Tom ran.")["input_ids"][:-1]
    assert ids[0] == closing.bos_token_id


def test_a_start_token_that_a_prompt_brings_is_not_doubled(closing: Any, llama: Any) -> None:
    """As lm-eval's `tok_encode`."""
    assert encode_prompt(closing, "[CLS]Tom ran.") == encode_prompt(closing, "Tom ran.")
    assert encode_prompt(llama, "<s>The cat").count(llama.bos_token_id) == 1
    assert encode_prompt(llama, "The cat") == llama("The cat")["input_ids"]


def test_a_document_is_closed_once(closing: Any) -> None:
    ids, _ = example_of(closing, "Tom ran.", PLAIN)
    assert ids == closing("Tom ran.")["input_ids"]
    assert example_of(closing, "Tom ran.[SEP]", PLAIN)[0] == ids
    ids, learned = example_of(closing, {"prompt": "Tom", "completion": " ran."}, PLAIN)
    assert ids == closing("Tom ran.")["input_ids"]
    asked = len(encode_prompt(closing, "Tom"))
    assert learned == [False] * asked + [True] * (len(ids) - asked)
    assert solved_problem(closing, Problem("t", "1 + 1?", "2"), PLAIN)[0].count(closing.eos_token_id) == 1


def test_scoring_starts_from_bos_else_eos_else_the_tokenizers_own_start() -> None:
    assert start_token(with_special_tokens("<s>", bos_token="<s>")) == 1024
    assert start_token(with_special_tokens("<e>", bos_token=None, eos_token="<e>")) == 1024
    own = with_special_tokens("[CLS]", "[SEP]", around=("[CLS]", "[SEP]"), bos_token=None, eos_token=None)
    assert start_token(own) == 1024
    assert closed(own, [5]) == [5, 1025]


def test_without_a_start_token_the_first_token_of_a_document_is_read_and_not_scored() -> None:
    tokenizer = with_special_tokens(bos_token=None, eos_token=None, pad_token=None)
    assert start_token(tokenizer) is None
    assert scored_after(tokenizer, [5, 6, 7]) == ([5], [6, 7])
    assert scored_after(tokenizer, [5]) == ([5], [])
    assert scored_after(tokenizer, []) == ([], [])
    ids, learned = example_of(tokenizer, "Tom ran.", PLAIN)
    assert (ids, len(learned)) == (text_ids(tokenizer, "Tom ran."), len(ids))


# -- pieces ------------------------------------------------------------------------------------------------------------


def test_pieces_have_the_ids_that_they_have_in_the_whole_text(llama: Any) -> None:
    whole = llama("The cat sat on the mat.</s>")["input_ids"]
    assert example_of(llama, {"prompt": "The cat sat", "completion": " on the mat."}, PLAIN)[0] == whole
    whole = llama("Question: What is 2 and 2?\nAnswer: 4</s>")["input_ids"]
    assert solved_problem(llama, Problem("t", "What is 2 and 2?", "4"), PLAIN)[0] == whole
    text = "Question: Where is the cat?\nAnswer: On the mat.</s>\n\nQuestion: And the dog?\nAnswer: Under it.</s>"
    assert example_of(llama, {"messages": TALK}, PLAIN)[0] == llama(text)["input_ids"]


def test_turns_have_the_ids_that_the_chat_template_gives_them(llama: Any) -> None:
    llama.chat_template = INSTRUCT
    ids, learned = example_of(llama, {"messages": TALK}, TrainSettings())
    llama_ids = llama.apply_chat_template(TALK, return_dict=True)["input_ids"]
    asked, llama.chat_template = llama.apply_chat_template(TALK[:1], return_dict=True)["input_ids"], None
    assert ids == llama_ids
    assert learned.index(True) == len(asked)
    assert ids[: len(asked)] == asked


def test_a_token_that_would_reach_across_the_border_is_left_out(llama: Any) -> None:
    assert llama.tokenize("The cat") == ["▁The", "▁cat"]
    ids = piece_ids(llama, "The c", "at")
    assert "▁" not in "".join(llama.convert_ids_to_tokens(ids))
    assert llama.decode(text_ids(llama, "The c") + ids) == "The cat"


@pytest.mark.parametrize("before", ["Tom has", "It is\n", "1", "<|endoftext|>", ""])
@pytest.mark.parametrize("piece", [" a ball", "a ball", "\n\nQuestion:", " 7"])
def test_pieces_of_other_tokenizers_are_tokenised_alone(before: str, piece: str) -> None:
    tokenizer = with_special_tokens()
    assert piece_ids(tokenizer, before, piece) == tokenizer(piece, add_special_tokens=False)["input_ids"]


# -- ends --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("generation", "config", "text_config", "ends"),
    [
        (None, None, None, {0}),
        (5, None, None, {0, 5}),
        ([5, 6], 7, None, {0, 5, 6, 7}),
        (None, [7], 8, {0, 7, 8}),
        (None, -1, None, {0}),
    ],
)
def test_every_token_that_is_named_as_an_end_ends_a_text(
    generation: Any, config: Any, text_config: Any, ends: set[int]
) -> None:
    tokenizer, model = with_special_tokens(), model_of(generation, config, text_config)
    assert end_tokens(model, tokenizer) == ends
    assert bool(end_notice(model, tokenizer)) == (ends != {0})


def test_where_end_tokens_differ_all_are_named() -> None:
    tokenizer = with_special_tokens("<|im_end|>")
    said = end_notice(model_of(1024, 0), tokenizer)
    assert "tokenizer: '<|endoftext|>' (0); generation_config: '<|im_end|>' (1024); config: '<|endoftext|>'" in said


# -- text --------------------------------------------------------------------------------------------------------------


def test_the_text_of_a_continuation_is_what_it_adds_to_its_prompt(llama: Any) -> None:
    whole = llama("Here is the cat and the dog.")["input_ids"]
    shown = Detokenizer(llama)
    for length in range(1, len(whole)):
        prompt, new = whole[:length], whole[length:]
        added = shown.text(new, shown.context(prompt))
        assert llama.decode(prompt, skip_special_tokens=True) + added == "Here is the cat and the dog."


def test_a_long_prompt_is_not_decoded_again_and_its_bytes_are_not_cut(llama: Any) -> None:
    prompt = encode_prompt(llama, "The cat 語 " + "語" * 30)
    new = text_ids(llama, "\n語")[1:]
    shown = Detokenizer(llama)
    assert shown.text(new, shown.context(prompt)) == "\n語"
    assert len(shown.context(encode_prompt(llama, WORDS))) == 8


def test_special_tokens_are_text_but_for_ends_padding_and_starts() -> None:
    tokenizer = with_special_tokens("<answer>", "</think>", "<s>", "<pad>", "<e>", bos_token="<s>", pad_token="<pad>")
    ids = tokenizer("<s>a</think> <answer> 7<pad><e>", add_special_tokens=False)["input_ids"]
    assert Detokenizer(tokenizer, ends={ids[-1]}).text(ids) == "a</think> <answer> 7"
    # What a stop string names can be found.
    assert Detokenizer(tokenizer, stop=["7<pad>"]).text(ids) == "a</think> <answer> 7<pad><e>"


def test_a_tokenizer_of_known_words_refuses_others_in_one_sentence() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<s>": 0, "red": 1, "ball": 2}))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    assert encode_prompt(tokenizer, "red ball") == [1, 2]
    assert piece_ids(tokenizer, "red", "ball") == [2]
    with pytest.raises(RRError, match="the tokenizer fails on the text 'blue ball'"):
        encode_prompt(tokenizer, "blue ball")


@pytest.mark.parametrize("kind", ["raises", "makes nothing"])
def test_a_tokenizer_that_has_no_token_for_the_probe_does_not_close_prompts(kind: str) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"[CLS]": 0, "[SEP]": 1, "C": 2, "G": 3}
    backend = Tokenizer(models.WordLevel(vocabulary) if kind == "raises" else models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A $B [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, cls_token="[CLS]", sep_token="[SEP]")
    assert encode_prompt(tokenizer, "C G") == [0, 2, 3]
    assert start_token(tokenizer) == 0
