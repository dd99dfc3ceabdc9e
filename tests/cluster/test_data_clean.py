"""slurm/data_clean.sbatch cleans over an array as one process does, byte for byte, also after a node failed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from data.clean.pipeline import clean
from data.clean.settings import CleanSettings, NearSettings
from data.sources import find_source
from tests.cluster.cluster import Cluster
from tests.cluster.conftest import REPOSITORY
from tests.cluster.waiting import wait_until
from tests.data.clean.cases import planted, result, write_lines

SCRIPT = REPOSITORY / "slurm" / "data_clean.sbatch"
SIZE = ("--array=0-3", "--cpus-per-task=2", "--time=60")
OPTIONS = ("--dedup", "--rules", "none", "--shard-mib", "0.02")


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A folder whose name has a space, with two files."""
    folder = tmp_path / "a folder"
    records = planted(300)
    write_lines(folder / "src" / "a.jsonl", records[:200])
    write_lines(folder / "src" / "b.jsonl", records[200:])
    return folder


def reference(workplace: Path) -> dict[str, bytes]:
    settings = CleanSettings(rules=None, exact=True, near=NearSettings(), shard_bytes=int(0.02 * (1 << 20)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workplace)
        clean([find_source("src")], settings, Path("alone"))
    return result(workplace / "alone")


def submit(cluster: Cluster, workplace: Path, *options: str, size: tuple[str, ...] = SIZE) -> int:
    environment = {"ORTHANT_HOME": str(REPOSITORY)}
    return cluster.sbatch(
        *size, SCRIPT, "src", "--out", "out", *(options or OPTIONS), cwd=workplace, environment=environment
    )


def said(workplace: Path) -> str:
    return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')}" for path in sorted(workplace.glob("*.out")))


def wait_for_report(workplace: Path) -> None:
    done = workplace / "out" / ".request.json"
    wait_until("the report is there", done.is_file, otherwise=lambda: said(workplace))


def test_an_array_cleans_as_one_process_does(cluster: Cluster, workplace: Path) -> None:
    submit(cluster, workplace)
    wait_for_report(workplace)
    cluster.wait_idle()
    assert result(workplace / "out") == reference(workplace)
    assert said(workplace).count("follows as job") == 4


def test_a_failed_node_costs_only_its_share(cluster: Cluster, workplace: Path) -> None:
    number = submit(cluster, workplace)
    first = wait_until("the first task runs", lambda: re.search(r"share 0 .* on (\w+)\n", said(workplace)))
    node = first[1]
    cluster.crash(node)
    cluster.wait_missed(node)
    cluster.boot(node)
    wait_for_report(workplace)
    cluster.wait_idle()
    assert result(workplace / "out") == reference(workplace), f"job {number}"


def test_a_refused_request_ends_the_chain(cluster: Cluster, workplace: Path) -> None:
    number = submit(cluster, workplace, "--rules", "gofer")
    wait_until("it is refused", lambda: "the rules are gopher" in said(workplace), otherwise=lambda: said(workplace))
    wait_until("no job is left", lambda: not cluster.ask("squeue", "--noheader").strip())
    assert not (workplace / "out" / ".work").exists() and number
