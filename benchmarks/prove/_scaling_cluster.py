"""`orthant scale` by slurm/scaling.sbatch on a real Slurm of four nodes, held to a part of a core and slow links."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from benchmarks.record import ROOT
from tests.cluster.cluster import Cluster
from tests.cluster.series import CONFIG, ONE_RANK, SETTINGS, jobs_that_follow, submit
from tests.cluster.waiting import wait_until

SHARE = 0.45
"""Of a core, for all of a node."""
SIZES = (1, 2, 4)
STEPS, WARM_UP = 20, 4
GROUPS = Path("/sys/fs/cgroup")
PERIOD_US = 20_000
"""Short beside a step, which would otherwise be measured in whole periods."""
SERIES = (
    *("--nodes", ",".join(map(str, SIZES)), *ONE_RANK, "--mode", "weak"),
    *("--steps", str(STEPS), "--warm-up", str(WARM_UP), "--time", "30"),
)


def series(link: str, folder: Path, keep: Path | None) -> dict[str, Any]:
    """The figures of all sizes over links of that rate; `keep` gets the series' folder without its checkpoints."""
    started = time.monotonic()
    with Cluster(folder / "cluster", shared=(folder, ROOT)) as cluster, held(cluster):
        shape(cluster, link)
        out = folder / link
        ended, said = submit(cluster, folder, CONFIG, *SERIES, "--out", out, *SETTINGS)
        print(said, file=sys.stderr, flush=True)
        assert ended == "COMPLETED", said
        numbers, reporting = jobs_that_follow(out, said)
        states = {size: cluster.wait(number, seconds=300).state for size, number in numbers.items()}
        cluster.wait(reporting, {"COMPLETED"}, seconds=120)
    if keep is not None:
        shutil.copytree(out, keep / link, ignore=shutil.ignore_patterns("checkpoints"), dirs_exist_ok=True)
    found: dict[str, Any] = json.loads((out / "results.json").read_text())
    return {"seconds": round(time.monotonic() - started), "states": states, **found}


@contextmanager
def held(cluster: Cluster) -> Iterator[None]:
    """Every process of a node shares SHARE of a core."""
    unified = (GROUPS / "cgroup.controllers").is_file()
    groups = {name: (GROUPS if unified else GROUPS / "cpu") / f"orthant-{name}" for name in cluster.nodes}
    try:
        for name, group in groups.items():
            group.mkdir()
            if unified:
                (group / "cpu.max").write_text(f"{int(SHARE * PERIOD_US)} {PERIOD_US}")
            else:
                (group / "cpu.cfs_period_us").write_text(str(PERIOD_US))
                (group / "cpu.cfs_quota_us").write_text(str(int(SHARE * PERIOD_US)))
            first = psutil.Process(cluster.nodes[name].pid)
            for process in (first, *first.children(recursive=True)):
                (group / "cgroup.procs").write_text(str(process.pid))
        yield
    finally:
        cluster.down()
        for group in groups.values():
            if group.is_dir():
                _remove(group)


def _remove(group: Path) -> None:
    wait_until(f"{group} is empty", lambda: not (group / "cgroup.procs").read_text(), 20)
    group.rmdir()


def shape(cluster: Cluster, rate: str) -> None:
    """What each node sends goes at most at `rate`."""
    for machine in cluster.nodes.values():
        machine.run(
            *("tc", "qdisc", "replace", "dev", "eth0", "root", "tbf", "rate", rate, "burst", "256kb", "latency", "50ms")
        )
