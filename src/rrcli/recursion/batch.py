"""A batch of tokenised examples, as data makes it and the losses read it. Importing this loads no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

# Labels with this value bear no loss: what cross-entropy ignores throughout PyTorch.
IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """Examples, padded on the right. All tensors are `[row, position]`.

    A row holds one example, or several where they are packed (see `data/packing`).

    Attributes:
        input_ids: token ids.
        attention_mask: 1 for a token, 0 for padding.
        labels: what each position should predict next (already shifted), `IGNORED` where there is no loss.
        position_ids: the position of each token within its example; given only where rows are packed.
        examples: the number of each token's example; given only where rows are packed.
        sampled: the loss-bearing positions that intermediate passes learn from; None means all of them.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    position_ids: Tensor | None = None
    examples: Tensor | None = None
    sampled: Tensor | None = None

    @property
    def tokens(self) -> int:
        """How many positions bear loss."""
        return int(self.loss_bearing.sum())

    @property
    def positions(self) -> int:
        """How many positions there are, with padding."""
        return self.input_ids.numel()

    @property
    def loss_bearing(self) -> Tensor:
        """`[row, position]` booleans: where there is a label."""
        return self.labels.ne(IGNORED)

    def part(self, rows: slice) -> Batch:
        """Return some of the rows."""
        return self._each(lambda tensor: tensor[rows])

    def to(self, device: Any) -> Batch:
        """Return the batch on a device."""
        return self._each(lambda tensor: tensor.to(device))

    def without_loss(self) -> Batch:
        """Return the same rows, of which no position bears loss."""
        labels = self.labels.new_full(self.labels.shape, IGNORED)
        sampled = None if self.sampled is None else self.sampled.new_zeros(self.sampled.shape)
        return replace(self, labels=labels, sampled=sampled)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        tensors = {item.name: getattr(self, item.name) for item in fields(self)}
        return replace(self, **{name: change(tensor) for name, tensor in tensors.items() if tensor is not None})
