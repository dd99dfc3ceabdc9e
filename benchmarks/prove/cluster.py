"""`make prove AREA=cluster`: random faults on a real four-node Slurm; needs root and Slurm (`make test-cluster`).
Exits with 3 where a run does not go on by itself, loses more than a checkpoint interval, ends with other figures than
an unbroken run, or where the watchdog names the wrong rank or takes longer than 30 s.

Two runs of four ranks live side by side, each on two nodes. The faults are a shuffled deck; every fault waits until its
run has begun a life and done some steps in it. The campaign can be cut up: `--part K` does the K-th part alone, after
`--minutes` it draws no further fault, `--state` keeps what was found, so that the same command goes on, `--folder`
keeps runs and logs, and `--conclude` judges the states of all parts.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.record import ROOT, write_result
from tests.cluster.cluster import Cluster
from tests.cluster.hurt_run import HurtRun, Shape, figures, unbroken
from tests.cluster.waiting import ClusterError

DECK = {
    "rank stopped": 12,
    "rank asleep": 8,
    "rank killed": 10,
    "NaN": 6,
    "node crash": 4,
    "cable pulled": 3,
    "time limit": 4,
    "preemption": 4,
    "controller killed": 4,
}
HANGS = ("rank stopped", "rank asleep")
PART = 22
NAMED_SECONDS = 30.0
RECOVERY_SECONDS = 240.0
SHAPE = Shape(steps=300, interval=5, timeout=10.0, parallel="{tensor_model_parallel_size: 2, sequence_parallel: true}")
RANKS = 4
SIZE = ("--nodes=2", "--ntasks-per-node=2", "--time=30", "--signal=B:USR1@100")
PACE = 0.3


@dataclass(frozen=True)
class Outcome:
    """What one fault did.

    Attributes:
        target: the rank or node that it was done to.
        lost_steps: steps done that had to be done again.
        seconds: until the run stepped again.
        named: ranks that the watchdog named, of a hang.
        named_after: seconds from the fault to that.
    """

    kind: str
    target: str
    at_step: int
    lost_steps: int
    seconds: float
    named: list[int] | None = None
    named_after: float | None = None

    def failure(self) -> str | None:
        """What was promised and did not come."""
        if self.lost_steps > SHAPE.interval:
            return f"{self.lost_steps} steps lost"
        if self.kind in HANGS:
            if self.named != [int(self.target)]:
                return f"the watchdog named {self.named}, not {self.target}"
            if self.named_after is None or self.named_after > NAMED_SECONDS:
                return f"named after {self.named_after} s"
        return None


class Lane:
    """One run on nodes of its own, and the faults done to it, driven in small steps so that two go on at once."""

    def __init__(self, cluster: Cluster, folder: Path, nodes: tuple[str, str], draw: random.Random) -> None:
        self.cluster, self.nodes, self.draw = cluster, nodes, draw
        self.run = HurtRun(
            cluster, folder, SHAPE, *SIZE, f"--nodelist={','.join(nodes)}", pace=PACE, partition="spot"
        )  # fmt: skip
        self.outcomes: list[Outcome] = []
        self.failure: str | None = None

    def live(self, deck: list[str], end: float) -> Generator[None, None, None]:
        """Meet faults from `deck` until it is empty, or the clock says `end`. Yields while it waits."""
        yield from self._until(lambda: self._steps_in_life() >= 1, "the first life steps")
        while deck and time.monotonic() < end:
            kind = deck.pop()
            wanted = self._steps_in_life() + self.draw.randint(1, 2 * SHAPE.interval)
            # `wanted` is bound anew only after this round has asked for the last time
            yield from self._until(lambda: self._steps_in_life() >= wanted, "steps before the fault")  # noqa: B023
            yield from self._meet(kind)

    def goes_on(self, living: Generator[None, None, None]) -> bool:
        """One small step of `live`; False where it is over, well or not."""
        try:
            return next(living, "over") is None
        except ClusterError as error:
            self.failure = str(error)
            print(f"{time.strftime('%T')}  {self.nodes[0]}: {self.failure}", flush=True)
            return False

    def _meet(self, kind: str) -> Generator[None, None, None]:
        rank, node = self.draw.randrange(RANKS), self.draw.choice(self.nodes)
        if kind == "cable pulled":
            # What runs on of the batch script on the first node would meet its next life, and Slurm drain the node.
            node = self.nodes[1]
        lives, hangs, restarts = self.run.lives(), len(self.run.events("hang")), self.run.job().restarts
        rolled_back = len(self.run.events("rolled_back"))
        on_node = kind in ("node crash", "cable pulled")
        target = node if on_node else "the job" if kind in ("time limit", "preemption", "controller killed") else rank
        done, started, wall = self.run.done(), time.monotonic(), time.time()
        print(f"{time.strftime('%T')}  {self.nodes[0]}: step {done}: {kind}: {target}", flush=True)
        self._do(kind, rank, node)
        if kind == "NaN":
            yield from self._until(lambda: len(self.run.events("rolled_back")) > rolled_back, "the rollback")
            lost = max(0, done - self.run.events("rolled_back")[-1]["to_step"])
        elif kind == "controller killed":
            yield from self._until(lambda: self.run.done() >= done + 3, "steps after it")
            lost = 0
        else:
            if on_node:
                yield from self._until(lambda: not self.run.runs(), "Slurm misses the node")
                self._mend(node)
            if kind == "time limit":
                yield from self._until(lambda: self.run.job().restarts > restarts, "the requeue")
                yield from self._until(self.run.give_time_back, "Slurm takes the time limit")
            yield from self._until(lambda: self.run.lives() > lives, "the next life")
            lost = max(0, done - self.run.events("begin")[-1]["first_step"] + 1)
        yield from self._until(lambda: self._steps_in_life() >= 1, "it steps again")
        named = self.run.events("hang")[hangs:]
        self.outcomes.append(
            Outcome(
                kind,
                str(target),
                done,
                lost,
                round(time.monotonic() - started, 1),
                named[0]["culprits"] if named else None,
                round(named[0]["time"] - wall, 1) if named else None,
            )
        )
        print(f"{time.strftime('%T')}  {self.nodes[0]}: {self.outcomes[-1]}", flush=True)

    def _do(self, kind: str, rank: int, node: str) -> None:
        cluster, run = self.cluster, self.run
        faults: dict[str, Callable[[], Any]] = {
            "rank stopped": lambda: run.stop(rank),
            "rank asleep": lambda: run.send_to_sleep(rank),
            "rank killed": lambda: run.kill(rank),
            "NaN": lambda: run.poison(rank),
            "node crash": lambda: cluster.crash(node),
            "cable pulled": lambda: cluster.unplug(node),
            "time limit": run.shorten_time,
            "preemption": lambda: cluster.sbatch(
                "--partition=urgent", f"--nodelist={','.join(self.nodes)}", "--exclusive", "--wrap=sleep 1"
            ),
            "controller killed": cluster.kill_controller,
        }
        faults[kind]()

    def _mend(self, node: str) -> None:
        if self.cluster.nodes[node].is_up:
            self.cluster.plug(node)
            self.cluster.report_in(node)
        else:
            self.cluster.boot(node)

    def _steps_in_life(self) -> int:
        begun = self.run.events("begin")
        return self.run.done() - begun[-1]["first_step"] + 1 if begun and self.run.runs() else 0

    def _until(self, holds: Callable[[], bool], what: str) -> Generator[None, None, None]:
        end = time.monotonic() + RECOVERY_SECONDS
        while not _answered(holds):
            if time.monotonic() > end:
                raise ClusterError(f"not within {RECOVERY_SECONDS:g} s: {what}\n{self.run.said()}")
            yield


def _answered(holds: Callable[[], bool]) -> bool:
    """Whether it holds; a controller that was just killed gives no answer."""
    try:
        return holds()
    except ClusterError:
        return False


def prove_part(
    folder: Path, deck: list[str], seed: int, expected: list[dict[str, Any]], minutes: float
) -> dict[str, Any]:
    """One cluster, two runs, faults drawn from `deck` for so many minutes; what came of them."""
    draw, pairs = random.Random(seed), (("n1", "n2"), ("n3", "n4"))
    with Cluster(folder / "cluster", shared=(folder, ROOT)) as cluster:
        lanes = [Lane(cluster, folder / nodes[0], nodes, random.Random(draw.random())) for nodes in pairs]
        at_work = [(lane, lane.live(deck, time.monotonic() + 60 * minutes)) for lane in lanes]
        while at_work:
            at_work = [(lane, living) for lane, living in at_work if lane.goes_on(living)]
            time.sleep(0.3)
        for lane in lanes:
            lane.run.set_pace(0.0)
        runs = [ended(lane, expected) for lane in lanes]
        return {"outcomes": [asdict(one) for lane in lanes for one in lane.outcomes], "runs": runs}


def ended(lane: Lane, expected: list[dict[str, Any]]) -> dict[str, Any]:
    """How a run ended, once its faults are over."""
    if lane.failure is None:
        try:
            lane.run.finish(300)
        except ClusterError as error:
            lane.failure = str(error)
    return {
        "failure": lane.failure,
        "equal": figures(lane.run.folder) == expected,
        "checkpoint": verified(lane.run.folder),
        "lives": lane.run.lives(),
        "tracebacks": lane.run.said().count("Traceback"),
    }


def verified(run: Path) -> bool:
    """Whether every file of the last checkpoint is what was written."""
    checkpoint = run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()
    command = [sys.executable, "-m", "launch", "ckpt", "verify", str(checkpoint)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, timeout=120, check=False).returncode == 0


def reference(folder: Path) -> list[dict[str, Any]]:
    """The figures of the run without faults."""
    process = unbroken(folder, SHAPE, RANKS)
    said, _ = process.communicate(timeout=280)
    if process.returncode != 0:
        raise ClusterError(f"the unbroken run failed:\n{said}")
    return figures(folder / "run")


def main() -> int:
    """Run the parts that are asked for; with all of them, judge and write the result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--part", type=int, help="this part of the deck alone, from 0")
    parser.add_argument("--minutes", type=float, default=60.0, help="draw no further fault of a part after so long")
    parser.add_argument("--state", type=Path, help="file that keeps what was found")
    parser.add_argument("--folder", type=Path, help="runs and logs lie here and stay; otherwise they are removed")
    parser.add_argument("--conclude", type=Path, nargs="+", help="states of all parts: judge them")
    parser.add_argument("--seed", type=int, default=6)
    asked = parser.parse_args()
    if asked.conclude:
        return conclude([json.loads(path.read_text()) for path in asked.conclude])
    if asked.folder:
        asked.folder.mkdir(parents=True, exist_ok=True)
    folder = asked.folder or Path(tempfile.mkdtemp(prefix="prove-cluster-"))
    state_file = asked.state or folder / "state.json"
    state = json.loads(state_file.read_text()) if state_file.exists() else {"found": [], "expected": None}
    if state["expected"] is None:
        state["expected"] = reference(folder / "unbroken")
        state_file.write_text(json.dumps(state))
    if "deck" not in state:
        deck = [kind for kind, count in DECK.items() for _ in range(count)]
        random.Random(asked.seed).shuffle(deck)
        state["deck"] = deck if asked.part is None else deck[asked.part * PART :][:PART]
    while state["deck"]:
        number = len(state["found"])
        now, rest = state["deck"][:PART], state["deck"][PART:]
        place = folder / f"runs-{asked.part or 0}-{number}"
        place.mkdir()
        seed = asked.seed + 100 * (asked.part or 0) + number
        found = prove_part(place, now, seed, state["expected"], asked.minutes)
        state["found"].append(found)
        state["deck"] = now + rest  # what was not drawn is left in `now`
        state_file.write_text(json.dumps(state))
        if asked.part is not None:
            break
    if not asked.folder:
        shutil.rmtree(folder, ignore_errors=True)
    return 0 if asked.part is not None else conclude([state])


