"""slurm/scaling.sbatch on the cluster: how a short series is submitted, and which jobs follow from it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from tests.cluster.cluster import Cluster
from tests.cluster.conftest import REPOSITORY

SCRIPT = REPOSITORY / "slurm" / "scaling.sbatch"
CONFIG = REPOSITORY / "configs" / "demo.yaml"
ONE_RANK = ("--gpus-per-node", "1", "--cpus-per-rank", "1")
"""On each node."""
SETTINGS = (
    "parallel.tensor_model_parallel_size=1",
    "parallel.pipeline_model_parallel_size=1",
    "parallel.sequence_parallel=false",
    "training.global_batch_size=2",
    "training.micro_batch_size=1",
    "training.seq_length=64",
)


def submit(cluster: Cluster, folder: Path, *words: str | Path) -> tuple[str, str]:
    """The state in which the script ended that was told `words`, and what it said."""
    environment = {"ORTHANT_HOME": str(REPOSITORY), "ORTHANT_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    number = cluster.sbatch("--mem=0", SCRIPT, *words, cwd=folder, environment=environment)
    ended = cluster.wait(number)
    return ended.state, (folder / f"scaling-{number}.out").read_text()


def jobs_that_follow(out: Path, said: str) -> tuple[dict[str, int], int]:
    """The job of every size of the series in `out`, and the one that reports, which the script named."""
    reporting = re.search(r"the report follows as job (\d+)", said)
    assert reporting is not None, said
    return json.loads((out / "jobs.json").read_text()), int(reporting[1])
