"""The whole model's tensors, put together from all ranks on rank 0: for comparisons, not for checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from model.global_tensors import GlobalSlice
from model.initialization import VOCABULARY_TENSORS
from parallel.data_parallel import gather_sharded_gradients, gather_updated_parameters
from training.slices import gradient_slices, weight_slices
from training.state import TrainingState

WholeTensors = dict[str, torch.Tensor]


def whole_weights(state: TrainingState) -> WholeTensors | None:
    """Every weight of the model by its global name, on rank 0; None on the others. Collective."""
    gather_updated_parameters(state.wrapped, state.layout)
    return _collect(state, weight_slices(state))


def whole_gradients(state: TrainingState) -> WholeTensors | None:
    """Every reduced gradient by its parameter's global name, on rank 0; None on the others. Collective."""
    gather_sharded_gradients(state.wrapped)
    return _collect(state, gradient_slices(state))


def _collect(state: TrainingState, slices: Iterator[GlobalSlice]) -> WholeTensors | None:
    own = [_to_host(part) for part in slices if part.is_main_replica]
    gathered: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(own, gathered)
    if gathered is None:
        return None
    whole: WholeTensors = {}
    filled: dict[str, int] = {}
    for part in (part for parts in gathered for part in parts):
        tensor = whole.setdefault(part.name, torch.zeros(part.shape, dtype=part.tensor.dtype))
        tensor[part.index] = part.tensor
        filled[part.name] = filled.get(part.name, 0) + part.tensor.numel()
    incomplete = [name for name, count in filled.items() if count != whole[name].numel()]
    if incomplete:
        raise AssertionError(f"ranks together do not hold exactly one copy of {incomplete}")
    return {name: _without_padding(name, tensor, state.vocab_size) for name, tensor in sorted(whole.items())}


def _to_host(part: GlobalSlice) -> GlobalSlice:
    return GlobalSlice(part.name, part.shape, part.offset, part.tensor.detach().cpu().clone(), part.is_main_replica)


def _without_padding(name: str, tensor: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Rows that pad the vocabulary differ in number from layout to layout; they have to be zero."""
    if name not in VOCABULARY_TENSORS:
        return tensor
    if tensor[vocab_size:].any():
        raise AssertionError(f"{name}: rows that pad the vocabulary are not zero")
    return tensor[:vocab_size]
