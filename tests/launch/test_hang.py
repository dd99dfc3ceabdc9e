"""A rank of a real run is stopped: the watchdog ends the run and names it; the same command goes on."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.training.test_killed_rank import CONFIG, finish, metrics, rank_processes, start, write_corpus
from training.survival.events import read_events
from training.survival.goodput import goodput

SETTINGS = "\nwatchdog: {timeout_seconds: 3.0}\n"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_stopped_rank_is_named_and_the_run_goes_on(tmp_path: Path) -> None:
    config, folder = tmp_path / "config.yaml", tmp_path / "run"
    config.write_text("run: {folder: unused}\n" + CONFIG.replace("SOURCE", str(write_corpus(tmp_path))) + SETTINGS)
    process = start(config, folder)
    while len(metrics(folder)) < 6 and process.poll() is None:
        pass
    second = rank_processes(process.pid)[1]
    second.send_signal(signal.SIGSTOP)
    code, said = finish(process)
    assert code == 1, said
    assert f"missing: rank 1 on {_node()}: its process {second.pid} is stopped" in said
    assert "waiting: rank 0 in " in said and "run the same command again" in said
    assert "Traceback" not in said
    assert not second.is_running()
    hang = [event for event in read_events(folder) if event["event"] == "hang"]
    assert [event["culprits"] for event in hang] == [[1]] and hang[0]["step"] == len(metrics(folder)) + 1

    code, said = finish(start(config, folder))
    assert code == 0, said
    assert [line["step"] for line in metrics(folder)] == list(range(1, 31))
    found = goodput(read_events(folder))
    assert (found.lives, found.steps) == (2, 30) and found.lost > 2.0 and found.other < 0.1 * found.wall


def _node() -> str:
    import socket

    return socket.gethostname()
