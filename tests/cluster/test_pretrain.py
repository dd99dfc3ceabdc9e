"""slurm/pretrain.sbatch trains on real nodes as on one machine, bit for bit, also when it is requeued."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.conftest import REPOSITORY
from tests.cluster.faulty import PACE as FILE_OF_PACE
from tests.cluster.hurt_run import figures, write_interpreter
from tests.cluster.waiting import PATIENCE, wait_until

SCRIPT = REPOSITORY / "slurm" / "pretrain.sbatch"
CONFIG = REPOSITORY / "configs" / "demo.yaml"
STEPS = 30
# The demo at its own layout, TP2 x PP2, cut short. No checkpoint before the last step but one that a signal asks for.
OVERRIDES = (
    f"training.train_steps={STEPS}",
    "training.global_batch_size=2",
    "training.micro_batch_size=1",
    "training.seq_length=64",
    "evaluation.interval=null",
    "checkpoint.interval=null",
    "run.folder=a run",
)
SIZE = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1", "--time=60")
PACE = 0.5
"""Seconds of a step while a signal is under way: a run that has ended cannot be asked to stop."""


def metrics(folder: Path, run: str = "a run") -> list[dict[str, Any]]:
    """What has to agree of each line of metrics.jsonl; floats as written, so equal means bit for bit."""
    return figures(folder / run)


def submit(cluster: Cluster, folder: Path, size: Sequence[str] = SIZE, **environment: str) -> int:
    """As a person does: in a folder of their own, whose name has a space."""
    folder.mkdir(exist_ok=True)
    given = {"ORTHANT_HOME": str(REPOSITORY), "ORTHANT_INTERFACE": "eth0", **environment}
    return cluster.sbatch(*size, SCRIPT, CONFIG, *OVERRIDES, cwd=folder, environment=given)


def slowed(run: Path) -> Path:
    """The file that says how long a step of the run in this folder takes, for ranks of `write_interpreter`."""
    run.mkdir(parents=True)
    (run / FILE_OF_PACE).write_text(str(PACE))
    return run / FILE_OF_PACE


def said(folder: Path) -> str:
    """Everything that the job and its ranks wrote."""
    paths = sorted(folder.glob("*.out")) + sorted(folder.glob("logs/*/*.log"))
    return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')}" for path in paths)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where four ranks that `orthant train` started on this machine have done the same run."""
    folder = tmp_path_factory.mktemp("local")
    answer = subprocess.run(
        [sys.executable, "-P", "-m", "launch", "train", str(CONFIG), *OVERRIDES],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    return folder


@pytest.fixture(scope="module")
def local(trained: Path) -> list[dict[str, Any]]:
    """Its metrics."""
    found = metrics(trained)
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    return found


def test_two_nodes_train_as_one_machine_does(cluster: Cluster, local: list[dict[str, Any]], tmp_path: Path) -> None:
    nodes = [cluster.nodes["n1"], cluster.nodes["n2"]]
    before = [node.bytes_received() for node in nodes]
    folder = tmp_path / "a folder"
    number = submit(cluster, folder, (*SIZE, "--nodelist=n1,n2"))
    job = cluster.wait(number)
    assert (job.state, job.exit_code, job.nodes) == ("COMPLETED", 0, "n[1-2]"), said(folder)
    assert metrics(folder) == local
    logs = {path.name for path in (folder / "logs" / str(number)).glob("n*.log")}
    assert logs == {"n1-0.log", "n1-1.log", "n2-2.log", "n2-3.log"}
    assert f"step {STEPS}/{STEPS}" in (folder / "logs" / str(number) / "n1-0.log").read_text()
    # Each step sends the activations of two sequences forth and their gradients back: 64 tokens x 192 channels x fp32.
    activations = STEPS * 2 * 64 * 192 * 4
    received = [node.bytes_received() - start for node, start in zip(nodes, before, strict=True)]
    assert min(received) > activations, received


def test_under_torchrun_a_run_that_is_asked_to_stop_saves_and_goes_on_after_its_requeue(
    cluster: Cluster, local: list[dict[str, Any]], tmp_path: Path
) -> None:
    folder = tmp_path / "a folder"
    pace, python = slowed(folder / "a run"), str(write_interpreter(folder))
    given = {"ORTHANT_LAUNCHER": "torchrun", "ORTHANT_PYTHON": python, "PYTHON_EXEC": python}  # torchrun's, for ranks
    number = submit(cluster, folder, (*SIZE, "--nodelist=n2,n3"), **given)
    wait_until("two steps are done", lambda: len(metrics(folder)) >= 2, otherwise=lambda: said(folder))
    cluster.signal_batch(number, "USR1")
    logs = folder / "logs" / str(number)
    wait_until("it saves", lambda: "it saved after" in (logs / "n2-0.log").read_text(), otherwise=lambda: said(folder))
    pace.unlink()
    job = cluster.wait(number, {"COMPLETED"})
    assert (job.restarts, job.exit_code) == (1, 0), said(folder)
    ranks = {path.name for path in logs.glob("n*.log")} - {"n2-torchrun.log", "n3-torchrun.log"}
    assert ranks == {"n2-0.log", "n2-1.log", "n3-2.log", "n3-3.log"}
    text = (logs / "n2-0.log").read_text()
    saved = re.search(r"asked to stop by SIGUSR1; it saved after step (\d+)", text)
    assert saved is not None and 2 <= int(saved[1]) < STEPS, said(folder)
    assert f"resumed from {folder / 'a run'}" in text or "resumed from a run/checkpoints" in text, said(folder)
    assert metrics(folder) == local


HOSTILE = "a; touch pwned $(touch pwned) `touch pwned` \"q\" 'r'#c %j"
AS_INTERPRETER = (
    "import sys; sys.executable = sys.argv.pop(1); from launch.cli import main; sys.exit(main(sys.argv[1:]))"
)
SUBMIT = ("--nodes", "2", "--gpus-per-node", "2", "--time", "1:00:00", "--chain", "3", "--json")


def test_a_chain_of_jobs_that_orthant_submits_follows_a_run_to_its_end(
    cluster: Cluster, local: list[dict[str, Any]], tmp_path: Path
) -> None:
    folder = tmp_path / "a folder"
    folder.mkdir()
    pace, python = slowed(folder / HOSTILE), write_interpreter(folder)
    words = ("-P", "-c", AS_INTERPRETER, python, "submit", CONFIG, *SUBMIT, *OVERRIDES, f"run.folder={HOSTILE}")
    environment = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    answer = cluster.controller.run(sys.executable, *map(str, words), cwd=folder, environment=environment)
    described = json.loads(answer.stdout)
    first, second, third = described["jobs"]
    logs = folder / HOSTILE / "logs"
    assert described["logs"] == str(logs) and described["layout"] == "TP2 x PP2 x DP1"

    def told() -> str:
        return "\n".join(path.read_text(errors="replace") for path in sorted(logs.rglob("*")) if path.is_file())

    wait_until("two steps are done", lambda: len(metrics(folder, HOSTILE)) >= 2, otherwise=told)
    assert cluster.job(second).reason == cluster.job(third).reason == "Dependency"
    cluster.signal_batch(first, "USR1")  # what Slurm sends before the time limit
    stopped = cluster.wait(first)
    pace.unlink()
    assert (stopped.state, stopped.exit_code, stopped.restarts) == ("FAILED", 75, 0), told()
    finished = cluster.wait(second, {"COMPLETED"})
    assert (finished.exit_code, finished.restarts) == (0, 0), told()
    assert cluster.wait(third).state == "CANCELLED"  # without a node: the run was finished
    assert "resumed from" in (logs / str(second) / f"{first_node(finished.nodes)}-0.log").read_text()
    assert sorted(path.name for path in logs.glob("*.out")) == [f"{first}.out", f"{second}.out"]
    assert metrics(folder, HOSTILE) == local
    assert not list(tmp_path.rglob("pwned"))


def first_node(nodes: str) -> str:
    return f"n{re.findall(r'[0-9]', nodes)[0]}"


POST_TRAINING = (
    "parallel.pipeline_model_parallel_size=1",
    "training.train_steps=2",
    "training.global_batch_size=2",
    "training.micro_batch_size=1",
    "training.seq_length=64",
    "schedule.warmup_steps=1",
    "evaluation.interval=null",
)


def test_post_training_begins_with_what_was_trained(cluster: Cluster, trained: Path, tmp_path: Path) -> None:
    words = ["red", "green", "blue", "grey"]
    instructions = [{"prompt": f"{one} and", "completion": " more"} for one in words * 4]
    pairs = [{"prompt": f"{one} or", "chosen": " this", "rejected": " that"} for one in words * 4]
    for name, rows in (("instructions", instructions), ("preferences", pairs)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    size = ("--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1", "--time=60")
    jobs = {}
    for task in ("sft", "reward", "dpo"):
        script, config = REPOSITORY / "slurm" / f"{task}.sbatch", REPOSITORY / "configs" / task / "demo.yaml"
        settings = (*POST_TRAINING, f"init.checkpoint={trained / 'a run'}", f"run.folder={task}")
        given = {"ORTHANT_HOME": str(REPOSITORY)}
        jobs[task] = cluster.sbatch(*size, script, config, *settings, cwd=tmp_path, environment=given)
    for task, number in jobs.items():
        job = cluster.wait(number)
        assert (job.state, job.exit_code, job.restarts) == ("COMPLETED", 0, 0), said(tmp_path)
        assert [line["step"] for line in metrics(tmp_path, task)] == [1, 2]
        assert (tmp_path / task / "checkpoints" / "step_00000002" / "manifest.json").is_file()
