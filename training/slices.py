"""A state's weights and gradients as parts of the whole model's tensors, whatever shards them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from model.global_tensors import GlobalSlice, global_slices
from model.parameter_rows import ParameterPart
from parallel.data_parallel import main_gradient
from parallel.shards import ParameterShard
from training.state import TrainingState


def weight_slices(state: TrainingState) -> Iterator[GlobalSlice]:
    """What this rank holds of the weights; views of its storage."""
    if not state.layout.fully_sharded:
        yield from global_slices(list(state.chunks))
        return
    for shard, parts in sharded_parameters(state):
        yield from _slices(parts, shard.first_row, shard.weight)


def gradient_slices(state: TrainingState) -> Iterator[GlobalSlice]:
    """What this rank holds of the reduced gradients; views of its storage."""
    if not state.layout.fully_sharded:
        yield from global_slices(list(state.chunks), main_gradient)
        return
    for shard, parts in sharded_parameters(state):
        if shard.gradient is not None:
            yield from _slices(parts, shard.first_row, shard.gradient)


def sharded_parameters(state: TrainingState) -> Iterator[tuple[ParameterShard, tuple[ParameterPart, ...]]]:
    """This rank's shard of every parameter and where the parameter lies in the whole model; ZeRO-2 and 3 only."""
    for wrapped, rows in zip(state.wrapped, state.rows, strict=True):
        chunk: Any = wrapped
        for shard in chunk.shards():
            yield shard, rows.parts[shard.name]


def _slices(parts: tuple[ParameterPart, ...], first_row: int, tensor: torch.Tensor) -> Iterator[GlobalSlice]:
    for part in parts:
        found = part.slice(first_row, tensor)
        if found is not None:
            yield found
