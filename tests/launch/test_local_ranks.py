"""Ranks that a command starts itself: a request to save reaches them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.multiprocessing.errors.error_handler import ErrorHandler

from foundation.errors import FaultError, LostRankError
from launch.local_ranks import _pass_on, _what_a_rank_said

ROOT = Path(__file__).resolve().parents[2]

RANK = """
import os, signal, sys
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(7))
signal.alarm(400)  # nobody else ends it where its launcher died
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
        end = time.monotonic() + 300
        while len(list(tmp_path.glob("begun-*"))) < 2 and time.monotonic() < end:
            time.sleep(0.05)
        command.send_signal(signal.SIGUSR1)
        command.wait(300)
    finally:
        command.kill()
        command.wait()
    said = (tmp_path / "said").read_text()
    assert command.returncode == 1 and "failed" in said, said
    assert "SIGUSR1" not in said  # no rank died of it
    assert not list((tmp_path / "tmp").glob("*elastic*")) and not list((tmp_path / "tmp").glob("orthant-*"))


def test_a_request_that_comes_before_the_ranks_ends_the_command(tmp_path: Path) -> None:
    answer = subprocess.run([sys.executable, "-c", ALONE], cwd=ROOT, timeout=300, check=False)
    assert answer.returncode == 128 + signal.SIGUSR1


def test_ctrl_c_is_told_as_such_whoever_has_it_first() -> None:
    failure = SimpleNamespace(exitcode=-signal.SIGINT, message="Signal 2 received")
    said = _what_a_rank_said(SimpleNamespace(get_first_failure=lambda: (1, failure)), "run it again")
    assert said.exit_code == 130 and str(said) == "stopped by Ctrl-C\n  do: run it again"
    failure.exitcode = -signal.SIGKILL
    said = _what_a_rank_said(SimpleNamespace(get_first_failure=lambda: (1, failure)), "run it again")
    assert said.exit_code == 1 and "rank 1 was ended by SIGKILL" in str(said)


@pytest.mark.parametrize(
    ("code", "recorded", "said"),
    [
        (2, "RequestError: metrics.jsonl is damaged\n  where: line 1", "metrics.jsonl is damaged\n  where: line 1"),
        (2, "ConfigErrors: 2 settings are refused", "2 settings are refused"),
        (1, "WorkError: no disk", "rank 1 failed: no disk"),
        (1, "ValueError: nobody foresaw it", "rank 1 failed: ValueError: nobody foresaw it"),
    ],
)
def test_our_own_errors_come_without_the_names_of_their_classes(code: int, recorded: str, said: str) -> None:
    failure = SimpleNamespace(exitcode=code, message={"message": recorded})
    error = _what_a_rank_said(SimpleNamespace(get_first_failure=lambda: (1, failure)), "run it again")
    assert (error.exit_code, str(error)) == (code, said)


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


@pytest.fixture
def failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ProcessFailure]:
    """(exit code, time, error) -> what torch's launcher has of a rank that recorded the error then, or left nothing."""

    def record(exit_code: int, at: float, said: BaseException | None = None) -> ProcessFailure:
        monkeypatch.setattr("time.time", lambda: at)
        file = tmp_path / f"error-{exit_code}-{at}.json"
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
        if said is not None:
            ErrorHandler().record_exception(said)
        return ProcessFailure(0, 1, exit_code, str(file))

    return record


def test_a_killed_rank_is_named_although_another_had_recorded_that_it_lost_it(
    failed: Callable[..., ProcessFailure],
) -> None:
    """Torch knows whole seconds: to it what was recorded at 9.98 s came before a death that it saw at 10.02 s."""
    lost = failed(75, 9.98, LostRankError("rank 0 on n1 lost another rank in step 8, optimizer"))
    hangs = failed(75, 10.0, FaultError("rank 3 ends: the run hangs in step 8"))
    killed, ended = failed(-signal.SIGKILL, 10.02), failed(-signal.SIGTERM, 10.5)
    for failures, says in (
        ({1: killed, 0: lost, 2: ended}, "rank 1 was ended by SIGKILL"),
        ({0: lost, 2: ended, 3: hangs}, "rank 3 failed: rank 3 ends: the run hangs"),
        ({0: lost, 2: ended}, "rank 0 failed: rank 0 on n1 lost another rank"),
        ({3: hangs, 1: failed(-signal.SIGKILL, 11.0)}, "the run hangs"),  # the watchdog's doing
    ):
        said = _what_a_rank_said(ChildFailedError("command", failures), "run it again")
        assert says in str(said) and said.exit_code == 1


def test_a_rank_that_begins_answers_ctrl_c_without_a_traceback() -> None:
    script = (
        "import os, signal\nfrom launch.rank import let_ctrl_c_end_this\nlet_ctrl_c_end_this()\n"
        "os.kill(os.getpid(), signal.SIGINT)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert (answer.returncode, answer.stderr) == (-signal.SIGINT, "")
