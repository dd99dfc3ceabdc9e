"""The watching thread: whom it names on real ranks, when it keeps still, what it leaves for others."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from launch.life import _leave, _lost
from launch.world import World
from tests.ranks import RankPool
from training.survival.config import WatchdogConfig
from training.survival.events import append_event
from training.survival.heartbeat import Beat, Details, Wait, Who, path_of, read_beat, write_beat
from training.survival.processes import end_stopped, own_processes, start_of, state_of
from training.survival.pulse import Pulse
from training.survival.watchdog import VERDICT, Watchdog

CONFIG = WatchdogConfig(timeout_seconds=20.0, slow_timeout_seconds=40.0)
WAITS = Details(Wait("all_reduce", "a.py:1 f", "world", (0, 1)), ())


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


def me(rank: int = 0) -> Who:
    return Who(rank, rank, "n1", os.getpid(), own_processes(), start_of(os.getpid()))


def other(folder: Path, number: int, details: Details | None = WAITS, rank: int = 1) -> None:
    who = Who(rank, rank, "n2", 4711, "elsewhere", "1")
    write_beat(folder, Beat(who, number, 3, "agreement", 15.0, details))


@dataclass
class Watched:
    """A watchdog of rank 0 of 2, driven by hand."""

    folder: Path
    clock: Clock = field(default_factory=Clock)
    config: WatchdogConfig = CONFIG

    def __post_init__(self) -> None:
        self.pulse = Pulse(self.clock)
        self.pulse.mark("forward and backward", 3)
        self.dog = Watchdog(self.pulse, self.config, self.folder, me(), 2, lambda _: None)
        self.dog._asleep.set()  # no waiting in what is driven by hand

    def look_after(self, seconds: float) -> str | None:
        self.clock.now += seconds
        return self.dog.look(self.clock.now)


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    return Watched(tmp_path)


def test_a_silent_rank_is_named_after_the_timeout_and_not_before(watched: Watched) -> None:
    other(watched.folder, 1, None)
    assert [watched.look_after(5) for _ in range(3)] == [None] * 3
    said = watched.look_after(6)
    assert said is not None and "rank 1 on n2: no sign of life" in said and "step 3" in said
    assert json.loads((watched.folder / VERDICT).read_text())["culprits"].keys() == {"1"}


def test_a_run_that_gets_on_is_left_alone(watched: Watched) -> None:
    for number in range(20):
        other(watched.folder, number, None)
        watched.pulse.mark("data")
        assert watched.look_after(5) is None
    beat = read_beat(watched.folder, 0)
    assert beat is not None and beat.number == 20 and beat.details is None


def test_another_rank_that_gets_on_is_waited_for_but_not_for_ever(watched: Watched) -> None:
    watched.dog._whereabouts = lambda: WAITS
    said = None
    for number in range(11):
        assert said is None, number
        other(watched.folder, number, None)
        said = watched.look_after(5)
    for number in range(11, 14):
        other(watched.folder, number, None)
        said = said or watched.look_after(5)
    assert said is not None and "the run hangs" in said
    assert "missing: rank 1 on n2: it gets on while others wait for it, in step 3, agreement" in said


def test_saving_may_take_longer(watched: Watched) -> None:
    watched.pulse.mark("save")
    for number in range(7):
        other(watched.folder, number)
        assert watched.look_after(5) is None
    assert watched.look_after(6) is not None


def test_a_verdict_of_another_rank_ends_this_one_too(watched: Watched) -> None:
    other(watched.folder, 1)
    (watched.folder / VERDICT).write_text(json.dumps({"text": "rank 1 did it"}))
    assert watched.look_after(5) is None  # it gets on: whatever lies there does not concern it
    assert watched.look_after(6) == "rank 1 did it"


def test_a_rank_whose_life_is_over_ends(watched: Watched) -> None:
    assert watched.look_after(1) is None
    path_of(watched.folder, 0).unlink()
    watched.folder.rmdir()
    said = [watched.look_after(1) for _ in range(3)]
    assert said[:2] == [None, None] and said[2] is not None and "another one has begun" in said[2]


class Sleeps:
    """An event whose waits take the given seconds of a clock; afterwards it is set."""

    def __init__(self, clock: Clock, seconds: list[float]) -> None:
        self.clock, self.seconds = clock, seconds

    def wait(self, _pause: float) -> bool:
        if not self.seconds:
            return True
        self.clock.now += self.seconds.pop(0)
        return False


def test_a_rank_that_was_itself_stopped_does_not_judge_by_what_it_missed(watched: Watched) -> None:
    said: list[str] = []
    watched.dog._leave = said.append
    other(watched.folder, 1, None)
    for seconds, ends in (([1.0, 1.0, 60.0, 1.0, 1.0, 1.0], False), ([1.0] * 30, True)):
        watched.dog._asleep = Sleeps(watched.clock, seconds)  # type: ignore[assignment]  # stands in for the event
        watched.dog._watch()
        assert bool(said) == ends
    assert "rank 1 on n2: no sign of life" in said[0]


@pytest.mark.parametrize(("is_there", "code"), [(True, 75), (False, 1)])
def test_a_run_that_another_start_took_over_is_not_started_again(
    is_there: bool, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heartbeats = tmp_path / "life-0001"
    if is_there:
        heartbeats.mkdir()
    monkeypatch.setattr("launch.life.os._exit", sys.exit)
    with pytest.raises(SystemExit) as ended:
        _leave(World(1, 2, 1), heartbeats, "why")
    assert ended.value.code == code


def test_a_hung_rank_ends_where_the_file_system_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_dir", failing(errno.ESTALE))
    monkeypatch.setattr("launch.life.os._exit", sys.exit)
    with pytest.raises(SystemExit) as ended:
        _leave(World(1, 2, 1), Path("life-0001"), "why")
    assert ended.value.code == 75


def test_a_lost_peer_that_says_nothing_is_told_too() -> None:
    said = str(_lost(World(1, 2, 1), "lost another rank", dist.DistBackendError()))
    assert "rank 1" in said and "DistBackendError" in said


def test_a_torn_heartbeat_is_no_heartbeat(tmp_path: Path) -> None:
    other(tmp_path, 1)
    whole = path_of(tmp_path, 1).read_bytes()
    assert read_beat(tmp_path, 1) == Beat(Who(1, 1, "n2", 4711, "elsewhere", "1"), 1, 3, "agreement", 15.0, WAITS)
    path_of(tmp_path, 1).write_bytes(whole[:50])
    assert read_beat(tmp_path, 1) is None and read_beat(tmp_path, 7) is None


def test_a_disk_that_is_full_does_not_end_a_run_that_gets_on(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_folder: Path, _beat: Beat) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("training.survival.watchdog.write_beat", full)
    assert watched.look_after(1) is None


def test_a_stopped_rank_is_killed_and_one_that_runs_is_not() -> None:
    """Or it would hold its job's step, or its port, until somebody wakes it up."""
    ranks = [subprocess.Popen(["sleep", "60"]) for _ in range(2)]
    try:
        ranks[0].send_signal(signal.SIGSTOP)
        whos = [Who(number, 0, "n1", one.pid, own_processes(), start_of(one.pid)) for number, one in enumerate(ranks)]
        while state_of(whos[0], own_processes()) != "stopped":
            time.sleep(0.01)
        for who in whos:
            end_stopped(who, own_processes())
        assert ranks[0].wait(300) == -signal.SIGKILL
        assert ranks[1].poll() is None
    finally:
        for one in ranks:
            one.kill()
            one.wait(300)


