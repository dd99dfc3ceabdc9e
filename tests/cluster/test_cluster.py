"""The cluster itself: separate machines, their faults, and nothing left behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.conftest import REPOSITORY
from tests.cluster.waiting import PATIENCE, ClusterError, wait_until


def interfaces_here() -> set[str]:
    return {line.split(":")[0].strip() for line in Path("/proc/net/dev").read_text().splitlines()[2:]}


def own_namespaces() -> set[str]:
    return {str(path.readlink()) for path in Path("/proc/self/ns").iterdir()}


def namespaces_in_use() -> set[str]:
    """Of all processes."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/ns/*"):
        try:
            found.add(str(link.readlink()))
        except OSError:
            continue  # the process has ended meanwhile
    return found


def script(folder: Path, text: str) -> Path:
    path = folder / "job.sh"
    path.write_text(f"#!/bin/bash\n{text}\n")
    return path


def test_every_node_is_a_machine_of_its_own(cluster: Cluster, tmp_path: Path) -> None:
    said = cluster.controller.run("srun", "--nodes=4", "hostname").stdout.split()
    assert sorted(said) == ["n1", "n2", "n3", "n4"]
    machines = [cluster.controller, *cluster.nodes.values()]
    seen = own_namespaces()
    for machine in machines:
        namespaces = machine.namespaces()
        assert len(namespaces) == 5 and not namespaces & seen
        seen |= namespaces
        assert machine.run("ip", "route", "show", "default").stdout == ""
        machine.run("sh", "-c", f"echo {machine.name} >/tmp/mine; echo {machine.name} >{tmp_path}/{machine.name}")
    for machine in machines:
        assert machine.run("cat", "/tmp/mine").stdout.strip() == machine.name
        assert len(machine.run("ls", str(tmp_path)).stdout.split()) == 5
    assert not {"switch", "port1"} & interfaces_here()


def test_slurm_counts_gpus_and_shows_them_to_jobs(cluster: Cluster) -> None:
    show = ("bash", "-c", "echo $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES")
    said = cluster.controller.run("srun", "--nodes=2", "--gpus-per-node=2", *show).stdout.splitlines()
    assert len(set(said)) == 2 and all(re.fullmatch("n[1-4] 0,1", line) for line in said), said
    with pytest.raises(ClusterError, match="Requested node configuration is not available"):
        cluster.controller.run("srun", "--gpus-per-node=3", "true")


def test_nodes_that_crash_or_lose_their_cable_are_missed_and_come_back(cluster: Cluster, tmp_path: Path) -> None:
    file = script(tmp_path, "touch begun\nsleep 300")
    job = cluster.sbatch("--nodes=1", "--nodelist=n3", "--no-requeue", file, cwd=tmp_path)
    wait_until("the job runs", (tmp_path / "begun").exists)
    cluster.crash("n3")
    cluster.unplug("n4")
    with pytest.raises(ClusterError, match="n3 is off"):
        cluster.nodes["n3"].run("true")
    assert cluster.nodes["n4"].run("true").returncode == 0
    cluster.wait_missed("n3", "n4")
    assert cluster.wait(job).state == "NODE_FAIL"
    cluster.boot("n3")
    cluster.plug("n4")
    cluster.report_in("n4")
    cluster.wait_idle()


def test_a_job_outlives_slurmd(cluster: Cluster, tmp_path: Path) -> None:
    file = script(tmp_path, "srun bash -c 'until [[ -e go ]]; do echo >>ticks-$SLURM_PROCID; sleep 0.1; done'")
    job = cluster.sbatch("--nodes=2", "--nodelist=n1,n2", file, cwd=tmp_path)
    ticks = [tmp_path / "ticks-0", tmp_path / "ticks-1"]
    wait_until("both tasks run", lambda: all(file.exists() for file in ticks))
    cluster.kill_slurmd("n2")
    before = ticks[1].stat().st_size
    # Not for long: ten seconds without slurmd and Slurm takes the node for lost.
    wait_until("the task there goes on without it", lambda: ticks[1].stat().st_size > before)
    cluster.start_slurmd("n2")
    (tmp_path / "go").touch()
    ended = cluster.wait(job)
    assert (ended.state, ended.restarts) == ("COMPLETED", 0)


def test_a_job_that_ends_otherwise_than_awaited_is_told_at_once(cluster: Cluster) -> None:
    job = cluster.sbatch("--wrap=exit 3")
    with pytest.raises(ClusterError, match="FAILED"):
        cluster.wait(job, {"COMPLETED"})
    ended = cluster.wait(job)
    assert (ended.state, ended.exit_code, ended.restarts) == ("FAILED", 3, 0)


OWNER = """
import json, sys
from pathlib import Path
from tests.cluster.cluster import Cluster
from tests.cluster.slurm_config import Shape

with Cluster(Path(sys.argv[1]), Shape(nodes=1)) as cluster:
    cluster.sbatch("--wrap=sleep 300")
    machines = (cluster.controller, *cluster.nodes.values())
    print(json.dumps(sorted(name for machine in machines for name in machine.namespaces())), flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
@pytest.mark.parametrize("end", ["is closed", "is killed"])
def test_nothing_stays_of_a_cluster_that(end: str, tmp_path: Path) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-P", "-c", OWNER, str(tmp_path / "cluster")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert owner.stdout is not None
    with owner:
        namespaces = set(json.loads(owner.stdout.readline()))
        assert len(namespaces) == 10 and namespaces <= namespaces_in_use()
        if end == "is killed":
            owner.kill()
    assert owner.returncode == (-9 if end == "is killed" else 0)
    wait_until("every process is gone", lambda: not namespaces & namespaces_in_use())
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()


def test_a_shell_on_the_login_node_sees_idle_nodes_and_the_checkout() -> None:
    command = [sys.executable, "-m", "tests.cluster.shell", "sh", "-c", "sinfo -h -p all -o '%D %t' && pwd"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}  # PYTHONSAFEPATH may keep the working folder out
    said = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert said.returncode == 0, said.stderr
    assert said.stdout.splitlines() == ["4 idle", str(REPOSITORY)]
