"""What communication can hide under, and what it cannot: rules of the overlap settings that need no machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from foundation.errors import ConfigError
from parallel.layout import ParallelLayout

if TYPE_CHECKING:
    from launch.config import RunConfig


BLOCK = 128
"""Tokens that share scales of mxfp8 in a user buffer: a rank's number of tokens is a multiple of it."""


def user_buffers_hold_the_type(config: RunConfig, layout: ParallelLayout) -> None:
    """Transformer Engine has user buffers for bf16 and some recipes of fp8; with others it stops in the first step."""
    if not layout.tp_comm_overlap:
        return
    training = config.training
    tokens = training.seq_length * training.micro_batch_size // (layout.cp * layout.tp)
    off = "parallel.tp_comm_overlap=false"
    if training.precision == "fp32":
        rule, cure = "goes through buffers of bf16 or fp8, and training.precision is fp32", "training.precision=bf16"
    elif training.precision == "fp8" and training.fp8.recipe == "blockwise":
        rule = "goes through buffers that do not take training.fp8.recipe blockwise"
        cure = "training.fp8.recipe=current"
    elif training.precision == "fp8" and training.fp8.recipe == "mxfp8" and tokens % BLOCK:
        rule = f"with mxfp8 makes a tensor-parallel rank's tokens of a micro-batch ({tokens}) a multiple of {BLOCK}"
        cure = "training.fp8.recipe=current"
    else:
        return
    raise ConfigError("parallel.tp_comm_overlap", True, rule=rule, cure=f"{off}, or {cure}")


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
