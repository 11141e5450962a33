"""Tokenizers that are made for a test, and models whose next token is written down by hand."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from rrcli.demo import defaults


def with_special_tokens(*special: str, around: tuple[str, str] | None = None, **config: str | None) -> Any:
    """Return the embedded tokenizer with special tokens added.

    Args:
        around: what the tokenizer itself puts before and after every text, each one of them or ''.
        config: entries of tokenizer_config.json to change; None takes one out.
    """
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_file(str(Path(defaults.MODEL_DIR) / "tokenizer.json"))
    backend.add_special_tokens(list(special))
    if around:
        ids = [(token, backend.token_to_id(token)) for token in around if token]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{around[0]} $A {around[1]}".strip(),
            pair=f"{around[0]} $A $B {around[1]}".strip(),
            special_tokens=ids,
        )
    named = json.loads((Path(defaults.MODEL_DIR) / "tokenizer_config.json").read_text())
    named = {key: value for key, value in named.items() if key.endswith("_token")} | config
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, **{key: value for key, value in named.items() if value is not None}
    )


def like_llama_2(text: str) -> Any:
    """Return a tokenizer of the words of a text, which puts a space before every text it is given.

    As those of Llama 2, TinyLlama and Mistral 0.1: spaces are written `▁`, unknown characters are bytes, and decoding
    takes the first space off again.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    known = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=known, initial_alphabet=list("▁0123456789:?,."), show_progress=False
    )
    backend.train_from_iterator(text.split(), trainer)  # no token reaches across words
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def chain(tokens: list[int], vocab: int) -> Any:
    """Return a small llama that writes each of these tokens, which are different, after the one before it."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=vocab, hidden_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        intermediate_size=64, max_position_embeddings=512, tie_word_embeddings=False, bos_token_id=None,
        eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).float().eval()
    rows = torch.nn.functional.normalize(torch.randn(vocab, 256, generator=torch.Generator().manual_seed(0)), dim=1)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(rows)
        model.lm_head.weight.zero_()
        for before, after in pairwise(tokens):
            model.lm_head.weight[after] += rows[before]
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return model
