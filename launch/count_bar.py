"""Progress over things that are counted: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from launch.terminal import say, wants_bar

PLAIN_SECONDS = 10.0


@contextmanager
def count_bar(title: str, unit: str, *, shown: bool = True) -> Iterator[Callable[[int, int], None]]:
    """What takes (done, in all) and shows them on stderr.

    Args:
        title: what is done.
        unit: what is counted, in the plural.
        shown: whether this process, of several, is the one that tells.
    """
    if not shown:
        yield lambda _done, _total: None
        return
    if not wants_bar(sys.stderr):
        yield _PlainLines(title, unit)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn(title), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(title, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


class _PlainLines:
    def __init__(self, title: str, unit: str) -> None:
        self._title, self._unit, self._said_at = title, unit, time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() - self._said_at >= PLAIN_SECONDS:
            self._said_at = time.monotonic()
            say(f"{self._title}: {done:,} of {total:,} {self._unit}")
