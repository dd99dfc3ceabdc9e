"""slurm/pretrain.sbatch itself: what it hands to ranks, what it refuses, and how it ends. Ranks are scripts here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.conftest import REPOSITORY
from tests.cluster.waiting import wait_until

SCRIPT = REPOSITORY / "slurm" / "pretrain.sbatch"
OTHERS = {task: REPOSITORY / "slurm" / f"{task}.sbatch" for task in ("sft", "reward", "dpo", "ppo")}
SIZE = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1", "--time=60")


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


# Ranks take TERM for a request (training.stopping), so each keeps its own exit code when another ended before it.
TAKES_REQUESTS = """
trap : TERM
touch "begun-$SLURM_PROCID-${SLURM_RESTART_COUNT:-0}"
"""
# Where a rank died before another node has started its own, Slurm starts those all the same, and they run to their end.
WAITS_FOR_THE_OTHERS = "until (($(ls | grep -c begun-) == 4)); do sleep 0.05; done"


def test_a_dead_rank_ends_the_job_with_its_exit_code(cluster: Cluster, workplace: Path) -> None:
    dies = f"{TAKES_REQUESTS}\n[[ $SLURM_PROCID == 2 ]] || exec sleep 120\n{WAITS_FOR_THE_OTHERS}\nexit 7"
    number = submit(cluster, workplace, dies)
    job = cluster.wait(number)
    assert (job.state, job.restarts, job.exit_code) == ("FAILED", 0, 7), output(workplace, number)
    assert re.search(r"task 2: Exited with exit code 7", output(workplace, number))


def test_a_refused_request_keeps_its_exit_code(cluster: Cluster, workplace: Path) -> None:
    number = submit(cluster, workplace, f"{TAKES_REQUESTS}\n{WAITS_FOR_THE_OTHERS}\nexit 2")
    job = cluster.wait(number)
    assert (job.state, job.exit_code) == ("FAILED", 2), output(workplace, number)


def test_a_request_that_is_refused_under_torchrun_keeps_its_exit_code(cluster: Cluster, workplace: Path) -> None:
    given = {"ORTHANT_HOME": str(REPOSITORY), "ORTHANT_LAUNCHER": "torchrun"}
    number = cluster.sbatch(*SIZE, SCRIPT, "my run.yaml", cwd=workplace, environment=given)
    job = cluster.wait(number)
    assert (job.state, job.exit_code) == ("FAILED", 2), output(workplace, number)
    # The first to refuse it ends the others, some before they have read it.
    said = [path.read_text() for path in (workplace / "logs" / str(number)).glob("*-[0-9].log")]
    assert any("4 settings are refused" in one for one in said), said


# Ranks agree to stop, so none leaves before all have saved: Slurm would end those that the signal has not reached yet.
WAITS_FOR_A_SIGNAL = """
echo "step $SLURM_STEP_ID"
save() {{
    echo saved
    touch "saved-$SLURM_PROCID"
    until (($(ls | grep -c saved-) == 4)); do sleep 0.05; done
    exit {code}
}}
trap save USR1
{takes_requests}
[[ ${{SLURM_RESTART_COUNT:-0}} == 1 ]] && exit 0
while true; do sleep 0.1; done
"""


def running(cluster: Cluster, workplace: Path, code: int) -> int:
    """A job whose ranks wait for a signal, and then exit with `code`."""
    number = submit(cluster, workplace, WAITS_FOR_A_SIGNAL.format(code=code, takes_requests=TAKES_REQUESTS))
    wait_until("all ranks run", lambda: len(list(workplace.glob("begun-*"))) == 4)
    return number


def signalled(cluster: Cluster, workplace: Path, name: str, code: int) -> int:
    """The same, with the signal sent."""
    number = running(cluster, workplace, code)
    cluster.signal_batch(number, name)
    return number


def test_usr1_lets_ranks_save_and_requeues(cluster: Cluster, workplace: Path) -> None:
    number = signalled(cluster, workplace, "USR1", 1)
    job = cluster.wait(number, {"COMPLETED"})
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
    job = cluster.wait(number)
    assert (job.state, job.restarts, job.exit_code) == ("FAILED", 0, 75), output(workplace, number)
    assert all("saved\n" in log_of(workplace, number, rank) for rank in range(4))


def test_ranks_that_slurm_stops_without_the_job_save_and_the_job_goes_on(cluster: Cluster, workplace: Path) -> None:
    saves = TAKES_REQUESTS.replace("trap :", "trap 'echo saved; exit 75'")
    number = submit(cluster, workplace, WAITS_FOR_A_SIGNAL.format(code=75, takes_requests=saves))
    wait_until("all ranks run", lambda: len(list(workplace.glob("begun-*"))) == 4)
    cluster.controller.run("scancel", "--signal=TERM", str(number))  # reaches the step, and not the batch script
    job = cluster.wait(number, {"COMPLETED"})
    assert (job.restarts, job.exit_code) == (1, 0), output(workplace, number)
    assert all("saved\n" in log_of(workplace, number, rank) for rank in range(4))


def test_ranks_of_a_cancelled_job_can_save(cluster: Cluster, workplace: Path) -> None:
    number = running(cluster, workplace, 75)
    cluster.controller.run("scancel", str(number))
    job = cluster.wait(number, {"CANCELLED"})
    wait_until("all ranks saved", lambda: all("saved\n" in log_of(workplace, number, rank) for rank in range(4)))
    assert job.restarts == 0


def test_a_preempted_job_saves_and_is_requeued(cluster: Cluster, workplace: Path) -> None:
    rank = WAITS_FOR_A_SIGNAL.format(
        code=1, takes_requests=TAKES_REQUESTS.replace("trap :", "trap 'echo saved; exit 1'")
    )
    number = submit(cluster, workplace, rank, "my run.yaml", options=("--partition=spot", "--nodelist=n1,n2"))
    wait_until("all ranks run", lambda: len(list(workplace.glob("begun-*"))) == 4)
    urgent = cluster.sbatch("--partition=urgent", "--nodelist=n1,n2", "--nodes=2", "--exclusive", "--wrap=true")
    assert cluster.wait(urgent).state == "COMPLETED"
    job = cluster.wait(number, {"COMPLETED"})
    assert (job.restarts, job.exit_code) == (1, 0), output(workplace, number)
    assert all("saved\n" in log_of(workplace, number, rank) for rank in range(4))
    assert "requeueing\n" in output(workplace, number)


FAULTY = f"""
{TAKES_REQUESTS}
[[ $SLURM_RESTART_COUNT == 1 ]] && exit 75
{WAITS_FOR_THE_OTHERS}
[[ $SLURM_PROCID == 2 ]] && kill -KILL $$
sleep 60
"""


def test_faults_requeue_until_there_are_too_many_in_a_row(cluster: Cluster, workplace: Path) -> None:
    number = submit(cluster, workplace, FAULTY, ORTHANT_MAX_FAULTS="1")
    job = cluster.wait(number)
    said = output(workplace, number)
    assert (job.state, job.restarts, job.exit_code) == ("FAILED", 1, 75), said
    assert re.search(r"ended with exit code 1(37|43)\n", said) and "ended with exit code 75\n" in said
    assert "task 2: Killed" in said
    assert said.count("requeueing") == 1 and "that was fault 2 in a row" in said


def test_usr1_does_not_requeue_what_would_be_refused_again(cluster: Cluster, workplace: Path) -> None:
    number = signalled(cluster, workplace, "USR1", 2)
    job = cluster.wait(number)
    assert (job.state, job.restarts, job.exit_code) == ("FAILED", 0, 2), output(workplace, number)


NAMES_A_BAD_NODE = """
[[ ${SLURM_RESTART_COUNT:-0} == 1 ]] && exit 0
[[ $SLURM_PROCID == 0 ]] && echo n2 >"$ORTHANT_BAD_NODES"
until [[ -s $ORTHANT_BAD_NODES ]]; do sleep 0.05; done
exit 75
"""


def test_a_node_that_the_check_named_is_left_out_of_the_next_life(cluster: Cluster, workplace: Path) -> None:
    number = submit(cluster, workplace, NAMES_A_BAD_NODE, "my run.yaml", options=("--exclude=n4",))
    job = cluster.wait(number, {"COMPLETED"})
    assert job.restarts == 1 and two_each(job.nodes) == ["n1", "n1", "n3", "n3"], output(workplace, number)
    assert "without n2" in output(workplace, number)
