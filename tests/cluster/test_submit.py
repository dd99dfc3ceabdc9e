"""`orthant submit` asks a real Slurm before it submits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.cluster.cluster import Cluster
from tests.cluster.conftest import REPOSITORY
from tests.launch.refusals import BASE


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(BASE, sort_keys=False))
    (tmp_path / "corpus.txt").write_text("A corpus.\n")
    return tmp_path


def submit(cluster: Cluster, workplace: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = (sys.executable, "-P", "-m", "launch", "submit", "run.yaml", "--dry-run", *words)
    return cluster.controller.run(*command, cwd=workplace, environment={"PYTHONPATH": str(REPOSITORY)}, check=False)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--nodes", "2", "--gpus-per-node", "3", "training.global_batch_size=12"], "the 2 GPUs of a node of"),
        (["--nodes", "8", "--gpus-per-node", "2", "training.global_batch_size=16"], "is at most 4"),
        (["--nodes", "2", "--gpus-per-node", "2", "--partition", "gpu"], "partitions are all, spot, urgent"),
        (["--nodes", "2", "--gpus-per-node", "2", "--partition", "spot", "--time", "2:00:00"], "MaxTime 1:00:00"),
        (["--nodes", "2", "--gpus-per-node", "2", "--cpus-per-rank", "3"], "a node of partition all has 4"),
        (["--nodes", "3", "--gpus-per-node", "2"], "is a multiple of training.micro_batch_size x replicas"),
    ],
    ids=["GPUs", "nodes", "partition", "time", "CPUs", "batch"],
)  # fmt: skip
def test_what_this_slurm_would_not_run_is_refused(
    cluster: Cluster, workplace: Path, words: list[str], says: str
) -> None:
    answer = submit(cluster, workplace, *words)
    assert answer.returncode == 2 and answer.stdout == "", answer.stderr
    assert says in answer.stderr and "cure: " in answer.stderr


def test_what_it_would_run_is_rendered_for_its_nodes(cluster: Cluster, workplace: Path) -> None:
    answer = submit(cluster, workplace, "--nodes", "4", "--gpus-per-node", "2")
    assert answer.returncode == 0, answer.stderr
    assert "partition all: 4 nodes with 2 GPUs or more; no time limit" in answer.stderr
    assert "#SBATCH --cpus-per-task=2\n" in answer.stdout  # a node has four
