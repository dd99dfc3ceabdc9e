"""One life of a run: from the moment its ranks have met to its end, watched."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foundation.errors import FaultError, LostRankError, OrthantError, WorkError
from launch.preflight.check import FOLDER as PREFLIGHT
from launch.preflight.check import number_of_nodes
from launch.run_folder import WATCH
from launch.world import World

if TYPE_CHECKING:
    from training.config import TrainingSections
    from training.survival.comparison import Comparison
    from training.survival.heartbeat import Details, Who
    from training.survival.pulse import Pulse
    from training.survival.stragglers import Pace, SlowRank
    from training.survival.verdict import Verdict
    from training.survival.watchdog import Watchdog

NCCL_TRACE_EVENTS = 2000

Agreement = Callable[[Callable[[], tuple[int, str]]], tuple[int, str]]
"""What the function that it is given returns on rank 0 of the run, on every rank of it."""


@dataclass(frozen=True)
class Life:
    """What a trainer needs of it.

    Attributes:
        number: of the run's starts, from 1.
        folder: the run's.
    """

    number: int
    folder: Path
    node: str
    pulse: Pulse
    watchdog: Watchdog


@contextmanager
def living(
    sections: TrainingSections,
    folder: Path,
    world: World,
    agree: Agreement | None = None,
    whereabouts: Callable[[], Details] | None = None,
) -> Iterator[Life]:
    """A life of the run in `folder`, on every rank, inside an initialised torch.distributed. Collective.

    Args:
        agree, whereabouts: where torch.distributed holds a part of the run's ranks alone: how all of them come to the
            same, and where a rank's main thread is, in numbers of the run.

    Raises:
        LostRankError: another rank of the run was lost.
    """
    from parallel.platform import current_platform
    from training.checkpoint.agreement import from_rank_0
    from training.survival.place import details
    from training.survival.pulse import Pulse
    from training.survival.watchdog import Watchdog

    pulse, who = Pulse(), _who(world)
    try:
        number, place = (agree or from_rank_0)(lambda: _begin(folder, world))
        heartbeats = Path(place)
        watchdog = Watchdog(
            pulse,
            sections.watchdog,
            heartbeats,
            who,
            world.world_size,
            partial(_leave, world, heartbeats),
            decided=partial(_write_down, folder, number),
            whereabouts=whereabouts or details,
            samples=current_platform().device_type == "cpu",
        )
        with watchdog:
            yield Life(number, folder, who.node, pulse, watchdog)
    except OrthantError:
        raise
    except Exception as error:
        if not is_lost_peer(error):
            raise
        position = pulse.position
        raise _lost(world, f"lost another rank in step {position.step}, {position.phase}", error) from None


def join(world: World, folder: Path, timeout_seconds: float = 1800) -> None:
    """Join the world that the launcher announced.

    Raises:
        LostRankError: another rank did not come, or went away.
    """
    from parallel.groups import start_distributed

    trace_nccl(folder)
    try:
        start_distributed(world.rank, world.world_size, world.local_rank, timeout_seconds=timeout_seconds)
    except Exception as error:
        if not is_lost_peer(error):
            raise
        raise _lost(world, "did not meet all other ranks", error) from None


def _lost(world: World, what: str, error: Exception) -> LostRankError:
    return LostRankError(
        f"rank {world.rank} on {socket.gethostname()} {what}",
        where=first_line(error),
        cure="the log of the rank that ended first says why; run the same command again to continue",
    )


def first_line(error: Exception) -> str:
    """What an error says first, or its kind where it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error says that another rank went away, as gloo and NCCL put it."""
    import torch.distributed as dist

    if isinstance(error, dist.DistError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("/gloo/" in text or "Connection closed by peer" in text)


def trace_nccl(folder: Path) -> None:
    """NCCL's flight recorder: what each rank had begun, in RUN/watch where a collective timed out or the watchdog ended
    the run. Before the first process group. Not run so far: it needs several GPUs."""
    from parallel.platform import current_platform

    if current_platform().backend == "nccl":
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(NCCL_TRACE_EVENTS))  # TORCH_NCCL_TRACE_BUFFER_SIZE once
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
        os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str((folder / WATCH / "nccl-trace-").absolute()))


def comparison(sections: TrainingSections, life: Life, stage: int, say: Any) -> Comparison:
    """What compares the speed of this life's ranks."""
    from training.survival.comparison import Comparison

    return Comparison(
        sections.stragglers, life.pulse, life.watchdog.take_compute_share, life.node, stage, partial(_paces, life, say)
    )


