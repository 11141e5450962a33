"""Exit rules: what each reads, and that decoding in chunks writes what deciding position by position writes."""

import logging

import pytest
import torch
from scipy.stats import chisquare
from torch.nn import functional as F

from families import build, cache_name, tokens, wake
from rrcli import ChunkedDecoding, RecursionConfig, attach
from rrcli.errors import RRError, UsageError
from rrcli.recursion.exits import CHOOSABLE, GREATEST, NEVER, ExitRule, parse_exit
from rrcli.recursion.signals import draws, top_of

NEW = 12
RULES = (
    *(ExitRule("head", 0.5), ExitRule("probability", 0.034), ExitRule("margin", 0.005), ExitRule("unchanged")),
    *(ExitRule("contraction", 1.1), ExitRule("depth", 0), ExitRule("depth", 2)),
    ExitRule("random", shares=(0.4, 0.2, 0.3, 0.1)),
)
STRICTEST = (
    *(ExitRule("head", 1), ExitRule("probability", 1), ExitRule("margin", 1), ExitRule("contraction", 0)),
    *(ExitRule("depth", 3), ExitRule("random", shares=(0.0, 0.0, 0.0, 1.0)), NEVER),
)


def awake(family="llama", depth=3, std=0.1, span=None):
    """Return a model whose passes differ, and whose boundary head is sometimes content."""
    model = build(family)
    recursion = wake(attach(model, RecursionConfig(max_steps=3, span=span)), std)
    recursion.depth = depth
    with torch.no_grad():
        generator = torch.Generator().manual_seed(3)
        recursion.head.score.weight.normal_(std=0.3, generator=generator)
        recursion.head.score.bias.zero_()
    return model


def run(model, ids, mask=None, decoding=None, **options):
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"max_new_tokens": NEW, "do_sample": False, "use_cache": True} | options
    return model.generate(ids, attention_mask=mask, custom_generate=decoding, **options)


def content(rule, recursion, states, logits, draw):
    """Tell whether a rule is content with the last of some passes at one position; the rules, written out again."""
    k, p = len(states) - 1, logits[-1].softmax(-1).sort(descending=True).values
    match rule.kind:
        case "head":
            return bool(recursion.head(states[k].float(), top_of(logits[k])).sigmoid() >= rule.threshold)
        case "probability":
            return bool(p[0] >= rule.threshold)
        case "margin":
            return bool(p[0] - p[1] >= rule.threshold)
        case "unchanged":
            return k > 0 and bool(logits[k].argmax() == logits[k - 1].argmax())
        case "contraction":
            return k > 0 and bool((states[k] - states[k - 1]).norm() / states[k - 1].norm() <= rule.threshold)
        case "random":
            return bool(draw < sum(rule.shares[: k + 1]))
        case "depth":
            return k >= rule.threshold
    return False


@torch.no_grad()
def reference(model, prompt, rule, row=0, new=NEW):
    """Decode one token after the other without a cache, and return the new tokens and the passes they left with."""
    recursion, depth, text, left = model.recursion, model.recursion.depth, prompt, []
    for place in range(new):
        found = recursion.passes(text)
        states = [state[0, -1].double() for state in found.states]
        logits = [model.lm_head(hidden)[0, -1].double() for hidden in found.hidden]
        draw, k = draws(torch.tensor(row), torch.tensor(place)), 0
        while k < depth and not content(rule, recursion, states[: k + 1], logits[: k + 1], draw):
            k += 1
        left.append(k)
        text = torch.cat([text, logits[k].argmax()[None, None]], 1)
    return text[0, prompt.shape[1] :].tolist(), left


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "longcat_flash"])
def test_chunks_write_what_deciding_position_by_position_writes(family):
    model, seen = awake(family), set()
    for seed, rule in enumerate(RULES):
        ids = tokens(1, 7, seed=seed)
        decoding = ChunkedDecoding(5, rule)
        got = run(model, ids, decoding=decoding)[0, 7:].tolist()
        text, passes = reference(model, ids, rule)
        assert (got, decoding.traces[0].passes) == (text, passes), rule
        seen |= {(rule.kind, k) for k in passes}
        assert decoding.totals.metrics()["avg_passes"] == pytest.approx(sum(passes) / NEW)
    left = {kind: {k for name, k in seen if name == kind} for kind, _ in seen}
    assert sum(len(passes) > 1 for passes in left.values()) >= 4, left  # the rules do decide something


