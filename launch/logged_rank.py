"""An `orthant` command as one rank of torchrun or of a heterogeneous job: `python -m launch.logged_rank LOGS ...`.

What it says goes to LOGS/NODE-RANK.log, the name that srun gives where every rank is a task. torchrun's own files have
no node in their names, and begin anew when a job is requeued; srun itself miscounts the ranks of later components.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from pathlib import Path

from launch.cli import main


def write_to(log: Path) -> None:
    """From now on standard output and error of this process are appended to `log`."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


if __name__ == "__main__":
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    write_to(Path(sys.argv[1]) / f"{node}-{os.environ.get('RANK') or os.environ['SLURM_PROCID']}.log")
    code = main(sys.argv[2:])
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as in launch.__main__
    sys.exit(code)
