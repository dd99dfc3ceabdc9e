"""slurm/ppo.sbatch and slurm/ppo_hetjob.sbatch, roles on nodes of their own: they end where one machine ends, and go on
after a role was killed or stood still."""

from __future__ import annotations

import json
import os
import re
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
from tests.cluster.waiting import PATIENCE
from tests.launch.test_alignment import write_sets, write_tokenizer
from tests.launch.test_ppo import REWARD, decided, values
from training.survival.events import read_events
from training.survival.goodput import goodput

SCRIPTS = REPOSITORY / "slurm"
EACH = ("--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1", "--time=60")
TOGETHER = ("--nodes=2", *EACH[1:], "--nodelist=n1,n2", SCRIPTS / "ppo.sbatch")
APART = (*EACH, "--nodelist=n3", ":", *EACH, "--nodelist=n4", SCRIPTS / "ppo_hetjob.sbatch")
HURT_ONCE = """
import os, signal
from pathlib import Path
calls = []

def hurt(answers):
    calls.append(1)
    fault = Path(os.environ["FAULT"]) if "FAULT" in os.environ else None
    if len(calls) == 7 and fault is not None and not fault.exists():  # two groups an iteration: in the fourth
        fault.touch()
        os.kill(os.getpid(), getattr(signal, fault.name))
    return short(answers)
"""
ITERATIONS = 6


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    saved_model("llama3", tmp_path / "hf")
    write_tokenizer(tmp_path / "hf")
    write_sets(tmp_path)
    convert(tmp_path / "hf", tmp_path / "init", Form("distributed"))
    (tmp_path / "rewards.py").write_text(REWARD + HURT_ONCE)
    apart = {"stations": [["actor", "generation"], ["critic", "reference", "reward"]], "ranks": [1, 1]}
    reward = {"function": f"{tmp_path / 'rewards.py'}:hurt"}
    init = {"checkpoint": str(tmp_path / "init")}
    given = values(tmp_path, "run", ITERATIONS, placement=apart, init=init, reward=reward)
    (tmp_path / "ppo.yaml").write_text(
        yaml.safe_dump(given | {"checkpoint": {"interval": 1}, "watchdog": {"timeout_seconds": 8.0}})
    )
    return tmp_path


def metrics(folder: Path, run: str) -> list[dict[str, Any]]:
    path = folder / run / "metrics.jsonl"
    return decided([json.loads(line) for line in path.read_text().splitlines()]) if path.exists() else []


def test_roles_on_nodes_of_their_own_end_where_one_machine_ends_also_after_a_fault(
    cluster: Cluster, workplace: Path
) -> None:
    names = ("n1", "n2", "n3", "n4")
    before = [cluster.nodes[name].bytes_received() for name in names]
    jobs = {}
    for fault, options in (("SIGKILL", TOGETHER), ("SIGSTOP", APART)):
        given = {"ORTHANT_HOME": str(REPOSITORY), "ORTHANT_INTERFACE": "eth0", "FAULT": str(workplace / fault)}
        words = (*options, "ppo.yaml", f"run.folder={workplace / fault.lower()}")
        jobs[fault] = cluster.sbatch(*words, cwd=workplace, environment=given)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "launch", "ppo", "ppo.yaml", f"run.folder={workplace / 'here'}"],
        cwd=workplace,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    local = metrics(workplace, "here")
    assert len(local) == ITERATIONS
    for fault, number in jobs.items():
        job = cluster.wait(number, {"COMPLETED"})
        assert job.restarts == 1 and (workplace / fault).exists(), said(workplace)
        assert metrics(workplace, fault.lower()) == local
        nodes = ("n1", "n2") if fault == "SIGKILL" else ("n3", "n4")
        logs = {f"{node}-{rank}.log" for rank, node in enumerate(nodes)}
        assert logs <= {path.name for path in (workplace / "logs" / str(number)).iterdir()}
        found = goodput(read_events(workplace / fault.lower()))
        assert (found.lives, found.steps) == (2, ITERATIONS)
    after = [cluster.nodes[name].bytes_received() for name in names]
    assert all(now > then for now, then in zip(after, before, strict=True))
    hangs = [event for event in read_events(workplace / "sigstop") if event["event"] == "hang"]
    assert [event["culprits"] for event in hangs] == [[1]]
    log = (workplace / "logs" / str(jobs["SIGSTOP"]) / "n3-0.log").read_text()
    assert re.search(r"missing: rank 1 on n4: no sign of life for \d+ s; last seen in step [0-4], \w+", log), log
    assert "waiting: rank 0 in an exchange with rank 1 (critic, reference, reward)" in log
