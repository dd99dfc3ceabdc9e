"""Start the ranks of a run on this machine, through torch's elastic launcher."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any
from uuid import uuid4

import psutil

from foundation.errors import InterruptError, LostRankError, OrthantError, RequestError, WorkError

OF_OURS = re.compile(r"^(Orthant|Request|Config|Work|Fault|LostRank|Stopped|Interrupt)Errors?: ")
"""torch records the class of an error before its message; of ours nobody needs it."""


def run_ranks(world_size: int, module: str, *arguments: str, cure: str) -> None:
    """Run `python -m module arguments...` as `world_size` ranks and wait for all of them.

    Args:
        cure: what to do when a rank was ended from outside.

    Raises:
        RequestError, WorkError: what the first rank that failed said; the launcher ends the others.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    _silence_elastic()
    try:
        with TemporaryDirectory(prefix="orthant-") as folder:
            config = _on_this_machine(world_size, folder)
            with _environment_of_ranks(world_size), usr1_reaches_ranks():
                elastic_launch(config, sys.executable)("-m", module, *arguments)
    except ChildFailedError as error:
        raise _what_a_rank_said(error, cure) from None
    except SignalException as error:
        raise _stopped(error.sigval, cure) from None


def _on_this_machine(world_size: int, folder: str) -> Any:
    """Torch's settings of one launch. In `folder` ranks leave why they failed; torch's own choice would stay behind."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig

    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world_size,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=uuid4().hex,
        max_restarts=0,
        monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(log_dir=folder),
    )


@contextmanager
def usr1_reaches_ranks() -> Iterator[None]:
    """Inside the block USR1, by which Slurm asks for a checkpoint, is passed on to the child processes.

    torch's launcher knows TERM and INT, and would die of USR1; it gives the ranks 30 s after those.
    """
    before = signal.signal(signal.SIGUSR1, _pass_on)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


def _pass_on(number: int, _frame: FrameType | None) -> None:
    """To every rank; before there are any, die of it, so that whoever started this knows."""
    ranks = psutil.Process().children()
    if not ranks:
        os._exit(128 + number)
    for rank in ranks:
        with suppress(psutil.NoSuchProcess):  # it has ended meanwhile; the launcher says so
            rank.send_signal(number)


@contextmanager
def _environment_of_ranks(world_size: int) -> Iterator[None]:
    """Ranks share the cores, unless the person has said otherwise; more threads than cores are many times slower."""
    kept = dict(os.environ)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // world_size)))
    os.environ["PYTHONSAFEPATH"] = "1"  # a person's own data.py must not shadow ours
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(kept)


def _stopped(number: signal.Signals, cure: str) -> WorkError:
    """What ended the command: Ctrl-C, which may reach a rank before its launcher, or another signal."""
    if number == signal.SIGINT:
        return InterruptError("stopped by Ctrl-C", cure=cure)
    return WorkError(f"stopped by {number.name}", cure=cure)


def _silence_elastic() -> None:
    """We say what torch's launcher would, shorter. Its loggers have levels of their own."""
    for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _what_a_rank_said(error: Any, cure: str) -> OrthantError:
    rank, failure = _cause(error)
    if failure.exitcode < 0:
        number = -failure.exitcode
        if number == signal.SIGINT:
            return _stopped(signal.SIGINT, cure)
        return WorkError(f"rank {rank} was ended by {_name(number)}", cure=cure)
    message = OF_OURS.sub("", _message(failure))
    if failure.exitcode == RequestError.exit_code:
        return RequestError(message)
    return WorkError(f"rank {rank} failed: {message}")


def _cause(error: Any) -> tuple[int, Any]:
    """The rank that failed first, and how.

    Torch goes by whole seconds: of a rank that was killed, when the launcher saw it, of the others, when they wrote
    down that they had lost it, which may be earlier. A rank that the launcher itself ended has SIGTERM.
    """
    rank, failure = error.get_first_failure()
    if not _message(failure).startswith(LostRankError.__name__):
        return rank, failure
    causes = {
        one: other
        for one, other in error.failures.items()
        if other.exitcode != -signal.SIGTERM and not _message(other).startswith(LostRankError.__name__)
    }
    return min(causes.items(), key=lambda item: item[1].timestamp, default=(rank, failure))


def _message(failure: Any) -> str:
    """What a rank left, after the name of its error's class; of one that left nothing, torch's words."""
    return str(failure.message if isinstance(failure.message, str) else failure.message["message"])


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # most real-time signals have none
        return f"signal {number}"
