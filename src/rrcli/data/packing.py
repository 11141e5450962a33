"""Packing: lay several examples into one row, where none sees another, so that less is computed on padding.

A packed step has the same examples and the same losses as one without packing. A model recognises packed rows by their
positions, which start at 0 with every example, and by the absence of an attention mask; transformers then lets each
token attend to its own example alone. This works for softmax attention. Recurrent and convolutional layers do not stop
at the end of an example, and families with attention code of their own may ignore it: so `check_packing` compares
packed and separate examples on the model itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rrcli.errors import UsageError
from rrcli.recursion.batch import IGNORED, Batch
from rrcli.recursion.families import input_device
from rrcli.recursion.readout import Readout

# Lengths of the examples on which `check_packing` tries a model, in tokens.
TRIED = (5, 9, 7)


def pack(examples: Sequence[tuple[list[int], list[int]]], length: int, pad: int) -> Batch:
    """Lay (ids, labels) pairs into rows of at most `length` tokens: longest first, each where least room is left."""
    rows: list[list[int]] = []
    free: list[int] = []
    for number in sorted(range(len(examples)), key=lambda number: -len(examples[number][0])):
        size = len(examples[number][0])
        best = min((row for row in range(len(rows)) if free[row] >= size), key=lambda row: free[row], default=None)
        if best is None:
            best = len(rows)
            rows.append([])
            free.append(length)
        rows[best].append(number)
        free[best] -= size
    width = length - min(free)
    ids = torch.full((len(rows), width), pad)
    labels, numbers = torch.full_like(ids, IGNORED), torch.full_like(ids, -1)
    # The positions of the padding after the last example start at 0 too: to the model it is one more example.
    positions = torch.zeros_like(ids)
    for row, held in enumerate(rows):
        begin = 0
        for number in held:
            own_ids, own_labels = examples[number]
            place = slice(begin, begin + len(own_ids))
            ids[row, place], labels[row, place] = torch.tensor(own_ids), torch.tensor(own_labels)
            positions[row, place], numbers[row, place] = torch.arange(len(own_ids)), number
            begin += len(own_ids)
        positions[row, begin:] = torch.arange(width - begin)
    return Batch(ids, numbers.ne(-1).long(), labels, positions, numbers)


@torch.no_grad()
def check_packing(readout: Readout) -> None:
    """Compare packed with separate examples, in every pass of the model at its current depth.

    Raises:
        UsageError: they differ by more than rounding.
    """
    model = readout.model
    limit = max(1e-4, 8 * torch.finfo(model.dtype).eps)
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(readout.vocabulary, (size,), generator=generator) for size in TRIED]
    batch = pack([(text.tolist(), [IGNORED] * len(text)) for text in texts], sum(TRIED), 0)
    assert batch.examples is not None
    try:
        packed = _hidden(readout, batch.input_ids, None, batch.position_ids)
        alone = [_hidden(readout, text[None], torch.ones_like(text)[None], None) for text in texts]
    except (TypeError, ValueError, RuntimeError) as error:
        raise _refused(model, str(error)) from error
    for number, expected in enumerate(alone):
        found = packed[:, batch.examples[0].to(packed.device) == number]
        if not float((found - expected).abs().max() / expected.abs().max()) <= limit:
            raise _refused(model, "what comes before an example in its row changes its hidden states")


def _hidden(readout: Readout, ids: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor:
    """Return `[passes, position, hidden]` of one row."""
    home = input_device(readout.model)
    mask, positions = (None if tensor is None else tensor.to(home) for tensor in (mask, positions))
    return torch.stack([hidden[0].float() for hidden in readout.passes(ids.to(home), mask, positions).hidden])


def _refused(model: object, why: str) -> UsageError:
    family = model.config.model_type  # type: ignore[attr-defined]
    return UsageError(f"--packing is not exact for this '{family}' model: {why}", "Train it without --packing.")
