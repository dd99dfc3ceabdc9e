"""slurm/ppo.sbatch with roles on different nodes ends where one machine ends, and goes on after a role was killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from checkpoint_tools.convert import convert
from checkpoint_tools.planning import Form
from tests.checkpoint_tools.models import saved_model
from tests.cluster.cluster import Cluster
from tests.cluster.conftest import REPOSITORY
from tests.cluster.test_pretrain import said
from tests.launch.test_alignment import write_sets, write_tokenizer
from tests.launch.test_ppo import REWARD, decided, values

SCRIPT = REPOSITORY / "slurm" / "ppo.sbatch"
SIZE = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1", "--time=60", "--nodelist=n1,n2")
SECONDS = 240
DIES_ONCE = """
import os, signal
from pathlib import Path
calls = []

def dies(answers):
    calls.append(1)
    if len(calls) == 7 and not Path({folder!r}, "dead").exists():  # two groups an iteration: in the fourth
        Path({folder!r}, "dead").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return short(answers)
"""
ITERATIONS = 6


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    saved_model("llama3", tmp_path / "hf")
    write_tokenizer(tmp_path / "hf")
    write_sets(tmp_path)
    convert(tmp_path / "hf", tmp_path / "init", Form("distributed"))
    (tmp_path / "rewards.py").write_text(REWARD + DIES_ONCE.format(folder=str(tmp_path)))
    apart = {"stations": [["actor", "generation"], ["critic", "reference", "reward"]], "ranks": [1, 1]}
    reward = {"function": f"{tmp_path / 'rewards.py'}:dies"}
    init = {"checkpoint": str(tmp_path / "init")}
    given = values(tmp_path, "run", ITERATIONS, placement=apart, init=init, reward=reward)
    (tmp_path / "ppo.yaml").write_text(yaml.safe_dump(given | {"checkpoint": {"interval": 1}}))
    return tmp_path


def metrics(folder: Path, run: str) -> list[dict[str, Any]]:
    path = folder / run / "metrics.jsonl"
    return decided([json.loads(line) for line in path.read_text().splitlines()]) if path.exists() else []


@pytest.mark.timeout(2 * SECONDS)
def test_roles_on_two_nodes_end_where_one_machine_ends_also_after_a_kill(cluster: Cluster, workplace: Path) -> None:
    environment = {"ORTHANT_HOME": str(REPOSITORY), "ORTHANT_INTERFACE": "eth0"}
    before = [cluster.nodes[name].bytes_received() for name in ("n1", "n2")]
    number = cluster.sbatch(*SIZE, SCRIPT, "ppo.yaml", cwd=workplace, environment=environment)
    job = cluster.wait(number, {"COMPLETED"}, seconds=SECONDS)
    assert job.restarts == 1 and (workplace / "dead").exists(), said(workplace)
    after = [cluster.nodes[name].bytes_received() for name in ("n1", "n2")]
    assert all(now > then for now, then in zip(after, before, strict=True))
    done = subprocess.run(
        [sys.executable, "-P", "-m", "launch", "ppo", "ppo.yaml", f"run.folder={workplace / 'here'}"],
        cwd=workplace,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    local = metrics(workplace, "here")
    assert len(local) == ITERATIONS and metrics(workplace, "run") == local
