"""One chunk of chunked decoding: draft, refine and commit, for the rows of a batch that are still being decoded.

    draft    pass 0 alone proposes up to `width` tokens, one by one; it ends early where the boundary head expects
             that the last token will not survive
    refine   one forward runs the other passes over the whole draft, in parallel; what pass 0 gave while drafting is
             used again
    commit   the longest prefix of the draft that the last pass agrees with, and the last pass's own token after it;
             every cache is taken back to there

This is speculative decoding in which pass 0 is the draft model and the last pass is the target model (Leviathan et al.
2023, algorithm 1). Greedy: a drafted token is accepted if it is the target's most likely one. Sampling: it is accepted
with probability min(1, target_probs / draft_probs), and a rejected one is replaced by a draw from the normalised
max(0, target_probs - draft_probs), so that every token is distributed as the target's.

Refining may end early, at the first pass with which the boundary head is confident at every position of the chunk; even
pass 0 may do. Deeper passes then have no cache for these tokens: they are pending. Before a later chunk runs such a
pass, the pending tokens go through it together with the chunk, in one forward, so that what a pass computes never
depends on where chunks ended.

How caches are taken back: attention and convolution states are cropped. Recurrent states cannot be, so a snapshot from
before the draft is restored, and the committed tokens are run again. There, and where a model does not hide the padding
of shorter rows, all rows of a batch commit as many tokens as the row that commits the fewest; otherwise each row goes
at its own pace.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rrcli import upstream
from rrcli.recursion import caches
from rrcli.recursion.abilities import filled_layers
from rrcli.recursion.chunk_metrics import ChunkTotals
from rrcli.recursion.frames import Record
from rrcli.recursion.rows import Chooser, Rows


@dataclass
class Draft:
    """What pass 0 proposes.

    Attributes:
        tokens: `[row, position]`.
        scores: pass 0's scores at each position, `[row, 1, vocabulary]` each; empty unless tokens are sampled.
        confident: whether the boundary head expects every token to survive.
        record: what pass 0 computed.
    """

    tokens: Tensor
    scores: list[Tensor]
    confident: bool
    record: Record

    @property
    def width(self) -> int:
        """How many tokens each row has."""
        return self.tokens.shape[1]


@dataclass
class Chunk:
    """What was drafted, and how much of it is to be committed.

    Attributes:
        rows: the numbers of the batch's rows that took part; the other attributes have one row for each.
        draft: `[row, position]` the tokens of pass 0.
        tokens: `[row, position]` the same, with the last pass's token in place of the first that it rejected.
        accept_length: `[row]` how many drafted tokens the last pass accepted before the first that it rejected.
        commit_length: `[row]` how many of `tokens` are committed.
        passes: how many passes after pass 0 were run.
        before: the caches before the draft, where they hold recurrent states, which cannot be cropped.
    """

    rows: list[int]
    draft: Tensor
    tokens: Tensor
    accept_length: Tensor
    commit_length: Tensor
    passes: int
    before: caches.Snapshot | None = None

    def totals(self) -> ChunkTotals:
        """Return this chunk's part of the chunk metrics."""
        count, width = self.draft.shape
        return ChunkTotals(
            chunks=count,
            positions=self.draft.numel(),
            refine_steps=self.passes * count,
            whole=int(self.accept_length.eq(width).sum()),
            committed=int(self.commit_length.sum()),
        )


def draft_and_refine(rows: Rows, chooser: Chooser, width: int, *, boundary: float | None) -> Chunk:
    """Draft up to `width` tokens for each row that is still being decoded, and hold them against the last pass.

    The caches are ahead of the rows afterwards, until `commit` has taken them back.

    Args:
        boundary: the boundary head is confident of a token where its probability of committing is at least this; None
            means that it is not asked, and drafts are as long as `width`.
    """
    before = None if rows.cache.is_croppable else caches.Snapshot(rows.cache)
    draft = draft_tokens(rows, chooser, width, boundary=boundary)
    logits, passes = _refine(rows, draft, before, boundary=boundary)
    accept_length, replacement = torch.full_like(draft.tokens[:, 0], draft.width), draft.tokens[:, -1]
    if logits is not None:
        accept_length, replacement = chooser.accept(draft.tokens, draft.scores, chooser.scores(logits, draft.tokens))
    commit_length = (accept_length + 1).clamp_max(draft.width)
    if rows.pending is not None or not rows.may_part():
        commit_length = commit_length.min().expand_as(commit_length)
    tokens = draft.tokens.clone()
    corrected = accept_length < commit_length
    tokens[corrected, accept_length[corrected]] = replacement[corrected]
    return Chunk(rows.active, draft.tokens, tokens, accept_length, commit_length, passes, before)


def commit(rows: Rows, chunk: Chunk) -> None:
    """Append a chunk's committed tokens to its rows, and take every cache back to the last of them."""
    width, count = chunk.draft.shape[1], int(chunk.commit_length[0])
    dropped: Tensor | None = width - chunk.commit_length
    if chunk.before is not None and count < width:
        chunk.before.restore(rows.cache)
        rows.forward(torch.cat([rows.tokens[:, -1:], chunk.draft[:, : count - 1]], 1))
        dropped = torch.zeros_like(chunk.commit_length)
    if rows.pending is not None:
        caches.forget(rows.cache, [width - count] * (chunk.passes + 1))
        rows.pending = [0 if k < chunk.passes else lag + count for k, lag in enumerate(rows.pending)]
        dropped = None
    lengths = chunk.commit_length.tolist()
    rows.commit([row[:length] for row, length in zip(chunk.tokens.tolist(), lengths, strict=True)], dropped)


