"""slurm/pretrain.sbatch itself: what it hands to ranks, what it refuses, and how it ends. Ranks are scripts here."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.conftest import REPOSITORY
from tests.cluster.waiting import wait_until

SCRIPT = REPOSITORY / "slurm" / "pretrain.sbatch"
OTHERS = {task: REPOSITORY / "slurm" / f"{task}.sbatch" for task in ("sft", "reward", "dpo", "ppo")}
SIZE = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1", "--time=60")


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A folder whose name has a space and a percent sign, with a configuration that nobody reads."""
    folder = tmp_path / "a 100% folder"
    folder.mkdir()
    (folder / "my run.yaml").write_text("run: {folder: runs}\n")
    return folder


def submit(
    cluster: Cluster,
    workplace: Path,
    rank: str,
    *arguments: str,
    script: Path = SCRIPT,
    options: Sequence[str] = (),
    **environment: str,
) -> int:
    """Run `rank`, lines of bash, in place of the interpreter that would run a rank."""
    python = workplace / "rank"  # no space in this name: Slurm's linuxproc loses sight of such processes
    python.write_text(f"#!/bin/bash\n{rank}\n")
    python.chmod(0o755)
    given = {"ORTHANT_HOME": str(REPOSITORY), "ORTHANT_PYTHON": str(python), **environment}
    words = (*SIZE, *options, script, *(arguments or ["my run.yaml"]))
    return cluster.sbatch(*words, cwd=workplace, environment=given)


def log_of(workplace: Path, number: int, rank: int) -> str:
    (path,) = (workplace / "logs" / str(number)).glob(f"*-{rank}.log")
    return path.read_text()


def output(workplace: Path, number: int) -> str:
    return (workplace / f"pretrain-{number}.out").read_text()


@pytest.mark.parametrize("task", sorted(OTHERS))
def test_scripts_of_post_training_differ_by_the_command_alone(cluster: Cluster, workplace: Path, task: str) -> None:
    number = submit(cluster, workplace, 'printf "<%s>" "$@"', script=OTHERS[task])
    job = cluster.wait(number)
    assert job.state == "COMPLETED"
    for rank in range(4):
        assert log_of(workplace, number, rank) == f"<-m><launch><{task}><my run.yaml>"


def test_ranks_get_their_place_and_every_argument_whole(cluster: Cluster, workplace: Path) -> None:
    leftover = {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "MASTER_ADDR": "elsewhere", "MASTER_PORT": "1"}
    wanted = ["my run.yaml", "run.folder=runs/a *", "data.sources=[one two]", "x.y=$HOME"]
    number = submit(cluster, workplace, 'env; pwd; printf "<%s>" "$@"', *wanted, **leftover)
    job = cluster.wait(number)
    assert job.state == "COMPLETED", output(workplace, number)
    names = {path.name for path in (workplace / "logs" / str(number)).iterdir()}
    assert names == {"srun.log", *(f"{node}-{rank}.log" for rank, node in enumerate(two_each(job.nodes)))}
    for rank in range(4):
        lines = log_of(workplace, number, rank).splitlines()
        environment = dict(line.split("=", 1) for line in lines if re.match(r"\w+=", line))
        assert lines[-1] == "<-m><launch><train>" + "".join(f"<{one}>" for one in wanted)
        assert lines[-2] == str(workplace)
        assert environment["SLURM_PROCID"] == str(rank) and environment["SLURM_LOCALID"] == str(rank % 2)
        assert environment["SLURM_STEP_NUM_TASKS"] == "4"
        assert environment["MASTER_ADDR"] == two_each(job.nodes)[0]
        assert environment["MASTER_PORT"] == str(10000 + number)
        assert environment["CUDA_VISIBLE_DEVICES"] == "0,1"
        assert environment["OMP_NUM_THREADS"] == environment["PYTHONSAFEPATH"] == "1"
        assert environment["PYTHONPATH"].split(":")[0] == str(REPOSITORY)
        assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & set(environment)


def two_each(nodes: str) -> list[str]:
    """The nodes of ranks 0 to 3: neighbours share one."""
    first, second = re.findall(r"\d", nodes)
    return [f"n{first}", f"n{first}", f"n{second}", f"n{second}"]


