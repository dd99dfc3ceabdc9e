"""`launch.torchrun`: what torchrun is told on a node. Whole runs of it: tests/cluster."""

from __future__ import annotations

import pytest

from foundation.errors import RequestError
from launch.torchrun import torchrun_arguments

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
