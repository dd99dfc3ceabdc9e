"""The process that imports everything once and forks workers on request. Started by `pool.py`, not by hand."""

from __future__ import annotations

import gc
import os
import pickle
import socket
import sys
import threading
import traceback
import warnings
from multiprocessing.connection import Connection
from pathlib import Path

from foundation.processes import end_with_parent

KNOWN_WARNINGS = (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
)
MESSAGE_SIZE = 65536


def main() -> None:
    """Import, say ready, then serve.

    ("fork", path of the stacks) with a descriptor is answered with a pid, ("reap", pid) with an exit code.
    """
    control = socket.socket(fileno=int(sys.argv[1]))
    _import_everything()
    control.send(pickle.dumps("ready"))
    while True:
        request, descriptors, _, _ = socket.recv_fds(control, MESSAGE_SIZE, maxfds=1)
        if not request:
            return  # pytest is gone; its workers get a signal when this process ends
        kind, value = pickle.loads(request)
        if kind == "fork":
            answer = _fork(control, descriptors[0], Path(value))
        else:
            answer = os.waitstatus_to_exitcode(os.waitpid(value, 0)[1])
        control.send(pickle.dumps(answer))


def _import_everything() -> None:
    for message in KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    from parallel.platform import install

    install()
    import megatron.core
    import megatron.core.dist_checkpointing
    import megatron.core.distributed
    import megatron.core.models.gpt
    import megatron.core.optimizer
    import megatron.core.pipeline_parallel.schedules  # noqa: F401

    from tests.ranks import worker  # noqa: F401

    threads = list(Path("/proc/self/task").iterdir())
    if len(threads) != 1:
        names = [thread.name for thread in threading.enumerate()]
        raise RuntimeError(
            f"importing torch and megatron.core left {len(threads)} threads running (of Python: {names}): "
            "a process with threads can't be forked safely"
        )
    # Objects made so far are never garbage: freezing keeps collections in workers quick and their memory shared.
    gc.collect()
    gc.freeze()


def _fork(control: socket.socket, descriptor: int, stacks: Path) -> int:
    """The pid of a new worker that talks over `descriptor`."""
    template = os.getpid()
    pid = os.fork()
    if pid:
        os.close(descriptor)
        return pid
    code = 1
    try:
        control.close()
        end_with_parent(template)
        from tests.ranks.worker import serve

        serve(Connection(descriptor), stacks)
        code = 0
    except BaseException:  # noqa: BLE001 - nothing may unwind into the template's loop
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
