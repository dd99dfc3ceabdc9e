"""Mixtral: a router and experts in place of the feed-forward block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from checkpoint_tools.architectures.hugging_face_config import config_of, dimensions_of, model_of, sliding_window
from checkpoint_tools.architectures.llama import ATTENTION, CORE, EMBEDDING, FINAL_NORM, OUTPUT, THEIRS
from checkpoint_tools.architectures.table import Architecture, Row
from model.config import ModelConfig

ONE = f"{CORE}mlp.experts.local_experts.{{expert}}."
# The router reads the normalised tokens before any expert does, so the norm stands alone.
NORM = Row(f"{CORE}pre_mlp_layernorm.weight", (f"{THEIRS}post_attention_layernorm.weight",), ("hidden",))


def mixture(router: str, gate: str, up: str, down: str) -> tuple[Row, ...]:
    """The rows of a mixture of experts, from the names that a family gives to its parts."""
    return (
        NORM,
        Row(f"{CORE}mlp.router.weight", (THEIRS + router,), ("experts", "hidden")),
        Row(f"{ONE}linear_fc1.weight", (THEIRS + gate, THEIRS + up), ("gate_up", "hidden"), join="halves", split=0),
        Row(f"{ONE}linear_fc2.weight", (THEIRS + down,), ("hidden", "ffn"), split=1),
    )


EXPERTS = mixture(
    "block_sparse_moe.gate.weight",
    "block_sparse_moe.experts.{expert}.w1.weight",
    "block_sparse_moe.experts.{expert}.w3.weight",
    "block_sparse_moe.experts.{expert}.w2.weight",
)


def _fields(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_experts": config["num_local_experts"],
        "moe_router_topk": config["num_experts_per_tok"],
        **sliding_window(config),
    }


def _config(model: ModelConfig) -> dict[str, Any]:
    return {
        "intermediate_size": model.block_width,
        "num_local_experts": model.num_experts,
        "num_experts_per_tok": model.moe_router_topk,
        "router_aux_loss_coef": 0.001,
        "sliding_window": model.window_size,
    }


_model = model_of(_fields, rotary_base_default=1_000_000.0)

MIXTRAL = Architecture(
    name="mixtral",
    model_type="mixtral",
    causal_lm="MixtralForCausalLM",
    rows=(EMBEDDING, *ATTENTION, *EXPERTS, FINAL_NORM, OUTPUT),
    dimensions=dimensions_of(_model),
    model=_model,
    config=config_of("mixtral", "MixtralForCausalLM", _config),
)
