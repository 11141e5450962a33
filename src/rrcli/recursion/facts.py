"""Read the sizes of a model, under whatever name its family keeps them: vocabulary, context, layers, hidden size.

A configuration may be nested (a multimodal model's text model), and what is called `max_position_embeddings` in most
families is `max_seq_len` in others. The vocabulary is that of the embedding, because that is what fails: a tokenizer
may have more tokens than the embedding has rows, and no configuration has to agree with either.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rrcli.errors import RRError

# The names under which configurations keep the longest input, in tokens; the first that is there counts.
CONTEXT_NAMES = (
    *("max_position_embeddings", "n_positions", "max_seq_len", "max_seq_length", "max_sequence_length"),
    *("n_ctx", "seq_length", "context_length", "max_target_positions", "model_max_length"),
)
# The names under which configurations keep how many experts a token is routed to.
ROUTED_NAMES = (
    *("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k_experts", "moe_k"),
    "num_selected_experts",
)
# For models whose configuration names none: recurrent ones, and those whose attention is biased by distance.
UNLIMITED = 2048


def text_config(config: Any) -> Any:
    """Return the configuration of the text model that generates, where a configuration holds several models."""
    return config.get_text_config(decoder=True)


def context_length(model: Any) -> int:
    """Return the longest input that the model's configuration allows, in tokens."""
    for config in (text_config(model.config), model.config):
        for name in CONTEXT_NAMES:
            value = getattr(config, name, None)
            if isinstance(value, int) and value > 0:
                return value
    return UNLIMITED


def vocabulary(model: Any) -> int:
    """Return how many token ids the model's embedding has a row for."""
    embedding = model.get_input_embeddings()
    size = getattr(embedding, "num_embeddings", None)
    return int(embedding.weight.shape[0] if size is None else size)


def experts_per_token(model: Any) -> int:
    """Return how many experts of a layer a token is routed to; 1 where the configuration does not say."""
    config = text_config(model.config)
    return next((value for name in ROUTED_NAMES if isinstance(value := getattr(config, name, None), int)), 1)


def hidden_size(model: Any) -> int:
    """Return the width of the states between the layers."""
    width = getattr(text_config(model.config), "hidden_size", None)
    return int(width or model.get_input_embeddings().embedding_dim)


def described(config: Any) -> str:
    """Return a configuration's family, layers and hidden size, as far as it names them."""
    text = text_config(config)
    sizes = {name: getattr(text, name, None) for name in ("num_hidden_layers", "hidden_size")}
    layers = f"{sizes['num_hidden_layers']} layers" if sizes["num_hidden_layers"] else ""
    width = f"hidden size {sizes['hidden_size']}" if sizes["hidden_size"] else ""
    return ", ".join(part for part in (text.model_type, layers, width) if part)


def refuse_unknown_tokens(size: int, tokenizer: Any, ids: Sequence[int], what: str) -> None:
    """Refuse token ids that a model has no embedding for.

    Args:
        size: the vocabulary of its embedding. what: the text that the ids were made of, for the message.

    Raises:
        RRError: there is one; names the text, the token and its id.
    """
    highest = max(ids, default=0)
    if highest >= size:
        token = tokenizer.convert_ids_to_tokens(highest)
        raise RRError(
            f"{what} holds the token {token!r} with id {highest:,}, but the model's embedding ends at id {size - 1:,}",
            "The tokenizer has more tokens than the model. Leave such texts out, or give the model a row for the token "
            "(resize_token_embeddings of transformers).",
        )
