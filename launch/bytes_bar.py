"""Progress over bytes: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from launch.terminal import say, wants_bar

PLAIN_SECONDS = 10.0


@contextmanager
def bytes_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """What takes (bytes done, bytes in all) and shows them on stderr."""
    if not wants_bar(sys.stderr):
        yield _PlainLines(title)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(title, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


class _PlainLines:
    def __init__(self, title: str) -> None:
        self._title, self._said_at = title, time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() - self._said_at >= PLAIN_SECONDS:
            self._said_at = time.monotonic()
            say(f"{self._title}: {done / 1e9:.2f} of {total / 1e9:.2f} GB")
