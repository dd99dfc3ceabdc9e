"""Scripts whose first task submits what follows: once, whatever befell that task. Slurm's commands are stubs here."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.cluster.conftest import REPOSITORY
from tests.cluster.waiting import PATIENCE

SCRIPTS = ("tokenize", "data_clean")
SQUEUE = """
[[ ! -e away ]] || { rm away; echo "slurm_load_jobs error: Unable to contact slurm controller" >&2; exit 1; }
[[ "$*" != *%l* ]] || { echo 1:00:00; exit; }
[[ ! -e fails ]] || { cat fails >&2; exit 1; }
cat queue
"""
COMMANDS = {
    "srun": "true",
    "squeue": SQUEUE,
    "sbatch": 'printf "%s\\n" "$@" >>submitted; env >environment; echo 77',
    "scontrol": "exit 1",
}
UNRELATED = "(null)|{home}/slurm/{script} src\nafterok:9_*(unfulfilled)|{home}/slurm/{script} other\n"
MAILED = "afterok:4_*(unfulfilled)|/home/me/tell_me.sh\n"
FOLLOWS = "afterany:3(unfulfilled),afterok:4_*(unfulfilled)|{home}/slurm/{script} src\n"


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    for name, text in COMMANDS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "queue").write_text("")
    return tmp_path


def run_task(workplace: Path, script: str, task: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    """A task of the array 4 of three tasks."""
    given = {
        "PATH": f"{workplace}:{os.environ['PATH']}",
        "ORTHANT_HOME": str(REPOSITORY),
        "ORTHANT_PYTHON": "bash",
        "SLURM_JOB_ID": str(5 + task),
        "SLURM_JOB_NAME": "a name",
        "SLURM_JOB_PARTITION": "cpu",
        "SLURM_ARRAY_JOB_ID": "4",
        "SLURM_ARRAY_TASK_ID": str(task),
        "SLURM_ARRAY_TASK_COUNT": "3",
        "SLURM_ARRAY_TASK_MIN": "0",
        "SLURM_ARRAY_TASK_MAX": "2",
    }
    command = ["bash", REPOSITORY / "slurm" / f"{script}.sbatch", "src"]
    return subprocess.run(command, cwd=workplace, env=given | environment, capture_output=True, text=True,
                          check=False, timeout=PATIENCE)  # fmt: skip


def submitted(workplace: Path) -> list[str]:
    file = workplace / "submitted"
    return file.read_text().splitlines() if file.is_file() else []


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("task", "environment", "queue", "submits"),
    [
        (0, {}, "", True),
        (1, {}, "", False),
        (1, {"SLURM_RESTART_COUNT": "1"}, "", False),
        (0, {"SLURM_RESTART_COUNT": "1"}, UNRELATED + MAILED, True),
        (0, {"SLURM_RESTART_COUNT": "2"}, UNRELATED + FOLLOWS, False),
        (0, {"SLURM_RESTART_COUNT": "1", "ORTHANT_CHAIN": "0"}, "", False),
    ],
    ids=["first life", "another task", "another task again", "died before it", "died after it", "told not to"],
)
def test_what_follows_is_submitted_once(
    script: str, task: int, environment: dict[str, str], queue: str, submits: bool, workplace: Path
) -> None:
    (workplace / "queue").write_text(queue.format(home=REPOSITORY, script=f"{script}.sbatch"))
    done = run_task(workplace, script, task, **environment)
    assert done.returncode == 0, done.stderr
    words = submitted(workplace)
    assert bool(words) == submits == ("follows as job 77" in done.stdout)
    assert not submits or words[-2:] == [f"{REPOSITORY}/slurm/{script}.sbatch", "src"]
    assert not submits or "--dependency=afterok:4" in words


def test_a_queue_that_cannot_be_seen_ends_the_task_before_it_submits_twice(workplace: Path) -> None:
    (workplace / "fails").write_text("slurm_load_jobs error: Access/permission denied\n")
    done = run_task(workplace, "tokenize", SLURM_RESTART_COUNT="1")
    assert done.returncode == 1 and not submitted(workplace)
    assert "permission denied" in done.stderr and "submit the same again" in done.stderr


def test_a_controller_that_restarts_does_not_end_the_chain(workplace: Path) -> None:
    (workplace / "away").touch()
    done = run_task(workplace, "tokenize")
    assert done.returncode == 0, done.stderr
    assert "controller does not answer" in done.stderr and "--time=1:00:00" in submitted(workplace)


def test_what_follows_does_not_take_this_job_for_itself(workplace: Path) -> None:
    told = {"SLURM_MEM_PER_NODE": "2048", "SLURM_GPUS_PER_NODE": "1", "SLURM_CONF": "/etc/slurm.conf"}
    done = run_task(workplace, "tokenize", SLURM_RESTART_COUNT="1", OMP_PROC_BIND="close", **told)
    assert done.returncode == 0, done.stderr
    assert "--mem=2048" in submitted(workplace)
    reached = dict(line.split("=", 1) for line in (workplace / "environment").read_text().splitlines())
    assert {name for name in reached if name.startswith("SLURM_")} == {"SLURM_CONF"}
    assert (reached["OMP_PROC_BIND"], reached["ORTHANT_JOIN"]) == ("close", "1")
    assert reached["ORTHANT_HOME"] == str(REPOSITORY)