def draft_tokens(rows: Rows, chooser: Chooser, width: int, *, boundary: float | None) -> Draft:
    """Let pass 0 propose up to `width` tokens for each row, and leave its cache after them."""
    recursion = rows.model.recursion
    draft, scores = rows.tokens[:, :0], []
    ended = torch.zeros(len(rows.active), dtype=torch.bool, device=draft.device)
    doubted = ended
    with recursion.drafting() as record:
        while draft.shape[1] < width and not bool(ended.all()):
            token = torch.cat([rows.tokens[:, -1:], draft], 1)[:, -1:]
            logits = rows.forward(token, offset=draft.shape[1])
            token_scores = chooser.scores(logits, draft, last_only=True)
            if chooser.sample:
                scores.append(token_scores)
            draft = torch.cat([draft, chooser.choose(token_scores)], 1)
            if boundary is not None:
                doubted = doubted | ~_confident(recursion, record.states[-1][:, -1], boundary).to(doubted.device)
            ended = ended | rows.ended(draft) | doubted
    return Draft(draft, scores, not bool(doubted.any()), record)


def can_lag(recursion: Any, cache: Any) -> bool:
    """Tell whether passes may leave tokens pending: each can be cropped to any length and catch up later.

    Not where windows or states forget, nor where layers after the span cache what the last pass gave them.
    """
    return recursion.end == len(recursion.layers) and all(map(upstream.remembers_all, cache.layers))


def _refine(
    rows: Rows, draft: Draft, before: caches.Snapshot | None, *, boundary: float | None
) -> tuple[Tensor | None, int]:
    """Run the passes after pass 0 over a draft.

    Args:
        before: the caches before the draft, where they cannot be cropped.

    Returns:
        `[row, position, vocabulary]` logits of the last pass that was run, None if pass 0 was the last; and which it
        was.
    """
    # What is read starts with the last committed token, and gives the logits of each drafted one.
    ids = torch.cat([rows.tokens[:, -1:], draft.tokens[:, :-1]], 1)
    if rows.pending is None:
        return _refine_fully(rows, ids, draft, before), rows.model.recursion.depth
    if draft.confident:
        return None, 0
    assert boundary is not None
    return _refine_until_confident(rows, ids, boundary)


def _refine_fully(rows: Rows, ids: Tensor, draft: Draft, before: caches.Snapshot | None) -> Tensor:
    """Run every pass after pass 0 over a draft; return `[row, position, vocabulary]` logits of the last.

    Args:
        ids: `[row, position]` the tokens that pass 0 read while drafting.
    """
    recursion, record = rows.model.recursion, draft.record
    drafted = caches.Snapshot(rows.cache, draft=True)
    # The other passes go on from the last committed token, and the model has to find pass 0 there too.
    if before is None:
        caches.forget(rows.cache, [draft.width])
    else:
        before.restore(rows.cache, draft=True)
    if not record.entries:
        return rows.forward(ids)
    with recursion.refining((torch.cat(record.entries, 1), torch.cat(record.states, 1))):
        logits = rows.forward(ids)
    drafted.restore(rows.cache, layers=filled_layers(recursion))
    return logits


def _refine_until_confident(rows: Rows, ids: Tensor, boundary: float) -> tuple[Tensor, int]:
    """Run passes over a draft until the boundary head is confident at every position of it.

    Args:
        ids: `[row, position]` the tokens that pass 0 read while drafting.

    Returns:
        `[row, position, vocabulary]` logits of the last pass that was run, and which it was.
    """
    recursion, width, ran, pending = rows.model.recursion, ids.shape[1], 0, rows.pending
    assert pending is not None

    def confident(state: Tensor) -> bool:
        return bool(_confident(recursion, state[:, -width:], boundary).all())

    while True:
        # Passes with equally many pending tokens go in one forward; those before them are run again from there.
        lag = pending[ran]
        deepest = next((k for k in range(ran, len(pending)) if pending[k] != lag), len(pending))
        caches.forget(rows.cache, [lag + width] * (ran + 1))
        with_pending = torch.cat([rows.tokens[:, rows.tokens.shape[1] - 1 - lag : -1], ids], 1)
        with recursion.refining_until(confident, depth=deepest) as record:
            logits = rows.forward(with_pending, offset=-lag)
        ran = len(record.states) - 1
        pending = rows.pending = [0 if k < ran else count for k, count in enumerate(pending)]
        if ran == len(pending) or confident(record.states[-1]):
            return logits[:, -width:], ran


def _confident(recursion: Any, states: Tensor, boundary: float) -> Tensor:
    """Tell for each of `[..., hidden]` states whether the boundary head expects its token to survive."""
    return recursion.head(states).sigmoid() >= boundary
