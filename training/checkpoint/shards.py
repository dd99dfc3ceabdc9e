"""Weights and optimizer state under ZeRO-2 and 3, in checkpoints under the names and shapes of all other layouts.

Core's own forms for these write what no other layout reads. Here every rank describes the rows that it holds of the
same whole tensors: nothing is gathered, and a checkpoint does not tell how its state was sharded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from parallel.shards import ParameterShard
from training.slices import sharded_parameters
from training.state import TrainingState

MOMENTS = ("exp_avg", "exp_avg_sq")


def describe_shards(state: TrainingState) -> dict[str, Any]:
    """The sharded state dict of `state`; its tensors are views of the state's own storage where that is one piece."""
    tensors = {number: tensor for number, (tensor, _) in enumerate(_stored(state))}
    return {
        "model": [rows.rest for rows in state.rows],
        "shards": tensors,
        "optimizer": {"optimizer": {"param_groups": _groups(state)}, "param_state_sharding_type": "fully_reshardable"},
    }


@torch.no_grad()
def load_shards(state: TrainingState, loaded: dict[str, Any]) -> None:
    """Put what was read for `describe_shards` into `state`."""
    for number, (_, own) in enumerate(_stored(state)):
        own.copy_(loaded["shards"][number])
    step = max(group["step"] for group in loaded["optimizer"]["optimizer"]["param_groups"])
    for part in state.optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            group["step"] = step
    for chunk in state.wrapped:
        chunk.take_up_weights()


def _stored(state: TrainingState) -> Iterator[tuple[ShardedTensor, torch.Tensor]]:
    """(description, the storage that it describes) of all that this rank holds, in the same order every time."""
    moments = _moments(state)
    for shard, parts in sharded_parameters(state):
        tensors = {"": shard.weight, "optimizer.state.param.": shard.master}
        tensors |= {f"optimizer.state.{name}.": tensor for name, tensor in moments(shard).items()}
        for prefix, tensor in tensors.items():
            for part in parts:
                cut = part.stored(shard.first_row, tensor)
                if cut is not None:
                    own = cut.data
                    yield replace(cut, key=prefix + cut.key, data=own.detach().clone()), own


def _moments(state: TrainingState) -> Any:
    """What finds a shard's moments; those that no step has made yet are zero."""
    parts = state.optimizer.chained_optimizers
    for part in parts:
        part.init_state_fn(part.optimizer, part.config)
    states = {id(parameter): kept for part in parts for parameter, kept in part.optimizer.state.items()}

    def of_shard(shard: ParameterShard) -> dict[str, torch.Tensor]:
        if not shard.weight.numel():
            return {}
        return {name: states[id(shard.parameter)][name].to_local() for name in MOMENTS}

    return of_shard


def _groups(state: TrainingState) -> list[dict[str, Any]]:
    """The optimizer's groups without parameters, which count the same step even where a rank holds nothing of one."""
    groups = [dict(group) for part in state.optimizer.chained_optimizers for group in part.optimizer.param_groups]
    step = max((group.get("step", 0) for group in groups), default=0)
    for group in groups:
        del group["params"]
        group["step"] = step
    return groups
