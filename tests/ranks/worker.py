"""A rank process: takes a job, plays its rank, becomes clean again, takes the next."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import os
import pickle
import random
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

import megatron.core.num_microbatches_calculator as microbatches
import megatron.core.tensor_parallel.random as tensor_parallel_random
import numpy
import torch
import torch.distributed
from megatron.core import parallel_state, rerun_state_machine
from torch.distributed import distributed_c10d

from tests.ranks.messages import Clean, Cleaned, Job, Raised, Returned, receive, resolve, send

SEED = 1234
STACKS_SIGNAL = signal.SIGUSR1
MOST_THREADS = 200
"""A rank with more of them between two jobs is replaced."""

PATIENCE = 60.0
"""Seconds that a collective waits beyond the timeout of the run."""


class FirstState:
    """What a worker is before its first job, and becomes again after each."""

    def __init__(self) -> None:
        self.environment = dict(os.environ)
        self.folder = Path.cwd()
        self.dtype = torch.get_default_dtype()
        self.unset = {module: _unset_names(module) for module in (parallel_state, tensor_parallel_random, microbatches)}

    def restore(self) -> None:
        """Take down process groups and put back what a job may have changed, except patches of modules."""
        parallel_state.destroy_model_parallel()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        # A rank whose peer failed before it had joined the world has counted that world; by its number the next one's
        # ranks would miss each other.
        distributed_c10d._world.group_count = 0
        rerun_state_machine.destroy_rerun_state_machine()
        for module, names in self.unset.items():
            # core's own "destroy" functions leave some of their globals set
            for name in names:
                setattr(module, name, None)
        tensor_parallel_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = False
        if dict(os.environ) != self.environment:
            os.environ.clear()
            os.environ.update(self.environment)
        os.chdir(self.folder)
        torch.set_default_dtype(self.dtype)
        torch.set_grad_enabled(True)
        torch.set_num_threads(1)
        gc.collect()


def _unset_names(module: ModuleType) -> list[str]:
    """The module's private globals that nothing has set yet."""
    names = (name for name, value in vars(module).items() if value is None)
    return [name for name in names if name.startswith("_") and not name.startswith("__")]


def serve(connection: Connection, stacks: Path) -> None:
    """Work until pytest closes the connection."""
    faulthandler.enable()  # a crash leaves its stacks in the log of the run
    signals: dict[int, Any] = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)}
    with open(stacks, "a") as stacks_file:
        torch.set_num_threads(1)
        first_state = FirstState()
        while True:
            try:
                job: Job = receive(connection)
                _take_signals(signals, stacks_file)
                with _output_to(job.log):
                    send(connection, play(job))
                    said = receive(connection)
                    assert isinstance(said, Clean), said
                    cleaned = _clean(first_state)
            except EOFError:
                return
            send(connection, cleaned)


def _take_signals(first: dict[int, Any], stacks_file: TextIO) -> None:
    """A job before this one may have listened to them, as a training run does: whatever it left is undone."""
    for number, handler in first.items():
        signal.signal(number, handler)
    faulthandler.unregister(STACKS_SIGNAL)  # else it thinks itself in place and does nothing
    faulthandler.register(STACKS_SIGNAL, file=stacks_file, all_threads=True, chain=False)


def play(job: Job) -> Returned | Raised:
    """Be rank `job.rank` of a fresh world and call the function."""
    os.environ |= {
        "RANK": str(job.rank),
        "LOCAL_RANK": str(job.rank),
        "WORLD_SIZE": str(job.world_size),
        "LOCAL_WORLD_SIZE": str(job.world_size),
    }
    try:
        function = resolve(job.module, job.qualified_name)
        arguments, keywords = pickle.loads(job.arguments)
        _seed()
        patience = timedelta(seconds=job.timeout + PATIENCE)
        # Not a TCPStore: each of its connections asks for a host name, and waits 5 s where that answer is lost.
        path = str(job.log.with_name("store"))
        store = torch.distributed.FileStore(path, job.world_size)  # type: ignore[attr-defined]  # not in its __all__
        store.set_timeout(patience)
        torch.distributed.init_process_group(
            "gloo", store=store, rank=job.rank, world_size=job.world_size, timeout=patience
        )
        return Returned(pickle.dumps(function(*arguments, **keywords)))
    except BaseException as error:  # noqa: BLE001 - SystemExit and KeyboardInterrupt fail the test as well
        return Raised(time.monotonic(), _own_traceback(error), _pickled(error))


def _seed() -> None:
    """Every run starts from the same random state, so a test can't depend on the tests before it."""
    random.seed(SEED)
    numpy.random.seed(SEED)
    torch.manual_seed(SEED)


def _own_traceback(error: BaseException) -> str:
    """The traceback without this file's frame."""
    frames = error.__traceback__.tb_next if error.__traceback__ is not None else None
    return "".join(traceback.format_exception(type(error), error, frames or error.__traceback__))


def _pickled(error: BaseException) -> bytes | None:
    """The exception for pytest; None where it can't be pickled there and back (many with own constructors can't)."""
    try:
        pickled = pickle.dumps(error)
        pickle.loads(pickled)
    except Exception:  # noqa: BLE001 - a foreign constructor runs here and may raise anything
        return None
    return pickled


def _clean(first_state: FirstState) -> Cleaned:
    try:
        first_state.restore()
    except Exception:  # noqa: BLE001 - whatever it is, pytest is told and this process is replaced
        return Cleaned(traceback.format_exc())
    _keep_coverage()
    # Megatron-FSDP's buffers keep a model for good, and with it the two threads of each of its gloo groups.
    return Cleaned(None, worn=sum(1 for _ in Path("/proc/self/task").iterdir()) > MOST_THREADS)


def _keep_coverage() -> None:
    """Under `make coverage`: write down which lines ran, for a worker is killed and has no end of its own."""
    measuring = sys.modules.get("coverage")
    current = None if measuring is None else measuring.Coverage.current()
    if current is not None:
        current.save()


@contextlib.contextmanager
def _output_to(log: Path) -> Iterator[None]:
    """Send file descriptors 1 and 2 to `log`, so that what C++ writes is caught as well."""
    kept = os.dup(1), os.dup(2)
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.dup2(target, 1)
        os.dup2(target, 2)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, original in zip((1, 2), kept, strict=True):
            os.dup2(original, descriptor)
            os.close(original)
        os.close(target)
