"""Megatron-LM's `args`, which its checkpoints hold, to our ModelConfig."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from checkpoint_tools.architectures.identity import Identity
from foundation.errors import OrthantError, RequestError
from model.config import ModelConfig

REQUIRED = {
    "swiglu": (True, "the decoder has SwiGLU only"),
    "add_bias_linear": (False, "the decoder has no biases but those of query, key and value"),
    "normalization": ("RMSNorm", "the decoder has RMSNorm only"),
    "position_embedding_type": ("rope", "the decoder has rotary embeddings only"),
}


def identity_from_arguments(arguments: Mapping[str, Any], vocab_size: int | None, where: Path) -> Identity:
    """Whose weights, from the arguments of the training that wrote them.

    Args:
        vocab_size: the true vocabulary where the arguments do not say; they mostly hold the padded one.

    Raises:
        RequestError: an architecture that is not converted, or an unknown vocabulary.
    """
    for name, (wanted, rule) in REQUIRED.items():
        if arguments.get(name, wanted) != wanted:
            raise RequestError(
                f"the checkpoint was trained with {name} = {arguments[name]!r}",
                where=str(where),
                rule=f"is {wanted!r}: {rule}",
                cure="convert a Llama-family model",
            )
    vocabulary = vocab_size or arguments.get("vocab_size")
    if not isinstance(vocabulary, int):
        raise RequestError(
            "the checkpoint does not say its true vocabulary, only the padded one: "
            f"{arguments.get('padded_vocab_size')}",
            where=str(where),
            rule="rows that pad the vocabulary are never exported",
            cure="--vocab-size N, the tokenizer's",
        )
    try:
        return Identity.from_model(ModelConfig.model_validate(_fields(arguments, vocabulary)))
    except (OrthantError, ValidationError, KeyError, TypeError, ValueError) as error:
        raise RequestError(
            f"the checkpoint's arguments describe no model that is converted: {error}",
            where=str(where),
            cure="convert a Llama-family model",
        ) from error


def _fields(arguments: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    heads = arguments["num_attention_heads"]
    grouped = arguments.get("group_query_attention", arguments.get("num_query_groups") is not None)
    experts = arguments.get("num_experts")
    fields = {
        "num_layers": arguments["num_layers"],
        "hidden_size": arguments["hidden_size"],
        "ffn_hidden_size": arguments["ffn_hidden_size"],
        "num_attention_heads": heads,
        "num_query_groups": arguments.get("num_query_groups") if grouped else heads,
        "kv_channels": arguments.get("kv_channels"),
        "vocab_size": vocab_size,
        "max_position_embeddings": arguments.get("max_position_embeddings") or arguments["seq_length"],
        "rotary_base": float(arguments.get("rotary_base", 10000)),
        "rope_scaling": _rope_scaling(arguments),
        "layernorm_epsilon": float(arguments.get("norm_epsilon", 1e-5)),
        "qk_layernorm": bool(arguments.get("qk_layernorm", False)),
        "add_qkv_bias": bool(arguments.get("add_qkv_bias", False)),
        "share_embeddings_and_output_weights": not arguments.get("untie_embeddings_and_output_weights", False),
        "window_size": _window(arguments),
    }
    if experts:
        fields |= {
            "num_experts": experts,
            "moe_router_topk": arguments.get("moe_router_topk", 2),
            "moe_ffn_hidden_size": arguments.get("moe_ffn_hidden_size"),
            "moe_router_pre_softmax": bool(arguments.get("moe_router_pre_softmax", False)),
        }
    return fields


def _rope_scaling(arguments: Mapping[str, Any]) -> dict[str, Any] | None:
    """Megatron-LM knows Llama 3's scaling only, with its published factors but the first."""
    if not arguments.get("use_rope_scaling"):
        return None
    return {
        "kind": "llama3",
        "factor": float(arguments.get("rope_scaling_factor", 8.0)),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def _window(arguments: Mapping[str, Any]) -> int | None:
    window = arguments.get("window_size")
    return window[0] + 1 if isinstance(window, tuple | list) and window[0] >= 0 else None
