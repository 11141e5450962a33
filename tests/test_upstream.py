"""What belongs to other people: found under any name, done without, or refused; never another number."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

import rrcli
from commands import rr
from families import build, cache_name, tokens, uncached, wake
from rrcli import ChunkedDecoding, RecursionConfig, attach, upstream
from rrcli.errors import CheckFailed, RRError
from rrcli.evaluation.evaluate import evaluate_model
from rrcli.evaluation.held_out import held_out_data
from rrcli.recursion import flops
from rrcli.recursion.lora import add_lora
from rrcli.recursion.selftest import self_test
from rrcli.settings import EvalSettings

PACKAGE = Path(rrcli.__file__).parent
PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


# -- versions ----------------------------------------------------------------------------------------------------------


def test_what_is_installed_was_tested():
    assert upstream.untested() == []


@pytest.mark.parametrize("name", upstream.WATCHED)
def test_a_range_ends_where_the_tests_do(name):
    """A version that nobody has tried may have renamed what `upstream` rests on."""
    found = [text for text in metadata.requires("rrcli") if re.match(rf"{name}\b", text) and "extra" not in text]
    assert len(found) == 1
    assert re.search(r">=\d", found[0])
    assert re.search(r"<=?\d+\.\d+", found[0])


@pytest.mark.skipif(not PYPROJECT.is_file(), reason="not in a checkout")
def test_what_is_installed_came_from_this_pyproject():
    written = tomllib.loads(PYPROJECT.read_text())["project"]["dependencies"]
    recorded = {text for text in metadata.requires("rrcli") if "extra ==" not in text}
    assert {frozenset(re.split("[,<>=]+", text)) for text in written} == {
        frozenset(re.split("[,<>=]+", text)) for text in recorded
    }


def test_an_untested_version_is_named_and_every_family_then_proves_itself(monkeypatch):
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "99.0" if name == "peft" else real(name))
    upstream.untested.cache_clear()
    try:
        [said] = upstream.untested()
        assert re.fullmatch(r"peft 99\.0 \(tested: .*>=0\.21.*\)", said)
        proved = []
        monkeypatch.setattr("rrcli.recursion.engine.prove", lambda recursion: proved.append(recursion))
        attach(build("llama"))
        assert len(proved) == 1
    finally:
        monkeypatch.undo()
        upstream.untested.cache_clear()


def test_setup_says_what_was_not_tested_and_what_the_self_test_found(tmp_path, monkeypatch):
    monkeypatch.setattr(upstream, "untested", lambda: ["peft 99.0 (tested: >=0.21)"])
    done = rr("setup", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "not tested with peft 99.0" in " ".join(done.stdout.split())
    assert "chunked = sequential" in " ".join(done.stderr.split())


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_one_module_knows_private_names_of_others(path):
    if path.name == "upstream.py":
        return
    own = {"_exit"}  # documented, in spite of its name
    tree = ast.parse(path.read_text())
    found = [
        f"{node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and re.match(r"_[a-z]", node.attr)
        and node.attr not in own
        and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("rrcli") and not node.level:
            found += [f"{node.lineno}: {alias.name}" for alias in node.names if re.match(r"_[a-z]", alias.name)]
            found += [f"{node.lineno}: {node.module}"] if re.search(r"\._[a-z]", node.module or "") else []
        strings = [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else []
        found += [text for text in strings if re.fullmatch("past_key_values|cache_params|_[a-z]+(_[a-z]+)+", text)]
    assert found == []


# -- the self-test -----------------------------------------------------------------------------------------------------


def test_the_self_test_holds():
    assert re.fullmatch(
        r"zero-init identical, cached = uncached \(\de-0\d\), chunked = sequential \(48 tokens\), FLOPs as by formula",
        self_test(),
    )


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("one cache for all passes", "cannot go on"),
        ("feedback at zero-init", "zero-initialised recursion changes"),
        ("drafts are taken as they are", "chunked decoding writes other tokens"),
        ("no cache is known", "not known as a cache"),
        ("products are counted twice", "FLOPs are counted for a tiny 'llama', not"),
    ],
)
def test_the_self_test_finds_what_is_broken(monkeypatch, what, told):
    if what == "one cache for all passes":
        monkeypatch.setattr("rrcli.recursion.caches.of_pass", lambda cache, step: cache)
    elif what == "feedback at zero-init":
        forward = rrcli.recursion.feedback_cell.FeedbackCell.forward
        monkeypatch.setattr(
            "rrcli.recursion.feedback_cell.FeedbackCell.forward",
            lambda self, hidden, step: forward(self, hidden, step) + 0.1,
        )
    elif what == "drafts are taken as they are":
        monkeypatch.setattr(
            "rrcli.recursion.rows.Chooser.accept",
            lambda self, draft, drawn_from, refined: (torch.full_like(draft[:, 0], draft.shape[1]), draft[:, -1]),
        )
    elif what == "products are counted twice":
        monkeypatch.setitem(flops.OWN_FORMULAS, "aten::mm", lambda args, *_: 4 * args[0].numel() * args[1].shape[1])
    else:
        monkeypatch.setattr("rrcli.recursion.selftest.cache_of", lambda values: None)
    with pytest.raises(RRError, match=told):
        self_test()


def test_the_self_test_says_what_a_new_torch_does_not_let_count(monkeypatch):
    monkeypatch.delitem(flops.OWN_FORMULAS, "aten::_scaled_dot_product_flash_attention_for_cpu")
    assert self_test().endswith("cannot count: aten::_scaled_dot_product_flash_attention_for_cpu")


def test_setup_fails_with_3_where_the_self_test_does(tmp_path, monkeypatch):
    def broken() -> str:
        raise CheckFailed("chunked decoding writes other tokens than all passes for every token")

    monkeypatch.setattr("rrcli.recursion.selftest.self_test", broken)
    done = rr("setup", folder=tmp_path)
    assert done.returncode == 3
    assert "failed: self-test" in done.stderr


# -- transformers as they might become ---------------------------------------------------------------------------------


def _third_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model takes and returns its cache as `memory`, and `generate` hands it on so."""
    today = cache_name(build("llama"))
    forward, generate = LlamaForCausalLM.forward, LlamaForCausalLM.generate

    @functools.wraps(forward)
    def renamed(self: Any, *args: Any, memory: Any = None, **kwargs: Any) -> Any:
        assert today not in kwargs
        output = forward(self, *args, **kwargs, **({} if memory is None else {today: memory}))
        found = {("memory" if name == today else name): value for name, value in output.items()}
        return _Answer(found)

    parameters = inspect.signature(forward).parameters.values()
    renamed.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [p.replace(name="memory") if p.name == today else p for p in parameters]
    )

    def generating(self: Any, *args: Any, memory: Any = None, custom_generate: Any = None, **kwargs: Any) -> Any:
        given = {} if memory is None else {today: memory}
        prepare = self.prepare_inputs_for_generation

        @functools.wraps(prepare)
        def prepared(*a: Any, **k: Any) -> dict[str, Any]:
            return {("memory" if name == today else name): value for name, value in prepare(*a, **k).items()}

        def handed_on(*a: Any, **k: Any) -> Any:
            return custom_generate(*a, **{("memory" if name == today else name): value for name, value in k.items()})

        self.prepare_inputs_for_generation = prepared
        try:
            options = {} if custom_generate is None else {"custom_generate": handed_on}
            return generate(self, *args, **kwargs, **given, **options)
        finally:
            del self.prepare_inputs_for_generation

    monkeypatch.setattr(LlamaForCausalLM, "forward", renamed)
    monkeypatch.setattr(LlamaForCausalLM, "generate", generating)