def _paces(life: Life, say: Any, step: int, paces: list[Pace], slow: list[SlowRank]) -> None:
    from training.survival.events import append_event

    seconds = [round(pace.seconds, 6) for pace in paces]
    named = [{"rank": one.pace.rank, "node": one.pace.node, "times": round(one.times, 3)} for one in slow]
    append_event(life.folder, life.number, "ranks", step=step, compute_seconds=seconds, slow=named)
    for one in slow:
        say(f"step {step}: slow: {one.render()} what its equals take")


def _who(world: World) -> Who:
    from training.survival.heartbeat import Who
    from training.survival.network import open_port, own_address
    from training.survival.processes import own_processes, start_of

    address, port = "", 0
    if world.local_rank == 0 and number_of_nodes(world) > 1:
        with suppress(OSError):  # a node without a way to the master is none that others could ask for
            address, port = own_address(), open_port()
    pid = os.getpid()
    return Who(world.rank, world.local_rank, socket.gethostname(), pid, own_processes(), start_of(pid), address, port)


def _begin(folder: Path, world: World) -> tuple[int, str]:
    """Number and heartbeat folder of a new life; on rank 0. Whatever of an older life still runs ends when it sees
    that its folder is gone."""
    from training.survival.events import append_event, lives_before

    number = lives_before(folder) + 1
    for older in (folder / WATCH).glob("life-*"):
        shutil.rmtree(older, ignore_errors=True)
    heartbeats = folder / WATCH / f"life-{number:04d}-{secrets.token_hex(4)}"
    heartbeats.mkdir(parents=True)
    shutil.rmtree(folder / PREFLIGHT, ignore_errors=True)  # every rank is here, so every rank has read it
    job = os.environ.get("SLURM_JOB_ID")
    append_event(folder, number, "life", ranks=world.world_size, job=job)
    return number, str(heartbeats)


def _write_down(folder: Path, number: int, verdict: Verdict) -> None:
    from training.survival.events import append_event

    append_event(folder, number, "hang", text=verdict.render(), culprits=sorted(verdict.culprits), step=verdict.step)


def _leave(world: World, heartbeats: Path, text: str) -> None:
    """End this process, whose main thread is blocked, so that its launcher knows why.

    A run that another start has taken over is not started again: the two would end each other in turns.
    """
    from torch.distributed.elastic.multiprocessing.errors.error_handler import ErrorHandler

    what, again = f"rank {world.rank} ends: {text}", "run the same command again to continue"
    error: WorkError = FaultError(what, cure=again)
    try:
        with suppress(OSError):  # a file system that does not answer: nobody is known to have taken it over
            if not heartbeats.is_dir():
                error = WorkError(what, cure="one job at a time for a run")
        print(error, file=sys.stderr, flush=True)
        if "TORCHELASTIC_ERROR_FILE" in os.environ:
            ErrorHandler().record_exception(error)
        _dump_nccl_trace(heartbeats.parent / f"nccl-trace-{world.rank}")
    finally:
        os._exit(error.exit_code)


def _dump_nccl_trace(path: Path) -> None:
    """What NCCL's flight recorder holds, in the form that torch's own analyser reads."""
    from torch import _C

    dump = getattr(getattr(_C, "_distributed_c10d", None), "_dump_nccl_trace", None)
    trace = b"" if dump is None else dump()
    if trace:
        path.write_bytes(trace)
