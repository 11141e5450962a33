"""A model that brings its own code and its own cache class, from a local folder."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import save_file

import rrcli
from families import ROUNDING, far, tokens
from rrcli.demo import defaults
from rrcli.errors import RRError
from rrcli.files import write_json
from rrcli.recursion.config import RecursionConfig
from rrcli.recursion.engine import attach

# `crop` keeps the first n tokens, as caches did before transformers' own; `drop_last` is a name nobody else knows.
CODE = """
import torch
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


class PocketConfig(PretrainedConfig):
    model_type = "pocket"
    attribute_map = {"num_hidden_layers": "depth"}

    def __init__(self, width=32, depth=4, vocab_size=97, layer_passes=False, tuple_cache=False, **kwargs):
        super().__init__(**kwargs)
        self.width, self.depth, self.vocab_size = width, depth, vocab_size
        self.layer_passes, self.tuple_cache = layer_passes, tuple_cache


class PocketCache:
    def __init__(self, layers):
        self.keys, self.values = [None] * layers, [None] * layers

    def update(self, keys, values, layer):
        if self.keys[layer] is not None:
            keys = torch.cat([self.keys[layer], keys], 1)
            values = torch.cat([self.values[layer], values], 1)
        self.keys[layer], self.values[layer] = keys, values
        return keys, values

    def get_seq_length(self, layer=0):
        return 0 if self.keys[layer] is None else self.keys[layer].shape[1]

    def _each(self, change):
        self.keys = [None if k is None else change(k) for k in self.keys]
        self.values = [None if v is None else change(v) for v in self.values]

    def crop(self, length):
        self._each(lambda t: t[:, :length])

    def drop_last(self):
        self._each(lambda t: t[:, :-1])

    def reorder_cache(self, order):
        self._each(lambda t: t.index_select(0, order))


class TupleStore(tuple):
    pass


class PocketBlock(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        self.index = index
        self.norm_1, self.norm_2 = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.qkv, self.out = nn.Linear(config.width, 3 * config.width), nn.Linear(config.width, config.width)
        self.up, self.down = nn.Linear(config.width, 64), nn.Linear(64, config.width)

    def forward(self, x, memory=None, extra=None):
        q, k, v = self.qkv(self.norm_1(x)).chunk(3, -1)
        if memory is not None:
            k, v = memory.update(k, v, self.index)
        seen, new = k.shape[1], q.shape[1]
        mask = torch.ones(new, seen, dtype=torch.bool, device=x.device).tril(seen - new)
        scores = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).masked_fill(~mask, float("-inf"))
        x = x + self.out(scores.softmax(-1) @ v)
        if extra is not None:
            x = x + extra
        return x + self.down(torch.relu(self.up(self.norm_2(x))))


class PocketPreTrained(PreTrainedModel):
    config_class = PocketConfig
    base_model_prefix = "trunk"


class PocketTrunk(PocketPreTrained):
    def __init__(self, config):
        super().__init__(config)
        self.embed, self.places = nn.Embedding(config.vocab_size, config.width), nn.Embedding(64, config.width)
        self.blocks = nn.ModuleList(PocketBlock(config, i) for i in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, attention_mask=None, past_key_values=None, use_cache=None, **kwargs):
        if use_cache and past_key_values is None:
            past_key_values = PocketCache(self.config.depth)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        x = self.embed(input_ids) + self.places(torch.arange(past, past + input_ids.shape[1], device=input_ids.device))
        extra = None
        for block in self.blocks:
            y = block(x, past_key_values, extra)
            extra, x = (x * 0.1 if self.config.layer_passes else None), y
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), past_key_values=past_key_values)


class PocketForCausalLM(PocketPreTrained, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.trunk = PocketTrunk(config)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.trunk.embed

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, attention_mask=None, past_key_values=None, use_cache=None, **kwargs):
        output = self.trunk(input_ids, attention_mask, past_key_values, use_cache)
        past = output.past_key_values
        if self.config.tuple_cache and past is not None:
            past = TupleStore((past,))
        return CausalLMOutputWithPast(logits=self.lm_head(output.last_hidden_state), past_key_values=past)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A model folder as one is downloaded: config, code, weights and a tokenizer."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return write(tmp_path / "pocket")


def write(path, **changes):
    path.mkdir()
    (path / "modeling_pocket.py").write_text(CODE)
    classes = {
        "AutoConfig": "modeling_pocket.PocketConfig",
        "AutoModelForCausalLM": "modeling_pocket.PocketForCausalLM",
    }
    write_json(path / "config.json", {"model_type": "pocket", "vocab_size": 97, "auto_map": classes} | changes)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).write_bytes((defaults.MODEL_DIR / name).read_bytes())
    scope: dict = {"__name__": "pocket"}
    exec(compile(CODE, "modeling_pocket.py", "exec"), scope)
    torch.manual_seed(0)
    model = scope["PocketForCausalLM"](scope["PocketConfig"](vocab_size=97))
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(p.shape, generator=generator) * 0.2 if p.dim() > 1 else p.detach().clone()
        for name, p in model.named_parameters()
    }
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


