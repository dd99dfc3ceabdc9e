"""A shell on the test cluster's login node: `.venv/bin/python -m tests.cluster.shell`, as root, in the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.cluster.cluster import Cluster
from tests.cluster.machine import PLAIN_ENVIRONMENT

REPOSITORY = Path(__file__).resolve().parents[2]


def main(command: list[str]) -> int:
    """Bring the cluster up, run `command` (a shell where none is given) on the login node, and take it all down.

    Returns:
        The exit code of `command`; 2 where this machine cannot hold the cluster.
    """
    if os.geteuid() != 0 or shutil.which("slurmctld") is None:
        print("the test cluster needs root and Slurm\n  cure: as root: scripts/install_slurm.sh", file=sys.stderr)
        return 2
    with (
        tempfile.TemporaryDirectory(prefix="cluster-") as folder,
        Cluster(Path(folder) / "cluster", shared=(REPOSITORY,)) as cluster,
    ):
        names = ", ".join(cluster.nodes)
        print(f"nodes {names} are idle; `exit` takes the cluster down with the jobs on it", file=sys.stderr)
        words = cluster.controller.command(*(command or ["bash", "-i"]), cwd=REPOSITORY)
        given = {**PLAIN_ENVIRONMENT, "TERM": os.environ.get("TERM", "dumb")}
        return subprocess.run(words, env=given, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
