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
from typing import Any

import pytest

from foundation.errors import ConfigError
from launch.meeting import job_of_rank_0, start_key
from launch.roll_call import RollCall
from launch.world import World
from tests.ranks.processes import REPOSITORY

CONFIG: dict[str, Any] = {"training": {"seed": 1}}


OF_AN_EARLIER_VERSION = {"config": CONFIG}
"""Without what ranks of this one read: `beginning`, for one."""


def write_job(folder: Path, job: object) -> Path:
    (folder / "job.json").write_text(json.dumps(job))
    return folder / "job.json"


@pytest.mark.usefixtures("meeting_point")
def test_rank_0_prepares_and_the_others_wait_for_it(tmp_path: Path) -> None:
    """torchrun by hand gives every start the same environment, and the same configuration may be started again."""
    earlier = write_job(tmp_path, OF_AN_EARLIER_VERSION)
    found: list[tuple[Path, str]] = []

    def wait() -> None:
        with RollCall(World(1, 2, 1)) as call:
            path = job_of_rank_0(World(1, 2, 1), tmp_path, CONFIG, lambda: Path("nobody"), call)
            found.append((path, path.read_text()))

    waiting = threading.Thread(target=wait)
    waiting.start()
    with RollCall(World(0, 2, 0)) as call:
        call.announce("of another file")  # one that this node does not see yet
        time.sleep(0.5)
        assert not found
        written = {"config": CONFIG, "beginning": None}
        path = job_of_rank_0(World(0, 2, 0), tmp_path, CONFIG, lambda: write_job(tmp_path, written), call)
        waiting.join(300)
    assert path == earlier and found == [(path, json.dumps(written))]


@pytest.mark.usefixtures("meeting_point")
def test_a_rank_that_has_read_another_configuration_is_refused(tmp_path: Path) -> None:
    with RollCall(World(0, 2, 0)) as call:
        job_of_rank_0(World(0, 2, 0), tmp_path, CONFIG, lambda: write_job(tmp_path, OF_AN_EARLIER_VERSION), call)
        with RollCall(World(1, 2, 1), patience_seconds=0.0) as other, pytest.raises(ConfigError) as refused:
            job_of_rank_0(World(1, 2, 1), tmp_path, {"training": {"seed": 2}}, lambda: Path("nobody"), other)
    assert str(refused.value).startswith(
        "training.seed = 2 is refused\n  rule: is the same on all ranks, and rank 1 on "
    )
    assert "rank 0, which has 1\n" in str(refused.value)


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
