"""One fault of each kind, on two runs side by side: each goes on by itself, and ends as if nothing had happened."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.hurt_run import QUICK, HurtRun, Shape, figures, unbroken
from tests.cluster.waiting import PATIENCE, wait_until

SHAPE = Shape(steps=150)
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--time=30", "--signal=B:USR1@100")
PACE = 3.0
"""Seconds of a step while the other run is waited for: however long that takes, steps are left for the next fault."""


def test_a_run_lives_through_every_fault(cluster: Cluster, tmp_path: Path) -> None:
    whole = unbroken(tmp_path / "whole", SHAPE, 2)
    ranks = HurtRun(cluster, tmp_path / "ranks", SHAPE, *TWO_NODES, "--nodelist=n1,n2", pace=PACE, partition="spot")
    nodes = HurtRun(cluster, tmp_path / "nodes", SHAPE, *TWO_NODES, "--nodelist=n3,n4", pace=PACE, partition="spot")
    ranks.wait_life(1)
    nodes.wait_life(1)
    ranks.wait_steps(SHAPE.interval)

    # A node's power fails; meanwhile a rank of the other run stands still.
    cluster.crash("n4")
    ranks.let_stop(1)
    cluster.wait(nodes.number, {"PENDING"})
    cluster.boot("n4")
    ranks.wait_life(2)
    nodes.wait_life(2)
    text = ranks.said()
    assert re.search(r"missing: rank 1 on n2: no sign of life for \d+ s; last seen in step \d+", text), text
    assert re.search(r"waiting: rank 0 in all_reduce of ranks 0-1 \(.*\.py:\d+", text), text
    assert [event["culprits"] for event in ranks.events("hang")] == [[1]]

    # The cable of a node is pulled; a rank of the other run is killed.
    ranks.let_die(0)
    # Not the first node's: what runs on there of the batch script would meet its next life, and Slurm drain the node.
    cluster.unplug("n4")
    ranks.wait_life(3)
    assert "lost another rank in step" in ranks.said()
    # While that job waits for its node's end: a value that is no number, and the controller anew.
    ranks.poison(1)
    ranks.wait_steps(3)
    assert "rolled back to" in ranks.said()
    cluster.kill_controller()
    ranks.wait_steps(3)
    assert ranks.lives() == 3
    cluster.wait(nodes.number, {"PENDING"})
    cluster.plug("n4")
    cluster.report_in("n4")
    nodes.wait_life(3)

    # Another job takes the nodes; the time of the other is nearly over.
    urgent = cluster.sbatch("--partition=urgent", "--nodelist=n1,n2", "--exclusive", "--wrap=sleep 1", cwd=tmp_path)
    nodes.shorten_time()
    cluster.wait(urgent, {"COMPLETED"})
    stopped = "asked to stop by SIGUSR1; it saved after step"
    wait_until("its time is nearly over", lambda: stopped in nodes.said(), otherwise=nodes.said)
    wait_until("Slurm takes its time limit", nodes.give_time_back)
    ranks.wait_life(4)
    assert "asked to stop by SIGTERM; it saved after step" in ranks.said()
    nodes.wait_life(4)

    # One run comes back with another number of nodes.
    nodes.set_pace(QUICK)  # Slurm gives it ten seconds to save
    cluster.controller.run("scancel", str(nodes.number))
    cluster.wait(nodes.number, {"CANCELLED"})
    before = nodes.saved()
    of_one = [option for option in nodes.size if not option.startswith("--node")]
    nodes.submit(*of_one, "--nodes=1", "--nodelist=n3")
    said, _ = whole.communicate(timeout=2 * PATIENCE)
    assert whole.returncode == 0, said
    ended_as(ranks, figures(tmp_path / "whole" / "run"), SHAPE.steps)
    ended_as(nodes, figures(tmp_path / "whole" / "run"), before)


def ended_as(run: HurtRun, expected: list[dict[str, Any]], exact: int) -> None:
    """The run ends, and its figures are those of the unbroken one: bit for bit as far as step `exact`, then nearly.

    Gradient norms of another number of ranks drift apart with the steps since then, losses do not: as they do where
    weights were moved by half a rounding once (benchmarks/node_change.py).
    """
    assert run.finish().exit_code == 0, run.said()
    assert "Traceback" not in run.said(), run.said()
    assert [line["step"] for line in expected] == list(range(1, SHAPE.steps + 1))
    found = figures(run.folder)
    assert found[:exact] == expected[:exact]
    for line, other in zip(found, expected, strict=True):
        drift = 1e-6 if line["step"] <= exact + 50 else 1e-5
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=drift)
        assert line | {"grad_norm": 0} == pytest.approx(other | {"grad_norm": 0}, rel=1e-6)
