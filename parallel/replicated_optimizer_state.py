"""The state of an optimizer without ZeRO, in checkpoints under the very names that a ZeRO optimizer uses.

Core gives the two kinds formats of their own, and neither reads the other's. Here master weights and moments of the
replicated kind are described as core's "fully_reshardable" describes those of the sharded kind, so that a checkpoint
does not tell whether its optimizer was sharded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

from parallel.optimizer_state import MOMENTS


def describe(optimizer: Any, weights: dict[str, Any]) -> dict[str, Any]:
    """The sharded state dict of a replicated optimizer.

    Args:
        optimizer: core's.
        weights: the chunks' sharded state dicts, which hold the parameters themselves.
    """
    entries = {id(entry.data): entry for entry in _leaves(weights)}
    groups, states, number = [], {}, 0
    for part in optimizer.chained_optimizers:
        part.init_state_fn(part.optimizer, part.config)
        groups += [{**group, "params": []} for group in part.optimizer.param_groups]
        for parameter, main in _main_parameters(part):
            state = {"param": main, **{name: part.optimizer.state[main][name] for name in MOMENTS}}
            entry = entries[id(parameter)]
            states[number] = {name: _like(entry, name, tensor.detach()) for name, tensor in state.items()}
            number += 1
    step = max((group.get("step", 0) for group in groups), default=0)
    for group in groups:
        del group["params"]
        group["step"] = step  # a group without parameters on this rank does not count its own
    return {
        "optimizer": {"param_groups": groups},
        "param_state": states,
        "param_state_sharding_type": "fully_reshardable",
    }


@torch.no_grad()
def load(optimizer: Any, loaded: dict[str, Any]) -> None:
    """Put what was read for `describe` into `optimizer`, on every rank the same."""
    step = max(group["step"] for group in loaded["optimizer"]["param_groups"])
    number = 0
    for part in optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            group["step"] = step
        for _, main in _main_parameters(part):
            state = loaded["param_state"][number]
            main.copy_(state["param"])
            for name in MOMENTS:
                part.optimizer.state[main][name].copy_(state[name])
            number += 1


def _main_parameters(part: Any) -> Iterator[tuple[torch.nn.Parameter, torch.nn.Parameter]]:
    """(the model's parameter, the fp32 one that the optimizer updates)."""
    if not hasattr(part, "float16_groups"):
        for group in part.optimizer.param_groups:
            yield from ((parameter, parameter) for parameter in group["params"])
        return
    for models, mains in zip(part.float16_groups, part.fp32_from_float16_groups, strict=True):
        yield from zip(models, mains, strict=True)
    for group in part.fp32_from_fp32_groups:
        yield from ((parameter, parameter) for parameter in group)


def _like(entry: Any, name: str, tensor: torch.Tensor) -> Any:
    """`tensor` described as its parameter is."""
    changes: dict[str, Any] = {"key": f"optimizer.state.{name}.{entry.key}", "data": tensor}
    if not isinstance(entry, ShardedTensorFactory):
        changes["dtype"] = tensor.dtype
    return replace(entry, **changes)


def _leaves(nested: Any) -> Iterator[Any]:
    if isinstance(nested, dict):
        for value in nested.values():
            yield from _leaves(value)
    elif isinstance(getattr(nested, "data", None), torch.Tensor):
        yield nested
