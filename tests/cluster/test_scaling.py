"""slurm/scaling.sbatch: a real series, as short as one can be: a size, its job, and the job that reports."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from tests.cluster.cluster import Cluster
from tests.cluster.conftest import REPOSITORY

SETTINGS = (
    "parallel.tensor_model_parallel_size=1",
    "parallel.pipeline_model_parallel_size=1",
    "parallel.sequence_parallel=false",
    "training.global_batch_size=2",
    "training.micro_batch_size=1",
    "training.seq_length=64",
)
SERIES = ("--gpus-per-node", "1", "--cpus-per-rank", "1", "--steps", "2", "--warm-up", "1", "--out", "a series")


def submit(cluster: Cluster, workplace: Path, *words: str) -> str:
    """What the job said that was told `words`, once it has ended."""
    environment = {"ORTHANT_HOME": str(REPOSITORY), "ORTHANT_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    script = REPOSITORY / "slurm" / "scaling.sbatch"
    number = cluster.sbatch("--mem=0", script, *words, cwd=workplace, environment=environment)
    ended = cluster.wait(number, seconds=60)
    said = (workplace / f"scaling-{number}.out").read_text()
    assert ended.state == ("COMPLETED" if words else "FAILED"), said
    return said


def test_a_series_is_run_and_reported_on(cluster: Cluster, tmp_path: Path) -> None:
    config = str(REPOSITORY / "configs" / "demo.yaml")
    said = submit(cluster, tmp_path, config, "--nodes", "2", *SERIES, *SETTINGS)
    reporting = re.search(r"the report follows as job (\d+)", said)
    assert reporting is not None, said
    jobs = json.loads((tmp_path / "a series" / "jobs.json").read_text())
    assert list(jobs) == ["2"]
    for number in (*jobs.values(), int(reporting[1])):
        cluster.wait(number, {"COMPLETED"}, seconds=150)
    found = json.loads((tmp_path / "a series" / "results.json").read_text())
    assert [size["ranks"] for size in found["sizes"]] == [2] and found["missing"] == []
    pair = found["sizes"][0]["network"]["pairs"][0]
    first, second = pair["nodes"]  # whichever two Slurm gave
    assert first != second and {first, second} <= set(cluster.nodes) and pair["bytes_per_second"] > 0
    assert 0 < found["sizes"][0]["exposed_communication_share"] < 1
    assert (tmp_path / "a series" / "report.html").is_file()


def test_a_series_of_nothing_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    assert "no configuration given" in submit(cluster, tmp_path)