def test_a_dead_rank_ends_the_job_with_its_exit_code(cluster: Cluster, workplace: Path) -> None:
    number = submit(cluster, workplace, "[[ $SLURM_PROCID == 2 ]] && exit 7; exec sleep 120")
    job = cluster.wait(number, seconds=30)
    assert (job.state, job.restarts, job.exit_code) == ("FAILED", 0, 7), output(workplace, number)
    assert re.search(r"task 2: Exited with exit code 7", output(workplace, number))


# Ranks take TERM for a request (training.stopping), so each keeps its own exit code when another ended before it.
TAKES_REQUESTS = """
trap : TERM
touch "begun-$SLURM_PROCID-${SLURM_RESTART_COUNT:-0}"
"""
WAITS_FOR_THE_OTHERS = "until (($(ls | grep -c begun-) == 4)); do sleep 0.05; done"


def test_a_refused_request_keeps_its_exit_code(cluster: Cluster, workplace: Path) -> None:
    number = submit(cluster, workplace, f"{TAKES_REQUESTS}\n{WAITS_FOR_THE_OTHERS}\nexit 2")
    job = cluster.wait(number, seconds=30)
    assert (job.state, job.exit_code) == ("FAILED", 2), output(workplace, number)


def test_a_request_that_is_refused_under_torchrun_keeps_its_exit_code(cluster: Cluster, workplace: Path) -> None:
    given = {"ORTHANT_HOME": str(REPOSITORY), "ORTHANT_LAUNCHER": "torchrun"}
    number = cluster.sbatch(*SIZE, SCRIPT, "my run.yaml", cwd=workplace, environment=given)
    job = cluster.wait(number, seconds=60)
    assert (job.state, job.exit_code) == ("FAILED", 2), output(workplace, number)
    for rank in range(4):
        assert "4 settings are refused" in log_of(workplace, number, rank)


WAITS_FOR_A_SIGNAL = """
echo "step $SLURM_STEP_ID"
trap 'echo saved; exit {code}' USR1
{takes_requests}
[[ ${{SLURM_RESTART_COUNT:-0}} == 1 ]] && exit 0
while true; do sleep 0.1; done
"""


def running(cluster: Cluster, workplace: Path, code: int) -> int:
    """A job whose ranks wait for a signal, and then exit with `code`."""
    number = submit(cluster, workplace, WAITS_FOR_A_SIGNAL.format(code=code, takes_requests=TAKES_REQUESTS))
    wait_until("all ranks run", lambda: len(list(workplace.glob("begun-*"))) == 4, 30)
    return number


def signalled(cluster: Cluster, workplace: Path, name: str, code: int) -> int:
    """The same, with the signal sent."""
    number = running(cluster, workplace, code)
    cluster.signal_batch(number, name)
    return number


def test_usr1_lets_ranks_save_and_requeues(cluster: Cluster, workplace: Path) -> None:
    number = signalled(cluster, workplace, "USR1", 1)
    job = cluster.wait(number, {"COMPLETED"}, seconds=60)
    assert (job.restarts, job.exit_code) == (1, 0), output(workplace, number)
    # A step of another number: what Slurm could not tell a node about the first one must not reach the second.
    for rank in range(4):
        assert re.findall(r"^(saved|step \d)$", log_of(workplace, number, rank), re.MULTILINE) == [
            "step 0",
            "saved",
            "step 1",
        ]
    assert re.findall(r"start (\d)", output(workplace, number)) == ["1", "2"]


def test_term_lets_ranks_save_and_does_not_requeue(cluster: Cluster, workplace: Path) -> None:
    number = signalled(cluster, workplace, "TERM", 75)
    job = cluster.wait(number, seconds=30)
    assert (job.state, job.restarts, job.exit_code) == ("FAILED", 0, 75), output(workplace, number)
    assert all("saved\n" in log_of(workplace, number, rank) for rank in range(4))


