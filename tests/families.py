"""Tiny models of the families in `tiny_configs`, and what tests and the family matrix do with them."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rrcli.evaluation.decoding import decode
from rrcli.recursion.abilities import continues_in_blocks, takes_padding
from rrcli.recursion.chunked_decoding import ChunkedDecoding
from rrcli.recursion.config import RecursionConfig
from rrcli.recursion.engine import attach, self_check
from tiny_configs import CONFIGS, MORE, REFUSED, VOCABULARY

# Cached and uncached forward may differ by rounding: fp32, relative to the largest logit.
ROUNDING = 1e-5
# A model may be so badly conditioned that fp32 cannot hold ROUNDING: then by this many times what it makes of a change
# in the last place of its embeddings (0.1 to 2.7 times was seen over all families).
CONDITIONING = 4
# Models of these families count positions from 0 in every call, unless they are told; `generate` tells them.
TOLD_POSITIONS = ("bamba", "minimax")

# A torch that was built for CUDA, on a machine that has none: some of it asks for the driver all the same.
NO_DRIVER = torch.version.cuda is not None and not torch.cuda.is_available()

FAMILIES = sorted(CONFIGS)
SPANS = [None, (1, 3)]
# Of the recursions that `attached` attaches.
MAX_STEPS = 2


def build(family: str, **changes: Any) -> Any:
    """Return a random model of `family` in evaluation mode, in fp32; always the same weights.

    Matrices are drawn larger than the families' own initialisation does, so that attention is far from uniform and a
    wrong cache or mask shows in the logits.
    """
    if changes:
        return _build(family, **changes)
    return copy.deepcopy(_built(family))


def _build(family: str, **changes: Any) -> Any:
    config = AutoConfig.for_model(
        family, **((CONFIGS | MORE | REFUSED)[family] | {"pad_token_id": 0, "bos_token_id": 1} | changes)
    )
    config.eos_token_id = None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval().float()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() >= 2:
                    parameter.normal_(std=0.1)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


_built = functools.cache(_build)


def tokens(batch: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    """Return random token ids `[batch, length]`, none of them special."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def wake(recursion: Any, std: float = 0.1) -> Any:
    """Give a recursion random weights everywhere, as if it had been trained, and return it."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in recursion.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * std)
    return recursion


def attach_random(model: Any, std: float) -> Any:
    """Attach two passes whose output projection is random, so that they change some tokens; return the recursion."""
    recursion = attach(model, RecursionConfig(max_steps=2, commit_margin=0.02))
    torch.manual_seed(0)
    torch.nn.init.normal_(recursion.cell.w_out.weight, std=std)
    return recursion


def attached(family: str, span: tuple[int, int] | None = None, awake: bool = True, **changes: Any) -> tuple[Any, Any]:
    """Return a model and its recursion, which is `wake`d if it should show."""
    model = build(family, **changes)
    recursion = attach(model, RecursionConfig(max_steps=MAX_STEPS, span=span))
    return model, wake(recursion) if awake else recursion


def hooks(model: Any) -> dict[str, list[int]]:
    """Return how many hooks each module has."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {name: [len(getattr(module, kind)) for kind in kinds] for name, module in model.named_modules()}


def accepts(model: Any, argument: str) -> bool:
    """Tell whether the model's forward takes `argument`."""
    return argument in inspect.signature(model.forward).parameters


def cache_name(model: Any) -> str:
    """Return the name under which the model takes and returns its cache."""
    return next(name for name in ("cache", "past_key_values", "cache_params") if accepts(model, name))


def arguments(model: Any, mask: torch.Tensor | None, start: int, end: int) -> dict[str, Any]:
    """Return mask and positions of a forward over positions `[start, end)` of a left-padded batch."""
    if mask is None:
        if model.config.model_type not in TOLD_POSITIONS or start == 0:
            return {}
        mask = torch.ones(1, end, dtype=torch.long)
    values: dict[str, Any] = {"attention_mask": mask[:, :end]}
    if accepts(model, "position_ids"):
        values["position_ids"] = (mask.long().cumsum(1) - 1).clamp_min(0)[:, start:end]
    return values


