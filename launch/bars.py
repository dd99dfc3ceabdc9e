"""Progress over work of a known size: a bar on a terminal, a plain line now and then elsewhere, nothing if quiet."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from launch.terminal import say, wants_bar

PLAIN_SECONDS = 10.0
"""At most one plain line in so many seconds."""


@contextmanager
def progress_bar(title: str, unit: str | None = None, *, shown: bool = True) -> Iterator[Callable[[int, int], None]]:
    """What takes (done, in all) and shows them on stderr.

    Args:
        title: what is done.
        unit: what is counted, in the plural; None for bytes.
        shown: whether this process, of several, is the one that tells.
    """
    if not shown:
        yield lambda _done, _total: None
        return
    with terminal_bar(title, unit) as bar:
        yield bar or _PlainLines(title, unit)


@contextmanager
def terminal_bar(title: str, unit: str | None = None) -> Iterator[Callable[[int, int], None] | None]:
    """As `progress_bar` on a terminal that takes a bar; elsewhere None, for work that tells lines of its own."""
    with terminal_bars(unit, (title,)) as bars:
        yield bars and partial(bars, title)


@contextmanager
def terminal_bars(unit: str | None, titles: tuple[str, ...] = ()) -> Iterator[Callable[[str, int, int], None] | None]:
    """What takes (title, done, in all), with a bar for every title; None where stderr takes no bars.

    Args:
        unit: what is counted, in the plural; None for bytes.
        titles: that have a bar before anything is known of them.
    """
    if not wants_bar(sys.stderr):
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    amounts = (DownloadColumn(), TransferSpeedColumn()) if unit is None else (MofNCompleteColumn(), TextColumn(unit))
    columns = TextColumn("{task.description}", markup=False), BarColumn(), *amounts, TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks = {title: bars.add_task(title, total=None) for title in titles}

        def show(title: str, done: int, total: int) -> None:
            if title not in tasks:
                tasks[title] = bars.add_task(title, total=total)
            bars.update(tasks[title], completed=done, total=total)

        yield show


class _PlainLines:
    def __init__(self, title: str, unit: str | None) -> None:
        self._title, self._unit, self._said_at = title, unit, time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() - self._said_at < PLAIN_SECONDS:
            return
        self._said_at = time.monotonic()
        amounts = (
            f"{done / 1e9:.2f} of {total / 1e9:.2f} GB" if self._unit is None else f"{done:,} of {total:,} {self._unit}"
        )
        say(f"{self._title}: {amounts}")
