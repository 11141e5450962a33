"""Proof that surgery changed nothing: logits at every depth equal those of the model before surgery, bit for bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rrcli.errors import CheckFailed
from rrcli.recursion.facts import vocabulary
from rrcli.recursion.families import input_device, is_spread
from rrcli.recursion.probing import decoded_logits
from rrcli.reporting import Reporter

PROBES = ("The quick brown fox jumps over the lazy dog.", "Question: 2 + 3 =\nAnswer:")
DECODE_STEPS = 3
# Where layers lie on disk, each forward reads all of them: then one probe and one decoded token are compared.
SPREAD_PROBES, SPREAD_STEPS = 1, 1
# The tokens of a probe that the tokenizer cannot make.
STAND_IN_TOKENS = 10

Logits = dict[str, Tensor]


def reference(model: Any, tokenizer: Any) -> list[Logits]:
    """Return the logits of a model before surgery on every probe.

    Raises:
        CheckFailed: logits are not finite.
    """
    probes = _probes(model, tokenizer)
    found = [_logits(model, ids) for _, ids in probes]
    for (probe, _), logits in zip(probes, found, strict=True):
        if not all(bool(torch.isfinite(values).all()) for values in logits.values()):
            raise CheckFailed(f"the base model gives logits that are not finite for {probe!r}", "Check its weights.")
    return found


def verify(model: Any, tokenizer: Any, before: list[Logits], *, reporter: Reporter) -> list[int]:
    """Compare the logits at every depth, uncached and cached, with those before surgery; return the depths.

    Raises:
        CheckFailed: a single bit differs.
    """
    recursion = model.recursion
    depths = list(range(recursion.config.max_steps + 1))
    probes = _probes(model, tokenizer)
    with reporter.progress("verify", len(probes) * len(depths), "probes") as progress:
        for (probe, ids), stock in zip(probes, before, strict=True):
            for depth in depths:
                with recursion.at_depth(depth):
                    found = _logits(model, ids)
                for way, logits in found.items():
                    if not torch.equal(logits, stock[way]):
                        worst = float((logits - stock[way]).abs().max())
                        raise CheckFailed(
                            f"surgery changes the model: at depth {depth}, {way}, logits differ by {worst:.3g} for "
                            f"{probe!r}",
                            "Nothing was written. Try another --dtype, or report the model family.",
                        )
                progress.advance()
    return depths


def _probes(model: Any, tokenizer: Any) -> list[tuple[str, Tensor]]:
    """Return the probes with their token ids, each `[1, position]`.

    A tokenizer without a token for English letters makes few tokens of a probe, and some have more tokens than the
    model: tokens from all over the embedding then stand for it.
    """
    size = vocabulary(model)
    found = []
    for number, probe in enumerate(PROBES[:SPREAD_PROBES] if is_spread(model) else PROBES):
        try:
            ids = tokenizer(probe)["input_ids"]
        except Exception:  # some refuse words that they have no token for
            ids = []
        if len(ids) <= DECODE_STEPS or max(ids) >= size:
            ids = [(place * 37 + 11 + number) % size for place in range(STAND_IN_TOKENS)]
        found.append((probe, torch.tensor([ids], device=input_device(model))))
    return found


@torch.no_grad()
def _logits(model: Any, ids: Tensor) -> Logits:
    """Return `[1, position, vocabulary]` logits of one forward without a cache, and of a prefill and decoded tokens.

    A model that returns no cache has nothing to decode with: its prefill alone.
    """
    return {
        "uncached": model(input_ids=ids, use_cache=False).logits,
        "cached": decoded_logits(model, ids, SPREAD_STEPS if is_spread(model) else DECODE_STEPS),
    }
