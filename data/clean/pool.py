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
from typing import Protocol

from foundation.errors import OrthantError, RequestError, WorkError

_STARTED = 2
"""Units handed to each worker ahead of time."""


class Job(Protocol):
    """What a worker does with each unit; it is made once in each worker."""

    def run(self, unit: int) -> None: ...


class _Worker:
    """A worker's job, made when the first unit comes."""

    job: Job | None = None


def run_units(
    make: Callable[[], Job], units: Sequence[int], workers: int, done: Callable[[int], None] | None = None
) -> None:
    """Run a job's units.

    Args:
        make: makes the job; can be pickled.
        units: their numbers.
        workers: processes; 1 works in this one.
        done: is told each unit that is done.

    Raises:
        RequestError, WorkError, OSError: a unit failed. Units that had begun are finished first.
    """
    told = done or (lambda _: None)
    if min(workers, len(units)) <= 1:
        if units:
            job = make()
            for unit in units:
                job.run(unit)
                told(unit)
        return
    _run_in_processes(make, units, min(workers, len(units)), told)


def _run_in_processes(make: Callable[[], Job], units: Sequence[int], workers: int, done: Callable[[int], None]) -> None:
    left = iter(units)
    # Spawned, not forked: this process has threads (progress, libraries), and a fork copies only one of them.
    with ProcessPoolExecutor(workers, get_context("spawn"), _end_with, (os.getpid(),)) as pool:
        waiting = {pool.submit(_work, make, unit) for unit in islice(left, workers * _STARTED)}
        try:
            while waiting:
                finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in finished:
                    done(_unwrap(future.result()))
                waiting |= {pool.submit(_work, make, unit) for unit in islice(left, len(finished))}
        except BrokenProcessPool as problem:
            raise WorkError(
                "a worker process died",
                cure="most often memory ran out: start again with fewer --workers; what is done is kept",
            ) from problem
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _work(make: Callable[[], Job], unit: int) -> int | tuple[int, str]:
    """Run in a worker. Our errors take several arguments and do not survive pickling: their text does."""
    try:
        if _Worker.job is None:
            _Worker.job = make()
        _Worker.job.run(unit)
    except OrthantError as problem:
        return problem.exit_code, str(problem)
    return unit


def _unwrap(answer: int | tuple[int, str]) -> int:
    if isinstance(answer, tuple):
        code, text = answer
        raise RequestError(text) if code == RequestError.exit_code else WorkError(text)
    return answer


def _end_with(parent: int) -> None:
    """A worker ends when the process that started it is gone, however that went."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
