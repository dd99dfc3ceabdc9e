"""Bytes that one rank holds, counted from its tensors: each storage once, however many tensors view it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from megatron.core.distributed import DistributedDataParallel

from parallel.data_parallel import WrappedChunk
from parallel.fully_sharded import FullyShardedChunk
from training.state import TrainingState


@dataclass(frozen=True)
class HeldBytes:
    """Of one rank, between two steps."""

    parameters: int
    """How many, not bytes."""

    weights: int
    gradients: int
    optimizer: int


def held_bytes(state: TrainingState) -> HeldBytes:
    """Count weights, gradients and optimizer state; its moments have to be there (after a step)."""
    parameters = [one for chunk in state.chunks for one in chunk.parameters()]
    weights = _storages(one.data for one in parameters)
    gradients = _storages(_gradient_buffers(state))
    if state.layout.fully_sharded:
        shards = [shard for chunk in state.wrapped if _is_sharded(chunk) for shard in chunk.shards()]
        weights = _storages(shard.weight for shard in shards)
        gradients = _storages(shard.gradient for shard in shards if shard.gradient is not None)
    states = {
        key: size for key, size in _storages(_optimizer_tensors(state.optimizer)).items()
        if key not in weights and key not in gradients
    }  # fmt: skip
    return HeldBytes(
        parameters=sum(one.numel() for one in parameters),
        weights=sum(weights.values()),
        gradients=sum(gradients.values()),
        optimizer=sum(states.values()),
    )


class SavedActivations:
    """The bytes that autograd keeps for backward passes, now and at most."""

    def __init__(self, state: TrainingState) -> None:
        self._not_counted = set(_storages(one.data for chunk in state.chunks for one in chunk.parameters()))
        self._not_counted |= set(_storages(_gradient_buffers(state)))
        self._holders: dict[int, int] = {}
        self._sizes: dict[int, int] = {}
        self.now = 0
        self.most = 0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count what is saved inside the block."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
            yield

    def _pack(self, tensor: torch.Tensor) -> _Kept:
        return _Kept(tensor, self)

    def hold(self, tensor: torch.Tensor) -> int | None:
        """Count the storage of `tensor` unless something holds it already; None where it is no activation."""
        storage = tensor.untyped_storage()
        key: int = storage._cdata
        if key in self._not_counted or isinstance(tensor, torch.nn.Parameter):
            return None
        if not self._holders.get(key):
            self._sizes[key] = storage.nbytes()
            self.now += self._sizes[key]
            self.most = max(self.most, self.now)
        self._holders[key] = self._holders.get(key, 0) + 1
        return key

    def let_go(self, key: int) -> None:
        """One holder of a storage less."""
        self._holders[key] -= 1
        if not self._holders[key]:
            self.now -= self._sizes.pop(key)
            del self._holders[key]


class _Kept:
    """What autograd keeps in place of a tensor: counted as long as it lives."""

    def __init__(self, tensor: torch.Tensor, counter: SavedActivations) -> None:
        self.tensor, self._counter, self._key = tensor, counter, counter.hold(tensor)

    def __del__(self) -> None:
        if self._key is not None:
            self._counter.let_go(self._key)


def _unpack(kept: _Kept) -> torch.Tensor:
    return kept.tensor


def _storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Bytes of each storage, by its identity."""
    found: dict[int, int] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        found[storage._cdata] = storage.nbytes()
    return found


def _is_sharded(chunk: WrappedChunk) -> TypeGuard[FullyShardedChunk]:
    return not isinstance(chunk, DistributedDataParallel)


def _gradient_buffers(state: TrainingState) -> Iterator[torch.Tensor]:
    for chunk in state.wrapped:
        if isinstance(chunk, DistributedDataParallel):
            yield from (buffer.grad_data for buffer in chunk.buffers + chunk.expert_parallel_buffers)


def _optimizer_tensors(optimizer: Any) -> Iterator[torch.Tensor]:
    """Master weights and moments of every part."""
    for part in optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                yield _local(parameter.data)
        for kept in part.optimizer.state.values():
            yield from (_local(value) for value in kept.values() if isinstance(value, torch.Tensor) and value.dim())


def _local(tensor: Any) -> torch.Tensor:
    local: torch.Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local