def uncached(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Return `[batch, position, vocabulary]` logits of one forward without a cache."""
    return model(ids, use_cache=False, **arguments(model, mask, 0, ids.shape[1])).logits


def cached(
    model: Any, ids: torch.Tensor, prefill: int = 7, mask: torch.Tensor | None = None, cache: Any = None
) -> tuple[torch.Tensor, Any]:
    """Return the logits of `prefill` positions at once and the others one by one, and the cache."""
    name = cache_name(model)
    parts = []
    for start, end in [(0, prefill), *((t, t + 1) for t in range(prefill, ids.shape[1]))]:
        known = {} if cache is None else {name: cache}
        output = model(ids[:, start:end], use_cache=True, **known, **arguments(model, mask, start, end))
        cache = getattr(output, name)
        parts.append(output.logits)
    return torch.cat(parts, 1), cache


class Letters:
    """A tokenizer whose token t is the character of code t + 32."""

    eos_token_id = None

    def decode(self, ids: Any, skip_special_tokens: bool = True) -> str:
        """Return a character for each id."""
        return "".join(chr(32 + i) for i in ids)

    def batch_decode(self, rows: Any, skip_special_tokens: bool = True) -> list[str]:
        """Return the text of each row."""
        return [self.decode(row) for row in rows]


def generate(model: Any, ids: torch.Tensor, **options: Any) -> Any:
    """Generate 6 tokens, greedily unless told otherwise."""
    defaults = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False, "use_cache": True}
    return model.generate(ids, **(defaults | options))


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the largest difference relative to the scale of `b`."""
    return float((a - b).abs().max() / b.abs().max())


@torch.no_grad()
def resolution(model: Any, ids: torch.Tensor) -> float:
    """Return how far the logits move when every embedding changes by one unit in the last place (fp32)."""
    plain = uncached(model, ids)
    generator = torch.Generator().manual_seed(2)

    def nudge(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        signs = torch.randint(0, 2, output.shape, generator=generator) * 2 - 1
        return output * (1 + torch.finfo(torch.float32).eps * signs)

    hook = model.get_input_embeddings().register_forward_hook(nudge)
    try:
        return far(uncached(model, ids), plain)
    finally:
        hook.remove()


def limit(model: Any, ids: torch.Tensor) -> float:
    """Return how far logits that should be the same may differ."""
    return max(ROUNDING, CONDITIONING * resolution(model, ids))


def padded_left(prompts: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `[row, position]` ids of prompts of different lengths, padded on the left, and their mask."""
    width = max(map(len, prompts))
    ids = torch.stack([torch.nn.functional.pad(prompt, (width - len(prompt), 0)) for prompt in prompts])
    mask = torch.stack([torch.arange(width) >= width - len(prompt) for prompt in prompts]).long()
    return ids, mask


def same_text(model: Any, expected: torch.Tensor, found: torch.Tensor) -> bool:
    """Tell whether two greedy texts are one, or part where the model's two best logits cannot be told apart."""
    if torch.equal(expected, found):
        return True
    if expected.shape != found.shape:
        return False
    place = int(expected.ne(found).nonzero()[0])
    logits = uncached(model, expected[None, :place])[0, -1]
    gap = (logits[expected[place]] - logits[found[place]]).abs() / logits.abs().max()
    return float(gap) < limit(model, expected[None, :place])


@torch.no_grad()
def decoding_faults(
    family: str,
    spans: Sequence[tuple[int, int] | None] = tuple(SPANS),
    depths: Sequence[int] = (1, 2),
    *,
    lengths: Sequence[int] = (9, 6, 8, 3),
    new: int = 10,
    width: int = 4,
) -> list[str]:
    """Hold every way to decode against each prompt alone with every pass for every token; name those that differ.

    The ways are: `rr`'s own decoding of all prompts; where the family takes padding, stock `generate` with a batch of
    them; and with a recursion chunked decoding of that batch and of single prompts. The stock model and a recursion
    with random weights, at some depths and spans.
    """
    prompts = [tokens(1, length, seed=seed)[0] for seed, length in enumerate(lengths)]
    ids, mask = padded_left(prompts)
    faults = []
    for span, depth in [(None, 0), *((span, depth) for span in spans for depth in depths)]:
        model = build(family)
        if depth:
            wake(attach(model, RecursionConfig(max_steps=max(depths), span=span)), 0.03).depth = depth

        def alone(**options: Any) -> list[torch.Tensor]:
            return [generate(model, prompt[None], max_new_tokens=new, **options)[0] for prompt in prompts]  # noqa: B023

        def batch(**options: Any) -> list[torch.Tensor]:
            written = generate(model, ids, attention_mask=mask, max_new_tokens=new, **options)  # noqa: B023
            return [row[ids.shape[1] - length :] for row, length in zip(written, lengths, strict=True)]

        def decoded() -> list[torch.Tensor]:
            rows = [prompt.tolist() for prompt in prompts]
            found = decode(model, Letters(), rows, depth=depth, new_tokens=new, batch_tokens=10_000)  # noqa: B023
            texts = {one.number: one.tokens for part in found for one in part}
            return [torch.tensor(row + texts[number]) for number, row in enumerate(rows)]

        ways: dict[str, Callable[[], list[torch.Tensor]]] = {"rr's decoding": decoded}
        if takes_padding(model):
            ways["a batch"] = batch
        if depth:
            ways["chunks"] = lambda: alone(custom_generate=ChunkedDecoding(width))
        if depth and takes_padding(model):
            ways["chunks of a batch"] = lambda: batch(custom_generate=ChunkedDecoding(width))
        expected = alone()
        for way, run in ways.items():
            try:
                same = [same_text(model, *pair) for pair in zip(expected, run(), strict=True)]
            except Exception as error:  # what fails in one family is said with the others
                faults.append(f"{way}, span {span}, depth {depth}: {type(error).__name__}: {error}")
                continue
            if not all(same):
                faults.append(f"{way}, span {span}, depth {depth}: rows {[i for i, one in enumerate(same) if not one]}")
    return faults


@dataclass(frozen=True)
class Findings:
    """What was found for one family, over a full and a partial span and every depth.

    Attributes:
        cached: the largest difference of cached and uncached logits. limit: what it must be below.
        faults: ways to decode that write other tokens than a prompt alone with every pass; see `decoding_faults`.
        padding: whether prompts of different lengths may share a batch. blocks: whether it can be decoded in chunks.
    """

    exact: bool
    cached: float
    limit: float
    causal: bool
    generates: bool
    learns: bool
    faults: tuple[str, ...]
    padding: bool
    blocks: bool

    @property
    def hold(self) -> bool:
        """Whether every property holds."""
        return (
            self.exact
            and self.cached < self.limit
            and self.causal
            and self.generates
            and self.learns
            and not self.faults
        )


def examine(family: str, max_steps: int = 2) -> Findings:
    """Hold every property of a recursion against one family, once."""
    # Frozen like the model below: torch picks another convolution kernel for weights that want no gradient.
    stock, ids = build(family).requires_grad_(False), tokens()
    with torch.no_grad():
        plain, stepwise, text = uncached(stock, ids), cached(stock, ids)[0], generate(stock, ids)
    exact, causal, generates, learns, worst, most = True, True, True, True, 0.0, 0.0
    for span in SPANS:
        model = build(family)
        recursion = attach(model, RecursionConfig(max_steps=max_steps, span=span))
        model.requires_grad_(False)
        uncached(model, ids).logsumexp(-1).sum().backward()
        learns &= float(recursion.cell.w_out.weight.grad.norm()) > 0
        with torch.no_grad():
            self_check(recursion)
            for depth in range(max_steps + 1):
                recursion.depth = depth
                exact &= torch.equal(uncached(model, ids), plain)
            exact &= torch.equal(cached(model, ids)[0], stepwise) and torch.equal(generate(model, ids), text)
            wake(recursion)
            for depth in range(1, max_steps + 1):
                recursion.depth = depth
                worst = max(worst, far(cached(model, ids)[0], uncached(model, ids)))
            most = max(most, limit(model, ids))
            awake, place = uncached(model, ids), 6
            learns &= far(awake, plain) > 1e-3
            other = ids.clone()
            other[:, place] = (other[:, place] + 7) % 90 + 3
            changed = uncached(model, other)
            causal &= far(changed[:, :place], awake[:, :place]) < most
            causal &= far(changed[:, place:], awake[:, place:]) > 1e-4
            written = generate(model, ids[:, :6])
            generates &= torch.equal(written[:, 6:], uncached(model, written)[:, 5:-1].argmax(-1))
            recursion.depth = 0
            exact &= torch.equal(uncached(model, ids), plain)
    faults = tuple(decoding_faults(family))
    padding, blocks = takes_padding(stock), continues_in_blocks(recursion)
    return Findings(exact, worst, most, causal, generates, learns, faults, padding, blocks)