@pytest.mark.parametrize("family", ["gemma3_text", "qwen3_next", "bloom", "mpt"])
def test_where_passes_cannot_lag_the_tokens_are_the_same(family, caplog):
    model = awake(family)
    with caplog.at_level(logging.WARNING):
        for rule in RULES[1:5:3]:
            ids = tokens(1, 7)
            got = run(model, ids, decoding=ChunkedDecoding(5, rule))[0, 7:].tolist()
            assert got == reference(model, ids, rule)[0], rule
    assert caplog.text.count("exits save nothing") == 1


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_rows_of_a_batch_get_the_tokens_that_they_get_alone(family):
    model = awake(family)
    ids, mask = tokens(3, 9), torch.ones(3, 9, dtype=torch.long)
    mask[1, :3] = mask[2, :1] = 0
    free = run(model, ids, mask)
    ends = [int(free[0, 12])]
    for rule in (RULES[0], RULES[1], RULES[7]):
        decoding = ChunkedDecoding(4, rule)
        got = run(model, ids, mask, decoding)[:, 9:].tolist()
        for row, padding in enumerate((0, 3, 1)):
            text, passes = reference(model, ids[row : row + 1, padding:], rule, row)
            assert (got[row], decoding.traces[row].passes) == (text, passes), rule
        ended = ChunkedDecoding(4, rule)
        shorter = run(model, ids, mask, ended, eos_token_id=ends, pad_token_id=0)[:, 9:].tolist()
        for row, trace in enumerate(ended.traces):
            assert shorter[row][: len(trace.passes)] == got[row][: len(trace.passes)]


@pytest.mark.parametrize("rule", STRICTEST, ids=str)
def test_at_the_strictest_threshold_every_pass_is_run(rule):
    model = awake()
    ids = tokens(2, 7)
    assert torch.equal(run(model, ids, decoding=ChunkedDecoding(6, rule)), run(model, ids))


def test_each_token_goes_through_a_pass_once_at_most():
    """What a single row's decoding runs: nothing is drafted in vain, and no pass is run twice over a token."""
    model = awake()
    run(model, tokens(1, 7), decoding=ChunkedDecoding(8, ExitRule("depth", 0)))  # what a model can do is tried now
    ran: dict[int, int] = {}
    recursion = model.recursion
    cell = recursion.cell.forward
    recursion.cell.forward = lambda h, step: (ran.update({step: ran.get(step, 0) + h.shape[1]}), cell(h, step))[1]
    drafted = []
    model.model.register_forward_pre_hook(
        lambda _, __, kwargs: drafted.append(kwargs["input_ids"].shape[1]) if recursion._frame.before is None else None,
        with_kwargs=True,
    )
    ids = tokens(1, 7)
    decoding = ChunkedDecoding(8, ExitRule("probability", 0.034))
    run(model, ids, decoding=decoding)
    passes = decoding.traces[0].passes
    assert sum(drafted) == 7 + NEW - 1
    for k in (1, 2, 3):
        last = max((place for place, left in enumerate(passes) if left >= k), default=None)
        assert ran.get(k, 0) == (0 if last is None else 7 + last), k


def test_sampled_tokens_are_those_of_the_pass_they_left_with():
    model = awake(std=0.1, depth=2)
    ids = tokens(1, 6)
    rule = ExitRule("probability", 0.034)
    torch.manual_seed(0)
    text = run(
        model, ids.expand(3000, -1), None, ChunkedDecoding(4, rule),
        max_new_tokens=2, do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
    )  # fmt: skip
    first = text[:, 6].bincount().argmax()[None, None]
    for prefix, drawn in ((ids, text[:, 6]), (torch.cat([ids, first], 1), text[text[:, 6] == first[0, 0], 7])):
        with torch.no_grad():
            logits = [model.lm_head(h)[0, -1] for h in model.recursion.passes(prefix).hidden]
        k = next((k for k in range(2) if float(logits[k].softmax(-1).max()) >= 0.034), 2)
        expected = logits[k].softmax(-1).double() * len(drawn)
        observed = torch.bincount(drawn, minlength=len(expected)).double()
        common = expected >= 5
        observed = torch.cat([observed[common], observed[~common].sum()[None]])
        expected = torch.cat([expected[common], expected[~common].sum()[None]])
        observed, expected = observed[expected > 0], expected[expected > 0]
        assert chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 0.001


