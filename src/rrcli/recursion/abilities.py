"""What a model can do when it decodes, found by trying it once on a few tokens.

    takes_padding        a row gives the same logits in a batch, padded on the left, as it gives alone
    continues_in_blocks  several tokens after a cache give together what they give one by one
    rows_may_part        the same where chunked decoding itself runs the model
    filled_layers        which layers of a cache the decoder layers up to the span's end write to
    layers_return_states decoder layers return the hidden state alone

Families differ here, and so do versions of transformers, so a table would soon be wrong. A trial runs the model as
decoding runs it, so it finds what would happen there. What was found is kept on the model, or on its recursion.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rrcli import upstream
from rrcli.recursion.engine import at_depth
from rrcli.recursion.facts import vocabulary
from rrcli.recursion.families import home_of
from rrcli.recursion.probing import in_pieces
from rrcli.recursion.proof import LOW_PRECISION, TOLERANCE

# The batch of a trial: two prompts, of which the second has this much padding, and how many tokens follow them. There
# is more padding than prompt, so that padding that is not hidden shows in the logits.
PROMPT, PADDING, NEW = 12, 8, 3
# What a model raises that cannot be run in the way that is tried; running out of memory is a RuntimeError too.
FAILURES = (IndexError, NotImplementedError, RuntimeError, TypeError, ValueError)


def takes_padding(model: Any) -> bool:
    """Tell whether prompts of different lengths can be decoded in one batch, padded on the left.

    Where a stock model is wrong there, as MiniMax is (the mask of its attention layers is made from a layer that has no
    keys), only prompts of one length may share a batch. A recursion is tried too, at its full depth.
    """
    recursion = getattr(model, "recursion", None)
    kept = (model if recursion is None else recursion).__dict__
    if "rr_takes_padding" not in kept:
        depths = (0,) if recursion is None else (0, recursion.config.max_steps)
        kept["rr_takes_padding"] = all(_padding_is_hidden(model, depth) for depth in depths)
    return bool(kept["rr_takes_padding"])


def continues_in_blocks(recursion: Any) -> bool:
    """Tell whether the model's own cache can be taken back, and tokens after it give together what they give alone."""
    kept = recursion.model.__dict__
    if "rr_continues_in_blocks" not in kept:
        kept["rr_continues_in_blocks"] = _block_is_its_tokens(recursion.model)
    return bool(kept["rr_continues_in_blocks"])


def rows_may_part(recursion: Any) -> bool:
    """Tell whether rows of a batch may commit different numbers of tokens: padding then fills up the shorter ones."""
    kept = recursion.model.__dict__
    if "rr_rows_may_part" not in kept:
        model = recursion.model
        ids, mask = _batch(model)
        pieces = [1] * NEW
        with _trying(model, 0):
            batch, _ = _run(model, ids, mask, [PROMPT, *pieces])
            alone, _ = _run(model, ids[1:, PADDING:], mask[1:, PADDING:], [PROMPT - PADDING, *pieces])
        kept["rr_rows_may_part"] = _close(model, batch[1:, PADDING:], alone)
    return bool(kept["rr_rows_may_part"])


def filled_layers(recursion: Any) -> list[int]:
    """Return which layers of a cache hold what the decoder layers before the span's end computed.

    Mostly these are layers of the same numbers. A layer of LongCat-Flash attends twice and writes to two of them.
    """
    return list(_looked_at_span(recursion)[0])


def layers_return_states(recursion: Any) -> bool:
    """Tell whether decoder layers return the hidden state alone, so that a stub can stand for them."""
    return bool(_looked_at_span(recursion)[1])


