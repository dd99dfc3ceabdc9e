"""Layouts whose ranks lie on two nodes do what they do on one machine: context and expert parallel in bf16, ZeRO 3."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.cluster.cluster import Cluster
from tests.cluster.conftest import REPOSITORY
from tests.cluster.test_pretrain import SCRIPT, metrics, said
from tests.cluster.waiting import PATIENCE

CONFIG = REPOSITORY / "configs" / "tiny.yaml"
STEPS = 6
SIZE = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1", "--time=60")
LAYOUTS = {
    "experts": (
        "parallel.context_parallel_size=2",
        "parallel.expert_model_parallel_size=2",
        "model.num_experts=4",
        "model.moe_router_topk=2",
        "training.precision=bf16",
    ),
    "zero3": ("parallel.data_parallel_size=2", "parallel.zero_stage=3"),
}
NODES = {"experts": "n1,n2", "zero3": "n3,n4"}


def test_ranks_on_two_nodes_do_what_ranks_of_one_machine_do(cluster: Cluster, tmp_path: Path) -> None:
    environment = {"ORTHANT_HOME": str(REPOSITORY), "ORTHANT_INTERFACE": "eth0"}
    jobs = {}
    for name, settings in LAYOUTS.items():
        (tmp_path / name).mkdir()
        size = (*SIZE, f"--nodelist={NODES[name]}")
        words = (SCRIPT, CONFIG, "run.folder=run", *settings)
        jobs[name] = cluster.sbatch(*size, *words, cwd=tmp_path / name, environment=environment)
    for name, number in jobs.items():
        job = cluster.wait(number)
        assert (job.state, job.exit_code) == ("COMPLETED", 0), said(tmp_path / name)
        logs = {path.name for path in (tmp_path / name / "logs" / str(number)).glob("n*.log")}
        one, other = NODES[name].split(",")
        assert logs == {f"{one}-0.log", f"{other}-1.log"}
        assert len(metrics(tmp_path / name, "run")) == STEPS
        here = tmp_path / name / "here"
        assert metrics(tmp_path / name, "run") == metrics(train(here, *LAYOUTS[name]), ""), name


def train(folder: Path, *settings: str) -> Path:
    """The same run by ranks that `orthant train` starts on this machine; its folder."""
    command = [sys.executable, "-P", "-m", "launch", "train", str(CONFIG), f"run.folder={folder}", *settings]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, timeout=PATIENCE, check=True, stdout=subprocess.DEVNULL)
    return folder
