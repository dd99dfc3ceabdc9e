"""Units of a stage, in this process or spread over several."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import get_context
from types import TracebackType
from typing import Protocol

from foundation.errors import RequestError, WorkError
from foundation.interrupts import children_without_ctrl_c

_AHEAD = 2
"""Units handed to each worker ahead of time."""


class Job(Protocol):
    """What is done with each unit of a stage."""

    def run(self, unit: int) -> None:
        """Do one unit."""


class Workers:
    """Processes that work on units, one stage after the other; they start when there is something for them.

    Args:
        count: how many; 1 works in this process.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def run(self, stage: str, make: Callable[[], Job], units: Sequence[int], done: Callable[[int], None]) -> None:
        """Run a stage's units.

        Args:
            stage: its name.
            make: makes the job, once in each process that works on it; can be pickled.
            units: their numbers.
            done: is told each unit that is done.

        Raises:
            RequestError, WorkError, OSError: a unit failed. Units that had begun are finished first.
        """
        if min(self._count, len(units)) <= 1:
            if units:
                job = make()
                for unit in units:
                    job.run(unit)
                    done(unit)
            return
        if self._pool is None:
            # Spawned, not forked: this process has threads (progress, libraries), and a fork copies only one of them.
            self._pool = ProcessPoolExecutor(self._count, get_context("spawn"), _begin, (os.getpid(),))
        try:
            self._spread(self._pool, stage, make, units, done)
        except BrokenProcessPool as problem:
            raise WorkError(
                "a worker process died",
                cure="most often memory ran out: start again with fewer --workers; what is done is kept",
            ) from problem

    def _spread(
        self,
        pool: ProcessPoolExecutor,
        stage: str,
        make: Callable[[], Job],
        units: Sequence[int],
        done: Callable[[int], None],
    ) -> None:
        left = iter(units)
        with children_without_ctrl_c():  # submitting is what starts them
            waiting = {pool.submit(_work, stage, make, unit) for unit in islice(left, self._count * _AHEAD)}
        while waiting:
            finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in finished:
                done(_unwrap(future.result()))
            with children_without_ctrl_c():
                waiting |= {pool.submit(_work, stage, make, unit) for unit in islice(left, len(finished))}


class _Worker:
    """What a worker keeps between units: the job of the stage that it is in."""

    stage = ""
    job: Job | None = None


def _work(stage: str, make: Callable[[], Job], unit: int) -> int | tuple[int, str]:
    """Run in a worker. Our errors take several arguments and do not survive pickling: their text does."""
    try:
        if _Worker.job is None or _Worker.stage != stage:
            _Worker.stage, _Worker.job = stage, make()
        _Worker.job.run(unit)
    except (RequestError, WorkError) as problem:
        return problem.exit_code, str(problem)
    return unit


def _unwrap(answer: int | tuple[int, str]) -> int:
    if isinstance(answer, tuple):
        code, text = answer
        raise RequestError(text) if code == RequestError.exit_code else WorkError(text)
    return answer


def _begin(parent: int) -> None:
    """A worker ends when the process that started it is gone, however that went; Ctrl-C is that process's alone."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
