"""megatron-core's process groups for a layout."""

from __future__ import annotations

from datetime import timedelta
from types import TracebackType

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from parallel.layout import ParallelLayout
from parallel.platform import current_platform


class ProcessGroups:
    """Core's groups, from `with` to its end.

    torch.distributed has to be initialised with `layout.world_size` ranks. One set at a time in a process: core holds
    them in module state, and only this class touches it.
    """

    def __init__(self, layout: ParallelLayout, seed: int) -> None:
        self._layout, self._seed = layout, seed

    def __enter__(self) -> ProcessGroups:
        layout = self._layout
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
            virtual_pipeline_model_parallel_size=layout.virtual_pipeline_model_parallel_size,
            context_parallel_size=layout.cp,
            expert_model_parallel_size=layout.ep,
        )
        # Captured graphs draw from generators that the capture knows: Transformer Engine's tracker, which its attention
        # insists on, or core's own where that library is not.
        model_parallel_cuda_manual_seed(
            self._seed,
            te_rng_tracker=layout.cuda_graphs,
            use_cudagraphable_rng=layout.cuda_graphs,
            force_reset_rng=True,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        parallel_state.destroy_model_parallel()


def start_distributed(rank: int, world_size: int, local_rank: int, timeout_seconds: float) -> torch.device:
    """Join the world that torchrun or srun announced in the environment; returns this rank's device."""
    platform = current_platform()
    device = platform.device(local_rank)
    dist.init_process_group(
        platform.backend, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_seconds)
    )
    return device


def is_last_pipeline_stage() -> bool:
    """Whether this rank computes losses."""
    last: bool = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
    return last


def sum_over_batch_and_show_all_stages(values: torch.Tensor) -> torch.Tensor:
    """Add up `values` of the last stage over data- and context-parallel ranks and hand the sum to every stage.

    Args:
        values: what the last stage counted; of other stages only shape and dtype matter. Changed in place.
    """
    if is_last_pipeline_stage():
        dist.all_reduce(values, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        source = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast(values, src=source, group=parallel_state.get_pipeline_model_parallel_group())
    return values


def sum_over_all_ranks(values: torch.Tensor) -> torch.Tensor:
    """Add up `values` over the whole world, in place; collective."""
    dist.all_reduce(values)
    return values
