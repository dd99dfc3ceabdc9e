"""Coefficients of the two models, calibrated by `python -m benchmarks.planner.calibrate`, with what was expected of
them before any data (prior) and how sure that was (spread, of the natural logarithm)."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "data" / "coefficients.json"


@dataclass(frozen=True)
class TimeCoefficients:
    """Of the step-time model. All are positive; `efficiency_*` are shares of a datasheet figure."""

    efficiency_bf16_ampere: float
    efficiency_bf16_hopper: float
    efficiency_bf16_blackwell: float
    efficiency_fp8_hopper: float
    efficiency_fp8_blackwell: float
    efficiency_fp4: float
    ultra: float
    efficiency_grouped: float
    efficiency_attention_ampere: float
    efficiency_attention_hopper: float
    efficiency_attention_blackwell: float
    slowdown_flash1: float
    misaligned_heads: float
    small_side: float
    score_bytes_fused: float
    score_bytes_unfused: float
    element_bytes: float
    unfused_norm: float
    unfused_elements: float
    fp8_cast_bytes: float
    efficiency_memory: float
    efficiency_scale_up: float
    efficiency_scale_out: float
    exposed_tensor: float
    exposed_tensor_plain: float
    exposed_tensor_overlapped: float
    collective_seconds: float
    exposed_context: float
    exposed_pipeline: float
    exposed_data: float
    exposed_sharded: float
    exposed_expert: float
    layer_seconds: float
    expert_layer_seconds: float
    local_expert_seconds: float
    older_software: float
    routing_bytes: float
    expert_imbalance: float
    state_elements: float
    step_seconds: float
    jitter: float


@dataclass(frozen=True)
class MemoryCoefficients:
    """Of the memory model.

    Attributes:
        activation_scale: activations held over those that the layer's formula counts.
        logits_scale: held for one logit, over what its loss is counted to hold.
        fragmentation: share of what the allocator holds beyond what tensors fill.
        framework_gib: context, kernels and communicators of one process.
        group_gib: for each process group with more than one rank.
        spread: how far a prediction lies from the truth (of the logarithm); shares of jobs that fit follow from it.
    """

    activation_scale: float
    score_bytes_fused: float
    score_bytes_unfused: float
    unfused_norm: float
    working_scale: float
    logits_scale: float
    fragmentation: float
    framework_gib: float
    group_gib: float
    spread: float


@cache
def time_coefficients() -> TimeCoefficients:
    """Those that are shipped."""
    return TimeCoefficients(**_read("time", TimeCoefficients))


@cache
def memory_coefficients() -> MemoryCoefficients:
    """Those that are shipped."""
    return MemoryCoefficients(**_read("memory", MemoryCoefficients))


def _read(part: str, kind: type[Any]) -> dict[str, float]:
    values = json.loads(FILE.read_text())[part]
    return {field.name: float(values[field.name]) for field in fields(kind)}
