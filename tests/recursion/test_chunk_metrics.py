"""The vectorised chunk metrics against a loop that says the same in plain Python."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rrcli.recursion.chunk_metrics import COMMIT_THRESHOLD, ChunkTotals, teacher_forced_chunks

COUNTS = ("chunks", "positions", "whole", "committed", "stable", "wrong", "fixed", "right", "broken")


def by_loop(predictions, commit, targets, windows):
    """Do what `teacher_forced_chunks` documents, one chunk and one position at a time, on nested lists."""
    depth, totals = len(predictions) - 1, ChunkTotals(stable=[0] * (len(predictions) - 1))
    start = 0
    while start < len(targets):
        end = start
        while end < len(targets) and windows[end] == windows[start]:
            end += 1
        places = range(start, end)
        totals.chunks += 1
        steps = 0
        while steps < depth and not all(commit[steps][i] >= COMMIT_THRESHOLD for i in places):
            steps += 1
        totals.refine_steps += steps
        prefix = 0
        while prefix < len(places) and predictions[0][start + prefix] == predictions[-1][start + prefix]:
            prefix += 1
        totals.whole += prefix == len(places)
        totals.committed += prefix if prefix == len(places) else prefix + 1
        for i in places:
            totals.positions += 1
            for k in range(1, depth + 1):
                totals.stable[k - 1] += predictions[k][i] == predictions[k - 1][i]
            if predictions[0][i] == targets[i]:
                totals.right += 1
                totals.broken += predictions[-1][i] != targets[i]
            else:
                totals.wrong += 1
                totals.fixed += predictions[-1][i] == targets[i]
        start = end
    return totals


def by_tensors(predictions, commit, targets, windows):
    return teacher_forced_chunks(*(torch.tensor(x) for x in (predictions, commit, targets, windows)))


@st.composite
def texts(draw, patient=False):
    """Return random arguments; where `patient`, a position that is confident stays confident in later passes."""
    depth = draw(st.integers(1, 4))
    lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=6))
    n = sum(lengths)
    row = st.lists(st.integers(0, 2), min_size=n, max_size=n)
    probability = st.lists(st.sampled_from([0.0, 0.3, 0.5, 0.9]), min_size=n, max_size=n)
    commit = draw(st.lists(probability, min_size=depth, max_size=depth))
    if patient:
        for k in range(1, depth):
            commit[k] = [max(a, b) for a, b in zip(commit[k - 1], commit[k], strict=True)]
    # Numbers of windows ascend, with gaps where a window was not sampled.
    gaps = draw(st.lists(st.integers(1, 3), min_size=len(lengths), max_size=len(lengths)))
    numbers = [sum(gaps[: i + 1]) for i in range(len(gaps))]
    windows = [number for number, length in zip(numbers, lengths, strict=True) for _ in range(length)]
    return draw(st.lists(row, min_size=depth + 1, max_size=depth + 1)), commit, draw(row), windows


@settings(max_examples=80, deadline=None)
@given(texts())
def test_counts_are_those_of_the_loop(text):
    found, expected = by_tensors(*text), by_loop(*text)
    for name in COUNTS:
        assert getattr(found, name) == getattr(expected, name), name


@settings(max_examples=80, deadline=None)
@given(texts(patient=True))
def test_a_chunk_stops_when_the_head_is_content_everywhere(text):
    assert by_tensors(*text).refine_steps == by_loop(*text).refine_steps


def test_a_position_that_is_no_longer_content_keeps_its_chunk_going():
    # Pass 0: the first position is confident; pass 1: only the second; so no pass is confident of both.
    text = ([[1, 1]] * 3, [[0.9, 0.1], [0.1, 0.9]], [1, 1], [0, 0])
    assert by_loop(*text).refine_steps == 2
    assert by_tensors(*text).refine_steps == 2


@settings(max_examples=40, deadline=None)
@given(texts(), texts())
def test_totals_add_up_over_batches(one, other):
    total = by_tensors(*one)
    total.add(by_tensors(*other))
    apart = by_tensors(*one), by_tensors(*other)
    for name in (*COUNTS, "refine_steps"):
        if name != "stable":
            assert getattr(total, name) == sum(getattr(part, name) for part in apart)
    assert len(total.stable) == max(len(part.stable) for part in apart)
    assert sum(total.stable) == sum(sum(part.stable) for part in apart)


def test_a_worked_example():
    # Two chunks of three. The first is accepted whole, the second is corrected at its second position.
    totals = by_tensors(
        [[5, 6, 7, 1, 2, 3], [5, 6, 7, 1, 9, 3], [5, 6, 7, 1, 9, 4]],
        [[0.9, 0.9, 0.9, 0.9, 0.1, 0.9], [0.9, 0.9, 0.9, 0.9, 0.9, 0.9]],
        [5, 6, 0, 1, 9, 3],
        [0, 0, 0, 4, 4, 4],
    )
    assert totals.metrics() == pytest.approx(
        {
            "avg_refine_steps": 0.5,
            "commit_rate": 0.5,
            "avg_chunk_length": 2.5,
            "stability@1": 5 / 6,
            "stability@2": 5 / 6,
            "fix_rate": 1 / 2,
            "break_rate": 1 / 4,
        }
    )


def test_nothing_seen_gives_no_metrics():
    assert ChunkTotals().metrics() == {}
    assert by_tensors([[1, 2]], [], [1, 2], [0, 0]) == ChunkTotals()
    empty = torch.zeros(3, 0, dtype=torch.long)
    assert teacher_forced_chunks(empty, empty[:2].float(), empty[0], empty[0]) == ChunkTotals()


def test_rates_without_a_denominator_are_left_out():
    metrics = by_tensors([[1, 1], [1, 1]], [[0.0, 0.0]], [1, 1], [0, 0]).metrics()
    assert "fix_rate" not in metrics
    assert metrics["break_rate"] == 0
