"""ZeRO-2 and ZeRO-3 around model chunks: core's Megatron-FSDP, or PyTorch's FSDP2 through core's wrapper.

Both sum gradients over replicas and leave the division to core's `finalize_model_grads`, which divides by the tokens
of the whole batch: a replica with fewer tokens weighs less, as at the other stages.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallelConfig,
    FullyShardedDataParallel,
    TorchFullyShardedDataParallel,
)
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch.distributed.fsdp import FSDPModule

from parallel.layout import ParallelLayout
from parallel.shards import ParameterShard, row_size

STRATEGIES = {2: "optim_grads", 3: "optim_grads_params"}
"""Core's names of the ZeRO stages."""


class MegatronFsdpChunk(FullyShardedDataParallel):  # type: ignore[misc]
    """A chunk under Megatron-FSDP; parameters lie in buffers that are cut at whole rows."""

    def __init__(self, core: Any, layout: ParallelLayout, chunk: torch.nn.Module) -> None:
        options = DistributedDataParallelConfig(
            use_megatron_fsdp=True,
            use_distributed_optimizer=True,
            data_parallel_sharding_strategy=STRATEGIES[layout.zero_stage],
            grad_reduce_in_fp32=layout.grad_reduce_in_fp32,
            overlap_grad_reduce=True,
            overlap_param_gather=layout.zero_stage == 3 or layout.overlap_param_gather,
            bucket_size=layout.bucket_size,
            gradient_reduce_div_fusion=False,  # it multiplies before it sums, which gloo has no operation for
        )
        super().__init__(core, options, chunk, device=torch.device(torch.cuda.current_device()))

    def shards(self) -> list[ParameterShard]:
        """This rank's part of every parameter; gradients are there after a batch's reduction."""
        buffer = self.param_and_grad_buffer
        return [
            ParameterShard(
                name=name,
                first_row=parameter.megatron_fsdp_slice.start // row_size(parameter.orig_param.shape),
                parameter=parameter,
                weight=_in_rows(self._part(buffer, parameter, "model_weight_buffer"), parameter.orig_param),
                gradient=_in_rows(self._part(buffer, parameter, "main_grad_buffer"), parameter.orig_param),
                master=parameter.to_local(),
            )
            for name, parameter in buffer.optimizer_named_parameters
        ]

    @staticmethod
    def _part(buffer: Any, parameter: Any, name: str) -> torch.Tensor:
        group = buffer.parameter_groups[buffer.param_to_param_group[parameter.orig_param]]
        held = getattr(group, name)
        part: torch.Tensor = held.get_item(held.param_idx[parameter.orig_param], only_shard=True)
        return part

    def take_up_weights(self) -> None:
        """Forget what was gathered, after weights were written into the shards."""
        self.module.synchronize_param_gather()


class Fsdp2Chunk(TorchFullyShardedDataParallel):  # type: ignore[misc]
    """A chunk under FSDP2: layers are units, all else is the root's."""

    def __init__(self, core: Any, layout: ParallelLayout, chunk: torch.nn.Module) -> None:
        options = DistributedDataParallelConfig(grad_reduce_in_fp32=layout.grad_reduce_in_fp32)
        options.reshard_after_forward = layout.zero_stage == 3
        # Embeddings stay with the root: tied ones are used once more at its end.
        super().__init__(core, options, chunk, sub_modules_to_wrap={TransformerLayer})
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)

    def finish_grad_sync(self, force_all_reduce: bool = False) -> None:
        """Gradients are reduced when the backward pass ends. Core's wrapper lacks the argument its caller gives."""

    @torch.no_grad()
    def scale_gradients(self, scaling_factor: float) -> None:
        """Core's wrapper leaves this out: gradients would stay sums over tokens."""
        for parameter in self.module.parameters():
            if parameter.grad is not None:
                parameter.grad.to_local().mul_(scaling_factor)

    def shards(self) -> list[ParameterShard]:
        """This rank's part of every parameter; gradients are there after a batch's reduction."""
        self._forget_gathered()  # a forward pass without a backward one leaves whole weights in the modules at stage 2
        return [self._shard(name, parameter) for name, parameter in self.module.named_parameters()]

    def take_up_weights(self) -> None:
        """Forget what was gathered, after weights were written into the shards."""
        self._forget_gathered()

    def _forget_gathered(self) -> None:
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _shard(self, name: str, parameter: Any) -> ParameterShard:
        group = self.process_group
        rows = -(-parameter.shape[0] // group.size())
        return ParameterShard(
            name=name,
            first_row=min(rows * group.rank(), parameter.shape[0]),
            parameter=getattr(parameter, "main_param", parameter),
            weight=parameter.detach().to_local(),
            gradient=None if parameter.grad is None else parameter.grad.to_local(),
            master=getattr(parameter, "main_param", parameter).detach().to_local(),
        )


FullyShardedChunk = MegatronFsdpChunk | Fsdp2Chunk


def wrap_fully_sharded(chunks: list[Any], core: Any, layout: ParallelLayout) -> list[FullyShardedChunk]:
    """Shard every chunk's weights, gradients and optimizer state as `layout.zero_stage` (2 or 3) says."""
    kind = MegatronFsdpChunk if layout.zero_implementation == "megatron_fsdp" else Fsdp2Chunk
    return [kind(core, layout, chunk) for chunk in chunks]


def _in_rows(flat: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """[rows * row size] -> [rows, ...] of `parameter`."""
    return flat.view(-1, *parameter.shape[1:])