def test_the_kernel_tells_of_processes_of_this_machine_only() -> None:
    who = me()
    assert state_of(who, own_processes()) is None
    assert state_of(who, "elsewhere") is None
    gone = Who(0, 0, "n1", who.pid, who.processes, "1")  # the number was used again
    assert state_of(gone, own_processes()) == "dead"


def as_rank(folder: str) -> tuple[str, dict[str, Any]]:
    """Three ranks reduce; rank 1 does not come. What the watchdog of this rank says, and what it had told."""
    rank, folder_path = dist.get_rank(), Path(folder)
    said: list[str] = []
    is_over = threading.Event()
    pulse = Pulse()

    def leave(text: str) -> None:
        said.append(text)
        is_over.set()

    dist.barrier()
    with Watchdog(pulse, WatchdogConfig(timeout_seconds=5.0), folder_path, me(rank), 3, leave):
        pulse.mark("optimizer", 5)
        if rank == 1:
            a_long_computation(is_over)
        dist.all_reduce(torch.ones(1))
        is_over.wait(200)
    beat = read_beat(folder_path, rank)
    assert beat is not None and beat.details is not None
    return said[0], {"wait": beat.details.wait, "sequences": beat.details.sequences}


def a_long_computation(is_over: threading.Event) -> None:
    end = time.monotonic() + 200
    while not is_over.is_set() and time.monotonic() < end:
        time.sleep(0.01)


