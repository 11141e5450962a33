"""Chunked decoding: the tokens of running every pass for every token, whatever the chunks are."""

import logging

import pytest
import torch
from scipy.stats import chisquare
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList, TextStreamer

from families import build, cache_name, padded_left, tokens, wake
from rrcli import ChunkedDecoding, RecursionConfig, attach, upstream
from rrcli.errors import UsageError

# Dense, grouped and biased attention, sliding windows, latent attention, mixtures, two layers of a cache for each
# decoder layer (longcat_flash), convolutions, recurrent states.
FAMILIES = (
    *("llama", "gpt2", "bloom", "gemma2", "gemma3_text", "gpt_oss", "mixtral", "deepseek_v3", "lfm2"),
    *("longcat_flash", "mpt"),
    *("kimi_linear", "qwen3_next", "falcon_h1", "mamba2", "granitemoehybrid"),
)
NEW = 14


def awake(family="llama", depth=2, span=None, std=0.03, **changes):
    """Return a model whose recursion changes some tokens and leaves others."""
    model = build(family, **changes)
    recursion = wake(attach(model, RecursionConfig(max_steps=3, span=span)), std)
    recursion.depth = depth
    return model


def prompts(batch=5, length=9):
    """Return left-padded prompts of different lengths, with their mask."""
    ids, mask = tokens(batch, length), torch.ones(batch, length, dtype=torch.long)
    for row, padding in enumerate((0, 3, 1, 5, 2)[:batch]):
        mask[row, :padding] = 0
        ids[row, :padding] = 0
    return ids, mask


def run(model, ids, mask, decoding=None, **options):
    """Generate greedily unless told otherwise."""
    options = {"max_new_tokens": NEW, "do_sample": False, "use_cache": True} | options
    return model.generate(ids, attention_mask=mask, custom_generate=decoding, **options)


def same_tokens(family, depth, span, widths, rows):
    """Hold chunked against sequential decoding at some widths, with the first `rows` rows of a batch."""
    model = awake(family, depth, span)
    ids, mask = (part[:rows] for part in prompts())
    expected = run(model, ids, mask)
    for width in widths:
        assert torch.equal(run(model, ids, mask, ChunkedDecoding(width)), expected), (depth, width, rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_running_every_pass_for_every_token(family):
    same_tokens(family, 1, None, (3, 64), 5)
    same_tokens(family, 2, (1, 3), (1, 8), 5)
    same_tokens(family, 3, None, (16,), 1)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_greedy_tokens_at_every_depth_width_and_batch(family, depth, rows):
    same_tokens(family, depth, None, (1, 3, 8, 64), rows)  # any width beyond the new tokens is the same
    same_tokens(family, depth, (1, 3), (3,), rows)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_next"])
def test_greedy_tokens_are_the_argmax_without_a_cache(family):
    model = awake(family)
    ids = tokens(1, 7)
    text = run(model, ids, torch.ones_like(ids), ChunkedDecoding(8))
    with torch.no_grad():
        logits = model(text, use_cache=False).logits
    assert torch.equal(logits[:, 6:-1].argmax(-1), text[:, 7:])


def test_what_was_drafted_refined_and_committed_is_counted():
    model = awake()
    ids, mask = prompts()
    decoding = ChunkedDecoding(8)
    run(model, ids, mask, decoding)
    assert decoding.totals.refine_steps == 2 * decoding.totals.chunks
    assert 1 <= decoding.totals.metrics()["avg_chunk_length"] <= 8
    for trace in decoding.traces:
        assert len(trace.passes) == len(trace.changed) == NEW
    # With the cell asleep, pass 0 is what every pass says: drafts are committed whole.
    quiet = build("llama")
    attach(quiet, RecursionConfig(max_steps=2))
    decoding = ChunkedDecoding(8)
    text = run(quiet, ids, mask, decoding, max_new_tokens=17)
    assert torch.equal(text, run(build("llama"), ids, mask, max_new_tokens=17))
    assert decoding.totals.metrics() == {
        "avg_refine_steps": 2,
        "commit_rate": 1,
        "avg_chunk_length": 8,
        "avg_passes": 2,
    }
    assert not any(changed for trace in decoding.traces for changed in trace.changed)


def test_drafts_are_short_where_they_fail():
    model = awake(std=0.3)
    ids, mask = prompts(1)
    decoding = ChunkedDecoding(8)
    assert torch.equal(run(model, ids, mask, decoding, max_new_tokens=30), run(model, ids, mask, max_new_tokens=30))
    assert decoding.totals.committed < 2 * decoding.totals.chunks
    assert decoding.totals.positions <= 8 + 2 * decoding.totals.committed


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "lfm2", "kimi_linear"])
def test_rows_end_where_they_would_have_ended(family):
    model = awake(family)
    ids, mask = prompts()
    free = run(model, ids, mask)[:, 9:]
    # Tokens that occur at different places of different rows.
    ends = sorted({int(free[0, 3]), int(free[1, 6]), int(free[2, 10])})
    expected = run(model, ids, mask, eos_token_id=ends, pad_token_id=0)
    for width in (1, 4, 16):
        assert torch.equal(run(model, ids, mask, ChunkedDecoding(width), eos_token_id=ends, pad_token_id=0), expected)


