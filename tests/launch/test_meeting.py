"""Ranks that were started together come to the job that rank 0 wrote, and to no other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from foundation.errors import FaultError
from launch.life import same_job
from launch.meeting import START, job_of_rank_0, start_key
from launch.world import World
from tests.ranks.processes import REPOSITORY

CONFIG = {"training": {"seed": 1}}


def write_job(folder: Path, key: str, config: object) -> Path:
    (folder / "job.json").write_text(json.dumps({START: key, "config": config}))
    return folder / "job.json"


def test_rank_0_prepares_and_the_others_wait_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    write_job(tmp_path, "SLURM_RESTART_COUNT=0", CONFIG)  # of the life before
    found: list[Path] = []
    waiting = threading.Thread(
        target=lambda: found.append(job_of_rank_0(World(1, 2, 1), tmp_path, CONFIG, lambda: Path("nobody")))
    )
    waiting.start()
    time.sleep(0.3)
    assert not found
    write_job(tmp_path, start_key(), {"training": {"seed": 2}})  # another configuration
    time.sleep(0.3)
    assert not found
    written = job_of_rank_0(World(0, 2, 0), tmp_path, CONFIG, lambda: write_job(tmp_path, start_key(), CONFIG))
    waiting.join(300)
    assert found == [written]


def test_a_rank_that_read_the_job_of_an_earlier_start_does_not_go_on_with_it() -> None:
    """torchrun by hand gives every start the same key: rank 1 may read what lies there before rank 0 has written."""
    told: list[tuple[int, str]] = []
    same_job({"prepared": {"train_prefixes": ["new"]}}, World(0, 2, 0), lambda ask: told.append(ask()) or told[0])

    def by_rank_0(_ask: object) -> tuple[int, str]:
        return told[0]

    same_job({"prepared": {"train_prefixes": ["new"]}}, World(1, 2, 1), by_rank_0)
    with pytest.raises(FaultError, match="rank 1 has read the job of an earlier start"):
        same_job({"prepared": {"train_prefixes": ["old"]}}, World(1, 2, 1), by_rank_0)


def test_starts_differ_by_what_launchers_set() -> None:
    first = {"SLURM_JOB_ID": "7", "MASTER_PORT": "1", "HOME": "/a"}
    assert start_key(first) == start_key(first | {"HOME": "/b"})
    for change in ({"SLURM_RESTART_COUNT": "1"}, {"MASTER_PORT": "2"}, {"SLURM_JOB_ID": "8"}):
        assert start_key(first) != start_key(first | change)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_before_the_first_step_is_a_fault(number: signal.Signals) -> None:
    code = "from launch.meeting import *; stop_before_the_first_step(); print('ready', flush=True); time.sleep(60)"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 75 and f"stopped by {number.name} before the first step" in said
