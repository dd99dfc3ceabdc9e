"""Work in a fork: what it sees, what it says, how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.ranks.processes import REPOSITORY
from training.checkpoint.forked import Forked


def test_it_sees_memory_as_it_was() -> None:
    values = [1, 2, 3]
    reading, writing = os.pipe()
    forked = Forked(lambda: (os.read(reading, 1), list(values))[1])
    values.append(4)
    assert not forked.done()
    os.write(writing, b"!")
    assert forked.result() == [1, 2, 3]
    assert forked.done()


def test_it_computes_alone_where_its_parent_has_threads() -> None:
    """OpenMP would wait for threads that a fork does not have: it would never end."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        values = torch.ones(1 << 20)
        values.exp().sum()
        forked = Forked(lambda: (torch.get_num_threads(), float((values + values).sum())))
        begun = time.monotonic()
        while not forked.done():
            assert time.monotonic() - begun < 60, os.kill(forked._pid, signal.SIGKILL)
            time.sleep(0.01)
        assert forked.result() == (1, 2.0 * (1 << 20)) and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


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


@pytest.mark.parametrize("begun", [True, False])
def test_it_dies_with_its_parent(tmp_path: Path, begun: bool) -> None:
    """Whether or not its work had begun when the parent died. Until it has ended, it holds standard output open."""
    code = (
        "import os, signal, sys, time\n"
        "from training.checkpoint.forked import Forked\n"
        "from pathlib import Path\n"
        "parent, (reading, writing) = os.getpid(), os.pipe()\n"
        "def work():\n"
        "    os.write(writing, b'!')\n"
        "    while os.getppid() == parent:\n"
        "        time.sleep(0.01)\n"
        "    time.sleep(0.5)  # the kernel's signal comes with the new parent\n"
        "    Path(sys.argv[1]).write_text('written by an orphan')\n"
        "Forked(work)\n"
        "sys.argv[2] == 'False' or os.read(reading, 1)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    written = tmp_path / "written"
    command = [sys.executable, "-c", code, str(written), str(begun)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    ended = subprocess.run(command, capture_output=True, check=False, cwd=REPOSITORY, env=environment, timeout=300)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert not written.exists()
