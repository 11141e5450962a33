"""Relevance of a generation: how much likelier the prompt makes it, under the baseline model."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rrcli.data.tokens import encode_prompt, piece_ids, scored_after
from rrcli.errors import RRError
from rrcli.recursion.engine import at_depth
from rrcli.recursion.facts import context_length, refuse_unknown_tokens, vocabulary
from rrcli.recursion.families import input_device
from rrcli.reporting import Reporter


@torch.no_grad()
def relevance(
    model: Any, tokenizer: Any, generations: Sequence[Mapping[str, Any]], *, reporter: Reporter
) -> list[float]:
    """Return the pointwise mutual information of each continuation and its prompt, in nats per token.

    The mean over the continuation's tokens of ln p(token | prompt, tokens before) - ln p(token | tokens before), both
    under `model`: the mutual information by which Li et al. (2016) rank responses, per token. Without a prompt the text
    follows the start token. A continuation without tokens has 0, as it says nothing about its prompt.

    Args:
        model, tokenizer: those of the baseline, even if another model wrote the texts. A recursion is not used (depth
            0).
        generations: records with `prompt` and `text`.

    Raises:
        RRError: a log-probability is not finite.
    """
    values = []
    with (
        at_depth(model, 0),
        reporter.progress("relevance", len(generations), "prompts") as progress,
    ):
        for record in generations:
            text = piece_ids(tokenizer, record["prompt"], record["text"])
            refuse_unknown_tokens(vocabulary(model), tokenizer, text, f"the continuation {record['text'][:40]!r}")
            # Where there is no start token, the text's first token is left out of both terms.
            alone, scored = scored_after(tokenizer, text)
            prompt = encode_prompt(tokenizer, record["prompt"]) + text[: len(text) - len(scored)]
            # Read again, a text may have more tokens than were generated: those beyond the context are not scored.
            scored = scored[: context_length(model) - 1]
            gain = _log_likelihood(model, prompt, scored) - _log_likelihood(model, alone, scored) if scored else 0.0
            values.append(gain / max(1, len(scored)))
            progress.advance()
    return values


def _log_likelihood(model: Any, context: list[int], tokens: list[int]) -> float:
    """Return the sum of ln p of `tokens` after `context`, reduced in fp32 and summed in fp64."""
    room = context_length(model) - len(tokens)
    ids = torch.tensor([[*context[-max(1, room) :], *tokens]], device=input_device(model))
    n = len(tokens)
    # Where the model can leave out the logits of the prompt, it does.
    short = {"logits_to_keep": n + 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    logits = model(input_ids=ids, use_cache=False, **short).logits[0, -n - 1 : -1].float()
    chosen = logits.log_softmax(-1).gather(1, torch.tensor(tokens, device=logits.device)[:, None])
    total = float(chosen.double().sum())
    if not math.isfinite(total):
        raise RRError("the baseline model gives no finite probability to a generation", "Try --dtype float32.")
    return total
