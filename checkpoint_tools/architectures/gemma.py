"""Gemma 2 and 3 (text): weights only, until the decoder has their post-norms, soft caps and mixed windows.

`post_attention_layernorm` is the norm after attention here, not the one before the feed-forward block as in Llama.
Norms multiply by 1 + weight; the weight is kept as it is (core's layernorm_zero_centered_gamma).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from checkpoint_tools.architectures.hugging_face_config import refuse, refuse_quantised
from checkpoint_tools.architectures.llama import ATTENTION, CORE, EMBEDDING, FC1, FC2, FINAL_NORM, OUTPUT, THEIRS
from checkpoint_tools.architectures.qwen3 import QK_NORMS
from checkpoint_tools.architectures.table import Architecture, Dimensions, Row

HEAD_WIDTH = 256
"""Where config.json does not say."""

NORMS = tuple(
    Row(f"{CORE}{core}", (f"{THEIRS}{theirs}.weight",), ("hidden",))
    for core, theirs in (
        ("self_attention.linear_proj.post_layernorm.weight", "post_attention_layernorm"),
        ("mlp.linear_fc1.layer_norm_weight", "pre_feedforward_layernorm"),
        ("mlp.linear_fc2.post_layernorm.weight", "post_feedforward_layernorm"),
    )
)


def _dimensions(config: Mapping[str, Any]) -> Dimensions:
    refuse_quantised(config)
    if config.get("attention_bias"):
        raise refuse("attention_bias", True, "attention has no biases")
    tied = config.get("tie_word_embeddings", True)
    if not isinstance(tied, bool):
        raise refuse("tie_word_embeddings", tied, "is true or false")
    dimensions = Dimensions(
        num_layers=_size(config, "num_hidden_layers"),
        hidden=_size(config, "hidden_size"),
        ffn=_size(config, "intermediate_size"),
        heads=_size(config, "num_attention_heads"),
        groups=_size(config, "num_key_value_heads"),
        head=_size({"head_dim": HEAD_WIDTH, **config}, "head_dim"),
        vocab=_size(config, "vocab_size"),
        experts=0,
        tied=tied,
    )
    if dimensions.heads % dimensions.groups:
        raise refuse("num_key_value_heads", dimensions.groups, f"divides num_attention_heads: {dimensions.heads}")
    return dimensions


def _size(config: Mapping[str, Any], key: str) -> int:
    value = config[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise refuse(key, value, "is a whole number, 1 or more")
    return value


GEMMA2 = Architecture(
    name="gemma2",
    model_type="gemma2",
    causal_lm="Gemma2ForCausalLM",
    rows=(EMBEDDING, *ATTENTION, *NORMS, FC1, FC2, FINAL_NORM, OUTPUT),
    dimensions=_dimensions,
    model=None,
    config=None,
)

GEMMA3 = Architecture(
    name="gemma3",
    model_type="gemma3_text",
    causal_lm="Gemma3ForCausalLM",
    rows=(EMBEDDING, *ATTENTION, *QK_NORMS, *NORMS, FC1, FC2, FINAL_NORM, OUTPUT),
    dimensions=_dimensions,
    model=None,
    config=None,
)
