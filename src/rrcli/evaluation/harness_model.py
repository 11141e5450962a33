"""lm-evaluation-harness's view of a model: the model object itself, at its current depth."""

from __future__ import annotations

import copy
from typing import Any

from lm_eval.models.huggingface import HFLM

from rrcli.recursion.abilities import takes_padding
from rrcli.recursion.facts import refuse_unknown_tokens, vocabulary


class HarnessModel(HFLM):  # type: ignore[misc]  # lm-eval has no types
    """HFLM without progress bars, and with one start token before rolling windows, where it would put two.

    Args:
        batch_size: rows of a batch, or what else lm-eval's command line takes.
    """

    add_bos_token: bool
    batch_size_per_gpu: int

    def __init__(self, model: Any, tokenizer: Any, *, batch_size: Any, **more: Any) -> None:
        # HFLM ties the weights of its model: a head that was trained separately from the embedding would be lost.
        model.tie_weights = lambda *_, **__: None
        try:
            super().__init__(
                pretrained=model,
                tokenizer=copy.deepcopy(tokenizer),  # it sets a padding token on it
                backend="causal",
                batch_size=batch_size,
                softmax_dtype="float32",  # in bfloat16 different sums would round to the same value
                **more,
            )
        finally:
            del model.tie_weights

    def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> list[int]:
        ids: list[int] = super().tok_encode(string, *args, **kwargs)
        refuse_unknown_tokens(vocabulary(self.model), self.tokenizer, ids, f"the request {string[:40]!r}")
        return ids

    def tok_batch_encode(self, strings: list[str], *args: Any, **kwargs: Any) -> Any:
        for string in strings:
            self.tok_encode(string)
        return super().tok_batch_encode(strings, *args, **kwargs)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
        return super().loglikelihood(requests, disable_tqdm=True)

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
        before = self.batch_size_per_gpu
        if not takes_padding(self.model):  # lm-eval pads on the left
            self.batch_size_per_gpu = 1
        try:
            return super().generate_until(requests, disable_tqdm=True)
        finally:
            self.batch_size_per_gpu = before

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
        before, self.add_bos_token = self.add_bos_token, False
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm=True)
        finally:
            self.add_bos_token = before
