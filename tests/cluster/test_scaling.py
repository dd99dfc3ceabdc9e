"""slurm/scaling.sbatch: a real series, as short as one can be: a size, its job, and the job that reports."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cluster.cluster import Cluster
from tests.cluster.series import CONFIG, ONE_RANK, SETTINGS, jobs_that_follow, submit


def test_a_series_is_run_and_reported_on(cluster: Cluster, tmp_path: Path) -> None:
    out = tmp_path / "a series"
    size = ("--nodes", "2", *ONE_RANK, "--steps", "2", "--warm-up", "1", "--out", out.name)
    state, said = submit(cluster, tmp_path, CONFIG, *size, *SETTINGS)
    assert state == "COMPLETED", said
    jobs, reporting = jobs_that_follow(out, said)
    assert list(jobs) == ["2"]
    for number in (*jobs.values(), reporting):
        cluster.wait(number, {"COMPLETED"})
    found = json.loads((out / "results.json").read_text())
    assert [size["ranks"] for size in found["sizes"]] == [2] and found["missing"] == []
    pair = found["sizes"][0]["network"]["pairs"][0]
    first, second = pair["nodes"]  # whichever two Slurm gave
    assert first != second and {first, second} <= set(cluster.nodes) and pair["bytes_per_second"] > 0
    assert 0 < found["sizes"][0]["exposed_communication_share"] < 1
    assert (out / "report.html").is_file()


def test_a_series_of_nothing_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    state, said = submit(cluster, tmp_path)
    assert state == "FAILED" and "no configuration given" in said
