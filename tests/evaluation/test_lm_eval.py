"""The same local text as an offline task of lm-eval: its three perplexities to six digits, recursion or not.

lm-eval is a reference only with `add_bos_token=False` (the start token is its prefix token already, or would be there
twice) and with its softmax in fp64: on a CPU, torch's log_softmax in fp32 is off by about 1e-5 nats a token over a
vocabulary of 49,152, which shows in the sixth digit.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
import torch
from test_smollm2 import gguf

import rrcli
from made_tokenizers import chain, like_llama_2, with_special_tokens
from rrcli.data.tokens import encode_prompt
from rrcli.demo import defaults
from rrcli.evaluation.evaluate import evaluate_model
from rrcli.evaluation.perplexity import score_documents
from rrcli.reporting import Silent
from rrcli.settings import EvalSettings

pytest.importorskip("lm_eval")

TEXTS = [
    "Tom has a red ball. He gives the ball to Ann.",
    "Once upon a time there was a small cat that lived in a very old house near the river.\n\nIts name was Émile.",
    "Ann walks to the market.  She buys a loaf of bread, two apples and a cup of tea. Then she goes home again. " * 3,
    # Enough for the rounding of fp32, about 1e-6 nats a token and of either sign, to even out.
    *(json.loads(line)["text"] for line in defaults.TEXT_FILE.read_text(encoding="utf-8").splitlines()[:10]),
]
ONLY_TEXT = EvalSettings(max_length=64, skip_reasoning=True, skip_generation=True, skip_performance=True)
NAMES = ("word_perplexity", "byte_perplexity", "bits_per_byte")
TASK = """
task: local_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/text.jsonl}}, cache_dir: {folder}/cache}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: byte_perplexity}}, {{metric: bits_per_byte}}]
metadata: {{version: 1.0}}
"""


@pytest.fixture(scope="module")
def loaded(request):
    if request.param != "SmolLM2-135M":
        return rrcli.load(request.param, dtype="float32", device="cpu")
    source, package = gguf(), pytest.importorskip("gguf")
    with pytest.MonkeyPatch.context() as patch:  # its 49,152 tokens are read once, not two or three times
        for name in ("GGUFReader", "get_tensor_name_map"):
            patch.setattr(package, name, functools.cache(getattr(package, name)))
        return rrcli.load(source, dtype="float32", device="cpu")


def harness_results(model: Any, tokenizer: Any, folder: Any) -> dict[str, float]:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    (folder / "local_text.yaml").write_text(TASK.format(folder=folder))
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    settings = {"max_length": ONLY_TEXT.max_length, "add_bos_token": False, "softmax_dtype": "float64"}
    harness = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=2, **settings)
    tasks = TaskManager(include_path=str(folder), include_defaults=False)
    found = lm_eval.simple_evaluate(model=harness, tasks=["local_text"], task_manager=tasks, bootstrap_iters=0)
    return {name: found["results"]["local_text"][f"{name},none"] for name in NAMES}


# A small vocabulary shows what a recursion does to the numbers, a large one what rounding does.
@pytest.mark.parametrize(
    ("loaded", "recursive"),
    [
        ("default", False),
        ("default", True),
        ("SmolLM2-135M", False),
        pytest.param("SmolLM2-135M", True, marks=pytest.mark.slow),
    ],
    indirect=["loaded"],
)
def test_perplexities_agree_with_lm_eval(loaded, recursive, tmp_path):
    model, tokenizer = loaded
    head = model.get_output_embeddings().weight.detach().clone()
    recursion = rrcli.attach(model, rrcli.RecursionConfig(max_steps=1)) if recursive else None
    try:
        if recursion is not None:
            torch.nn.init.normal_(recursion.cell.w_out.weight, std=0.02)
        theirs = harness_results(model, tokenizer, tmp_path)
        ours = evaluate_model(model, tokenizer, TEXTS, settings=ONLY_TEXT)["metrics"]
    finally:
        if recursion is not None:
            recursion.detach()
    assert {name: ours[name]["value"] for name in NAMES} == pytest.approx(theirs, rel=1e-6)
    # lm-eval ties weights when it is given a model: what it measured is what was loaded.
    assert torch.equal(model.get_output_embeddings().weight, head)


@pytest.mark.parametrize("kind", ["as Llama 2's", "BOS", "no BOS"])
def test_contexts_and_nats_agree_with_lm_eval_whatever_the_tokenizer_begins_with(kind):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    tokenizer = {
        "as Llama 2's": lambda: like_llama_2(" ".join(TEXTS)),
        "BOS": lambda: with_special_tokens("<s>", around=("<s>", ""), bos_token="<s>"),
        "no BOS": lambda: with_special_tokens(bos_token=None),
    }[kind]()
    model = chain([], len(tokenizer))
    model.lm_head.weight.data.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
    settings = {"max_length": 64, "softmax_dtype": "float64"}
    harness = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=1, **settings)
    for prompt in ("Tom has a red ball", *([f"{tokenizer.bos_token}Tom has"] if tokenizer.bos_token else [])):
        assert encode_prompt(tokenizer, prompt) == harness.tok_encode(prompt)
    harness.add_bos_token = False
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in TEXTS]
    expected = [-value for value in harness.loglikelihood_rolling(requests, disable_tqdm=True)]
    records, _ = score_documents(model, tokenizer, TEXTS, depth=0, settings=ONLY_TEXT, reporter=Silent())
    assert [record["nll"][0] for record in records] == pytest.approx(expected, rel=1e-5)
