"""Packed rows: the same losses as one example in each row, where a family allows it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from families import build, wake
from rrcli.data.batching import collate
from rrcli.data.packing import check_packing, pack
from rrcli.errors import UsageError
from rrcli.recursion.batch import IGNORED, Batch
from rrcli.recursion.config import LossWeights, RecursionConfig
from rrcli.recursion.engine import attach
from rrcli.recursion.losses import LossTerms, StepPlan, compute_losses, sample_windows
from rrcli.recursion.readout import Readout

DENSE = ("llama", "qwen3", "gemma2", "mistral", "gpt2")
WIDTH = 3


def examples(count: int = 7) -> list[tuple[list[int], list[int]]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for size in torch.randint(4, 14, (count,), generator=generator).tolist():
        ids = torch.randint(3, 90, (size,), generator=generator).tolist()
        found.append((ids, [IGNORED, *ids[2:], IGNORED]))
    return found


def losses(model: Any, batch: Batch, depth: int) -> LossTerms:
    weights = LossWeights(share=0.5)
    generator = torch.Generator().manual_seed(5)
    sampled = sample_windows(batch, width=WIDTH, share=weights.share, generator=generator)
    plan = StepPlan(depth=depth, weights=weights, chunk_width=WIDTH, tokens=batch.tokens, sampled=int(sampled.sum()))
    return compute_losses(Readout(model), replace(batch, sampled=sampled), plan=plan)


def test_examples_lie_where_they_fit_best() -> None:
    lengths = (3, 8, 5, 2, 4)
    batch = pack([([n] * n, [*[n] * (n - 1), IGNORED]) for n in lengths], 10, pad=0)
    assert batch.input_ids.tolist() == [[8] * 8 + [2] * 2, [5] * 5 + [4] * 4 + [0], [3] * 3 + [0] * 7]
    assert batch.position_ids is not None
    assert batch.position_ids.tolist()[:2] == [[*range(8), 0, 1], [*range(5), *range(4), 0]]
    assert batch.examples is not None
    assert batch.examples.tolist() == [[1] * 8 + [3] * 2, [2] * 5 + [4] * 4 + [-1], [0] * 3 + [-1] * 7]
    assert batch.attention_mask.equal(batch.examples.ne(-1).long())
    assert batch.tokens == sum(lengths) - len(lengths)
    assert batch.labels.tolist()[1] == [5] * 4 + [IGNORED] + [4] * 3 + [IGNORED] * 2


def test_a_row_is_no_wider_than_what_lies_in_it() -> None:
    assert pack([([1, 2, 3], [2, 3, IGNORED])], 256, pad=0).input_ids.shape == (1, 3)


@pytest.mark.parametrize("family", DENSE)
@pytest.mark.parametrize("depth", [0, 2])
def test_packed_losses_and_gradients_are_those_of_separate_rows(family: str, depth: int) -> None:
    def run(batch: Batch) -> tuple[LossTerms, dict[str, torch.Tensor]]:
        model = build(family)  # without dropout, which would draw other positions
        recursion = wake(attach(model, RecursionConfig(max_steps=2, chunk_width=WIDTH)))
        terms = losses(model, batch, depth)
        terms.total.backward()
        named = [*model.named_parameters(), *recursion.named_parameters()]
        return terms, {name: p.grad for name, p in named if p.grad is not None}

    separate, packed = collate(examples(), 0), pack(examples(), 28, 0)
    assert len(packed.input_ids) < len(separate.input_ids) / 2
    (expected, gradients), (found, other) = run(separate), run(packed)
    for name, value in expected.parts.items():
        assert float(found.parts[name]) == pytest.approx(float(value), rel=1e-5), name
    assert found.chunks.metrics() == expected.chunks.metrics()
    assert gradients.keys() == other.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(other[name], gradient, rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize("family", [*DENSE, "qwen3_moe"])
@pytest.mark.parametrize("recursive", [False, True])
def test_families_that_pack_exactly_are_let_through(family: str, recursive: bool) -> None:
    model = build(family)
    if recursive:
        wake(attach(model, RecursionConfig(max_steps=2)))
    check_packing(Readout(model))


@pytest.mark.parametrize("family", ["bloom", "falcon_h1", "kimi_linear", "lfm2", "mamba2", "mpt", "opt", "qwen3_next"])
def test_families_that_do_not_are_refused(family: str) -> None:
    with pytest.raises(UsageError, match=f"--packing is not exact for this '{family}' model") as error:
        check_packing(Readout(build(family)))
    assert "without --packing" in error.value.hint
