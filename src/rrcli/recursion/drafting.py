"""One chunk of chunked decoding: draft, refine and commit, for the rows of a batch that are still being decoded.

    draft    pass 0 alone proposes up to `width` tokens, one by one
    refine   one forward runs the other passes over the whole draft, in parallel; what pass 0 gave while drafting is
             used again
    commit   the longest prefix of the draft that the last pass agrees with, and the last pass's own token after it;
             every cache is taken back to there

This is speculative decoding in which pass 0 is the draft model and the last pass is the target model (Leviathan et al.
2023, algorithm 1). Greedy: a drafted token is accepted if it is the target's most likely one. Sampling: it is accepted
with probability min(1, target_probs / draft_probs), and a rejected one is replaced by a draw from the normalised
max(0, target_probs - draft_probs), so that every token is distributed as the target's.

With an exit rule, the target of a position is the pass with which the position leaves. A draft ends where the rule is
not content with pass 0, so that a single row rejects nothing. Passes are run one by one, for as long as a position has
not left, over all tokens that have not gone through them (`lag`). Where passes cannot lag, all of them are run over
every draft, and the rule chooses among what they say: the same tokens, at the cost of the full depth.

How caches are taken back: attention and convolution states are cropped. Recurrent states cannot be, so a snapshot from
before the draft is restored, and the committed tokens are run again. There, where passes lag, and where a model does
not hide the padding of shorter rows, all rows of a batch commit as many tokens as the row that commits the fewest;
otherwise each row goes at its own pace.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rrcli.recursion import caches
from rrcli.recursion.abilities import filled_layers
from rrcli.recursion.chunk_metrics import ChunkTotals
from rrcli.recursion.exits import NEVER, ExitRule, Signals
from rrcli.recursion.frames import Record
from rrcli.recursion.readout import Readout
from rrcli.recursion.rows import Chooser, Rows
from rrcli.recursion.signals import Leaving, joined, last_of, look, top_of


@dataclass
class Draft:
    """What pass 0 proposes.

    Attributes:
        tokens: `[row, position]`.
        scores: pass 0's scores at each position, `[row, 1, vocabulary]` each; empty unless tokens are sampled.
        logits, seen: pass 0's logits and signals at each position; empty unless an exit rule reads them.
        record: what pass 0 computed.
    """

    tokens: Tensor
    scores: list[Tensor]
    logits: list[Tensor]
    seen: list[Signals]
    record: Record

    @property
    def width(self) -> int:
        """How many tokens each row has."""
        return self.tokens.shape[1]


@dataclass
class Refined:
    """What the passes say about a draft.

    Attributes:
        logits: `[row, position, vocabulary]` those of the pass with which each position leaves.
        passes: `[row, position]` which pass that is. ran: the last pass that was run.
    """

    logits: Tensor
    passes: Tensor
    ran: int


@dataclass
class Chunk:
    """What was drafted, and how much of it is to be committed.

    Attributes:
        rows: the numbers of the batch's rows that took part; the other attributes have one row for each.
        draft: `[row, position]` the tokens of pass 0.
        tokens: `[row, position]` the same, with the target's token in place of the first that was rejected.
        accept_length: `[row]` how many drafted tokens were accepted before the first that was rejected.
        commit_length: `[row]` how many of `tokens` are committed.
        passes: `[row, position]` the pass with which each position leaves.
        ran: how many passes after pass 0 were run.
        before: the caches before the draft, where they hold recurrent states, which cannot be cropped.
    """

    rows: list[int]
    draft: Tensor
    tokens: Tensor
    accept_length: Tensor
    commit_length: Tensor
    passes: Tensor
    ran: int
    before: caches.Snapshot | None = None

    def totals(self) -> ChunkTotals:
        """Return this chunk's part of the chunk metrics."""
        count, width = self.draft.shape
        committed = torch.arange(width, device=self.passes.device) < self.commit_length[:, None]
        return ChunkTotals(
            chunks=count,
            positions=self.draft.numel(),
            refine_steps=self.ran * count,
            whole=int(self.accept_length.eq(width).sum()),
            committed=int(self.commit_length.sum()),
            left=int(self.passes[committed].sum()),
        )


