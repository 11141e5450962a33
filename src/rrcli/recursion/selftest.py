"""A self-test of a few seconds: whether the recursion works with the installed libraries.

It runs on a tiny random model in memory, and so finds what a new version of a dependency changed before any model of
the user's is touched:

    zero-init      a fresh recursion changes no logit, cached and uncached, and no token that `generate` writes
    cached         with feedback that is not zero, decoding with a cache computes the logits of decoding without one
    chunked        chunked decoding writes the same tokens as running every pass for every token
    FLOPs          those that are counted forward and backward are those of a formula
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rrcli.errors import CheckFailed
from rrcli.recursion.chunked_decoding import ChunkedDecoding
from rrcli.recursion.config import RecursionConfig
from rrcli.recursion.engine import Recursion, attach
from rrcli.recursion.flops import counted_flops
from rrcli.recursion.probing import in_pieces
from rrcli.recursion.proof import self_check
from rrcli.upstream import cache_of

WIDTH, LAYERS, VOCABULARY = 32, 3, 97
PROMPT, NEW = 7, 16
# Cached and uncached logits may differ by rounding (fp32), relative to the largest.
TOLERANCE = 1e-5
HINT = "Do not use this installation: install versions of the dependencies that rr was tested with (pyproject.toml)."


@torch.no_grad()
def self_test() -> str:
    """Run the self-test, and return a line that says what was found.

    Raises:
        CheckFailed: a check fails; the message says which.
    """
    with torch.random.fork_rng(devices=[]):
        model = _tiny()
        flops = _flops(model)
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(3, VOCABULARY, (3, PROMPT), generator=generator)
        mask = torch.ones_like(ids)
        for row, padding in enumerate((0, 2, 1)):
            mask[row, :padding] = 0
        plain = _written(model, ids, mask)
        recursion = attach(model, RecursionConfig(max_steps=2))
        self_check(recursion)
        if not torch.equal(_written(model, ids, mask), plain):
            raise CheckFailed("a zero-initialised recursion changes what 'generate' writes", HINT)
        _wake(recursion, generator)
        worst = _cached_differs(model, _written(model, ids[:1], mask[:1]))
        if not worst <= TOLERANCE:
            raise CheckFailed(f"with feedback, cached and uncached logits differ by {worst:.2g} of the largest", HINT)
        sequential = _written(model, ids, mask)
        if torch.equal(sequential, plain):
            raise CheckFailed("feedback that is not zero changes no token", HINT)
        decoding = ChunkedDecoding(4)
        if not torch.equal(_written(model, ids, mask, decoding), sequential):
            raise CheckFailed("chunked decoding writes other tokens than all passes for every token", HINT)
        if not decoding.totals.chunks or [len(trace.passes) for trace in decoding.traces] != [NEW] * len(ids):
            raise CheckFailed("decoding was not done in chunks", HINT)
    tokens = NEW * len(ids)
    return f"zero-init identical, cached = uncached ({worst:.0e}), chunked = sequential ({tokens} tokens), {flops}"


def _tiny() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:  # far from uniform, so that a wrong cache or mask shows
            parameter.normal_(std=0.2)
    return model


def _flops(model: Any) -> str:
    """Hold the FLOPs that are counted on this CPU against a formula, and return what is found, in words.

    Each weight multiplies every position three times: forward, for the gradient of its input, and for its own. So do
    the two factors of attention, whose kernels may also compute the scores again.

    Raises:
        CheckFailed: they differ. (Where rr knows that it cannot count all that ran, it shows no wrong number anywhere.)
    """
    ids, config = torch.arange(PROMPT)[None] + 3, model.config
    weights = sum(p.numel() for p in model.parameters() if p.dim() > 1) - model.get_input_embeddings().weight.numel()
    pairs = LAYERS * WIDTH * PROMPT**2
    with counted_flops() as counter, torch.enable_grad():
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    model.zero_grad(set_to_none=True)
    expected = [2 * (3 * PROMPT * weights + products * pairs) for products in (6, 7)]
    if not counter.uncounted and counter.total not in expected:
        right = " or ".join(f"{flops:,}" for flops in expected)
        raise CheckFailed(f"{counter.total:,} FLOPs are counted for a tiny '{config.model_type}', not {right}", HINT)
    return counter.notice() or "FLOPs as by formula"


def _wake(recursion: Recursion, generator: torch.Generator) -> None:
    for parameter in recursion.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def _written(model: Any, ids: Tensor, mask: Tensor, decoding: Any = None) -> Tensor:
    return model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, custom_generate=decoding)


def _cached_differs(model: Any, ids: Tensor) -> float:
    """Return the difference of logits with a cache, token by token, and without one, relative to the largest logit."""
    parts = []
    for output in in_pieces(model, ids, [1] * ids.shape[1]):
        if cache_of(output) is None:
            raise CheckFailed("the model returns no cache, or one that is not known as a cache", HINT)
        parts.append(output.logits)
    plain = model(input_ids=ids, use_cache=False).logits
    return float((torch.cat(parts, 1) - plain).abs().max() / plain.abs().max())