def test_ranks_that_slurm_stops_without_the_job_save_and_the_job_goes_on(cluster: Cluster, workplace: Path) -> None:
    saves = TAKES_REQUESTS.replace("trap :", "trap 'echo saved; exit 75'")
    number = submit(cluster, workplace, WAITS_FOR_A_SIGNAL.format(code=75, takes_requests=saves))
    wait_until("all ranks run", lambda: len(list(workplace.glob("begun-*"))) == 4, 30)
    cluster.controller.run("scancel", "--signal=TERM", str(number))  # reaches the step, and not the batch script
    job = cluster.wait(number, {"COMPLETED"}, seconds=60)
    assert (job.restarts, job.exit_code) == (1, 0), output(workplace, number)
    assert all("saved\n" in log_of(workplace, number, rank) for rank in range(4))


def test_ranks_of_a_cancelled_job_can_save(cluster: Cluster, workplace: Path) -> None:
    number = running(cluster, workplace, 75)
    cluster.controller.run("scancel", str(number))
    job = cluster.wait(number, {"CANCELLED"}, seconds=30)
    wait_until("all ranks saved", lambda: all("saved\n" in log_of(workplace, number, rank) for rank in range(4)), 10)
    assert job.restarts == 0


def test_a_preempted_job_saves_and_is_requeued(cluster: Cluster, workplace: Path) -> None:
    rank = WAITS_FOR_A_SIGNAL.format(
        code=1, takes_requests=TAKES_REQUESTS.replace("trap :", "trap 'echo saved; exit 1'")
    )
    number = submit(cluster, workplace, rank, "my run.yaml", options=("--partition=spot", "--nodelist=n1,n2"))
    wait_until("all ranks run", lambda: len(list(workplace.glob("begun-*"))) == 4, 30)
    urgent = cluster.sbatch("--partition=urgent", "--nodelist=n1,n2", "--nodes=2", "--exclusive", "--wrap=true")
    assert cluster.wait(urgent).state == "COMPLETED"
    job = cluster.wait(number, {"COMPLETED"}, seconds=60)
    assert (job.restarts, job.exit_code) == (1, 0), output(workplace, number)
    assert all("saved\n" in log_of(workplace, number, rank) for rank in range(4))
    assert "requeueing\n" in output(workplace, number)


FAULTY = """
trap : TERM
[[ $SLURM_PROCID == 2 && ${SLURM_RESTART_COUNT:-0} == 0 ]] && kill -KILL $$
[[ ${SLURM_RESTART_COUNT:-0} == 1 ]] && exit 75
sleep 60
"""


def test_faults_requeue_until_there_are_too_many_in_a_row(cluster: Cluster, workplace: Path) -> None:
    number = submit(cluster, workplace, FAULTY, ORTHANT_MAX_FAULTS="1")
    job = cluster.wait(number, seconds=60)
    said = output(workplace, number)
    assert (job.state, job.restarts, job.exit_code) == ("FAILED", 1, 75), said
    assert re.search(r"ended with exit code 1(37|43)\n", said) and "ended with exit code 75\n" in said
    assert "task 2: Killed" in said
    assert said.count("requeueing") == 1 and "that was fault 2 in a row" in said


def test_usr1_does_not_requeue_what_would_be_refused_again(cluster: Cluster, workplace: Path) -> None:
    number = signalled(cluster, workplace, "USR1", 2)
    job = cluster.wait(number, seconds=30)
    assert (job.state, job.restarts, job.exit_code) == ("FAILED", 0, 2), output(workplace, number)


NAMES_A_BAD_NODE = """
[[ ${SLURM_RESTART_COUNT:-0} == 1 ]] && exit 0
echo n2 >"$ORTHANT_BAD_NODES"
exit 75
"""


def test_a_node_that_the_check_named_is_left_out_of_the_next_life(cluster: Cluster, workplace: Path) -> None:
    number = submit(cluster, workplace, NAMES_A_BAD_NODE)
    job = cluster.wait(number, {"COMPLETED"}, seconds=60)
    assert job.restarts == 1 and "2" not in job.nodes, output(workplace, number)
    assert "without n2" in output(workplace, number)


def outside_slurm(
    workplace: Path,
    arguments: Sequence[str] = ("my run.yaml",),
    stubs: Mapping[str, str] = MappingProxyType({}),
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
        ["bash", str(SCRIPT), *arguments],
        cwd=workplace,
        env=given,
        capture_output=True,
        text=True,
        timeout=30,
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
    assert f"--container-mounts={REPOSITORY}:{REPOSITORY},{workplace}:{workplace},/data:/data" in lines
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