class _Answer(dict):
    """A model's output of another kind: a dictionary with attributes."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.get(name)


def _no_cache_in_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = LlamaForCausalLM.forward

    @functools.wraps(forward)
    def lacking(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        return CausalLMOutputWithPast(logits=output.logits, hidden_states=output.hidden_states)

    monkeypatch.setattr(LlamaForCausalLM, "forward", lacking)


def _no_recorder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "RECORDER", None)


def _no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rrcli.recursion.products.onednn_product", lambda: None)


def _no_croppable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches that cannot be taken back: the fallback of chunked decoding decodes everything."""
    monkeypatch.setattr(upstream, "can_be_taken_back", lambda cache: False)


BREAKAGES = [_third_name, _no_cache_in_the_output, _no_recorder, _no_product, _no_croppable]


@functools.cache
def _measured() -> tuple[Any, dict[str, Any]]:
    """The held-out data, and what a recursion with feedback makes of it on today's transformers."""
    settings = EvalSettings(task=("chain_sum",), max_new_tokens=8, skip_performance=True, max_samples=6)
    data = held_out_data(settings, Path(), 6, 6)
    return data, _evaluate(data, settings)


def _evaluate(data: Any, settings: EvalSettings) -> dict[str, Any]:
    model, tokenizer = rrcli.load("default", device="cpu")
    wake(attach(model, RecursionConfig(max_steps=2)), 0.02)
    return evaluate_model(model, tokenizer, data, settings=settings)