def first_token(rows: Rows, chooser: Chooser, rule: ExitRule) -> Chunk:
    """Run the prompt through every pass, and return the token after it as a chunk."""
    recursion = rows.model.recursion
    with recursion.recording() as record:
        logits = rows.prefill()[:, -1:]
    passes = torch.full_like(rows.tokens[:, -1:], recursion.depth)
    if rule != NEVER:
        left = _chosen(rows, rule, [state[:, -1:] for state in record.states], first=0)
        logits, passes = left.logits, left.passes
    token = chooser.choose(chooser.scores(logits))
    one = torch.ones_like(token[:, 0])
    return Chunk(rows.active, token, token, one, one, passes, recursion.depth)


def draft_and_refine(rows: Rows, chooser: Chooser, width: int, *, rule: ExitRule) -> Chunk:
    """Draft up to `width` tokens for each row that is still being decoded, and hold them against later passes.

    The caches are ahead of the rows afterwards, until `commit` has taken them back.
    """
    before = None if rows.cache.is_croppable else caches.Snapshot(rows.cache)
    draft = draft_tokens(rows, chooser, width, rule=rule)
    refined = (
        _refine_fully(rows, draft, before, rule=rule)
        if rows.lag is None
        else _refine_lagging(rows, draft, chooser, rule=rule)
    )
    target_scores = chooser.scores(refined.logits, draft.tokens)
    accept_length, replacement = chooser.accept(draft.tokens, draft.scores, target_scores)
    commit_length = (accept_length + 1).clamp_max(draft.width)
    if rows.lag is not None or not rows.may_part():
        commit_length = commit_length.min().expand_as(commit_length)
    tokens = draft.tokens.clone()
    corrected = accept_length < commit_length
    tokens[corrected, accept_length[corrected]] = replacement[corrected]
    return Chunk(rows.active, draft.tokens, tokens, accept_length, commit_length, refined.passes, refined.ran, before)


def commit(rows: Rows, chunk: Chunk) -> None:
    """Append a chunk's committed tokens to its rows, and take every cache back to the last of them."""
    width, count = chunk.draft.shape[1], int(chunk.commit_length[0])
    dropped: Tensor | None = width - chunk.commit_length
    if chunk.before is not None and count < width:
        chunk.before.restore(rows.cache)
        rows.forward(torch.cat([rows.tokens[:, -1:], chunk.draft[:, : count - 1]], 1))
        dropped = torch.zeros_like(chunk.commit_length)
    if rows.lag is not None:
        rows.lag.take_back(width - count)
        dropped = None
    lengths = chunk.commit_length.tolist()
    rows.commit([row[:length] for row, length in zip(chunk.tokens.tolist(), lengths, strict=True)], dropped)


def draft_tokens(rows: Rows, chooser: Chooser, width: int, *, rule: ExitRule) -> Draft:
    """Let pass 0 propose up to `width` tokens for each row, and leave its cache after them.

    Where passes lag, pass 0 first reads what it has not seen (at first the prompt), and a draft ends when every row has
    come to a position that does not leave at pass 0.
    """
    recursion, lagging = rows.model.recursion, rows.lag is not None
    begin = rows.tokens.shape[1] - 1 if rows.lag is None else rows.lag.seen[0]
    found = Draft(rows.tokens[:, :0], [], [], [], Record())
    ended = torch.zeros(len(rows.active), dtype=torch.bool, device=rows.tokens.device)
    with recursion.drafting() as found.record:
        while found.width < width and not bool(ended.all()):
            columns = torch.cat([rows.tokens, found.tokens], 1)
            logits = rows.run(columns[:, begin:], columns.shape[1], keep=1)[:, -1:]
            begin = columns.shape[1]
            if lagging:
                state, draw = found.record.states[-1][:, -1:], rows.draws(found.width, 1)
                seen = look(recursion, 0, top_of(logits), state=state, draw=draw)
                found.logits.append(logits)
                found.seen.append(seen)
                ended = ended | (~rule.leaves(seen)[:, 0]).to(ended.device)
            token_scores = chooser.scores(logits, found.tokens, last_only=True)
            if chooser.sample:
                found.scores.append(token_scores)
            found.tokens = torch.cat([found.tokens, chooser.choose(token_scores)], 1)
            ended = ended | rows.ended(found.tokens)
    return found


