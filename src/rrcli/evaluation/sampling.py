"""Sampling whose draws belong to their row: the same answer, whatever else is in the batch, and however it is decoded.

Gumbel-max (Gumbel 1954): if g_v are independent draws of a standard Gumbel distribution, argmax_v(logits_v / T + g_v)
is a draw from softmax(logits / T). Here g is a hash of the row's key, the number of the new token and v. So sampling is
greedy decoding with noise that is added to the scores, and what holds for greedy decoding holds for it:

- chunks find exactly the tokens of all passes for every token, because draft and refined scores get the same noise;
- an evaluation that was interrupted goes on with the same answers, in other batches;
- two stages are asked with the same noise, so that their difference is that of the models (common random numbers).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn: at which temperature, and from which key for each prompt (`row_key`)."""

    temperature: float
    keys: Sequence[int]

    def processor(self, rows: Sequence[int], start: int) -> LogitsProcessor:
        """Return what turns greedy decoding of a batch into sampling.

        Args:
            rows: the number of the prompt of each row. start: how many columns the prompts have, padding included.
        """
        return _GumbelNoise(self.temperature, [self.keys[row] for row in rows], start)


def row_key(*parts: Any) -> int:
    """Return a key of 62 bits, made of anything that `repr` writes."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 2


class _GumbelNoise(LogitsProcessor):
    """Divides the scores of each row by the temperature and adds the noise of its key and of the token's number."""

    def __init__(self, temperature: float, keys: Sequence[int], start: int) -> None:
        self.temperature, self.start = temperature, start
        self.keys = torch.tensor([[key & 0x7FFFFFFF, key >> 31] for key in keys], dtype=torch.int32)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return `[row, vocabulary]` scores whose largest is a draw from softmax(scores / temperature)."""
        numbers = torch.full_like(input_ids[:, 0], input_ids.shape[1] - self.start)
        return self.placed(scores, range(len(scores)), numbers)

    def placed(self, scores: Tensor, rows: Sequence[int], numbers: Tensor) -> Tensor:
        """Do the same for some rows of the batch, each at a new token of its own; see `PlacedProcessor`."""
        noise = gumbel(self.keys[list(rows)].to(scores.device), numbers, scores.shape[-1])
        return noise.add_(scores.float(), alpha=1 / self.temperature)


def gumbel(keys: Tensor, numbers: Tensor, size: int) -> Tensor:
    """Return `[row, size]` draws of a standard Gumbel distribution.

    Args:
        keys: `[row, 2]` int32. numbers: `[row]` which new token of its row the draws are for.
    """
    low, high = keys.unbind(1)
    row = _mixed(_mixed(low ^ ((numbers.int() + 1) * _signed(0x9E3779B9))) ^ high)
    bits = _mixed(row[:, None] ^ _columns(size, str(keys.device)))
    # 23 bits, in the middle of their intervals: each of these uniform numbers, and 1 minus it, is exact in fp32.
    uniform = bits.bitwise_right_shift_(9).bitwise_and_(2**23 - 1).float().add_(0.5).mul_(2.0**-23)
    return uniform.log_().neg_().log_().neg_()


@lru_cache(maxsize=4)
def _columns(size: int, device: str) -> Tensor:
    return _mixed(torch.arange(size, dtype=torch.int32, device=device))


def _mixed(bits: Tensor) -> Tensor:
    """Return the hash `lowbias32` (Wellons 2018) of int32 bits: each bit of the result depends on all of them."""
    bits = bits.clone()
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        bits ^= bits.bitwise_right_shift(shift).bitwise_and_((1 << (32 - shift)) - 1)
        bits *= _signed(factor)
    return bits


def _signed(value: int) -> int:
    """Return the int32 with the lowest 32 bits of a value."""
    return (value + 2**31) % 2**32 - 2**31
