"""The chunk metrics of known text: what drafting, refining and committing would have done with it.

Every pass is run over the text itself (teacher forcing). The draft is what pass 0 predicts over a window of
`chunk_width` positions, and the refined chunk is what the last pass predicts there. Totals are added up over batches,
so that the metrics are means over all chunks, not means of means.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from rrcli.recursion.calibration import Bins, errors, joined

COMMIT_THRESHOLD = 0.5


@dataclass
class ChunkTotals:
    """Sums over chunks and positions.

    Attributes:
        chunks, positions: how many were seen.
        refine_steps: passes after pass 0, summed over chunks, when the boundary head stops them.
        whole: chunks whose whole draft the last pass agrees with.
        committed: tokens committed at once, summed over chunks: the agreed prefix plus the corrected token.
        left: the passes with which they left (0 for pass 0), summed over these tokens; None where nothing was decoded.
        stable: for each pass k >= 1, positions whose prediction equals that of pass k-1.
        wrong, fixed: errors of pass 0, and how many of them the last pass corrects.
        right, broken: right predictions of pass 0, and how many of them the last pass makes wrong.
        reliability: sums for the calibration of the boundary head; empty where it was not measured.
    """

    chunks: int = 0
    positions: int = 0
    refine_steps: int = 0
    whole: int = 0
    committed: int = 0
    left: int | None = None
    stable: list[int] = field(default_factory=list)
    wrong: int = 0
    fixed: int = 0
    right: int = 0
    broken: int = 0
    reliability: Bins = field(default_factory=list)

    def add(self, other: ChunkTotals) -> None:
        """Add another batch's totals."""
        for name in ("chunks", "positions", "refine_steps", "whole", "committed", "wrong", "fixed", "right", "broken"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        if other.left is not None:
            self.left = (self.left or 0) + other.left
        width = max(len(self.stable), len(other.stable))
        padded = [[*t.stable, *[0] * (width - len(t.stable))] for t in (self, other)]
        self.stable = [a + b for a, b in zip(*padded, strict=True)]
        self.reliability = joined(self.reliability, other.reliability)

    def metrics(self) -> dict[str, float]:
        """Return the metrics by name; none where no chunk was seen."""
        if not self.chunks:
            return {}
        values = {
            "avg_refine_steps": self.refine_steps / self.chunks,
            "commit_rate": self.whole / self.chunks,
            "avg_chunk_length": self.committed / self.chunks,
        }
        if self.left is not None:
            values["avg_passes"] = self.left / self.committed
        values |= {f"stability@{k}": count / self.positions for k, count in enumerate(self.stable, start=1)}
        if self.wrong:
            values["fix_rate"] = self.fixed / self.wrong
        if self.right:
            values["break_rate"] = self.broken / self.right
        return values | errors(self.reliability)


@torch.no_grad()
def teacher_forced_chunks(predictions: Tensor, commit: Tensor, targets: Tensor, windows: Tensor) -> ChunkTotals:
    """Count what chunked decoding would have done on known text.

    Args:
        predictions: `[passes, n]` most likely tokens of every pass at n positions, in order of position.
        commit: `[passes - 1, n]` the boundary head's probability of stopping after pass k.
        targets: `[n]` the true tokens; windows: `[n]` the number of each position's chunk, in one run for
            each chunk.
    """
    depth, n = len(predictions) - 1, predictions.shape[1]
    if depth < 1 or n == 0:
        return ChunkTotals()
    _, chunk, lengths = torch.unique_consecutive(windows, return_inverse=True, return_counts=True)
    chunks = len(lengths)
    offset = torch.arange(n, device=windows.device) - (lengths.cumsum(0) - lengths)[chunk]

    # A chunk stops after the first pass with which the head is confident at every position.
    doubts = (commit < COMMIT_THRESHOLD).int()
    per_chunk = torch.zeros(depth, chunks, dtype=doubts.dtype, device=doubts.device).index_add_(1, chunk, doubts)
    steps = per_chunk.ne(0).int().cumprod(0).sum(0)

    agrees = predictions[0] == predictions[-1]
    first = torch.where(agrees, lengths[chunk], offset)
    prefix = lengths.clone().scatter_reduce(0, chunk, first, "amin")
    committed = torch.minimum(prefix + 1, lengths)

    hit = predictions[0] == targets
    final = predictions[-1] == targets
    return ChunkTotals(
        chunks=chunks,
        positions=n,
        refine_steps=int(steps.sum()),
        whole=int((prefix == lengths).sum()),
        committed=int(committed.sum()),
        stable=[int((predictions[k] == predictions[k - 1]).sum()) for k in range(1, depth + 1)],
        wrong=int((~hit).sum()),
        fixed=int((~hit & final).sum()),
        right=int(hit.sum()),
        broken=int((hit & ~final).sum()),
    )
