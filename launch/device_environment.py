"""Environment variables that a layout needs on GPUs, set before a rank touches its GPU. A person's own value stays."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping

from foundation.errors import ConfigError
from parallel.layout import ParallelLayout

QUEUES = "CUDA_DEVICE_MAX_CONNECTIONS"


def needed_environment(layout: ParallelLayout) -> dict[str, str]:
    """Names and values.

    - One queue of work per GPU makes communication start before the product that was asked for after it, which core's
      overlap of tensor- and context-parallel communication relies on (tensor_parallel/layers.py). Sharded weights
      (ZeRO-2 and 3) are gathered beside products, which one queue would put one after the other.
    - CUDA graphs: NCCL would keep buffers registered that the allocator has given back (cuda_graphs.py:1414).
    - NCCL says what went wrong, once.
    """
    found = {"NCCL_DEBUG": "WARN"}
    if layout.fully_sharded:
        found[QUEUES] = "8"
    elif layout.tp > 1 or layout.cp > 1:
        found[QUEUES] = "1"
    if layout.cuda_graphs:
        found["NCCL_GRAPH_REGISTER"] = "0"
    return found


def check_environment(layout: ParallelLayout, given: Mapping[str, str] = os.environ) -> None:
    """Refuse a value that makes a layout slow or wrong.

    Raises:
        ConfigError: one queue with sharded weights.
    """
    if layout.fully_sharded and given.get(QUEUES) == "1":
        raise ConfigError(
            "parallel.zero_stage",
            layout.zero_stage,
            rule=f"gathers weights beside products, and {QUEUES}=1 in the environment lets a GPU do one at a time",
            cure=f"unset {QUEUES}, or parallel.zero_stage=1",
        )


def set_environment(layout: ParallelLayout, environment: MutableMapping[str, str] = os.environ) -> None:
    """Set what is needed and not set."""
    for name, value in needed_environment(layout).items():
        environment.setdefault(name, value)
