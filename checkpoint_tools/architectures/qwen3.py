"""Qwen 3: norms over each query and key head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from checkpoint_tools.architectures.hugging_face_config import (
    config_of,
    dimensions_of,
    model_of,
    window_fields,
    window_of_all_layers,
)
from checkpoint_tools.architectures.llama import ATTENTION, CORE, EMBEDDING, FINAL_NORM, MLP, OUTPUT, THEIRS
from checkpoint_tools.architectures.table import Architecture, Row

QK_NORMS = tuple(
    Row(f"{CORE}self_attention.{one}_layernorm.weight", (f"{THEIRS}self_attn.{one}_norm.weight",), ("head",))
    for one in "qk"
)


def fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `ModelConfig` beyond those of every family: norms of queries and keys, one window or none."""
    return {"qk_layernorm": True, **window_of_all_layers(config)}


QWEN3 = Architecture(
    name="qwen3",
    model_type="qwen3",
    causal_lm="Qwen3ForCausalLM",
    rows=(EMBEDDING, *ATTENTION, *QK_NORMS, *MLP, FINAL_NORM, OUTPUT),
    dimensions=dimensions_of(model_of(fields, head_dim_default=128)),
    model=model_of(fields, head_dim_default=128),
    config=config_of("qwen3", "Qwen3ForCausalLM", window_fields),
)
