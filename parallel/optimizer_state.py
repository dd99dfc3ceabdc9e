"""The sharded optimizer's state as core's checkpoints want it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def aligned_with_buffers(optimizer: Any) -> Iterator[None]:
    """While core describes the state of a ZeRO optimizer for a checkpoint, let parameters lie where it looks for them.

    megatron-core 0.16.1 gathers the flat state of all buckets without the padding at the end of each
    (DistributedOptimizer.get_parameter_state_dp_zero), and then cuts parameters out at offsets that count that padding
    (sharded_param_state_fully_reshardable). Wherever a bucket's size is no multiple of the padding, all that comes
    after it would be written from its neighbours' values, silently. Here the padding is put back in between.

    Args:
        optimizer: core's, over any number of model chunks.
    """
    parts = [part for part in optimizer.chained_optimizers if hasattr(part, "get_parameter_state_dp_zero")]
    for part in parts:
        part.get_parameter_state_dp_zero = _with_padding(part)
    try:
        yield
    finally:
        for part in parts:
            del part.get_parameter_state_dp_zero


def _with_padding(part: Any) -> Any:
    gather = part.get_parameter_state_dp_zero

    def gather_with_padding(*args: Any, **options: Any) -> Any:
        state = gather(*args, **options)
        for index, buffer in enumerate(part.buffers if state is not None else []):
            for tensors in state[index].values():
                for key in [key for key, value in tensors.items() if isinstance(value, torch.Tensor)]:
                    tensors[key] = _spread(tensors[key], buffer)
        return state

    return gather_with_padding


def _spread(dense: torch.Tensor, buffer: Any) -> torch.Tensor:
    """[numel without padding] -> [numel of the buffer], each bucket at its offset."""
    if all(bucket.numel_unpadded == bucket.grad_data.numel() for bucket in buffer.buckets):
        return dense
    padded = dense.new_zeros(buffer.numel)
    start = 0
    for bucket in buffer.buckets:
        size = bucket.numel_unpadded
        padded[bucket.offset : bucket.offset + size] = dense[start : start + size]
        start += size
    if start != dense.numel():
        raise AssertionError(f"buckets hold {start} elements, the gathered state {dense.numel()}")
    return padded


KINDS = ("wd_mult", "lr_mult", "is_decoupled_lr")
"""What tells the groups of one part of an optimizer apart."""


def joined(described: dict[Any, Any]) -> dict[str, Any]:
    """The state of a ZeRO optimizer as if it were in one part.

    With expert parallelism core chains two optimizers, one for experts, and describes each by its number; without, one
    holds everything and is described plainly. A checkpoint has to be the same in both cases.

    Args:
        described: of core's `sharded_state_dict`.
    """
    if 0 not in described:
        return described
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    states: dict[str, Any] = {}
    for number, part in described.items():
        for group in part["optimizer"]["param_groups"]:
            groups.setdefault(_kind(group), {**group, "is_expert_parallel": False})
        states |= {f"{number}.{key}": state for key, state in part["param_state"].items()}
    rest = {key: value for key, value in described[0].items() if key not in ("optimizer", "param_state")}
    return {"optimizer": {"param_groups": list(groups.values())}, "param_state": states, **rest}


def parted(optimizer: Any, loaded: dict[str, Any]) -> dict[Any, Any]:
    """What was read for `joined`, as core's `load_state_dict` of `optimizer` wants it."""
    parts = optimizer.chained_optimizers
    if len(parts) == 1:
        return loaded
    rest = {key: value for key, value in loaded.items() if key not in ("optimizer", "param_state")}
    saved = {_kind(group): group for group in loaded["optimizer"]["param_groups"]}
    numbered: dict[Any, Any] = {}
    for number, part in enumerate(parts):
        own = [
            {**saved[_kind(group)], "is_expert_parallel": group["is_expert_parallel"]}
            for group in part.optimizer.param_groups
        ]
        states = {
            int(key.partition(".")[2]): state
            for key, state in loaded["param_state"].items()
            if key.partition(".")[0] == str(number)
        }
        numbered[number] = {"optimizer": {"param_groups": own}, "param_state": states, **rest}
    return numbered


def _kind(group: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(group[key] for key in KINDS)
