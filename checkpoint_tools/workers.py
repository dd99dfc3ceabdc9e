"""Share parts of work among processes: forks of this one, which has imported no torch and runs no threads."""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

from foundation.errors import OrthantError, WorkError
from foundation.processes import end_with_parent

Work = Callable[[Iterator[int]], Iterator[Any]]
"""Takes numbers of parts one after another, gives a result for each, in order."""

Progress = Callable[[int, int], None]
"""Takes bytes done and bytes in all."""

MOST = 4
"""Processes that a disk is kept busy by, and that stay within a few hundred megabytes together."""


def no_progress(_done: int, _total: int) -> None:
    """For who does not want to know."""


def usual_processes(parts: int) -> int:
    """How many processes to use where nothing is said: those this process may run on, at most 4 and one a part."""
    return max(1, min(len(os.sched_getaffinity(0)), MOST, parts))


def run_parts(work: Work, numbers: Sequence[int], processes: int) -> Iterator[Any]:
    """The results of `work` for all `numbers`, in the order in which they come.

    Raises:
        WorkError: a process failed or was killed; the others are ended.
        OSError: the disk failed one of them.
    """
    if processes <= 1 or len(numbers) <= 1:
        yield from work(iter(numbers))
        return
    context = multiprocessing.get_context("fork")
    parent = os.getpid()
    left = iter(numbers)
    running: dict[Connection, Any] = {}
    try:
        for _ in range(min(processes, len(numbers))):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(work, theirs, [*running, ours], parent), daemon=True)
            process.start()
            theirs.close()
            running[ours] = process
        while running:
            for ready in wait(list(running)):
                connection = next(one for one in running if one is ready)
                kind, value = _received(connection, running[connection])
                if kind == "next":
                    with suppress(BrokenPipeError):  # it was ended meanwhile: nothing more is received from it
                        connection.send(next(left, None))
                elif kind == "done":
                    yield value
                elif kind == "ended":
                    running.pop(connection).join()
                    connection.close()
                elif isinstance(value, OSError):
                    raise value
                else:
                    raise WorkError(value)
    finally:
        for connection, process in running.items():
            process.kill()
            process.join()
            connection.close()


def _received(connection: Connection, process: Any) -> tuple[str, Any]:
    try:
        message: tuple[str, Any] = connection.recv()
    except (EOFError, ConnectionResetError):  # the latter where it did not take what was sent to it
        process.join()
        raise WorkError(
            f"a process of the conversion was ended (exit code {process.exitcode})",
            cure="see whether the machine ran out of memory; --resume goes on from what is done",
        ) from None
    return message


def _serve(work: Work, connection: Connection, others: list[Connection], parent: int) -> None:
    """A worker: asks for parts until there are none. Ends with its parent, whatever ends that."""
    end_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of the terminal's processes; the parent ends us
    for other in others:
        other.close()

    def asked() -> Iterator[int]:
        while True:
            connection.send(("next", None))
            number = connection.recv()
            if number is None:
                return
            yield number

    try:
        for result in work(asked()):
            connection.send(("done", result))
        connection.send(("ended", None))
    except OrthantError as error:
        connection.send(("failed", str(error)))
    except OSError as error:
        connection.send(("failed", error))
    except Exception:  # noqa: BLE001 - a defect of ours has to reach the parent with its traceback
        connection.send(("failed", traceback.format_exc()))
