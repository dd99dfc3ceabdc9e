"""Asynchronous collectives that nobody waits for, and the end of the process.

Megatron-FSDP starts to gather the next step's weights when a step ends: after the last step nobody asks for them.
gloo's threads then hold the tensors while Python shuts down, and the thread that lets go of the last one ends the
process by SIGABRT ("terminate called without an active exception"; PyTorch's pull request 179291 describes it). NCCL's
work lies on the GPU's stream and ends with it.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

SECONDS = 10.0
"""How long the end of the groups waits for work; where a peer is gone it would never be done."""


class WorkInFlight:
    """Holds on to asynchronous work until it is done."""

    def __init__(self) -> None:
        self._works: list[Any] = []

    def remember(self, start: Callable[..., Any]) -> Callable[..., Any]:
        """`start`, with the work that it returns held."""

        @functools.wraps(start)
        def start_and_hold(*args: Any, **options: Any) -> Any:
            work = start(*args, **options)
            self.hold(work)
            return work

        return start_and_hold

    def hold(self, work: Any) -> None:
        """Keep `work` while it runs; what is no work, or only stands for one of several, is let be."""
        if isinstance(work, dist.Work) and not isinstance(work, distributed_c10d._IllegalWork):
            self._works = [held for held in self._works if not held.is_completed()]
            self._works.append(work)

    def wait_before(self, destroy: Callable[..., Any]) -> Callable[..., Any]:
        """`destroy`, after all that is held is done."""

        @functools.wraps(destroy)
        def wait_and_destroy(*args: Any, **options: Any) -> Any:
            end = time.monotonic() + SECONDS
            for work in self._works:
                # Not `is_completed` alone: gloo's work of a reduce-scatter never says so, also when it was waited for.
                if not work.is_completed() and time.monotonic() < end:
                    with suppress(RuntimeError):  # a peer is gone, and says so itself
                        work.wait(timedelta(seconds=SECONDS))
            self._works.clear()
            return destroy(*args, **options)

        return wait_and_destroy

    def watch_coalesced(self) -> None:
        """Hold the work of collectives that torch sends as one."""
        manager: Any = distributed_c10d._CoalescingManager
        append = manager.append

        def append_and_hold(self_: Any, work: Any = None) -> None:
            self.hold(work)
            append(self_, work)

        manager.append = append_and_hold
