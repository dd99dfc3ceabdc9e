"""What of a run each rank holds under ZeRO. Imported by rank processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from model.config import ModelConfig
from parallel.fully_sharded import Fsdp2Chunk, MegatronFsdpChunk
from parallel.groups import ProcessGroups
from parallel.layout import ParallelLayout
from tests.training.parity_cases import MODELS, VOCAB_SIZE, UnevenBatches, sections
from training.batch import numbered, to_device
from training.optimizer import apply_gradients, gradient_norm
from training.state import TrainingState, build_state
from training.step import BatchShape, run_batches


def bytes_held(layout: ParallelLayout) -> dict[str, int]:
    """Bytes of memory behind this rank's weights, gradients and moments, after the gradients of its second step."""
    config = sections()
    with ProcessGroups(layout, 1):
        model = ModelConfig.model_validate(MODELS["llama"])
        state = build_state(model, layout, config.training, config.optimizer, VOCAB_SIZE)
        rank = torch.distributed.get_rank()
        device = torch.device("cpu")
        for step in range(2):
            batches = numbered(
                (to_device(batch, device, 0, 1) for batch in UnevenBatches()(step, rank, layout.dp)),
                step,
                8,
                rank,
                layout.dp,
            )
            for chunk in state.wrapped:
                chunk.zero_grad_buffer()
            state.optimizer.zero_grad()
            shape = BatchShape.of(8 // layout.dp, 1, 32, packed=False)
            run_batches(state.wrapped, [iter(batches)], shape, forward_only=False)
            norm = gradient_norm(state.optimizer)
            if step == 0:
                apply_gradients(state.optimizer, norm, 1.0)
        (chunk,) = state.wrapped
        return {
            "weights": _bytes(_weights(chunk)),
            "gradients": _bytes(_gradients(chunk)),
            "moments": _bytes(_moments(state)),
            "whole": 4 * model_size(state),
        }


def model_size(state: TrainingState) -> int:
    """Parameters of the whole model; DTensors tell the size of what they are a part of."""
    return sum(parameter.numel() for chunk in state.wrapped for parameter in chunk.module.parameters())


def _weights(chunk: Any) -> Iterator[torch.Tensor]:
    """Also what the model computes with, gathered or not; core names one and the same memory several times."""
    if isinstance(chunk, MegatronFsdpChunk):
        buffer = chunk.param_and_grad_buffer
        yield from buffer.params
        yield from (group.model_weight_buffer.data for group in buffer.parameter_groups)
        yield from _gathered(group.model_weight_buffer for group in buffer.parameter_groups)
        return
    for parameter in chunk.module.parameters():
        yield _local(parameter)
    if isinstance(chunk, Fsdp2Chunk):
        for module in chunk.module.modules():
            if isinstance(module, FSDPModule):
                for group in module._get_fsdp_state()._fsdp_param_groups:
                    for parameter in group.fsdp_params:
                        yield from parameter.all_gather_outputs


def _gathered(buffers: Iterable[Any]) -> Iterator[torch.Tensor]:
    """What Megatron-FSDP has made room for beside its shards, for as long as a layer computes."""
    for buffer in buffers:
        yield from (bucket.data for bucket in buffer.temporary_bucket_allocator.buckets.values())


def _gradients(chunk: Any) -> Iterator[torch.Tensor]:
    if isinstance(chunk, MegatronFsdpChunk):
        buffer = chunk.param_and_grad_buffer
        yield from (group.main_grad_buffer.data for group in buffer.parameter_groups)
        yield from _gathered(group.main_grad_buffer for group in buffer.parameter_groups)
    elif isinstance(chunk, Fsdp2Chunk):
        yield from (_local(parameter.grad) for parameter in chunk.module.parameters())
    else:
        yield from (buffer.grad_data for buffer in chunk.buffers)


def _moments(state: TrainingState) -> Iterator[torch.Tensor]:
    for part in state.optimizer.chained_optimizers:
        for kept in part.optimizer.state.values():
            yield from (_local(kept[name]) for name in ("exp_avg", "exp_avg_sq"))


def _local(tensor: Any) -> torch.Tensor:
    local: torch.Tensor = getattr(tensor, "_local_tensor", tensor)
    return local


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Of all memory behind `tensors`, each piece once."""
    storages = {storage.data_ptr(): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storages.values())
