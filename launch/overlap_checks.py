"""What communication can hide under, and what it cannot: rules of the overlap settings that need no machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from foundation.errors import ConfigError
from parallel.layout import ParallelLayout

if TYPE_CHECKING:
    from launch.config import RunConfig


def user_buffers_hold_the_type(config: RunConfig) -> None:
    """Transformer Engine makes its user buffers for numbers of two bytes, or of one, and stops at others."""
    if config.parallel.tp_comm_overlap and config.training.precision == "fp32":
        raise ConfigError(
            "parallel.tp_comm_overlap",
            True,
            rule="goes through buffers of bf16 or fp8, and training.precision is fp32",
            cure="parallel.tp_comm_overlap=false, or training.precision=bf16",
        )


def graphs_have_one_shape(config: RunConfig, layout: ParallelLayout) -> None:
    """A graph replays what it has recorded: the same shapes, no choice by values, no stream that the host seeds."""
    if not layout.cuda_graphs:
        return
    model = config.model
    for field, value, asked, cure in (
        ("data.document_mask", True, config.data.document_mask, "data.document_mask=false"),
        ("model.num_experts", model.num_experts, model.num_experts is not None, "no experts"),
        ("model.hidden_dropout", model.hidden_dropout, model.hidden_dropout > 0, "model.hidden_dropout=0"),
        ("model.attention_dropout", model.attention_dropout, model.attention_dropout > 0, "model.attention_dropout=0"),
        ("parallel.zero_stage", layout.zero_stage, layout.fully_sharded, "parallel.zero_stage=1"),
        ("training.recompute_granularity", config.training.recompute_granularity,
         config.training.recompute_granularity != "none", "training.recompute_granularity=none"),
    ):  # fmt: skip
        if asked:
            raise ConfigError(
                field,
                value,
                rule="does not go with parallel.cuda_graphs, which replay the same kernels on the same places",
                cure=f"{cure}, or parallel.cuda_graphs=false",
            )
