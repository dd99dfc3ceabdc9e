"""`RankPool.run`: one function on every rank of a fresh world, in processes that live as long as the pytest session."""

from __future__ import annotations

import pickle
import shutil
import signal
import time
from collections.abc import Callable
from enum import Enum
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from tests.ranks.failures import Failure, RankFailure, RankTimeout
from tests.ranks.messages import Clean, Cleaned, Job, Raised, Returned, receive, reference_to
from tests.ranks.processes import Template, Worker, stacks_of

LIMIT = 8
GRACE_SECONDS = 30.0
"""How long ranks may go on after one has failed: they mostly fail too, by the connection that it closes."""
CLEANING_SECONDS = 120.0


class State(Enum):
    """Where a rank stands in a run."""

    WORKING = "working"
    ENDED = "ended"
    CLEANING = "cleaning"
    CLEAN = "clean"
    GONE = "gone"


class RankPool:
    """Up to eight rank processes, started when first needed, reused by every run, replaced when they die."""

    def __init__(self, folder: Path) -> None:
        """`folder` takes the logs of ranks; those of runs that went well are removed."""
        self.folder = folder
        self._template: Template | None = None
        self._workers: dict[int, Worker] = {}
        self._runs = 0

    def run(
        self, world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 240.0, **kwargs: Any
    ) -> list[Any]:
        """Call `function(*args, **kwargs)` on `world_size` ranks at once.

        Every run gets a new default process group (gloo over a new FileStore), RANK, LOCAL_RANK, WORLD_SIZE and
        LOCAL_WORLD_SIZE in the environment, one thread and the same random seed. Afterwards process groups, megatron's
        parallel state, environment and working folder are put back. What the function patches in modules stays:
        undo it there.

        Args:
            world_size: ranks, 1 to 8.
            function: top-level function of an importable module; arguments and return value are pickled.
            timeout: seconds for all ranks together.

        Returns:
            The return values by rank.

        Raises:
            RankFailure: a rank raised or died. Shows every rank's traceback, first cause first; raised from the first
                rank's own exception where that can be pickled.
            RankTimeout: the time was over. Says which ranks hang and shows their stacks.
            TypeError, ValueError: what was asked can't be run.
        """
        if not 1 <= world_size <= LIMIT:
            raise ValueError(f"world_size = {world_size}: the pool runs 1 to {LIMIT} ranks")
        module, name = reference_to(function)
        arguments = pickle.dumps((args, kwargs))
        workers = self._workers_for(world_size)
        self._runs += 1
        folder = self.folder / f"run-{self._runs:05d}"
        folder.mkdir()
        jobs = [
            Job(module, name, arguments, rank, world_size, timeout, folder / f"rank-{rank}.log")
            for rank in range(world_size)
        ]
        run = _Run(self, workers, jobs, timeout)
        try:
            values = run.follow(f"{module}.{name} failed at world size {world_size}")
        finally:
            run.end()
        shutil.rmtree(folder)
        return values

    def pids(self) -> list[int]:
        """Process ids of the living workers, by rank."""
        return [worker.pid for _, worker in sorted(self._workers.items())]

    def drop(self, worker: Worker) -> int:
        """Kill a worker if it lives and forget it; its exit code, negative for the signal that ended it."""
        assert self._template is not None
        worker.kill()
        code = self._template.reap(worker.pid)
        worker.connection.close()
        del self._workers[worker.slot]
        return code

    def close(self) -> None:
        """End all processes."""
        for worker in self._workers.values():
            worker.connection.close()
        self._workers.clear()
        if self._template is not None:
            self._template.close()
            self._template = None

    def _workers_for(self, world_size: int) -> list[Worker]:
        if self._template is not None and self._template.gone():
            self.close()
        if self._template is None:
            self._template = Template(self.folder)
        for worker in list(self._workers.values()):
            if worker.gone():
                self.drop(worker)
        for slot in range(world_size):
            if slot not in self._workers:
                self._workers[slot] = self._template.fork(slot)
        return [self._workers[slot] for slot in range(world_size)]