def _refine_lagging(rows: Rows, draft: Draft, chooser: Chooser, *, rule: ExitRule) -> Refined:
    """Run the passes after pass 0 over what they have not seen, one by one, until every position has left."""
    recursion, lag, ran = rows.model.recursion, rows.lag, 0
    assert lag is not None
    lag.drafted(torch.cat(draft.record.entries, 1), torch.cat(draft.record.states, 1))
    columns, draw = torch.cat([rows.tokens, draft.tokens], 1), rows.draws(0, draft.width)
    leaving = Leaving(rule, recursion.depth, joined(draft.seen), torch.cat(draft.logits, 1))
    # A draft is known to be rejected at once only if its tokens are simply the most likely ones.
    drafted = draft.tokens if chooser.takes_the_most_likely else None
    earliest = min(rule.earliest, recursion.depth)
    while bool((undecided := leaving.undecided(drafted).any(0)).any()):
        # Logits are computed from the first undecided position on: for a single row, of the last one alone.
        keep = draft.width - int(undecided.nonzero()[0])
        ran, logits, state = lag.catch_up(rows.run, columns, ran + 1, earliest=earliest, keep=keep)
        before = last_of(leaving.seen, keep)
        leaving.look(look(recursion, ran, top_of(logits), state=state, draw=draw[:, -keep:], before=before), logits)
    return Refined(leaving.logits, leaving.passes, ran)


def _refine_fully(rows: Rows, draft: Draft, before: caches.Snapshot | None, *, rule: ExitRule) -> Refined:
    """Run every pass after pass 0 over a draft.

    Args:
        before: the caches before the draft, where they cannot be cropped.
    """
    recursion, record = rows.model.recursion, draft.record
    # What is read starts with the last committed token, and gives the logits of each drafted one.
    ids = torch.cat([rows.tokens[:, -1:], draft.tokens[:, :-1]], 1)
    drafted = caches.Snapshot(rows.cache, draft=True)
    # The other passes go on from the last committed token, and the model has to find pass 0 there too.
    if before is None:
        caches.forget(rows.cache, [draft.width])
    else:
        before.restore(rows.cache, draft=True)
    if record.entries:
        with recursion.refining((torch.cat(record.entries, 1), torch.cat(record.states, 1))) as refined:
            logits = rows.forward(ids)
        drafted.restore(rows.cache, layers=filled_layers(recursion))
    else:
        with recursion.recording() as refined:
            logits = rows.forward(ids)
    if rule == NEVER:
        return Refined(logits, torch.full_like(draft.tokens, recursion.depth), recursion.depth)
    left = _chosen(rows, rule, refined.states, first=0)
    return Refined(left.logits, left.passes, recursion.depth)


def _chosen(rows: Rows, rule: ExitRule, states: Sequence[Tensor], *, first: int) -> Leaving:
    """Let a rule choose among all passes.

    Args:
        states: `[row, position, hidden]` of every pass. first: the number of the first position's new token.
    """
    recursion, readout = rows.model.recursion, Readout(rows.model)
    leaving: Leaving | None = None
    for step, state in enumerate(states):
        logits = readout.logits(recursion.readout(state).flatten(0, 1)).unflatten(0, state.shape[:2])
        seen = look(
            recursion, step, top_of(logits), state=state, draw=rows.draws(first, state.shape[1]),
            before=None if leaving is None else leaving.seen,
        )  # fmt: skip
        if leaving is None:
            leaving = Leaving(rule, recursion.depth, seen, logits)
        else:
            leaving.look(seen, logits)
    assert leaving is not None
    return leaving
