"""Work in a fork: what it sees, what it says, how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.ranks.processes import REPOSITORY
from training.checkpoint.forked import Forked


def test_it_sees_memory_as_it_was() -> None:
    values = [1, 2, 3]
    forked = Forked(lambda: (time.sleep(0.2), list(values))[1])
    values.append(4)
    assert not forked.done()
    assert forked.result() == [1, 2, 3]
    assert forked.done()


def test_an_answer_may_be_large() -> None:
    assert len(Forked(lambda: b"x" * 5_000_000).result()) == 5_000_000


def fail() -> None:
    raise OSError(28, "No space left on device", "/run/file")


def test_its_error_is_told() -> None:
    with pytest.raises(OSError, match=r"No space left on device: '/run/file'"):
        Forked(fail).result()
    with pytest.raises(OSError, match="ZeroDivisionError: integer division"):
        Forked(lambda: 1 // 0).result()


def test_a_killed_fork_is_an_error() -> None:
    with pytest.raises(OSError, match="killed by SIGKILL"):
        Forked(lambda: os.kill(os.getpid(), signal.SIGKILL)).result()


def test_signals_that_ask_the_run_to_stop_leave_it_alone() -> None:
    assert Forked(lambda: (os.kill(os.getpid(), signal.SIGTERM), "written")[1]).result() == "written"


def test_it_dies_with_its_parent(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, time\n"
        "from training.checkpoint.forked import Forked\n"
        "from pathlib import Path\n"
        "def work():\n"
        "    time.sleep(1)\n"
        "    Path(sys.argv[1]).write_text('written by an orphan')\n"
        "Forked(work)\n"
        "time.sleep(0.2)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    written = tmp_path / "written"
    command = [sys.executable, "-c", code, str(written)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    ended = subprocess.run(command, check=False, cwd=REPOSITORY, env=environment, timeout=60)
    assert ended.returncode == -signal.SIGKILL
    time.sleep(1.5)
    assert not written.exists()
