"""A rank of a real run is stopped: the watchdog ends the run and names it; the same command goes on."""

from __future__ import annotations

import re
import signal
import socket
from pathlib import Path

import pytest

from tests.ranks.processes import is_alive
from tests.training.test_killed_rank import CONFIG, fault, finish, metrics, start, write_corpus
from training.survival.events import read_events
from training.survival.goodput import goodput

SETTINGS = "\nwatchdog: {timeout_seconds: 10.0}\n"
"""Many times what a part of a step takes here: a slow machine is no hang."""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_stopped_rank_is_named_and_the_run_goes_on(tmp_path: Path) -> None:
    config, folder = tmp_path / "config.yaml", tmp_path / "run"
    config.write_text("run: {folder: unused}\n" + CONFIG.replace("SOURCE", str(write_corpus(tmp_path))) + SETTINGS)
    code, said = finish(start(config, folder, fault(tmp_path / "fault", signal.SIGSTOP, 7)))
    assert code == 1, said
    stopped = re.search(rf"missing: rank 1 on {re.escape(socket.gethostname())}: its process (\d+) is stopped", said)
    assert stopped is not None, said
    assert "waiting: rank 0 in " in said and "run the same command again" in said
    assert "Traceback" not in said
    assert not is_alive(int(stopped[1]))
    hang = [event for event in read_events(folder) if event["event"] == "hang"]
    assert [event["culprits"] for event in hang] == [[1]] and hang[0]["step"] == 7 == len(metrics(folder)) + 1

    code, said = finish(start(config, folder))
    assert code == 0, said
    assert [line["step"] for line in metrics(folder)] == list(range(1, 31))
    found = goodput(read_events(folder))
    assert (found.lives, found.steps) == (2, 30) and found.lost > 9.0 and found.other < 0.1 * found.wall