def conclude(states: list[dict[str, Any]]) -> int:
    """Judge every fault and run, print and write the figures."""
    found = [part for state in states for part in state["found"]]
    outcomes = [Outcome(**one) for part in found for one in part["outcomes"]]
    runs = [run for part in found for run in part["runs"]]
    failures = [f"{one.kind} at step {one.at_step}: {why}" for one in outcomes if (why := one.failure())]
    undrawn = sorted((Counter(DECK) - Counter(one.kind for one in outcomes)).items())
    failures += [f"{kind}: {count} of {DECK[kind]} are still to be drawn" for kind, count in undrawn]
    failures += [f"run {number} differs from the unbroken one" for number, run in enumerate(runs) if not run["equal"]]
    failures += [f"run {number}: {run['failure'].splitlines()[0]}" for number, run in enumerate(runs) if run["failure"]]
    failures += [f"run {number}: a damaged checkpoint" for number, run in enumerate(runs) if not run["checkpoint"]]
    hangs = [one for one in outcomes if one.kind in HANGS]
    seconds = {kind: [one.seconds for one in outcomes if one.kind == kind] for kind in DECK}
    result = {
        "faults": len(outcomes),
        "by_kind": dict(Counter(one.kind for one in outcomes)),
        "checkpoint_interval": SHAPE.interval,
        "most_steps_lost": max((one.lost_steps for one in outcomes), default=None),
        "runs": len(runs),
        "lives": sum(run["lives"] for run in runs),
        "runs_equal_to_the_unbroken_one": sum(run["equal"] for run in runs),
        "hangs": len(hangs),
        "hangs_named_right": sum(one.failure() is None for one in hangs),
        "watchdog_timeout_seconds": SHAPE.timeout,
        "slowest_naming_seconds": max((one.named_after or 0.0 for one in hangs), default=None),
        "seconds_until_it_steps_again": {kind: [min(some), max(some)] for kind, some in seconds.items() if some},
        "failures": failures,
        "outcomes": [asdict(one) for one in outcomes],
    }
    path = write_result("cluster", result)
    print(json.dumps({name: value for name, value in result.items() if name != "outcomes"}, indent=1))
    print(path)
    return 3 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
