"""A wish to stop, from a signal to one rank, agreed on by all of them."""

from __future__ import annotations

import signal
from types import FrameType

import torch
import torch.distributed as dist

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""What schedulers send before a time limit or a preemption, and what Ctrl-C sends."""


class StopRequest:
    """Remembers the signal that asks this process to stop; the run ends after the step that it is in, saved."""

    def __init__(self) -> None:
        self._signal = 0

    def listen(self) -> None:
        """From now on STOP_SIGNALS are requests. Call in the main thread."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._signal = number

    def agreed(self, device: torch.device) -> str | None:
        """The name of a signal that any rank has had, the same on all ranks; None without. Collective."""
        seen = torch.tensor([self._signal], dtype=torch.int32, device=device)
        dist.all_reduce(seen, op=dist.ReduceOp.MAX)
        return signal.Signals(int(seen)).name if int(seen) else None
