"""One cluster for all tests of a session, whole again after each of them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def one_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Four nodes of four CPUs and two counted GPUs, and their controller."""
    if os.geteuid() != 0 or shutil.which("slurmctld") is None:
        pytest.fail("needs root and Slurm: run `make test-cluster` as root", pytrace=False)
    folder = tmp_path_factory.mktemp("cluster") / "a cluster"
    with Cluster(folder, shared=(tmp_path_factory.getbasetemp(), REPOSITORY)) as cluster:
        yield cluster


@pytest.fixture
def cluster(one_cluster: Cluster) -> Iterator[Cluster]:
    """The session's cluster: all nodes idle when the test begins, whatever the one before did."""
    yield one_cluster
    one_cluster.restore()


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A folder whose name has a space and a percent sign, with a configuration that nobody reads."""
    folder = tmp_path / "a 100% folder"
    folder.mkdir()
    (folder / "my run.yaml").write_text("run: {folder: runs}\n")
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every wait has a limit of its own, and says what did not happen; this one is the last resort."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.timeout(1800))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that failed shows what Slurm said."""
    report = yield
    cluster = getattr(item, "funcargs", {}).get("one_cluster")
    if call.when == "call" and report.failed and cluster is not None:
        report.sections.append(("cluster", cluster.logs()))
    return report
