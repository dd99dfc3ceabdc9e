"""Ranks as threads of one process, for functions whose only collectives are those below: milliseconds a run.

What is measured of them is their arithmetic. Processes, devices and gloo are what the rank pool is for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from unittest import mock

import torch
import torch.distributed as dist

T = TypeVar("T")
PATIENCE = 300.0


class _Meeting:
    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=PATIENCE)
        self.brought: list[torch.Tensor] = [torch.empty(0)] * size

    def exchange(self, rank: int, tensor: torch.Tensor) -> torch.Tensor:
        """Everybody's, stacked."""
        self.brought[rank] = tensor.detach().clone()
        self.barrier.wait()
        together = torch.stack(self.brought)
        self.barrier.wait()
        return together


class ThreadGroup:
    """Stands where a function takes a process group."""

    def __init__(self, rank: int, size: int, meeting: _Meeting) -> None:
        self._rank, self._size, self.meeting = rank, size, meeting

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


def _all_reduce(tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None) -> None:
    together = group.meeting.exchange(group.rank(), tensor)
    tensor.copy_(together.amax(0) if op == dist.ReduceOp.MAX else together.sum(0))


def _all_gather_into_tensor(output: torch.Tensor, tensor: torch.Tensor, group: Any = None) -> None:
    output.copy_(group.meeting.exchange(group.rank(), tensor).view(-1))


def on_threads(size: int, function: Callable[[Any], T]) -> list[T]:
    """What `function` gives on each of `size` ranks; its argument is the rank's group."""
    meeting = _Meeting(size)
    with (
        mock.patch.object(dist, "all_reduce", _all_reduce),
        mock.patch.object(dist, "all_gather_into_tensor", _all_gather_into_tensor),
        ThreadPoolExecutor(size) as pool,
    ):
        running = [pool.submit(function, ThreadGroup(rank, size, meeting)) for rank in range(size)]
        return [one.result(PATIENCE) for one in running]