@pytest.mark.parametrize("breakage", BREAKAGES, ids=lambda f: f.__name__.strip("_"))
def test_an_evaluation_gives_the_same_numbers(monkeypatch, breakage):
    data, expected = _measured()
    settings = EvalSettings(task=("chain_sum",), max_new_tokens=8, skip_performance=True, max_samples=6)
    breakage(monkeypatch)
    found = _evaluate(data, settings)
    for part in ("problems", "generations"):
        assert found["records"][part] == expected["records"][part]
    for a, b in zip(found["records"]["documents"], expected["records"]["documents"], strict=True):
        assert a["nll"] == pytest.approx(b["nll"], rel=1e-6)
        assert a["correct"] == b["correct"]


@pytest.mark.parametrize("breakage", [_third_name, _no_recorder, _no_product])
def test_the_self_test_holds_where_numbers_are_the_same(monkeypatch, breakage):
    breakage(monkeypatch)
    assert "chunked = sequential" in self_test()


@pytest.mark.parametrize(
    ("breakage", "told"), [(_no_cache_in_the_output, "returns no cache"), (_no_croppable, "was not done in chunks")]
)
def test_the_self_test_refuses_what_makes_decoding_slow(monkeypatch, breakage, told):
    breakage(monkeypatch)
    with pytest.raises(RRError, match=told):
        self_test()


def test_without_a_recorder_recorded_outputs_are_refused_and_the_rest_is_the_same(monkeypatch):
    model, ids = build("llama"), tokens()
    wake(attach(model, RecursionConfig(max_steps=2)))
    with torch.no_grad():
        expected = uncached(model, ids)
        monkeypatch.setattr(upstream, "RECORDER", None)
        assert torch.equal(uncached(model, ids), expected)
        with pytest.raises(RRError, match="output_hidden_states cannot be had"):
            model(ids, output_hidden_states=True)
        model.recursion.depth = 0
        assert len(model(ids, output_hidden_states=True).hidden_states) == 5


