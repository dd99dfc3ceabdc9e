"""slurm/pretrain.sbatch beside stand-ins for Slurm's tools: what it refuses, asks for and hands to srun."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import pytest

from tests.cluster.conftest import REPOSITORY
from tests.cluster.test_pretrain_script import SCRIPT
from tests.cluster.waiting import PATIENCE

CONVERT = REPOSITORY / "slurm" / "convert.sbatch"
ASKED = {
    "srun": 'trap "exit 143" TERM; kill -USR1 "$PPID"; while :; do sleep 0.05; done',
    "scontrol": 'echo "$@" >>asked',
}
"""A step whose job is asked to stop as soon as it runs, and which ends then."""


def outside_slurm(
    workplace: Path,
    arguments: Sequence[str] = ("my run.yaml",),
    stubs: Mapping[str, str] = MappingProxyType({}),
    script: Path = SCRIPT,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """The script with an `srun` that shows its arguments, one a line, or with `stubs` of its own."""
    tools = workplace / "tools"
    tools.mkdir(exist_ok=True)
    usual = {
        "srun": 'printf "%s\\n" "$@"; echo "gloo=${GLOO_SOCKET_IFNAME:-} nccl=${NCCL_SOCKET_IFNAME:-}"',
        "scontrol": "echo n1; echo n2",
        "getent": '[[ $2 == n1 ]] && echo "${OWN_ADDRESS:-10.0.0.1} n1" || echo "10.0.0.2 n2"',
        "ip": '[[ -n ${NO_ROUTE:-} ]] || echo "$4 dev eth7 src 10.0.0.1 uid 0"',
    }
    for name, text in {**usual, **stubs}.items():
        (tools / name).write_text(f"#!/bin/bash\n{text}\n")
        (tools / name).chmod(0o755)
    given = {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "31234",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_SUBMIT_DIR": str(workplace),
        "ORTHANT_HOME": str(REPOSITORY),
        **environment,
    }
    return subprocess.run(
        ["bash", str(script), *arguments],
        cwd=workplace,
        env=given,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "environment", "says"),
    [
        ([], {}, "no configuration given"),
        (["nowhere.yaml"], {}, "nowhere.yaml does not exist"),
        (["my run.yaml"], {"ORTHANT_HOME": ""}, "is not a checkout of Orthant"),
        (["my run.yaml"], {"ORTHANT_PYTHON": "/nowhere/python"}, "/nowhere/python is not there"),
        (
            ["my run.yaml"],
            {"ORTHANT_LOGS": "/dev/null/logs"},
            "/dev/null/logs, where ranks' logs go, cannot be written",
        ),
    ],
)
def test_a_wrong_request_is_refused_with_a_cure(
    workplace: Path, arguments: list[str], environment: dict[str, str], says: str
) -> None:
    answer = outside_slurm(workplace, arguments, **environment)
    assert answer.returncode == 2
    assert says in answer.stderr and "cure: " in answer.stderr


def test_a_container_gets_its_image_and_what_it_has_to_see(workplace: Path) -> None:
    container = {"ORTHANT_CONTAINER": "nvcr.io#team/image:1", "ORTHANT_MOUNTS": "/data:/data"}
    answer = outside_slurm(workplace, **container)
    lines = answer.stdout.splitlines()
    assert answer.returncode == 0, answer.stderr
    assert "--container-image=nvcr.io#team/image:1" in lines
    logs = f"{workplace}/logs/31234"  # rank 0 names nodes there that are not fit
    seen = (f"{REPOSITORY}:{REPOSITORY}", f"{workplace}:{workplace}", "/data:/data", f"{logs}:{logs}")
    assert f"--container-mounts={','.join(seen)}" in lines
    assert f"--container-workdir={workplace}" in lines
    assert lines[lines.index("python3") :][:5] == ["python3", "-m", "launch", "train", "my run.yaml"]
    assert "--container-" not in outside_slurm(workplace).stdout


def test_the_meeting_port_follows_from_the_job_and_can_be_set(workplace: Path) -> None:
    assert "meeting at n1:21234" in outside_slurm(workplace).stdout
    assert "meeting at n1:4444" in outside_slurm(workplace, ORTHANT_MASTER_PORT="4444").stdout


def test_the_interface_is_what_was_said_or_leads_to_the_other_nodes(workplace: Path) -> None:
    assert "gloo= nccl=" in outside_slurm(workplace).stdout
    assert "gloo=ib0 nccl=ib0" in outside_slurm(workplace, ORTHANT_INTERFACE="ib0").stdout
    own = {"ORTHANT_INTERFACE": "ib0", "NCCL_SOCKET_IFNAME": "eth1"}
    assert "gloo=ib0 nccl=eth1" in outside_slurm(workplace, **own).stdout
    found = outside_slurm(workplace, OWN_ADDRESS="127.0.1.1")
    assert "gloo=eth7 nccl=" in found.stdout and "n1 is 127.0.1.1 to itself" in found.stdout
    refused = outside_slurm(workplace, OWN_ADDRESS="127.0.1.1", NO_ROUTE="yes")
    assert refused.returncode == 2 and "ORTHANT_INTERFACE" in refused.stderr


def test_a_time_limit_that_is_over_before_the_first_step_does_not_requeue_for_ever(workplace: Path) -> None:
    """Each life is asked to save within its first ten minutes; the second one is the last that ORTHANT_MAX_FAULTS=1
    allows."""
    stubs = {
        "srun": 'trap "" USR1; kill -USR1 "$PPID"; sleep 0.3; exit 75',
        "scontrol": '[[ $1 == show ]] && echo n1; echo "$@" >>asked',
    }
    first = outside_slurm(workplace, stubs=stubs, ORTHANT_MAX_FAULTS="1")
    assert first.returncode == 75 and "USR1: the work is asked to stop" in first.stdout and "requeueing" in first.stdout
    second = outside_slurm(workplace, stubs=stubs, ORTHANT_MAX_FAULTS="1")
    assert second.returncode == 75 and "that was fault 2 in a row" in second.stdout
    assert (workplace / "asked").read_text().count("requeue 31234") == 1


def test_one_task_that_is_asked_to_stop_before_it_gets_anywhere_is_not_requeued_for_ever(workplace: Path) -> None:
    given = {"ORTHANT_MAX_FAULTS": "2", "ORTHANT_LOGS": str(workplace / "of all jobs of a person")}
    lives = [outside_slurm(workplace, ["hf", "out", "--to", "hf"], ASKED, CONVERT, **given) for _ in range(3)]
    assert [life.returncode for life in lives] == [143] * 3, lives[0].stderr
    assert ["requeueing" in life.stdout for life in lives] == [True, True, False]
    assert "that was fault 3 in a row" in lives[2].stdout
    assert (workplace / "asked").read_text() == "requeue 31234\n" * 2


def test_one_task_counts_every_life_where_the_count_cannot_be_kept(workplace: Path) -> None:
    (workplace / "logs").write_text("no folder")
    for restarts, requeued in (("4", True), ("5", False)):
        life = outside_slurm(workplace, ["hf", "out", "--to", "hf"], ASKED, CONVERT, SLURM_RESTART_COUNT=restarts)
        assert ("requeueing" in life.stdout) == requeued, life.stdout + life.stderr


def test_a_request_to_save_that_comes_when_ranks_have_ended_does_not_prevent_the_requeue(workplace: Path) -> None:
    answers = """
    [[ $2 != hostnames ]] || { echo n1; exit; }
    echo "$@" >>asked
    [[ $1 != --oneliner ]] || { kill -USR1 "$(<script)"; echo "JobId=31234 JobState=RUNNING PreemptTime=None "; }
    """
    ended = outside_slurm(workplace, stubs={"srun": 'echo "$PPID" >script; exit 75', "scontrol": answers})
    assert ended.returncode == 75 and "requeueing" in ended.stdout
    assert "requeue 31234" in (workplace / "asked").read_text()


def test_ranks_do_not_get_the_memory_and_cpus_of_the_job_that_submitted(workplace: Path) -> None:
    told = {"SLURM_MEM_PER_NODE": "2048", "SLURM_CPU_BIND": "quiet,mask_cpu:0x1", "SLURM_CPU_BIND_LIST": "0x1"}
    answer = outside_slurm(workplace, stubs={"srun": "env"}, **told)
    assert answer.returncode == 0 and "SLURM_JOB_ID=31234" in answer.stdout
    assert "SLURM_MEM_PER" not in answer.stdout and "SLURM_CPU_BIND" not in answer.stdout
    assert "SLURM_CPU_BIND=cores" in outside_slurm(workplace, stubs={"srun": "env"}, SLURM_CPU_BIND="cores").stdout


def test_a_controller_that_restarts_is_asked_again(workplace: Path) -> None:
    answers = """
    echo "$@" >>asked
    [[ $2 != hostnames ]] || { echo n1; exit; }
    [[ -e back ]] || { touch back; echo "slurm_load_jobs error: Unable to contact slurm controller" >&2; exit 1; }
    [[ $1 != --oneliner ]] || echo "JobId=31234 JobState=RUNNING PreemptTime=None "
    """
    ended = outside_slurm(workplace, stubs={"srun": "exit 75", "scontrol": answers})
    assert ended.returncode == 75 and "requeueing" in ended.stdout
    assert "controller does not answer" in ended.stderr
    asked = (workplace / "asked").read_text().splitlines()[1:]
    assert asked == ["--oneliner show job 31234", "--oneliner show job 31234", "requeue 31234"]


def test_a_controller_that_refuses_is_not_asked_again(workplace: Path) -> None:
    answers = """
    echo "$@" >>asked
    [[ $2 != hostnames ]] || { echo n1; exit; }
    [[ $1 != --oneliner ]] || { echo "JobId=31234 JobState=RUNNING PreemptTime=None "; exit; }
    echo "Requested operation is presently disabled for job 31234" >&2; exit 1
    """
    ended = outside_slurm(workplace, stubs={"srun": "exit 75", "scontrol": answers})
    assert ended.returncode == 75 and "Slurm does not requeue it: submit again" in ended.stdout
    assert "presently disabled" in ended.stderr
    assert (workplace / "asked").read_text().count("requeue") == 1


def test_components_of_a_heterogeneous_job_are_one_step(workplace: Path) -> None:
    given = {"SLURM_HET_SIZE": "2"}
    for group, (nodes, ranks, cpus) in enumerate((("n[1-2]", "4", "3"), ("n[3-4]", "2", "5"))):
        named = {"JOB_NODELIST": nodes, "NTASKS": ranks, "CPUS_PER_TASK": cpus}
        given |= {f"SLURM_{name}_HET_GROUP_{group}": value for name, value in named.items()}
    answer = outside_slurm(workplace, **given)
    assert "6 ranks on n[1-2],n[3-4]," in answer.stdout
    lines = answer.stdout.splitlines()
    between = lines.index(":")
    for part, group, cpus in ((lines[:between], 0, 3), (lines[between:], 1, 5)):
        assert {f"--het-group={group}", f"--cpus-per-task={cpus}", f"OMP_NUM_THREADS={cpus}"} <= set(part)
        assert part[part.index("launch.logged_rank") :][:4] == [
            *("launch.logged_rank", f"{workplace}/logs/31234", "train", "my run.yaml")
        ]
    assert "OMP_NUM_THREADS=2" in outside_slurm(workplace, **given, OMP_NUM_THREADS="2").stdout
    refused = outside_slurm(workplace, **given, ORTHANT_LAUNCHER="torchrun")
    assert refused.returncode == 2 and "ORTHANT_LAUNCHER=srun" in refused.stderr


def test_one_torchrun_on_each_node_gets_the_cpus_of_its_ranks(workplace: Path) -> None:
    given = {"ORTHANT_LAUNCHER": "torchrun", "SLURM_NTASKS_PER_NODE": "4", "SLURM_CPUS_PER_TASK": "3"}
    container = {"ORTHANT_CONTAINER": "image", "ORTHANT_LOGS": "/scratch/logs"}
    (workplace / "logs").mkdir()
    lines = outside_slurm(workplace, **given).stdout.splitlines()
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=12"} <= set(lines)
    assert lines[lines.index("-m") :][:4] == ["-m", "launch.torchrun", "4", f"{workplace}/logs/31234"]
    container["ORTHANT_LOGS"] = str(workplace / "elsewhere")
    (mounts,) = [one for one in outside_slurm(workplace, **given, **container).stdout.splitlines() if "mounts" in one]
    assert mounts.endswith(f",{workplace}/elsewhere:{workplace}/elsewhere")
    del given["SLURM_NTASKS_PER_NODE"]
    refused = outside_slurm(workplace, **given)
    assert refused.returncode == 2 and "--ntasks-per-node" in refused.stderr
    assert outside_slurm(workplace, ORTHANT_LAUNCHER="mpirun").returncode == 2
