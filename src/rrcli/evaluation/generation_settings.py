"""Decode without a model's own generation settings, and say which of them are not followed.

A `generation_config.json` may ask for sampling, penalties, forced or suppressed tokens, a least length, several
answers, another kind of cache or none. Answers that are measured are the most likely tokens, so that two models, or two
depths of one, differ in their predictions alone. Therefore nothing of it is followed but where a text begins and ends
and what fills up rows. Tasks of lm-eval are the exception: there whatever chooses tokens holds, as in lm-eval itself,
so that the numbers are lm-eval's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig

from rrcli.upstream import generation_defaults, patched

# What every decoding follows.
ENDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
# Greedy decoding means that these are not used, and every command gives the length: neither needs a word.
SAMPLING = (
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p"),
    *("epsilon_cutoff", "eta_cutoff", "num_beams", "early_stopping", "length_penalty"),
)
LENGTHS = ("max_length", "max_new_tokens")
# What changes the scores of tokens before one is chosen.
CHOOSING = (
    *("min_length", "min_new_tokens", "repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size"),
    *("encoder_no_repeat_ngram_size", "bad_words_ids", "forced_bos_token_id", "forced_eos_token_id"),
    *("suppress_tokens", "begin_suppress_tokens", "sequence_bias", "exponential_decay_length_penalty"),
    *("renormalize_logits", "remove_invalid_values", "guidance_scale"),
)


@contextmanager
def without_own_settings(model: Any, *, choosing: bool = False) -> Iterator[None]:
    """While it is entered, `model.generate` follows its arguments alone, and the model's end tokens.

    Args:
        choosing: follow also what the model says about how tokens are chosen.
    """
    with patched(model, generation_config=followed_settings(model, choosing=choosing)):
        yield


def followed_settings(model: Any, *, choosing: bool = False) -> GenerationConfig:
    """Return what `without_own_settings` leaves of the model's own settings."""
    own = model.generation_config
    names = (*ENDS, *SAMPLING, *CHOOSING) if choosing else ENDS
    return GenerationConfig(**{name: value for name in names if (value := getattr(own, name, None)) is not None})


def unfollowed_settings(model: Any) -> str:
    """Say which of the model's own generation settings are not followed; '' if there are none worth a word."""
    plain = generation_defaults()
    found = {
        name: value
        for name, value in model.generation_config.to_diff_dict().items()
        if name not in (*ENDS, *SAMPLING, *LENGTHS, "transformers_version")
        and not name.startswith("_")
        and value not in (None, plain.get(name))
        and (value is not False or name == "use_cache")
    }
    if not found:
        return ""
    said = ", ".join(f"{name} = {value}" for name, value in sorted(found.items()))
    return f"the model's own generation settings are not followed, so that its predictions alone count: {said}"
