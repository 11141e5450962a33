"""Pictures of generations: which tokens took which passes, and what is drawn of it."""

from __future__ import annotations

import numpy as np
import pytest

import rrcli
from rrcli.evaluation.pictures import PAPER, TINTS, WIDTH, draw, generate_traced
from rrcli.evaluation.tracing import Piece
from rrcli.recursion.config import RecursionConfig
from rrcli.recursion.engine import attach
from rrcli.recursion.exits import ExitRule

PROMPT = "Tom has three"


def has(image: np.ndarray, colour: tuple[int, int, int]) -> bool:
    return bool((image == np.array(colour)).all(-1).any())


def test_the_traced_tokens_are_those_of_generate() -> None:
    model, tokenizer = rrcli.load("default")
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    expected = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    text = tokenizer.decode(expected, skip_special_tokens=True)
    plain = generate_traced(model, tokenizer, PROMPT, 12)
    assert "".join(token.text for token in plain) == text
    assert {token.passes for token in plain} == {0}
    attach(model, RecursionConfig(max_steps=2))
    model.recursion.depth = 2
    for rule, passes in ((None, {2}), (ExitRule("margin", 0.95), {0, 2})):  # where pass 0 is sure, no other is run
        model.recursion.exit = rule
        recursive = generate_traced(model, tokenizer, PROMPT, 12)
        assert "".join(token.text for token in recursive) == text  # zero-init changes nothing
        assert {token.passes for token in recursive} == passes
        assert not any(token.changed for token in recursive)


def test_tokens_lie_on_the_colour_of_their_passes() -> None:
    image = draw([("prompt", [Piece(" zero"), Piece(" two", 2)])], "title")
    assert image.dtype == np.uint8
    assert image.shape[1:] == (WIDTH, 3)
    assert has(image, PAPER)
    assert has(image, TINTS[2])
    assert not has(image, TINTS[1])


@pytest.mark.parametrize("text", ["y" * 500, " word" * 200, "\n" * 5, "", "日本\u202e<b>", "a\r\x1d\x85\u2029b\ud800"])
def test_any_text_stays_inside_the_picture(text: str) -> None:
    image = draw([("prompt", [Piece(text, 1)])], "title")
    assert (image[:, -8:] == 255).all()
    assert (image[-8:] == 255).all()
