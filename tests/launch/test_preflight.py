"""The look at the nodes before the first step: what it finds, whom it blames, how ranks learn of it."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from foundation.errors import FaultError
from launch.preflight.check import Check, look_before_step_0, number_of_nodes, own_versions
from launch.preflight.judgement import Node, unfit
from launch.preflight.links import Answering, Leader, Links, find_links
from launch.world import World
from training.survival.config import PreflightConfig

CONFIG = PreflightConfig(nodes="always", timeout_seconds=200.0, min_free_gib=0.0)
FAST = 1e9


def node(name: str, free: int = 100 << 30, **versions: str) -> Node:
    return Node(name, {"torch": "2.13", "orthant": "abc"} | versions, free)


def link(name: str, *unreachable: str, ahead: float | None = 0.0, rate: float | None = FAST) -> Links:
    return Links(name, unreachable, ahead, 0.001, rate)


def judged(links: list[Links], nodes: list[Node] | None = None, **settings: Any) -> dict[str, list[str]]:
    config = PreflightConfig.model_validate({"max_clock_skew_seconds": 5.0} | settings)
    return unfit(nodes or [node(one.node) for one in links], links, config)


def test_nodes_that_are_fit() -> None:
    assert judged([link("n1"), link("n2", ahead=4.9), link("n3", ahead=-4.9)]) == {}


def test_a_clock_that_differs_is_named_also_where_it_is_rank_0s() -> None:
    bad = judged([link("n1"), link("n2", ahead=120.0), link("n3")])
    assert bad == {"n2": ["its clock is 120.0 s ahead of the others"]}
    bad = judged([link("n1"), link("n2", ahead=-60.0), link("n3", ahead=-60.1)])
    assert list(bad) == ["n1"] and "60.0 s ahead" in bad["n1"][0]
    assert list(judged([link("n1"), link("n2", ahead=-6.0)])) == ["n2"]


def test_another_version_is_named_against_the_usual_one() -> None:
    nodes = [node("n1", torch="2.12"), node("n2"), node("n3")]
    assert judged([link("n1"), link("n2"), link("n3")], nodes) == {"n1": ["torch is 2.12 there and 2.13 on the others"]}
    assert list(judged([link("n1"), link("n2")], [node("n1"), node("n2", orthant="def")])) == ["n2"]


def test_a_full_disk_is_named() -> None:
    bad = judged([link("n1"), link("n2")], [node("n1"), node("n2", free=1 << 29)])
    assert list(bad) == ["n2"] and "0.5 GiB" in bad["n2"][0] and "preflight.min_free_gib 1" in bad["n2"][0]


def test_the_node_that_most_cannot_reach_is_named() -> None:
    bad = judged([link("n1", "n3"), link("n2", "n3"), link("n3", "n1", "n2"), link("n4")])
    assert list(bad) == ["n3"] and "n1, n2" in bad["n3"][0]


def test_a_slow_cable_is_blamed_on_the_node_between_two_slow_connections() -> None:
    slow = 1e6
    assert list(judged([link("n1"), link("n2", rate=slow), link("n3")])) == ["n2"]
    assert list(judged([link("n1", rate=slow), link("n2", rate=slow), link("n3")])) == ["n2"]
    assert judged([link("n1", rate=None), link("n2", rate=slow)], min_bandwidth_gb_per_second=0.0) == {}


def test_leaders_measure_each_other() -> None:
    token = b"0123456789abcdef"
    with Answering(token) as here, Answering(token, lambda: time.time() - 30.0) as there:
        leaders = [Leader(0, "n1", "127.0.0.1", here.port), Leader(2, "n2", "127.0.0.1", there.port),
                   Leader(4, "n3", "127.0.0.1", 1)]  # fmt: skip
        found = find_links(leaders[1], leaders, token, bandwidth=False, clock=lambda: time.time() - 30.0)
        assert found.unreachable == ("n3",) and found.bytes_per_second is None
        assert found.clock_ahead == pytest.approx(-30.0, abs=1.0)
        found = find_links(leaders[0], leaders[:2], token, bandwidth=True)
        assert found.clock_ahead == 0.0 and found.bytes_per_second is not None and found.bytes_per_second > 1e6
        assert find_links(leaders[0], leaders, b"another token 16", bandwidth=True).unreachable == ("n2", "n3")


def test_a_connection_that_carries_no_bulk_is_slow_and_not_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small packets pass and large ones are lost, as where a switch has another MTU; or they come too slowly."""

    def lost(_connection: object) -> None:
        raise OSError("timed out")

    monkeypatch.setattr("launch.preflight.links._take_bulk", lost)
    token = b"0123456789abcdef"
    with Answering(token) as here, Answering(token) as there:
        leaders = [Leader(0, "n1", "127.0.0.1", here.port), Leader(2, "n2", "127.0.0.1", there.port)]
        found = [find_links(leader, leaders, token, bandwidth=True) for leader in leaders]
    assert [one.unreachable for one in found] == [(), ()]
    assert "sends 0.0000 GB/s to" in str(judged(found))


def test_a_rank_that_cannot_read_or_write_files_names_its_node(tmp_path: Path) -> None:
    def versions() -> dict[str, str]:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), "/shared/launch/cli.py")

    (said,) = checked(tmp_path, {"versions": versions}, ranks=1)
    assert "rank 0 on n1: Stale file handle" in said and "/shared/launch/cli.py" in said


