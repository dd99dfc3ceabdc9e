"""Qwen 2 and 2.5: biases in the query, key and value projections."""

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
from checkpoint_tools.architectures.llama import ATTENTION, CORE, EMBEDDING, FINAL_NORM, MLP, OUTPUT, QKV
from checkpoint_tools.architectures.table import Architecture, Row

QKV_BIAS = Row(
    f"{CORE}self_attention.linear_qkv.bias",
    tuple(f"{one}.bias" for one in QKV),
    ("qkv",),
    join="query_groups",
    split=0,
)


def _fields(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"add_qkv_bias": True, **window_of_all_layers(config)}


QWEN2 = Architecture(
    name="qwen2",
    model_type="qwen2",
    causal_lm="Qwen2ForCausalLM",
    rows=(EMBEDDING, *ATTENTION, QKV_BIAS, *MLP, FINAL_NORM, OUTPUT),
    dimensions=dimensions_of(model_of(_fields)),
    model=model_of(_fields),
    config=config_of("qwen2", "Qwen2ForCausalLM", window_fields),
)