class _After(StoppingCriteria):
    """Stops a row after a pair of tokens, as a stop string would."""

    def __init__(self, pair):
        self.pair = pair

    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids[:, -2:] == torch.tensor(self.pair)).all(1)


def test_custom_criteria_stop_inside_a_chunk():
    model = awake()
    ids, mask = prompts(1)
    pair = run(model, ids, mask)[0, 14:16].tolist()
    criteria = StoppingCriteriaList([_After(pair)])
    expected = run(model, ids, mask, stopping_criteria=criteria)
    assert expected.shape[1] < 9 + NEW
    assert torch.equal(run(model, ids, mask, ChunkedDecoding(8), stopping_criteria=criteria), expected)


def test_logits_processors_see_what_they_would_have_seen():
    model = awake()
    ids, mask = prompts()
    options = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 5}
    assert torch.equal(run(model, ids, mask, ChunkedDecoding(6), **options), run(model, ids, mask, **options))


def test_a_streamer_gets_every_token():
    model = awake()
    ids, mask = prompts(1)

    class Collect(TextStreamer):
        def __init__(self):
            self.got, self.ended = [], False

        def put(self, value):
            self.got += value.flatten().tolist()

        def end(self):
            self.ended = True

    streamer = Collect()
    text = run(model, ids, mask, ChunkedDecoding(8, streamer=streamer))
    assert streamer.got == text[0].tolist()
    assert streamer.ended


def test_sampling_follows_the_refined_distribution():
    model = awake(std=0.1, depth=2)
    ids = tokens(1, 6)
    with torch.no_grad():
        first = model(ids, use_cache=False).logits[0, -1]
        top = first.topk(3).indices
        # The distribution of the second new token, over the three most likely first ones.
        refined = {int(t): model(torch.cat([ids, t[None, None]], 1), use_cache=False).logits[0, -1] for t in top}
    draws, temperature = 4000, 0.7
    torch.manual_seed(0)
    text = run(
        model, ids.expand(draws, -1), torch.ones(draws, 6, dtype=torch.long), ChunkedDecoding(4),
        max_new_tokens=3, do_sample=True, temperature=temperature, top_k=0, top_p=1.0,
    )  # fmt: skip
    _agree(text[:, 6], (first / temperature).softmax(-1))
    for token, logits in refined.items():
        _agree(text[text[:, 6] == token, 7], (logits / temperature).softmax(-1))


def _agree(drawn, distribution):
    counts = torch.bincount(drawn, minlength=len(distribution)).double()
    expected = distribution.double() * len(drawn)
    common = expected >= 5
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    wanted = torch.cat([expected[common], expected[~common].sum()[None]])
    kept = wanted > 0
    assert chisquare(observed[kept], wanted[kept] * observed[kept].sum() / wanted[kept].sum()).pvalue > 0.001


def test_sampling_repeats_with_its_seed_and_respects_top_k():
    model = awake()
    ids, mask = prompts()
    texts = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        texts.append(run(model, ids, mask, ChunkedDecoding(8), do_sample=True, top_k=1))
    assert torch.equal(texts[0], run(model, ids, mask))  # only the most likely token is left
    texts = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        texts.append(run(model, ids, mask, ChunkedDecoding(8), do_sample=True, top_p=0.9))
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])