def test_logits_processors_change_tokens_and_not_the_decision():
    model = awake()
    ids = tokens(1, 7)
    rule = ExitRule("probability", 0.034)
    options = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}
    texts = [run(model, ids, decoding=ChunkedDecoding(width, rule), **options) for width in (1, 5)]
    assert torch.equal(*texts)
    strict = run(model, ids, decoding=ChunkedDecoding(5, ExitRule("probability", 1)), **options)
    assert torch.equal(strict, run(model, ids, **options))


def test_the_rule_of_the_model_is_used_unless_another_is_asked_for():
    model = awake()
    ids = tokens(1, 7)
    model.recursion.exit = ExitRule("depth", 0)
    with model.recursion.at_depth(0):
        stock = run(model, ids)
    assert torch.equal(run(model, ids, decoding=ChunkedDecoding(5)), stock)
    assert torch.equal(run(model, ids, decoding=ChunkedDecoding(5, NEVER)), run(model, ids))
    assert not torch.equal(stock, run(model, ids))


def test_a_returned_cache_can_be_gone_on_with():
    model = awake()
    ids = tokens(1, 9)
    rule = ExitRule("probability", 0.034)
    whole = run(model, ids, decoding=ChunkedDecoding(5, rule))
    found = run(model, ids, decoding=ChunkedDecoding(5, rule), max_new_tokens=6, return_dict_in_generate=True)
    cache = {cache_name(model): found[cache_name(model)]}
    rest = run(model, found.sequences, None, ChunkedDecoding(5, rule), max_new_tokens=NEW - 6, **cache)
    assert torch.equal(rest, whole)


def test_an_exit_that_cannot_be_decoded_is_an_error():
    ids = tokens(1, 7)
    rule = ExitRule("probability", 0.034)
    with pytest.raises(RRError, match="layers follow the span"):
        run(awake(span=(1, 3)), ids, decoding=ChunkedDecoding(5, rule))
    with pytest.raises(RRError, match="cannot be taken back"):
        run(awake(), ids, decoding=ChunkedDecoding(5, rule), cache_implementation="static")
    assert run(awake(span=(1, 3)), ids, decoding=ChunkedDecoding(5, NEVER)).shape == (1, 7 + NEW)


@pytest.mark.parametrize("text", ["probability:0.99", "head:0.5", "unchanged", "none", "depth:2", "contraction:0.1"])
def test_rules_are_read_as_they_are_written(text):
    assert str(parse_exit(text)) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [("probabilty:1", "unknown exit rule"), ("probability", "not understood"), ("unchanged:1", "not understood"),
     ("probability:x", "no number"), ("probability:2", "from 0 to 1"), ("depth:1.5", "whole number"),
     ("oracle", "unknown exit rule"), ("random", "unknown exit rule"), ("", "unknown exit rule")],
)  # fmt: skip
def test_what_is_no_rule_is_said(text, message):
    with pytest.raises(UsageError) as caught:
        parse_exit(text)
    assert message in f"{caught.value.message} {caught.value.hint}"


def test_rules_go_into_a_manifest_and_back():
    for kind in CHOOSABLE:
        rule = ExitRule(kind, 1.0 if kind in GREATEST else 0.0)
        assert ExitRule.from_dict(rule.to_dict()) == rule
    with pytest.raises(UsageError, match="cannot be chosen"):
        ExitRule.from_dict({"rule": "oracle", "threshold": 0})


def test_random_draws_are_uniform_and_belong_to_their_place():
    rows, places = torch.arange(200)[:, None], torch.arange(300)
    found = draws(rows, places)
    assert torch.equal(found[7, 30:40], draws(torch.tensor(7), torch.arange(30, 40)))
    assert float(found.min()) >= 0
    assert float(found.max()) < 1
    assert chisquare(torch.histc(found.float(), 50, 0, 1)).pvalue > 0.001
    neighbours = torch.corrcoef(torch.stack([found[:, 1:].flatten(), found[:, :-1].flatten()]))[0, 1]
    assert abs(float(neighbours)) < 0.02
    assert abs(float(F.cosine_similarity(found[0] - 0.5, found[1] - 0.5, dim=0))) < 0.25