def test_a_transformers_without_its_recorder_is_imported_all_the_same():
    code = (
        "import transformers.utils.output_capturing as module\ndel module._active_collector\n"
        "from rrcli import upstream\nfrom rrcli.recursion import engine\nprint(upstream.RECORDER)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "None"


def test_an_argument_that_is_no_cache_is_not_taken_for_one():
    class Odd:
        class config:
            model_type = "odd"

        def forward(self, input_ids: Any, past: tuple[Any, ...] | None = None) -> None: ...

    assert not upstream.takes_cache(Odd())
    with pytest.raises(RRError, match="no argument of their forward is known as a cache"):
        upstream.cache_argument(Odd())


def test_a_cache_layer_that_does_not_say_whether_it_is_empty_is_looked_into():
    """As those that families have in place of layers without attention."""

    class Quiet:
        def __init__(self) -> None:
            self.is_initialized, self.keys, self.states = True, None, torch.zeros(0)

    layer = Quiet()
    assert upstream.is_blank(layer)
    layer.states = torch.zeros(1)
    assert not upstream.is_blank(layer)
    model, ids = build("nemotron_h"), tokens()
    wake(attach(model, RecursionConfig(max_steps=2)))
    text = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert torch.equal(text[:, 12:], uncached(model, text)[:, 11:-1].argmax(-1))


# -- peft, accelerate, torch, tensorboard ------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_are_switched_the_public_way_where_pefts_flag_is_gone(monkeypatch, checkpointing):
    gradients = []
    for public in (False, True):
        model, ids = build("llama"), tokens()
        wake(attach(model, RecursionConfig(max_steps=2)))
        lora = add_lora(model, 2, 2)
        with torch.no_grad():
            for parameter in lora.parameters():
                parameter.add_(0.02)
        if checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        if public:
            from peft.tuners.tuners_utils import BaseTunerLayer

            # The flag has another name: the old one is set in vain.
            monkeypatch.setattr(BaseTunerLayer, "disable_adapters", property(lambda self: self.renamed))
            monkeypatch.setattr(BaseTunerLayer, "enable_adapters", _enable)
            for layers in lora._of_layer.values():
                for layer in layers:
                    layer.renamed = layer._disable_adapters
        uncached(model, ids).logsumexp(-1).sum().backward()
        gradients.append([parameter.grad for parameter in lora.parameters()])
    assert any(float(gradient.abs().max()) > 0 for gradient in gradients[0])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def _enable(self: Any, enabled: bool) -> None:
    self.renamed = not enabled
    self.requires_grad_(enabled)


def test_checkpointing_that_is_not_understood_is_refused():
    """A recomputation would leave the adapters out, and the gradients would be another model's."""
    layer = torch.nn.Linear(2, 2)
    with upstream.checkpointed_with(layer, lambda run: run):
        pass
    layer.gradient_checkpointing = True
    with pytest.raises(RRError, match="LoRA in passes"), upstream.checkpointed_with(layer, lambda run: run):
        pass
    layer.eval()
    with upstream.checkpointed_with(layer, lambda run: run):
        pass


def test_a_fallback_without_its_function_is_an_error_not_an_empty_text():
    model, ids = build("llama"), tokens()
    attach(model).depth = 0  # nothing to draft: token by token
    mask = torch.ones_like(ids)
    options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "custom_generate": ChunkedDecoding()}
    assert model.generate(ids, **options).shape[1] == ids.shape[1] + 4
    model._sample = None
    with pytest.raises(RRError, match="cannot be decoded token by token"):
        model.generate(ids, **options)


def test_a_function_of_peft_that_moved_is_found_and_one_that_is_gone_is_told(monkeypatch):
    function = upstream.peft_function("get_peft_model_state_dict")
    monkeypatch.setitem(sys.modules, "peft.functional", None)
    assert upstream.peft_function("get_peft_model_state_dict") is function
    with pytest.raises(RRError, match="peft has no 'frobnicate'"):
        upstream.peft_function("frobnicate")


def test_onednn_is_left_alone_where_its_product_is_another(monkeypatch):
    upstream.onednn_product.cache_clear()
    try:
        monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda rows, weight, *_: rows @ weight.T * 2)
        assert upstream.onednn_product() is None
        upstream.onednn_product.cache_clear()
        monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda rows: rows)
        assert upstream.onednn_product() is None
    finally:
        monkeypatch.undo()
        upstream.onednn_product.cache_clear()


def test_a_skeleton_is_left_as_it_was():
    model = build("mixtral")
    before = model.config.to_dict(), model.config._experts_implementation
    with upstream.on_shapes(model):
        assert (model.config.pad_token_id, model.config._experts_implementation) == (None, "grouped_mm")
    assert (model.config.to_dict(), model.config._experts_implementation) == before