def _looked_at_span(recursion: Any) -> tuple[list[int], bool]:
    """Run pass 0 once; return the filled layers of its cache and whether the span's last layer returns a tensor."""
    if "rr_span" not in recursion.__dict__:
        found: list[int] = []
        kinds: list[bool] = []

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            cache = next(value for value in (*args, *kwargs.values()) if upstream.is_cache(value))
            found.extend(index for index, layer in enumerate(cache.layers) if not upstream.is_blank(layer))
            kinds.append(isinstance(output, Tensor))

        ids, mask = _batch(recursion.model)
        hook = recursion.layers[recursion.end - 1].register_forward_hook(note, with_kwargs=True)
        try:
            with _trying(recursion.model, 0):
                _run(recursion.model, ids, mask, [PROMPT])
        finally:
            hook.remove()
        recursion.__dict__["rr_span"] = found, all(kinds)
    kept: tuple[list[int], bool] = recursion.__dict__["rr_span"]
    return kept


def _padding_is_hidden(model: Any, depth: int) -> bool:
    ids, mask = _batch(model)
    try:
        with _trying(model, depth):
            batch, alone = _generated(model, ids, mask), _generated(model, ids[1:, PADDING:], mask[1:, PADDING:])
    except FAILURES:
        return False
    return _close(model, batch[1:], alone)


def _generated(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Return `[batch, NEW, vocabulary]` fp32 logits of the last tokens of `ids`, as `generate` computes them."""
    prompt = ids.shape[1] - NEW

    def force(text: Tensor, scores: Tensor) -> Tensor:
        return torch.full_like(scores, -torch.inf).scatter(1, ids[:, text.shape[1], None], 0.0)

    found = model.generate(
        input_ids=ids[:, :prompt], attention_mask=mask[:, :prompt], max_new_tokens=NEW, do_sample=False, num_beams=1,
        use_cache=True, pad_token_id=0, logits_processor=[force], return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return torch.stack(found.logits, 1).float()


def _block_is_its_tokens(model: Any) -> bool:
    if not upstream.takes_cache(model):
        return False
    ids, mask = _batch(model)
    try:
        with _trying(model, 0):
            together, cache = _run(model, ids, mask, [PROMPT, NEW])
            if not upstream.can_be_taken_back(cache):
                return False
            alone, _ = _run(model, ids, mask, [PROMPT, *[1] * NEW])
    except FAILURES:
        return False
    return _close(model, together[:, PROMPT:], alone[:, PROMPT:])


def _batch(model: Any) -> tuple[Tensor, Tensor]:
    """Return `[2, PROMPT + NEW]` ids, none of which ends a text, and their mask; the second row begins with padding."""
    embedding = model.get_input_embeddings()
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    usual = torch.tensor([i for i in range(min(vocabulary(model), 1000)) if i not in _listed(ends)])
    count = PROMPT + NEW
    ids = usual[(torch.arange(2 * count).view(2, count) * 37 + 11) % len(usual)].to(home_of(embedding))
    mask = torch.ones_like(ids)
    ids[1, :PADDING] = mask[1, :PADDING] = 0
    return ids, mask


def _listed(tokens: Any) -> list[int]:
    return list(tokens) if isinstance(tokens, (list, tuple)) else [tokens]


@contextmanager
def _trying(model: Any, depth: int) -> Iterator[None]:
    """Set the model to evaluation, without gradients and at a depth, and put everything back."""
    training = model.training
    model.eval()
    try:
        with at_depth(model, depth), torch.no_grad():
            yield
    finally:
        model.train(training)


def _run(model: Any, ids: Tensor, mask: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Any]:
    """Run pieces of these lengths one after the other, told mask and positions as decoding tells them.

    Returns:
        `[batch, position, vocabulary]` fp32 logits, and the cache that the model made. Without a cache the first piece
        is the only one.
    """
    outputs = list(in_pieces(model, ids, lengths, mask=mask, told=("attention_mask", "position_ids")))
    return torch.cat([output.logits.float() for output in outputs], 1), upstream.cache_of(outputs[-1])


def _close(model: Any, a: Tensor, b: Tensor) -> bool:
    limit = TOLERANCE.get(model.dtype, LOW_PRECISION)
    return a.shape == b.shape and bool((a - b).abs().max() <= limit * b.abs().max())
