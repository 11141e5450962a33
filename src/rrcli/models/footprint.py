"""How many bytes and FLOPs a model takes to train, to score and to generate, from its skeleton alone.

    weights      of the base in its format, or quantised; of the sidecar; of the adapters. What trains is held in fp32
    gradients    4 bytes for each weight that trains
    optimiser    8 bytes for each weight that trains, and 4 for each tensor; 4 more with an average of the weights
    activations  what forward keeps for backward, or computes at a time, at the moment when most is held
    logits       the tiles of them, at that moment
    caches       keys, values and states of all passes

A step of training, a scored batch and a prompt are run on shapes (see `ledger`). So the numbers are those of the code
that will run, for every family and with every option that it has. What is not in them: the device's own context, what a
kernel takes while it runs, and memory that an allocator cannot use again. Where a family's fast kernels are not
installed, its reference in torch is what is counted, as it is what would run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rrcli.errors import RRError, first_line
from rrcli.models import ledger as accounts
from rrcli.models.costs import held_bytes
from rrcli.models.few_bits import sizes
from rrcli.models.ledger import accounted
from rrcli.recursion import tiles
from rrcli.recursion.boundary_head import Top
from rrcli.recursion.config import RecursionConfig
from rrcli.recursion.engine import at_depth, attach
from rrcli.recursion.facts import vocabulary
from rrcli.recursion.lora import add_lora
from rrcli.recursion.readout import Readout
from rrcli.upstream import cache_of

Found = TypeVar("Found")

# What AdamW keeps of a weight, in bytes, and of each tensor: its step.
OF_WEIGHT, OF_TENSOR = 8, 4
# Bytes of scoring for each logit of a tile: the tile and what is computed from it, in fp32.
OF_A_TILE = 6 * 4


@dataclass(frozen=True)
class Weights:
    """What is held for as long as a model is trained or run, in bytes.

    Attributes:
        base, sidecar, adapters: weights. gradients, optimiser: of what trains; 0 where nothing does.
        parameters: how many weights there are in all three. trained: how many of them train.
    """

    base: int
    sidecar: int
    adapters: int
    gradients: int
    optimiser: int
    parameters: int
    trained: int


@dataclass(frozen=True)
class Use:
    """What one forward takes, with its backward where there is one.

    Attributes:
        flops: of the whole batch.
        activations, logits: bytes at the moment when most is held; in training those beside all gradients, so that all
            parts add up to the peak.
        uncounted: names of operators whose FLOPs are not known.
    """

    flops: int
    activations: int
    logits: int
    uncounted: tuple[str, ...] = ()


def seen(model: Any, measure: Callable[[Any], Found]) -> Found:
    """Return what is measured on the shapes of a skeleton.

    Raises:
        RRError: the family cannot run on them.
    """
    try:
        return measure(model)
    except RRError:
        raise
    except Exception as error:  # of any kind: it is the family's own code that runs without values
        raise RRError(
            f"a '{model.config.model_type}' model cannot be run on shapes alone: {first_line(error)}",
            "Its memory can be measured alone: 'rr costs', and 'rr train' with few --steps.",
        ) from error


def operate(
    model: Any,
    *,
    recursion: RecursionConfig | None,
    phase: str = "",
    lora: tuple[int, int] | None = None,
    span: Sequence[int] | None = None,
    experts: bool = False,
) -> list[Tensor]:
    """Give a skeleton a recursion, adapters and what a phase trains, and return what trains: tied weights once.

    Args:
        recursion: None for vanilla training and the baseline. phase: of a training; '' for a model that is only run.
        lora: rank and alpha, in phase b. span: the layers that are adapted without a recursion; None means all.
        experts: whether experts are adapted too.
    """
    if recursion is not None:
        attach(model, recursion).to("meta")
    model.requires_grad_(phase == "c")
    if phase == "b":
        rank, alpha = lora or (16, 32)
        add_lora(model, rank, alpha, span=span, experts=experts)
        model.to("meta")  # adapters of weights that are nowhere are given real ones
        for parameter in model.lora.parameters():
            parameter.requires_grad_(True)
    if model.__dict__.get("recursion") is not None:
        model.recursion.requires_grad_(bool(phase))
    trained: list[Tensor] = [p for part in _parts(model) for p in part.parameters() if p.requires_grad]
    for parameter in trained:  # a step of 1e-5 of a bfloat16 weight is lost in its rounding
        parameter.data = parameter.data.float()
    return trained


def weights_of(model: Any, trained: Sequence[Tensor] = (), *, average: bool = False) -> Weights:
    """Return what the weights of a skeleton take, and what training them takes.

    Args:
        trained: what `operate` returned. average: whether an average of the weights goes along (`--ema`).
    """
    adapters = {id(p) for p in model.lora.parameters()} if model.__dict__.get("lora") is not None else set()
    held = sizes(model)
    sidecar = list(model.recursion.parameters()) if model.__dict__.get("recursion") is not None else []
    count = sum(p.numel() for p in trained)
    return Weights(
        base=sum(size for key, size in held.items() if key not in adapters),
        sidecar=sum(p.numel() * p.element_size() for p in sidecar),
        adapters=sum(size for key, size in held.items() if key in adapters),
        gradients=4 * count,
        optimiser=OF_WEIGHT * count + OF_TENSOR * len(trained) + (4 * count if average else 0),
        parameters=sum(p.numel() for part in _parts(model) for p in part.parameters()),
        trained=count,
    )


def training_step(
    model: Any,
    trained: Sequence[Tensor],
    *,
    rows: int,
    length: int,
    depth: int,
    share: float,
    device: str,
    autocast: bool,
    accumulates: bool = False,
) -> Use:
    """Run one part of a training step on shapes, forward and backward: the losses of `recursion/losses`.

    Every position bears loss, which is the most that a batch of that size can take.

    Args:
        model: a skeleton; see `operate`. trained: what that returned.
        rows, length: of the part. depth: how many passes follow pass 0; 0 without a recursion.
        share: of the positions that intermediate passes learn from. autocast: whether it computes in bfloat16.
        accumulates: whether gradients of an earlier part are there already.

    Raises:
        Exception: of any kind, where a family cannot run on the meta device.
    """
    readout = Readout(model)
    ids = torch.zeros(rows, length, dtype=torch.long, device="meta")
    model.train()
    try:
        with accounted(model, [ids], vocabulary=readout.vocabulary, device=device, autocast=autocast) as ledger:
            for parameter in trained if accumulates else ():
                parameter.grad = torch.zeros_like(parameter)
                ledger.mark_gradient(parameter)
            _losses(readout, ids, depth=depth, share=share).backward()
    finally:
        model.eval()
        for parameter in trained:
            parameter.grad = None
    peak = ledger.peak
    of_gradients = 4 * sum(p.numel() for p in trained)
    logits = peak[accounts.LOGITS]
    rest = max(sum(peak.values()), of_gradients) - logits - of_gradients
    return Use(ledger.total, max(0, rest), max(0, logits + min(0, rest)), tuple(sorted(ledger.uncounted)))


def _losses(readout: Readout, ids: Tensor, *, depth: int, share: float) -> Tensor:
    """Return the total of a part's losses, with the tensors that `compute_losses` makes for them on the way."""
    passes = readout.passes(ids, None, depth=depth)
    count = ids.numel()
    places = torch.zeros(count, 2, dtype=torch.long, device="meta")
    bearing = places[:, 0], places[:, 1]
    targets = torch.zeros(count, dtype=torch.long, device="meta")
    final, final_top = readout.token_losses(passes.hidden[-1][bearing], targets, predict=depth > 0)
    if depth == 0:
        return final.sum() / count
    index = torch.zeros(math.ceil(count * share), dtype=torch.long, device="meta")
    assert final_top is not None
    earlier, tops = [], list[Top]()
    for hidden in passes.hidden[:-1]:
        ce, top = readout.token_losses(hidden[bearing][index], targets[index])
        assert top is not None
        earlier.append(ce)
        tops.append(top)
    ce_by_pass = torch.stack([*earlier, final[index]])
    states = torch.stack([state[bearing][index].detach() for state in passes.states[:-1]])
    logits = readout.recursion.head(states, Top(*map(torch.stack, zip(*tops, strict=True)))).float()
    halt = (
        F.binary_cross_entropy_with_logits(logits, torch.zeros_like(logits)) + (1 - logits.sigmoid()).cumprod(0).sum()
    )
    return final.sum() / count + ce_by_pass[:-1].sum() + halt + F.silu(ce_by_pass[1:] - ce_by_pass[:-1].detach()).sum()