def test_a_filled_cache_is_gone_on_with():
    model = awake()
    ids = tokens(1, 9)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :6], use_cache=True, **{cache_name(model): cache})
    mask = torch.ones_like(ids)
    got = run(model, ids, mask, ChunkedDecoding(8), **{cache_name(model): cache})
    assert torch.equal(got, run(model, ids, mask))


OBSTACLES = ["static cache", "depth 0", "no recursion", "jamba", "no cache", "right padding", "an unknown cache"]


@pytest.mark.parametrize("ending", [False, True])
@pytest.mark.parametrize("case", OBSTACLES)
def test_what_cannot_be_taken_back_is_decoded_token_by_token(case, ending, caplog, monkeypatch):
    """The same tokens, and traces as long as each row's new text: what reads them must not find it empty."""
    model = awake("jamba" if case == "jamba" else "llama")
    depth = 2
    ids, mask = prompts(3)
    if case == "right padding":
        ids, mask = ids.flip(1), mask.flip(1)
    if case == "depth 0":
        model.recursion.depth = depth = 0
    if case == "no recursion":
        model.recursion.detach()
        depth = 0
    if case == "an unknown cache":
        monkeypatch.setattr(upstream, "cache_of", lambda values: None)
    options = {"cache_implementation": "static"} if case == "static cache" else {}
    options |= {"use_cache": False} if case == "no cache" else {}
    free = run(model, ids, mask, **options)
    if ending:
        options |= {"eos_token_id": [int(free[0, 12]), int(free[1, 15])], "pad_token_id": 0}
    expected = run(model, ids, mask, **options)
    decoding = ChunkedDecoding(8)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.equal(run(model, ids, mask, decoding, **options), expected)
    assert caplog.text.count("token by token") == 1, "a reason is told once"
    assert len(decoding.traces) == len(ids)
    for row, trace in zip(expected[:, 9:].tolist(), decoding.traces, strict=True):
        ends = [row.index(token) + 1 for token in options.get("eos_token_id", ()) if token in row]
        length = min([*ends, len(row)])
        assert trace.passes == [depth] * length
        assert trace.changed == [False] * length
    as_dict = run(model, ids, mask, ChunkedDecoding(8), return_dict_in_generate=True, **options)
    assert torch.equal(as_dict.sequences, expected)


def test_beam_search_is_refused():
    model = awake()
    ids, mask = prompts(1)
    with pytest.raises(UsageError, match="beams"):
        run(model, ids, mask, ChunkedDecoding(8), num_beams=2)
    with pytest.raises(UsageError, match="width is 0"):
        ChunkedDecoding(0)


@pytest.mark.parametrize("family", ["gpt2", "mpt"])
def test_no_row_is_drafted_beyond_the_last_position_of_the_model(family):
    """Rows that are ahead of others end at the limit, and those that ended leave no empty columns."""
    model, lengths = awake(family, std=0.1), (20, 18, 19, 12)
    ids, mask = padded_left([tokens(1, length, seed=seed)[0] for seed, length in enumerate(lengths)])
    free = run(model, ids, mask, max_new_tokens=44)  # 64 positions
    assert torch.equal(run(model, ids, mask, ChunkedDecoding(8), max_new_tokens=44), free)
    first = {"eos_token_id": [int(free[0, 40])], "pad_token_id": 0, "max_new_tokens": 44}
    assert torch.equal(run(model, ids, mask, ChunkedDecoding(8), **first), run(model, ids, mask, **first))


def test_the_caches_hold_one_entry_per_pass_and_position():
    model = awake(depth=2, span=(1, 3))
    ids = tokens(1, 9)
    found = run(model, ids, torch.ones_like(ids), ChunkedDecoding(8), return_dict_in_generate=True)
    cache = found[cache_name(model)]
    lengths = [[layer.get_seq_length() for layer in part.layers] for part in (cache, *cache.rr_passes)]
    assert lengths[0] == [lengths[0][0]] * 4
    # Passes after pass 0 hold the span's layers alone: (1 + depth x span share) times the baseline's cache.
    assert lengths[1] == lengths[2] == [0, lengths[0][0], lengths[0][0], 0]
