"""Ranks that a command starts itself: a request to save reaches them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from launch.local_ranks import _pass_on, _what_a_rank_said

ROOT = Path(__file__).resolve().parents[2]

RANK = """
import os, signal, sys
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(7))
signal.alarm(40)  # nobody else ends it where its launcher died
open(f"begun-{os.environ['RANK']}", "w").close()
while True:
    signal.pause()
"""
COMMAND = "from launch.local_ranks import run_ranks; run_ranks(2, 'a_rank', cure='none')"
ALONE = """
import signal
from launch.local_ranks import usr1_reaches_ranks
with usr1_reaches_ranks():
    signal.raise_signal(signal.SIGUSR1)
"""


def test_a_request_to_save_reaches_every_rank(tmp_path: Path) -> None:
    (tmp_path / "a_rank.py").write_text(RANK)
    (tmp_path / "tmp").mkdir()
    own = {"PYTHONPATH": f"{ROOT}:{tmp_path}", "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path / "tmp")}
    environment = {**os.environ, **own}
    with open(tmp_path / "said", "w") as log:
        command = subprocess.Popen([sys.executable, "-c", COMMAND], cwd=tmp_path, env=environment, stderr=log)
    try:
        end = time.monotonic() + 60
        while len(list(tmp_path.glob("begun-*"))) < 2 and time.monotonic() < end:
            time.sleep(0.05)
        command.send_signal(signal.SIGUSR1)
        command.wait(60)
    finally:
        command.kill()
        command.wait()
    said = (tmp_path / "said").read_text()
    assert command.returncode == 1 and "failed" in said, said
    assert "SIGUSR1" not in said  # no rank died of it
    assert not list((tmp_path / "tmp").glob("*elastic*")) and not list((tmp_path / "tmp").glob("orthant-*"))


def test_a_request_that_comes_before_the_ranks_ends_the_command(tmp_path: Path) -> None:
    answer = subprocess.run([sys.executable, "-c", ALONE], cwd=ROOT, timeout=60, check=False)
    assert answer.returncode == 128 + signal.SIGUSR1


def test_ctrl_c_is_told_as_such_whoever_has_it_first() -> None:
    failure = SimpleNamespace(exitcode=-signal.SIGINT, message="Signal 2 received")
    said = _what_a_rank_said(SimpleNamespace(get_first_failure=lambda: (1, failure)), "run it again")
    assert said.exit_code == 130 and str(said) == "stopped by Ctrl-C\n  do: run it again"
    failure.exitcode = -signal.SIGKILL
    said = _what_a_rank_said(SimpleNamespace(get_first_failure=lambda: (1, failure)), "run it again")
    assert said.exit_code == 1 and "rank 1 was ended by SIGKILL" in str(said)


def test_a_signal_without_a_name_is_told_by_its_number() -> None:
    failure = SimpleNamespace(exitcode=-(signal.SIGRTMIN + 1), message="")
    said = _what_a_rank_said(SimpleNamespace(get_first_failure=lambda: (1, failure)), "run it again")
    assert said.exit_code == 1 and f"rank 1 was ended by signal {signal.SIGRTMIN + 1}" in str(said)


def test_a_request_to_save_passes_over_a_rank_that_has_just_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []

    class Ended:
        def send_signal(self, _number: int) -> None:
            raise psutil.NoSuchProcess(1)

    ranks = [Ended(), SimpleNamespace(send_signal=sent.append)]
    monkeypatch.setattr("launch.local_ranks.psutil.Process", lambda: SimpleNamespace(children=lambda: ranks))
    _pass_on(signal.SIGUSR1, None)
    assert sent == [signal.SIGUSR1]


def test_a_rank_that_begins_answers_ctrl_c_without_a_traceback() -> None:
    script = (
        "import os, signal\nfrom launch.rank import let_ctrl_c_end_this\nlet_ctrl_c_end_this()\n"
        "os.kill(os.getpid(), signal.SIGINT)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (answer.returncode, answer.stderr) == (-signal.SIGINT, "")
