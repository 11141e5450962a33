"""What models can do when they decode, found by trying: padding, blocks of tokens, layers of a cache."""

from __future__ import annotations

import pytest
import torch

from families import build, tokens, wake
from rrcli.recursion.abilities import continues_in_blocks, filled_layers, rows_may_part, takes_padding
from rrcli.recursion.config import RecursionConfig
from rrcli.recursion.engine import attach


def recursive(family, **config):
    return wake(attach(build(family), RecursionConfig(max_steps=2, **config)))


@pytest.mark.parametrize(
    ("family", "expected"), [("llama", True), ("mpt", True), ("mamba", True), ("jamba", True), ("minimax", False)]
)
def test_whether_padding_is_hidden_is_found_by_trying(family, expected):
    assert takes_padding(build(family)) is expected
    assert takes_padding(recursive(family).model) is expected


def test_a_recursion_that_does_not_hide_padding_is_found_where_the_stock_model_does():
    recursion = recursive("llama")
    assert takes_padding(recursion.model)
    other = recursive("llama")
    other.cell.register_forward_hook(lambda *call: call[-1] + call[1][0].mean(1, keepdim=True))  # mixes positions
    assert not takes_padding(other.model)


@pytest.mark.parametrize(
    ("family", "expected"),
    [("llama", True), ("longcat_flash", True), ("jamba", False), ("mamba", False), ("minimax", False)],
)
def test_whether_a_block_is_its_tokens_is_found_by_trying(family, expected):
    assert continues_in_blocks(recursive(family)) is expected


@pytest.mark.parametrize(("family", "expected"), [("llama", True), ("longcat_flash", True), ("minimax", False)])
def test_whether_rows_may_part_is_found_by_trying(family, expected):
    assert rows_may_part(recursive(family)) is expected


def test_layers_of_a_cache_are_those_that_the_span_filled():
    assert filled_layers(recursive("llama", span=(1, 3))) == [0, 1, 2]
    assert filled_layers(recursive("longcat_flash", span=(1, 3))) == [0, 1, 2, 3, 4, 5]  # two each


@torch.no_grad()
def test_a_trial_leaves_the_model_as_it_was():
    recursion = recursive("llama")
    model, ids = recursion.model.train(), tokens()
    recursion.depth = 1
    before = model(ids, use_cache=False).logits
    assert takes_padding(model)
    assert continues_in_blocks(recursion)
    assert filled_layers(recursion) == [0, 1, 2, 3]
    assert model.training
    assert recursion.depth == 1
    assert torch.equal(model(ids, use_cache=False).logits, before)
    assert torch.is_grad_enabled() is False
