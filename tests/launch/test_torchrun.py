"""`launch.torchrun`: what torchrun is told on a node, and what becomes of signals. Whole runs: tests/cluster."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from foundation.errors import RequestError
from launch.torchrun import torchrun_arguments

ROOT = Path(__file__).resolve().parents[2]
TASK = {"SLURM_NODEID": "1", "SLURM_STEP_NUM_NODES": "3", "MASTER_ADDR": "n1", "MASTER_PORT": "10007"}


def test_torchrun_numbers_nodes_as_slurm_does() -> None:
    arguments = torchrun_arguments(4, "/logs", ["train", "my run.yaml"], TASK)
    assert arguments[:5] == [
        "--nnodes=3", "--node-rank=1", "--nproc-per-node=4", "--master-addr=n1", "--master-port=10007",
    ]  # fmt: skip
    assert arguments[-5:] == ["--module", "launch.logged_rank", "/logs", "train", "my run.yaml"]


@pytest.mark.parametrize("name", sorted(TASK))
def test_half_a_task_is_refused_by_name(name: str) -> None:
    with pytest.raises(RequestError, match=f"{name} is not set"):
        torchrun_arguments(4, "/logs", ["train"], {key: value for key, value in TASK.items() if key != name})


WITH_A_RANK = """
import signal, subprocess, sys
from launch.torchrun import pass_on
signal.signal(signal.SIGUSR1, pass_on)
rank = None
if {ranks}:
    code = "import signal; signal.signal(signal.SIGUSR1, lambda *_: exit(7)); print(1, flush=True); signal.pause()"
    rank = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    rank.stdout.readline()
signal.raise_signal(signal.SIGUSR1)
print("rank", rank.wait(), flush=True)
"""


def run(ranks: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITH_A_RANK.format(ranks=ranks)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)


def test_a_request_to_save_reaches_the_ranks() -> None:
    answer = run(1)
    assert (answer.returncode, answer.stdout) == (0, "rank 7\n"), answer.stderr


def test_a_request_that_comes_before_the_ranks_ends_the_node_so_that_the_job_knows() -> None:
    assert run(0).returncode == 128 + signal.SIGUSR1
