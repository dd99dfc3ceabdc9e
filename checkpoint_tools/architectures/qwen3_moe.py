"""Qwen 3's mixtures of experts: every layer a mixture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from checkpoint_tools.architectures import qwen3
from checkpoint_tools.architectures.hugging_face_config import (
    config_of,
    dimensions_of,
    model_of,
    refuse,
    window_fields,
)
from checkpoint_tools.architectures.llama import ATTENTION, EMBEDDING, FINAL_NORM, OUTPUT
from checkpoint_tools.architectures.mixtral import mixture
from checkpoint_tools.architectures.table import Architecture
from model.config import ModelConfig

EXPERTS = mixture(
    "mlp.gate.weight",
    "mlp.experts.{expert}.gate_proj.weight",
    "mlp.experts.{expert}.up_proj.weight",
    "mlp.experts.{expert}.down_proj.weight",
)


def _fields(config: Mapping[str, Any]) -> dict[str, Any]:
    for name, of_all in (("decoder_sparse_step", 1), ("mlp_only_layers", [])):
        if (config.get(name) or of_all) != of_all:
            raise refuse(name, config[name], f"is {of_all}: every layer is a mixture of experts")
    return {
        "num_experts": config.get("num_experts", config.get("num_local_experts")),
        "moe_router_topk": config["num_experts_per_tok"],
        "moe_ffn_hidden_size": config["moe_intermediate_size"],
        "moe_router_pre_softmax": not config.get("norm_topk_prob", False),
        **qwen3.fields(config),
    }


def _config(model: ModelConfig) -> dict[str, Any]:
    return {
        "num_experts": model.num_experts,
        "num_experts_per_tok": model.moe_router_topk,
        "moe_intermediate_size": model.block_width,
        "norm_topk_prob": not model.moe_router_pre_softmax,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        **window_fields(model),
    }


QWEN3_MOE = Architecture(
    name="qwen3_moe",
    model_type="qwen3_moe",
    causal_lm="Qwen3MoeForCausalLM",
    rows=(EMBEDDING, *ATTENTION, *qwen3.QK_NORMS, *EXPERTS, FINAL_NORM, OUTPUT),
    dimensions=dimensions_of(model_of(_fields)),
    model=model_of(_fields),
    config=config_of("qwen3_moe", "Qwen3MoeForCausalLM", _config),
)