class _Run:
    """One run, watched from start to clean ranks."""

    def __init__(self, pool: RankPool, workers: list[Worker], jobs: list[Job], timeout: float) -> None:
        self.pool, self.workers, self.jobs, self.timeout = pool, workers, jobs, timeout
        self.states = [State.WORKING] * len(workers)
        self.values: dict[int, bytes] = {}
        self.failures: list[Failure] = []
        self.timed_out = False
        self.started = time.monotonic()
        self.cleaning_since = self.started

    def follow(self, what: str) -> list[Any]:
        """Send the jobs, gather the outcomes."""
        for rank, (worker, job) in enumerate(zip(self.workers, self.jobs, strict=True)):
            if not worker.tell(job):
                self._died(rank)
        while busy := self._ranks(State.WORKING, State.CLEANING):
            by_connection = {self.workers[rank].connection: rank for rank in busy}
            ready = wait(list(by_connection), max(0.0, self._limit() - time.monotonic()))
            for connection in ready:
                self._hear(by_connection[connection])  # type: ignore[index]
            if not ready:
                self._lose_patience()
            self._let_clean()
        if self.timed_out:
            raise RankTimeout(f"{what}: not done after {self.timeout:g} s", self.failures)
        if self.failures:
            failure = RankFailure(what, self.failures)
            raise failure from failure.first
        return [pickle.loads(self.values[rank]) for rank in range(len(self.workers))]

    def end(self) -> None:
        """Drop every worker that isn't known to be clean (pytest was interrupted)."""
        for rank in self._ranks(State.WORKING, State.ENDED, State.CLEANING):
            self.pool.drop(self.workers[rank])
            self.states[rank] = State.GONE

    def _ranks(self, *states: State) -> list[int]:
        return [rank for rank, state in enumerate(self.states) if state in states]

    def _limit(self) -> float:
        """When patience ends, in time.monotonic()."""
        if not self._ranks(State.WORKING):
            return self.cleaning_since + CLEANING_SECONDS
        limit = self.started + self.timeout
        if self.failures:
            limit = min(limit, min(failure.at for failure in self.failures) + GRACE_SECONDS)
        return limit

    def _hear(self, rank: int) -> None:
        try:
            message = receive(self.workers[rank].connection)
        except EOFError:
            self._died(rank)
            return
        if isinstance(message, Cleaned):
            self.states[rank] = State.CLEAN
            if message.problem is not None:
                self._fail(rank, "returned, but could not be cleaned for the next run", message.problem)
            if message.problem is not None or message.worn:
                self._drop(rank)
            return
        self.states[rank] = State.ENDED
        if isinstance(message, Returned):
            self.values[rank] = message.value
        else:
            assert isinstance(message, Raised), message
            self._fail(rank, "raised", message.traceback, at=message.at, exception=message.exception)

    def _let_clean(self) -> None:
        """A rank keeps its process groups until all have ended: closing them early would fail a slower rank."""
        if self._ranks(State.WORKING) and not self.failures:
            return
        for rank in self._ranks(State.ENDED):
            self.states[rank] = State.CLEANING
            self.cleaning_since = time.monotonic()
            if not self.workers[rank].tell(Clean()):
                self._died(rank)

    def _lose_patience(self) -> None:
        """Time or grace is over: show where the ranks are that still work (or clean up), and kill them."""
        working = self._ranks(State.WORKING)
        late = working or self._ranks(State.CLEANING)
        self.timed_out = bool(working) and not self.failures
        if not working:
            headline = f"returned, but its process groups were not taken down within {CLEANING_SECONDS:g} s"
        elif self.failures:
            headline = "was still at work when the grace period after the first failure was over; killed"
        else:
            headline = f"hangs: still at work after {self.timeout:g} s; killed"
        stacks = stacks_of([self.workers[rank] for rank in late])
        for rank in late:
            self._fail(rank, headline, stacks[rank])
            self._drop(rank)

    def _died(self, rank: int) -> None:
        at = time.monotonic()
        code = self._drop(rank)
        cause = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        self._fail(rank, f"died by {cause}", "", at=at, died=True)

    def _drop(self, rank: int) -> int:
        self.states[rank] = State.GONE
        return self.pool.drop(self.workers[rank])

    def _fail(
        self,
        rank: int,
        headline: str,
        detail: str,
        *,
        at: float | None = None,
        exception: bytes | None = None,
        died: bool = False,
    ) -> None:
        at = time.monotonic() if at is None else at
        headline = f"{headline} ({at - self.started:.1f} s into the run)"
        self.failures.append(Failure(rank, at, headline, detail, self.jobs[rank].log, exception, died))
