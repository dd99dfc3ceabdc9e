"""Ctrl-C, which a terminal sends to every process of a command."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def children_without_ctrl_c() -> Iterator[None]:
    """Processes that are started inside the block are not interrupted, from their first instruction on.

    The one that started them ends them. A worker that sets its own handler is too late: Ctrl-C during its imports ends
    it with a traceback. An interrupt of this process that comes meanwhile is delivered behind the block.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