def test_experts_run_on_shapes_without_transformers_grouped_product(monkeypatch):
    """With as many FLOPs; only the memory that is estimated is more."""

    def run(skeleton):
        with torch.device("meta"), flops.counted_flops() as counter, upstream.on_shapes(skeleton):
            skeleton(torch.zeros(2, 5, dtype=torch.long), use_cache=True).logits.sum().backward()
        return counter.checked()

    usual = run(build("mixtral").to("meta"))
    monkeypatch.delattr(sys.modules["transformers.integrations.moe"], "_grouped_mm")
    assert run(build("mixtral").to("meta")) == usual


def test_a_plan_says_what_is_cut():
    plan = upstream.parallel_plan(build("qwen3_moe"))
    assert plan.cuts("model.layers.3.self_attn.q_proj.weight")
    assert plan.cuts("model.layers.0.mlp.experts.down_proj")
    assert not plan.cuts("model.layers.0.input_layernorm.weight")
    assert plan.experts
    none = upstream.parallel_plan(build("mamba2"))
    assert (dict(none.tensor), dict(none.experts)) == ({}, {})
    assert not none.cuts("backbone.layers.0.mixer.in_proj.weight")


def test_hyper_parameters_that_cannot_be_written_are_left_out():
    assert upstream.add_hparams(object(), {"lr": 1.0}, {}) is False


# -- remote code that was written for another version ------------------------------------------------------------------


@pytest.mark.parametrize("own", ["past_key_values", "cache", "cache_params"])
def test_generate_and_code_of_another_version_understand_each_other(monkeypatch, own):
    """A model whose forward has an older, or a newer, name for its cache, and takes any other for an unknown option."""
    today = cache_name(build("llama"))
    stock, ids = build("llama"), tokens()
    mask = torch.ones_like(ids)
    expected = stock.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    seen: list[bool] = []

    class Remote(LlamaForCausalLM):
        def forward(self, input_ids=None, attention_mask=None, position_ids=None, use_cache=None, **kwargs):  # type: ignore[no-untyped-def]
            past = kwargs.pop(own, None)
            kwargs.pop(today if today != own else "", None)
            seen.append(past is not None)
            given = {} if past is None else {today: past}
            return super().forward(
                input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=use_cache,
                **given,
                **kwargs,
            )

    parameters = [
        p.replace(name=own) if p.name == today else p
        for p in inspect.signature(LlamaForCausalLM.forward).parameters.values()
    ]
    Remote.forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    model = Remote(stock.config).eval()
    model.load_state_dict(stock.state_dict())
    model.generation_config = stock.generation_config
    recursion = wake(attach(model, RecursionConfig(max_steps=2)), 0.03)
    recursion.depth = 0
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False), expected)
    assert all(seen), "a forward went without its past"
    recursion.depth = 2
    sequential = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    decoding = ChunkedDecoding(4)
    chunked = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, custom_generate=decoding)
    assert torch.equal(chunked, sequential)
    assert decoding.totals.chunks
    recursion.detach()
    assert "prepare_inputs_for_generation" not in vars(model)
    assert not model._forward_pre_hooks


def test_what_is_patched_is_put_back_whatever_happens():
    plain, hooked = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    own = hooked.forward = lambda rows: rows
    rows = torch.ones(1, 2)
    for module in (plain, hooked):
        before = module(rows)
        with upstream.patched(module, forward=lambda rows: rows + 1, extra=True):
            assert torch.equal(module(rows), rows + 1)
            assert module.extra
            with pytest.raises(ZeroDivisionError), upstream.patched(module, forward=lambda rows: rows + 1 // 0):
                module(rows)
            assert torch.equal(module(rows), rows + 1)
        assert torch.equal(module(rows), before)
        assert not hasattr(module, "extra")
    assert "forward" not in vars(plain)
    assert hooked.forward is own
