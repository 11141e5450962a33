"""Decoding of many prompts, greedily or by sampling, in batches of similar length, with stop strings.

Decoding is stock `model.generate`, so every family and every depth of a recursion decodes as a user's own call would.
Once some rows of a batch have ended, `generate` is left, the other rows are selected from the cache that it returns
(the caches of a recursion's passes follow), and `generate` is called again with those.

Where a model writes other tokens next to padding, as is found by trying it, only prompts of one length share a batch.

At a depth above 0 a model in fp32 decodes in chunks, which finds the same tokens sooner. In fewer digits the largest
logits are often equal, and a chunk may then choose another of them than a single token does: there all passes run for
every token.

Sampling is greedy decoding with noise (`sampling`). Several answers to one prompt share its prefill: it is run once,
and the rows of its cache are repeated.

Several processes share out the batches. Where each holds a part of the model, all passes run for every token: chunks
run layers as often as their own tokens need it, and the processes would not be at the same layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

from rrcli.data.batching import batches, halving, padded
from rrcli.data.dealing import ALONE, Team, deal
from rrcli.data.tokens import CONTEXT_LENGTHS, Detokenizer, end_tokens
from rrcli.errors import CheckFailed, RRError
from rrcli.evaluation.generation_settings import without_own_settings
from rrcli.evaluation.sampling import Sampling
from rrcli.recursion.abilities import continues_in_blocks, takes_padding
from rrcli.recursion.chunked_decoding import ChunkedDecoding
from rrcli.recursion.engine import at_depth
from rrcli.recursion.exits import NEVER, ExitRule
from rrcli.recursion.facts import context_length
from rrcli.recursion.families import input_device
from rrcli.recursion.parts import in_step
from rrcli.recursion.products import through_onednn
from rrcli.upstream import cache_of, generation_cache_argument, goes_on

# A batch is cut down to its unfinished rows when this share of it has ended. Leaving and entering `generate` and
# copying the cache cost well below one token of SmolLM2-135M on a CPU; an eighth was faster than a quarter there.
LEAVING_SHARE = 0.125
# Options of `generate`: a cache and no sampling, even if the model's own generation config says otherwise.
GREEDY: dict[str, Any] = {
    "do_sample": False,
    "use_cache": True,
    "num_beams": 1,
    "temperature": None,
    "top_p": None,
    "top_k": None,
}

# Makes the noise of the rows at these places of a batch.
Noise = Callable[[Sequence[int]], LogitsProcessor]


def room_for(model: Any, new_tokens: int) -> int:
    """Return how many of `new_tokens` are generated where their number is not the user's: half of the context at most.

    The other half is for the prompt.
    """
    return max(1, min(new_tokens, context_length(model) // 2))


@dataclass(frozen=True)
class Decoded:
    """What was generated for one prompt.

    Attributes:
        number: the prompt's place in the list. tokens: the new ids, without the end token.
        text: up to the first stop string.
        ended: True if an end token or a stop string ended it, False if it reached the most new tokens.
        made: what was made of it, see `decode`.
    """

    number: int
    tokens: list[int]
    text: str
    ended: bool
    made: Any = None


def decode(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    *,
    depth: int,
    new_tokens: int,
    batch_tokens: int,
    stop: Sequence[str] = (),
    skip: int = 0,
    exit: ExitRule | None = None,
    sampling: Sampling | None = None,
    team: Team = ALONE,
    make: Callable[[Decoded], Any] | None = None,
) -> Iterator[list[Decoded]]:
    """Decode, longest prompts first; yield a list for each batch, in an order that depends on lengths alone.

    Args:
        prompts: token ids. new_tokens: the most to generate for each.
        depth: how many passes follow pass 0; a model without a recursion has pass 0 alone.
        batch_tokens: bounds rows x (prompt + new tokens) of a batch; where memory runs out, that batch is halved.
        stop: texts that end an answer. skip: leave out this many of the first answers: they are known already.
        exit: decode with this rule instead of every pass. sampling: draw the tokens instead of taking the most likely
            ones; give equal prompts side by side.
        team: the processes among which the batches are dealt out, unless they hold parts of the model and decode with
            an exit. make: called with every text, by the process that decoded it; its result becomes `made`.

    Raises:
        RRError: memory runs out for a single prompt. CheckFailed: decoding gave not even one token.
    """
    ends = Ends(tokenizer, end_tokens(model, tokenizer), stop)
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    # A batch whose prompts have one length needs no padding; some stock models do not hide it from their attention.
    unpadded = len(set(map(len, prompts))) > 1 and not takes_padding(model)
    sizes = [len(prompt) + new_tokens for prompt in prompts]
    if exit is not None and team.in_step:
        team = ALONE

    def run(batch: list[int]) -> list[Decoded]:
        with through_onednn(model):
            parts = halving(
                lambda numbers: _decode_batch(
                    model, prompts, numbers,
                    ends=ends, depth=depth, new_tokens=new_tokens, exit=exit, sampling=sampling,
                    shared=team.in_step and team.shares > 1,
                ),
                batch,
                lambda number: RRError(
                    f"memory runs out for a single prompt of {len(prompts[number])} tokens and {new_tokens} new ones",
                    "Lower --max-new-tokens, or use a smaller --dtype.",
                ),
            )  # fmt: skip
        found = []
        for number, tokens in zip(batch, chain(*parts), strict=True):
            text, stopped = ends.cut(ends.text_after(prompts[number], tokens))
            kept = tokens[:-1] if tokens and tokens[-1] in ends.tokens else tokens
            one = Decoded(number, kept, text, stopped or len(kept) < len(tokens))
            found.append(one if make is None else replace(one, made=make(one)))
        return found

    cut = batches(order[skip:], batch_tokens, sizes.__getitem__, unpadded=unpadded)
    for _, found in deal(cut, run, team, idle=lambda _: []):
        yield found


def _decode_batch(
    model: Any,
    prompts: Sequence[list[int]],
    numbers: list[int],
    *,
    ends: Ends,
    depth: int,
    new_tokens: int,
    exit: ExitRule | None,
    sampling: Sampling | None,
    shared: bool,
) -> list[list[int]]:
    """Return the new ids of each of these prompts, the end token included where there is one.

    Args:
        shared: whether other processes, which hold parts of the model too, decode prompts of their own; none are given
            to a process that only keeps up with them.
    """
    if not numbers:
        with at_depth(model, depth), in_step(model):
            return []
    rows = [prompts[number] for number in numbers]
    ids, mask = padded(rows, input_device(model), left=True)
    options = GREEDY | {
        "eos_token_id": sorted(ends.tokens) or None,
        "pad_token_id": min(ends.tokens, default=0),
    }
    if shared:  # `generate` would also count those that still work, but for the length of one call alone
        options["synced_gpus"] = False
    way = _decode_in_calls
    if exit is not None or (not shared and _in_chunks(model, depth) and _chunks_pay(ids, sampling)):
        way = partial(_decode_in_chunks, exit=exit or NEVER)
    with at_depth(model, depth), without_own_settings(model), in_step(model) if shared else nullcontext():
        cache = _shared_prefill(model, rows, ids, mask, options=options)
        noise = (
            None
            if sampling is None
            else lambda places: sampling.processor([numbers[place] for place in places], ids.shape[1])
        )
        return way(model, ids, mask, ends=ends, new_tokens=new_tokens, options=options, cache=cache, noise=noise)


def _shared_prefill(model: Any, rows: list[list[int]], ids: Tensor, mask: Tensor, *, options: dict[str, Any]) -> Any:
    """Run each distinct prompt once, without its last token; return the cache with a row for each of `rows`.

    Returns None where nothing would be saved, or the cache cannot be handed to `generate`.
    """
    places: dict[tuple[int, ...], int] = {}
    of_row = [places.setdefault(tuple(row), len(places)) for row in rows]
    if len(places) == len(rows) or min(map(len, rows)) < 2 or generation_cache_argument(model) is None:
        return None
    first = torch.tensor([of_row.index(place) for place in range(len(places))], device=ids.device)
    output = model.generate(
        input_ids=ids[first, :-1],
        attention_mask=mask[first, :-1],
        max_new_tokens=1,
        **options,
        return_dict_in_generate=True,
    )
    cache = cache_of(output)
    if not goes_on(cache):
        return None
    cache.reorder_cache(torch.tensor(of_row, device=ids.device))  # repeats rows as well as it selects them
    return cache


def _decode_in_chunks(
    model: Any,
    ids: Tensor,
    mask: Tensor,
    *,
    ends: Ends,
    new_tokens: int,
    options: dict[str, Any],
    cache: Any,
    noise: Noise | None,
    exit: ExitRule,
) -> list[list[int]]:
    """Decode in one call of `generate`, in chunks: rows leave inside it."""
    start, chunked = ids.shape[1], ChunkedDecoding(exit=exit)
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=new_tokens,
        **options,
        stopping_criteria=[StopStrings(ends.tokenizer, ends.stop, start, ends=ends.tokens)] if ends.stop else [],
        custom_generate=chunked,
        **_more(model, cache, noise, range(len(ids))),
    )
    found = [row[start : start + len(trace.passes)] for row, trace in zip(output.tolist(), chunked.traces, strict=True)]
    if not all(found):
        raise CheckFailed("a row was decoded to no token at all", "'rr setup' checks the installation.")
    return found


def _decode_in_calls(
    model: Any,
    ids: Tensor,
    mask: Tensor,
    *,
    ends: Ends,
    new_tokens: int,
    options: dict[str, Any],
    cache: Any,
    noise: Noise | None,
) -> list[list[int]]:
    """Decode in several calls of `generate`: each ends when some rows have ended, and the next has the others."""
    start, limit = ids.shape[1], ids.shape[1] + new_tokens
    # Where `generate` cannot be given its cache back, leaving it early saves nothing.
    name = generation_cache_argument(model)
    leaving = 1.0 if name is None else LEAVING_SHARE
    found: list[list[int]] = [[] for _ in ids]
    present = list(range(len(ids)))
    while present:
        watch = _Watch(ends, start, leaving)
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=limit - ids.shape[1],
            **options,
            stopping_criteria=[watch],
            return_dict_in_generate=True,
            **_more(model, cache, noise, present),
        )
        ids = output.sequences
        # Where `generate` looks at stopping a token late (on MPS), it took that token back.
        ended = {row: end for row, end in watch.ended.items() if end <= ids.shape[1]}
        staying = [] if ids.shape[1] >= limit else [row for row in range(len(present)) if row not in ended]
        for row in set(range(len(present))).difference(staying):
            found[present[row]] = ids[row, start : ended.get(row, limit)].tolist()
        selected = torch.tensor(staying, dtype=torch.long, device=ids.device)
        present = [present[row] for row in staying]
        cache = cache_of(output)
        if present and name is not None and goes_on(cache):
            cache.reorder_cache(selected)  # transformers' way to select rows that every kind of layer has
        else:
            # The remaining rows go through the model once more, as longer prompts: it pays where more of them leave.
            cache, leaving = None, max(leaving, 0.5)
        mask = torch.cat([mask[selected], mask.new_ones(len(present), ids.shape[1] - mask.shape[1])], 1)
        ids = ids[selected]
    return found


def _more(model: Any, cache: Any, noise: Noise | None, places: Sequence[int]) -> dict[str, Any]:
    """Return further arguments of `generate`: the cache to go on with, and the noise of the rows at these places."""
    name = generation_cache_argument(model)
    found = {} if cache is None or name is None else {name: cache}
    return found if noise is None else found | {"logits_processor": [noise(places)]}


def _in_chunks(model: Any, depth: int) -> bool:
    """Tell whether chunked decoding finds the same tokens as all passes for every token, and works with the model."""
    recursion = getattr(model, "recursion", None)
    if recursion is None or depth == 0 or model.dtype != torch.float32:
        return False
    return continues_in_blocks(recursion)


def _chunks_pay(ids: Tensor, sampling: Sampling | None) -> bool:
    """Tell whether chunks are sooner than all passes for every token: not for the many rows of samples on a CPU.

    There decoding is bound by computation, of which chunks save nothing. Measured on the embedded model with 480 rows:
    1.5 s in chunks, 0.6 s with all passes.
    """
    return sampling is None or ids.device.type != "cpu"


class Ends:
    """What ends an answer: the end tokens and the stop strings."""

    def __init__(self, tokenizer: Any, tokens: set[int], stop: Sequence[str]) -> None:
        self.tokenizer, self.tokens, self.stop = tokenizer, tokens, tuple(stop)
        self.detokenizer = Detokenizer(tokenizer, tokens, stop)
        # A token holds at least one byte; two more, since the first of a text may lose its space.
        self.reach = max((len(text.encode()) for text in stop), default=0) + 2

    def cut(self, text: str) -> tuple[str, bool]:
        """Return `text` up to the first stop string, and whether there was one."""
        end = min((place for stop in self.stop if (place := text.find(stop)) >= 0), default=-1)
        return (text, False) if end < 0 else (text[:end], True)

    def text_after(self, prompt: list[int], new: list[int]) -> str:
        """Return the text that `new` ids add to a prompt."""
        return self.detokenizer.text(new, self.detokenizer.context(prompt))

    def stopped(self, ids: Tensor, start: int) -> list[bool]:
        """Tell for each row of `[row, position]` ids whether its last token completed a stop string after `start`."""
        if not self.stop:
            return [False] * len(ids)
        before = min(start, CONTEXT_LENGTHS[-1])
        rows = ids[:, start - before :].tolist()
        contexts = [self.detokenizer.context(row[:before]) for row in rows]
        new = [row[before:] for row in rows]
        # The tail's text may differ from the whole's where it is cut; the whole text decides.
        tails = [[*context, *row[-self.reach :]][-self.reach :] for context, row in zip(contexts, new, strict=True)]
        return [
            self.cut(tail)[1] and self.cut(self.detokenizer.text(row, context))[1]
            for row, tail, context in zip(new, self.detokenizer.decode_all(tails), contexts, strict=True)
        ]


class StopStrings(StoppingCriteria):
    """Ends a row where its last token completes one of the `stop` strings in the text after position `start`.

    It looks at nothing but the ids it is given, so that any decoding method may ask it about any row. (transformers'
    own `StopStringCriteria` goes by the texts of single tokens, and `generate` does not hand `stop_strings` on to
    custom methods.)

    Args:
        ends: the tokens that end a text, besides the tokenizer's own; they give no text.
    """

    looks_at_tokens_alone = True  # so that an export decodes in chunks with it

    def __init__(self, tokenizer: Any, stop: Sequence[str], start: int, *, ends: Iterable[int] = ()) -> None:
        self.ends, self.start = Ends(tokenizer, set(ends), stop), start

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.tensor(self.ends.stopped(input_ids, self.start), device=input_ids.device)


class _Watch(StoppingCriteria):
    """Notes where rows end, and ends the call of `generate` once a share of them, `leaving`, has ended."""

    def __init__(self, ends: Ends, start: int, leaving: float) -> None:
        self.ends, self.start, self.leaving = ends, start, leaving
        self.ended: dict[int, int] = {}

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        last = input_ids[:, -1].tolist()
        open_rows = [row for row in range(len(last)) if row not in self.ended]
        for row, stopped in zip(open_rows, self.ends.stopped(input_ids[open_rows], self.start), strict=True):
            if stopped or last[row] in self.ends.tokens:
                self.ended[row] = input_ids.shape[1]
        leave = len(self.ended) >= self.leaving * len(last) and self.ended
        done = [bool(leave) or row in self.ended for row in range(len(last))]
        return torch.tensor(done, device=input_ids.device)
