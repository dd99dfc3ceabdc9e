"""Processes that do not outlive whoever started them."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
from collections.abc import Sequence

PR_SET_PDEATHSIG = 1
"""Of prctl(2)."""
_LIBC = ctypes.CDLL(None)  # opened before any fork: another thread may hold the loader's lock while one is made


def end_with_parent(parent: int) -> None:
    """Have the kernel kill this fork when its parent ends, however that goes; end now where it has ended already.

    The kernel watches the thread that forked: it has to live as long as the fork is wanted.

    Args:
        parent: its process id, asked for before the fork.
    """
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def run_to_its_end(command: Sequence[str]) -> int:
    """The exit code of a command that answers Ctrl-C itself. It is waited for then too.

    `subprocess.run` would kill it a quarter of a second later, however much it has to save.
    """
    with subprocess.Popen(command) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.wait()
            raise