@torch.no_grad()
def scored_batch(model: Any, *, rows: int, length: int, depth: int, device: str) -> Use:
    """Run a batch that is scored at every depth up to `depth` on shapes: without a cache, its logits tile by tile.

    Raises:
        Exception: of any kind, where a family cannot run on the meta device.
    """
    readout = Readout(model)
    ids = torch.zeros(rows, length, dtype=torch.long, device="meta")
    with accounted(model, [ids], vocabulary=readout.vocabulary, device=device) as ledger:
        passes = readout.passes(ids, None, depth=depth)
        places = torch.zeros(ids.numel(), 2, dtype=torch.long, device="meta")
        for hidden in passes.hidden:
            chosen = hidden[places[:, 0], places[:, 1]]
    width = chosen.shape[-1]
    head = 2 * ids.numel() * width * readout.vocabulary * (depth + 1)
    columns = min(tiles.COLUMNS.get(device, tiles.COLUMNS_ELSEWHERE), readout.vocabulary)
    logits = OF_A_TILE * min(tiles.ROWS, ids.numel()) * columns
    return Use(ledger.total + head, sum(ledger.peak.values()), logits, tuple(sorted(ledger.uncounted)))


@torch.no_grad()
def prompted(model: Any, *, rows: int, length: int, depth: int, device: str) -> Use:
    """Run prompts through every pass on shapes, with a cache, which is not among the activations.

    Raises:
        Exception: of any kind, where a family cannot run on the meta device.
    """
    ids = torch.zeros(rows, length, dtype=torch.long, device="meta")
    keep: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in signature(model.forward).parameters else {}
    with at_depth(model, depth), accounted(model, [ids], vocabulary=vocabulary(model), device=device) as ledger:
        cache = cache_of(model(input_ids=ids, use_cache=True, **keep))
    held = held_bytes(cache, set())
    logits = ledger.peak[accounts.LOGITS]
    activations = max(0, sum(ledger.peak.values()) - held - logits)
    return Use(ledger.total, activations, logits, tuple(sorted(ledger.uncounted)))


def _parts(model: Any) -> Iterator[nn.Module]:
    """Yield the model, and its recursion where it has one."""
    yield model
    if model.__dict__.get("recursion") is not None:
        yield model.recursion
