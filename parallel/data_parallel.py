"""Data parallelism around model chunks: core's DistributedDataParallel and its sharded gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

from parallel.fully_sharded import FullyShardedChunk, wrap_fully_sharded
from parallel.layout import ParallelLayout

WrappedChunk: TypeAlias = "DistributedDataParallel | FullyShardedChunk"


def wrap_in_data_parallel(chunks: list[Any], core: Any, layout: ParallelLayout) -> list[WrappedChunk]:
    """Give every chunk gradients that are reduced over data-parallel ranks, and tell core's schedules of them.

    Args:
        chunks: this rank's decoders.
        core: their TransformerConfig; its schedule hooks are set here.
        layout: ZeRO stage and overlap.
    """
    core.finalize_model_grads_func = finalize_model_grads
    if layout.fully_sharded:
        return list(wrap_fully_sharded(chunks, core, layout))
    options = DistributedDataParallelConfig(
        grad_reduce_in_fp32=layout.grad_reduce_in_fp32,
        use_distributed_optimizer=layout.zero_stage > 0,
        overlap_grad_reduce=layout.overlap_grad_reduce,
        overlap_param_gather=layout.overlap_param_gather,
        bucket_size=layout.bucket_size,
    )
    # Only the first chunk's backward ends last, so only there is anything left to overlap with.
    wrapped: list[WrappedChunk] = [
        DistributedDataParallel(core, options, chunk, disable_bucketing=index > 0) for index, chunk in enumerate(chunks)
    ]
    if layout.overlap_grad_reduce:
        hooks = [chunk.no_sync for chunk in wrapped]
        core.no_sync_func = hooks if len(hooks) > 1 else hooks[0]
    return wrapped


def gather_sharded_gradients(wrapped: list[WrappedChunk]) -> None:
    """Make every gradient whole on every data-parallel rank; after ZeRO-1's reduction each holds only its shard.

    ZeRO-2 and 3 hold no place for whole ones: there this does nothing.
    """
    for chunk in _replicated(wrapped):
        for buffer in chunk.buffers + chunk.expert_parallel_buffers:
            if not buffer.ddp_config.use_distributed_optimizer:
                continue
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                shard = bucket.grad_data.view(group.size(), -1)[group.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, shard, group=group)


def gather_updated_parameters(wrapped: list[WrappedChunk], layout: ParallelLayout) -> None:
    """Finish the parameter gathers that overlap would leave to the next forward pass."""
    if layout.overlap_param_gather:
        for chunk in _replicated(wrapped):
            chunk.start_param_sync(force_sync=True)


def _replicated(wrapped: list[WrappedChunk]) -> Iterator[DistributedDataParallel]:
    return (chunk for chunk in wrapped if isinstance(chunk, DistributedDataParallel))


def main_gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The gradient that the optimizer uses, of the parameter's shape, in the reduction's precision."""
    gradient: torch.Tensor = parameter.main_grad  # type: ignore[attr-defined]
    return gradient