def checked(folder: Path, *changes: dict[str, Any], ranks: int = 4, come: int | None = None) -> list[str]:
    """What each rank of two to a node is told: "" where all is well."""
    said = [""] * (ranks if come is None else come)

    def run(rank: int) -> None:
        given = {"node": f"n{1 + rank // 2}"} | (changes[rank] if rank < len(changes) else {})
        try:
            Check(given.pop("config", CONFIG), folder, World(rank, ranks, rank % 2), **given).run()
        except FaultError as error:
            said[rank] = str(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(said))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    return said


def test_all_ranks_go_on_where_nodes_are_fit(tmp_path: Path) -> None:
    (tmp_path / "bad_nodes.txt").write_text("n9\n")  # of an earlier start
    assert checked(tmp_path) == [""] * 4
    report = json.loads((tmp_path / "preflight.json").read_text())
    assert [one["name"] for one in report["nodes"]] == ["n1", "n2"] and report["bad"] == {}
    assert report["links"][0]["bytes_per_second"] > 0 and report["links"][1]["clock_ahead"] is not None
    assert not (tmp_path / "bad_nodes.txt").exists()


def test_every_rank_names_the_bad_node_and_the_batch_script_learns_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORTHANT_BAD_NODES", str(tmp_path / "logs" / "bad"))
    bad = {"clock": lambda: time.time() + 99.0, "versions": lambda: own_versions() | {"torch": "1.0"}}
    said = checked(tmp_path, {}, {}, bad)
    assert len(set(said)) == 1 and "1 of 2 nodes is not fit" in said[0]
    assert "n2: torch is 1.0 there" in said[0] and "clock is 99.0 s ahead" in said[0]
    assert "sbatch --exclude=n2" in said[0]
    for path in (tmp_path / "bad_nodes.txt", tmp_path / "logs" / "bad"):
        assert path.read_text() == "n2\n"


def test_what_an_earlier_start_left_is_not_believed(tmp_path: Path) -> None:
    """Started by hand, two starts may look alike; here a rank is there before rank 0 calls."""
    assert checked(tmp_path) == [""] * 4
    (place,) = (tmp_path / "preflight").iterdir()
    said: list[str] = []

    def early() -> None:
        Check(CONFIG, tmp_path, World(1, 2, 0), node="n2").run()
        said.append("on")

    thread = threading.Thread(target=early)
    for name in ("verdict.json", "roster.json"):  # that start died early; one that begins its life leaves nothing
        (place / name).unlink()
    thread.start()
    time.sleep(0.3)
    Check(CONFIG, tmp_path, World(0, 2, 0), node="n1").run()
    thread.join(300)
    assert said == ["on"]


def test_a_rank_of_an_earlier_start_is_not_taken_for_one_of_this(tmp_path: Path) -> None:
    config = PreflightConfig(nodes="always", timeout_seconds=1.0, min_free_gib=0.0)
    done = threading.Event()

    def late() -> None:
        while not done.wait(0.02):
            for place in (tmp_path / "preflight").glob("*"):
                (place / "here-00001.json").write_text(json.dumps({"node": "n2", "token": "older"}))

    thread = threading.Thread(target=late)
    thread.start()
    said = checked(tmp_path, {"config": config}, ranks=2, come=1)
    done.set()
    thread.join(300)
    assert "1 of 2 ranks did not come" in said[0]


def test_ranks_that_do_not_come_are_named(tmp_path: Path) -> None:
    config = PreflightConfig(nodes="always", timeout_seconds=1.0, min_free_gib=0.0)

    def once_the_others_are_there() -> dict[str, str]:
        """What rank 0 says of itself before it counts the ranks."""
        end = time.monotonic() + 300
        while len(list(tmp_path.glob("preflight/*/here-*.json"))) < 2 and time.monotonic() < end:
            time.sleep(0.01)
        return own_versions()

    changes: list[dict[str, Any]] = [{"config": config} for _ in range(3)]
    said = checked(tmp_path, changes[0] | {"versions": once_the_others_are_there}, *changes[1:], come=3)
    assert all("1 of 4 ranks did not come within 1 s: 3; these nodes are there: n1, n2" in one for one in said), said


def test_the_config_says_when_to_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    monkeypatch.setattr(Check, "run", lambda self: looked.append(self.config.nodes))
    for nodes in ("1", "2"):
        monkeypatch.setenv("SLURM_STEP_NUM_NODES", nodes)
        for when in ("never", "several", "always"):
            look_before_step_0(PreflightConfig.model_validate({"nodes": when}), tmp_path, World(0, 4, 0))
    assert looked == ["always", "several", "always"]


def test_nodes_are_counted_as_the_launcher_says() -> None:
    assert number_of_nodes(World(0, 8, 0), {"RANK": "0", "LOCAL_WORLD_SIZE": "4", "SLURM_STEP_NUM_NODES": "9"}) == 2
    assert number_of_nodes(World(0, 8, 0), {"SLURM_STEP_NUM_NODES": "4"}) == 4
    assert number_of_nodes(World(0, 8, 0), {}) == 1