def load(folder):
    return rrcli.load(folder, trust_remote_code=True, device="cpu")[0]


def awake(folder, span=None):
    model = load(folder)
    recursion = attach(model, RecursionConfig(max_steps=2, span=span))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        recursion.cell.w_out.weight.normal_(std=0.1, generator=generator)
    return model, recursion


def stepwise(model, ids, cache=None):
    parts = []
    for t in range(ids.shape[1]):
        output = model(ids[:, t : t + 1], use_cache=True, past_key_values=cache)
        cache = output.past_key_values
        parts.append(output.logits)
    return torch.cat(parts, 1), cache


def test_its_code_is_not_run_without_trust(folder):
    with pytest.raises(RRError) as error:
        rrcli.load(folder)
    assert "--trust-remote-code" in error.value.hint
    assert not (folder.parent / "modules").exists()


@pytest.mark.parametrize("span", [None, (1, 3)], ids=["full", "partial"])
@torch.no_grad()
def test_with_trust_every_property_holds(folder, span):
    stock, ids = load(folder), tokens()
    plain, one_by_one = stock(ids).logits, stepwise(stock, ids)[0]
    model = load(folder)
    recursion = attach(model, RecursionConfig(max_steps=2, span=span))
    for depth in range(3):
        recursion.depth = depth
        assert torch.equal(model(ids).logits, plain)
        assert torch.equal(stepwise(model, ids)[0], one_by_one)
    model, recursion = awake(folder, span)
    for depth in range(3):
        recursion.depth = depth
        logits = model(ids).logits
        assert (far(logits, plain) > 0.01) == (depth > 0)
        after, cache = stepwise(model, ids)
        assert far(after, logits) < ROUNDING
        assert len(getattr(cache, "rr_passes", [])) == depth
    other = ids.clone()
    other[:, 6] = (other[:, 6] + 7) % 90
    assert far(model(other).logits[:, :6], logits[:, :6]) < ROUNDING
    recursion.detach()
    assert torch.equal(model(ids).logits, plain)


@pytest.mark.parametrize("span", [None, (1, 3)], ids=["full", "partial"])
@torch.no_grad()
def test_its_own_cache_is_cropped_reordered_and_copied_with_those_of_the_passes(folder, span):
    model, _ = awake(folder, span)
    ids, order = tokens(batch=3), torch.tensor([2, 2, 0])
    full = model(ids).logits
    _, cache = stepwise(model, ids[:, :9])
    twin = copy.deepcopy(cache)
    cache.crop(6)
    assert far(stepwise(model, ids[:, 6:], cache)[0], full[:, 6:]) < ROUNDING
    twin.reorder_cache(order)
    assert far(stepwise(model, ids[order, 9:], twin)[0], full[order, 9:]) < ROUNDING


@pytest.mark.parametrize("span", [None, (1, 3)], ids=["full", "partial"])
@torch.no_grad()
def test_a_change_of_its_cache_that_we_do_not_know_is_refused(folder, span):
    model, _ = awake(folder, span)
    ids = tokens()
    _, cache = stepwise(model, ids[:, :9])
    cache.drop_last()
    with pytest.raises(RRError, match="PocketCache was changed"):
        model(ids[:, 8:9], past_key_values=cache, use_cache=True)


@torch.no_grad()
def test_it_generates_with_its_past(folder):
    """Under the name that its code has for the cache, whatever the installed transformers calls it."""
    stock, ids = load(folder), tokens()
    seen = []
    hook = stock.trunk.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    text = stock.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0)
    hook.remove()
    assert seen == [12, 1, 1, 1, 1, 1], "every token goes through once"
    assert torch.equal(stock(text).logits[:, 11:-1].argmax(-1), text[:, 12:])
    model, _ = awake(folder)
    text = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(model(text).logits[:, 11:-1].argmax(-1), text[:, 12:])


@pytest.mark.parametrize(
    ("changes", "match"),
    [({"layer_passes": True}, "something else than the hidden state"), ({"tuple_cache": True}, "TupleStore")],
)
def test_remote_code_that_cannot_be_run_again_is_refused(folder, changes, match):
    model = load(write(folder.parent / "other", **changes))
    with pytest.raises(RRError, match=match):
        attach(model)
    assert not hasattr(model, "recursion")
