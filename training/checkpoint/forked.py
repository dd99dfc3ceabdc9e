"""Work in a copy of this process while this one goes on."""

from __future__ import annotations

import gc
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch

from foundation.processes import end_with_parent
from training.stopping import STOP_SIGNALS


class Forked:
    """A function at work in a fork: it sees memory as it was when it was forked, whatever this process does later.

    The fork dies with its parent, so that nobody writes into a run that a new process has taken over. It may use
    neither the GPU nor process groups.
    """

    def __init__(self, work: Callable[[], Any]) -> None:
        self._answer = os.memfd_create("answer")
        self._status: int | None = None
        parent = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        self._pid = os.fork()
        if self._pid == 0:
            self._work_and_end(work, parent)

    def _work_and_end(self, work: Callable[[], Any], parent: int) -> None:
        """Never returns: what the parent does at its end is not the fork's to do."""
        code = 1
        try:
            end_with_parent(parent)
            torch.set_num_threads(1)  # the parent's other threads are not here, and OpenMP would wait for them
            gc.disable()  # a collection would free what belongs to the parent: on a GPU that fails
            for number in STOP_SIGNALS:
                signal.signal(number, signal.SIG_IGN)  # the parent decides when to stop
            with os.fdopen(self._answer, "wb") as answer:
                pickle.dump(_outcome(work), answer)
            code = 0
        finally:
            os._exit(code)

    def done(self) -> bool:
        """Whether it has ended, well or not."""
        if self._status is None:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            self._status = status if pid else None
        return self._status is not None

    def result(self) -> Any:
        """What the function returned; waits for it.

        Raises:
            OSError: the function raised, or the fork was killed.
        """
        if self._status is None:
            self._status = os.waitpid(self._pid, 0)[1]
        with os.fdopen(self._answer, "rb") as answer:
            answer.seek(0)
            written = answer.read()
        if self._status != 0:
            code = os.waitstatus_to_exitcode(self._status)
            ended = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            raise OSError(f"the process that writes in the background {ended}")
        value, error = pickle.loads(written)  # our own memory: nobody else can write there
        if error is not None:
            raise OSError(error)
        return value


def _outcome(work: Callable[[], Any]) -> tuple[Any, str | None]:
    """What `work` returns, or what it says when it fails."""
    try:
        return work(), None
    except OSError as error:
        return None, str(error)
    except Exception as error:  # noqa: BLE001  (told to the parent, which raises it)
        traceback.print_exc()
        return None, f"{type(error).__name__}: {error}"