def test_real_ranks_name_the_one_that_is_at_work(ranks: RankPool, tmp_path: Path) -> None:
    answers = ranks.run(3, as_rank, str(tmp_path))
    for text, _ in answers:  # rank 0's, unless it was so slow that another judged for itself
        assert "missing: rank 1" in text and text.count("missing") == 1
        assert "a_long_computation" in text and "step 5, optimizer" in text
        assert "waiting: ranks 0, 2 in all_reduce of ranks 0-2" in text and "test_watchdog.py" in text
    told = answers[0][1]
    assert told["wait"].operation == "all_reduce" and told["sequences"]


def test_a_node_that_does_not_answer_delays_no_heartbeat(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, answered = threading.Event(), threading.Event()

    def slow(places: dict[str, tuple[str, int]]) -> list[str]:
        asked.set()
        answered.wait(300)
        return list(places)

    monkeypatch.setattr("training.survival.watchdog.unreachable", slow)
    watched.dog._who = replace(me(), address="10.0.0.1", port=1)
    write_beat(watched.folder, Beat(Who(1, 0, "n2", 1, "elsewhere", "1", "10.0.0.2", 2), 1, 3, "data", 0.0))
    assert watched.look_after(11) is None and asked.wait(300)
    assert watched.look_after(1) is None
    beat = read_beat(watched.folder, 0)
    assert beat is not None and beat.number == 2 and beat.details is not None and beat.details.unreachable == ()
    answered.set()
    wait = time.monotonic() + 300
    while not (watched.dog._details and watched.dog._details.unreachable) and time.monotonic() < wait:
        time.sleep(0.01)
    watched.look_after(1)
    beat = read_beat(watched.folder, 0)
    assert beat is not None and beat.details is not None and beat.details.unreachable == ("n2",)


def failing(number: int) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def test_a_hang_on_a_full_disk_ends_too(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk is what may have made the run hang: neither the verdict nor the event can be written."""
    monkeypatch.setattr("training.survival.watchdog.write_text", failing(errno.ENOSPC))
    (watched.folder / "events.jsonl").symlink_to("/dev/full")
    watched.dog._decided = lambda _: append_event(watched.folder, 1, "hang")
    other(watched.folder, 1)
    assert watched.look_after(11) is None
    said = watched.look_after(10)
    assert said is not None and "the run hangs in step 3" in said


def test_a_file_that_cannot_be_read_does_not_end_the_watch(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network file system that does not answer for a while: the watch goes on, and names who hangs when it does."""
    other(watched.folder, 1)
    with monkeypatch.context() as broken:
        broken.setattr(Path, "read_bytes", failing(errno.ESTALE))
        broken.setattr(Path, "read_text", failing(errno.EIO))
        assert watched.look_after(11) is None
    other(watched.folder, 2)
    said = watched.look_after(10)
    assert said is not None and "waiting: ranks 1 in" not in said and "the run hangs" in said


def test_a_rank_that_still_loads_has_its_own_patience(tmp_path: Path) -> None:
    """Rank 0 has loaded and waits in its first step; rank 1 loads on: its own limit counts, not the waiting one's."""
    watched = Watched(tmp_path, config=WatchdogConfig(timeout_seconds=20.0, slow_timeout_seconds=200.0))
    watched.dog._whereabouts = lambda: WAITS
    at_work = Details(None, ("training/checkpoint/tensors.py:1 read_tensors",))
    number = 0
    for stalled in range(0, 200, 5):
        number += 1
        who = Who(1, 1, "n2", 4711, "elsewhere", "1")
        beat = Beat(who, number, 0, "load", float(stalled), at_work if stalled >= 100 else None)
        write_beat(watched.folder, beat)
        assert watched.look_after(5) is None, stalled
    write_beat(watched.folder, Beat(who, number + 1, 0, "load", 200.0, at_work))
    said = watched.look_after(5)
    assert said is not None and "missing: rank 1 on n2: it is at training/checkpoint/tensors.py:1" in said
