"""Pieces of a text, each after the cache of those before, have the logits of the whole text."""

import pytest
import torch
from transformers.utils import ModelOutput

from families import build, tokens, uncached
from rrcli import upstream
from rrcli.recursion.probing import decoded_logits, in_pieces


@pytest.mark.parametrize("told", [(), ("position_ids",), ("attention_mask", "position_ids")])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "mamba2"])
@torch.no_grad()
def test_pieces_have_the_logits_of_the_whole(family, told):
    model, ids = build(family), tokens(2, 9)
    outputs = list(in_pieces(model, ids, [4, 3, 1, 1], told=told))
    assert [output.logits.shape[1] for output in outputs] == [4, 3, 1, 1]
    whole = uncached(model, ids)
    torch.testing.assert_close(torch.cat([output.logits for output in outputs], 1), whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(decoded_logits(model, ids, 3), whole, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_given_cache_is_the_one_that_grows():
    model, ids = build("llama"), tokens(1, 6)
    cache = upstream.DynamicCache(config=model.config)
    lengths = [cache.get_seq_length() for _ in in_pieces(model, ids, [4, 2], cache=cache)]
    assert lengths == [4, 6]


class Forgetful(torch.nn.Module):
    """A model that returns no cache; notes how much it is given."""

    def __init__(self):
        super().__init__()
        self.lengths = []

    def forward(self, input_ids, use_cache):
        self.lengths.append(input_ids.shape[1])
        return ModelOutput(logits=torch.zeros(*input_ids.shape, 2))


def test_without_a_cache_there_is_one_piece():
    model = Forgetful()
    assert decoded_logits(model, torch.zeros(1, 5, dtype=torch.long), 2).shape == (1, 3, 2)
    assert model.lengths == [3]
