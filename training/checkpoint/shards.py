"""State that ranks share under ZeRO, in checkpoints under the names and shapes of all other layouts.

Core's own forms gather it on one rank, or write what no other layout reads. Here every rank describes what it holds of
the same whole tensors: nothing is gathered, all ranks write, and a checkpoint does not tell how its state was sharded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.distributed import DistributedDataParallel

from parallel.optimizer_state import MOMENTS, parameter_runs
from parallel.shards import ParameterShard
from training.slices import sharded_parameters
from training.state import TrainingState

OPTIMIZER = "optimizer.state."


def describe_shards(state: TrainingState, *, is_loading: bool) -> dict[str, Any]:
    """The sharded state dict of what `state` shares out: the optimizer's state, under ZeRO-2 and 3 the weights too.

    To be written, its tensors are views of the state's own storage; to be read into, they have storage of their own.
    """
    described: dict[str, Any] = {"optimizer": _step_and_groups(state), "shards": {}}
    if state.layout.fully_sharded:
        described["model"] = [rows.rest for rows in state.rows]
    for number, tensor in enumerate(_stored(state)):
        # Core fills with zeros, before it reads, what may have another shape in the checkpoint.
        described["shards"][number] = replace(tensor, data=tensor.data.clone()) if is_loading else tensor
    return described


@torch.no_grad()
def load_shards(state: TrainingState, loaded: dict[str, Any]) -> None:
    """Put what was read for `describe_shards` into `state`. Collective."""
    for number, own in enumerate(_stored(state)):
        own.data.copy_(loaded["shards"][number])
    step = max(group["step"] for group in loaded["optimizer"]["optimizer"]["param_groups"])
    for part in state.optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            group["step"] = step
    for chunk in state.wrapped:
        if isinstance(chunk, DistributedDataParallel):
            # fp32 weights are their own masters: each rank has just put its run of them into its own copy alone.
            chunk.start_param_sync(force_sync=True)
        else:
            chunk.take_up_weights()


def _stored(state: TrainingState) -> Iterator[ShardedTensor]:
    """All that this rank holds, in the same order every time; views of the state's own storage."""
    return _rows(state) if state.layout.fully_sharded else _runs(state)


def _runs(state: TrainingState) -> Iterator[ShardedTensor]:
    """ZeRO-1: the buckets' cuts fall anywhere."""
    parts = {
        id(parameter): rows.parts[name]
        for chunk, rows in zip(state.chunks, state.rows, strict=True)
        for name, parameter in chunk.named_parameters()
    }
    for run in parameter_runs(state.optimizer):
        for name, tensor in run.tensors.items():
            for part in parts[id(run.parameter)]:
                for cut in part.stored_run(run.start, tensor):
                    yield replace(cut, key=f"{OPTIMIZER}{name}.{cut.key}")


def _rows(state: TrainingState) -> Iterator[ShardedTensor]:
    """ZeRO-2 and 3: cuts are between rows."""
    moments = _moments(state)
    for shard, parts in sharded_parameters(state):
        tensors = {"": shard.weight, f"{OPTIMIZER}param.": shard.master}
        tensors |= {f"{OPTIMIZER}{name}.": tensor for name, tensor in moments(shard).items()}
        for prefix, tensor in tensors.items():
            for part in parts:
                cut = part.stored(shard.first_row, tensor.detach())
                if cut is not None:
                    yield replace(cut, key=prefix + cut.key)


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


def _step_and_groups(state: TrainingState) -> dict[str, Any]:
    """The optimizer's groups without parameters, which count the same step even where a rank holds nothing of one."""
    groups = [dict(group) for part in state.optimizer.chained_optimizers for group in part.optimizer.param_groups]
    step = max((group.get("step", 0) for group in groups), default=0)
    for group in groups:
        del group["params"]
        group["step"] = step
    return {"optimizer": {"param_groups": groups}, "param_state_sharding_type": "fully_reshardable"}
