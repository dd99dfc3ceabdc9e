"""Where a run's time went: from its events, over lives, rollbacks and hangs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.training.test_watchers import record
from training.survival.events import RunEvents, append_event, lives_before, read_events
from training.survival.goodput import goodput
from training.survival.pulse import Pulse


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Run:
    """A run that is driven by hand: every second of it is accounted for here, too."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.clock = folder, Clock()

    def live(self, first_step: int, load: float = 2.0) -> None:
        number = lives_before(self.folder) + 1
        append_event(self.folder, number, "life", self.clock.now, ranks=4)
        self.pulse = Pulse(self.clock)
        self.events = RunEvents(self.folder, number, self.pulse, self.clock)
        self.clock.now += 1.0
        self.pulse.mark("load", 0)
        self.clock.now += load
        self.events.begin(first_step, 100)

    def steps(self, first: int, last: int, seconds: float = 1.0) -> None:
        for step in range(first, last + 1):
            self.pulse.mark("forward and backward", step)
            self.clock.now += 0.75 * seconds
            self.pulse.mark("optimizer")
            self.clock.now += 0.25 * seconds
            self.pulse.mark("agreement")
            self.events.step_done(record(step))

    def save(self, step: int, seconds: float = 0.5) -> None:
        self.pulse.mark("save")
        self.clock.now += seconds
        self.events.event(f"step {step}: saved")

    def said(self) -> dict[str, Any]:
        found = goodput(read_events(self.folder))
        assert found.wall == pytest.approx(read_events(self.folder)[-1]["time"] - 100.0, abs=1e-2)
        return {name: round(getattr(found, name), 2) for name in found.__dataclass_fields__}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def test_an_unbroken_run(run: Run) -> None:
    run.live(1)
    run.steps(1, 10)
    run.save(10)
    run.pulse.mark("evaluation")
    run.clock.now += 2.0
    run.steps(11, 20)
    run.events.end()
    assert run.said() == {"productive": 20.0, "checkpoint": 0.5, "evaluation": 2.0, "restart": 3.0, "lost": 0.0,
                          "other": 0.0, "lives": 1, "steps": 20}  # fmt: skip


def test_steps_past_the_checkpoint_of_a_killed_life_are_lost(run: Run) -> None:
    run.live(1)
    run.steps(1, 10)
    run.save(10)
    run.steps(11, 17)
    run.clock.now += 30.0  # killed, and in the queue
    run.live(11)
    run.steps(11, 20)
    run.events.end()
    said = run.said()
    assert (said["productive"], said["checkpoint"], said["lives"], said["steps"]) == (20.0, 0.5, 2, 20)
    # Of the seven lost steps the last two came after the last line; they are part of the time without a sign.
    assert said["lost"] + said["restart"] == 7.0 + 30.0 + 3.0 + 3.0 and 5.0 <= said["lost"] <= 7.0


def test_of_steps_between_two_lines_only_those_past_the_checkpoint_are_lost(run: Run) -> None:
    run.live(1)
    run.steps(1, 11)  # lines after steps 1, 6 and 11
    run.live(9)
    run.steps(9, 19)
    run.events.end()
    said = run.said()
    assert (said["productive"], said["lost"], said["steps"]) == (19.0, 3.0, 19)


def test_a_rollback_loses_its_steps_and_the_loading(run: Run) -> None:
    run.live(1)
    run.steps(1, 10)
    run.save(10)
    run.steps(11, 13)
    run.pulse.mark("forward and backward", 14)
    run.clock.now += 1.0
    run.pulse.mark("load")
    run.clock.now += 2.0
    run.events.rolled_back(10)
    run.steps(11, 20)
    run.events.end()
    said = run.said()
    assert (said["productive"], said["lost"], said["other"], said["steps"]) == (20.0, 3.0 + 1.0 + 2.0, 0.0, 20)


def test_a_hang_is_lost_until_the_watchdog_ends_it(run: Run) -> None:
    run.live(1)
    run.steps(1, 5)
    run.clock.now += 60.0
    append_event(run.folder, 1, "hang", run.clock.now, text="rank 1", culprits=[1], step=6)
    run.clock.now += 10.0
    run.live(1)
    run.steps(1, 5)
    run.events.end()
    said = run.said()
    assert (said["productive"], said["lost"], said["restart"]) == (5.0, 5.0 + 60.0, 3.0 + 10.0 + 3.0)


def test_a_life_that_never_began_is_a_restart(run: Run) -> None:
    run.live(1)
    run.steps(1, 5)
    run.clock.now += 7.0
    append_event(run.folder, 2, "life", run.clock.now, ranks=4)
    assert run.said()["restart"] == 3.0 + 4.0 + 7.0  # the last line is of step 1


def test_a_line_that_a_crash_cut_short_is_left_out_and_not_continued(tmp_path: Path) -> None:
    append_event(tmp_path, 1, "life", 1.0)
    path = tmp_path / "events.jsonl"
    path.write_text(path.read_text() + '{"time": 2.0, "li')
    assert len(read_events(tmp_path)) == 1
    append_event(tmp_path, 2, "life", 3.0)
    assert [event["life"] for event in read_events(tmp_path)] == [1, 2]


def test_nothing_is_known_of_a_run_without_events(tmp_path: Path) -> None:
    found = goodput(read_events(tmp_path))
    assert (found.wall, found.share, found.lives) == (0.0, 0.0, 0)


def test_reading_is_a_phase_of_its_own() -> None:
    clock = Clock()
    pulse = Pulse(clock)
    pulse.mark("forward and backward", 1)

    def items() -> Any:
        for item in "ab":
            clock.now += 2.0
            yield item

    for _ in pulse.reading(items()):
        clock.now += 1.0
    assert pulse.seconds() == {"start": 0.0, "forward and backward": 2.0, "data": 4.0}
    assert pulse.position.phase == "forward and backward" and pulse.position.step == 1


def test_a_clock_that_is_set_back_does_not_stop_the_account(run: Run) -> None:
    run.live(1)
    run.steps(1, 10)
    wall = Clock()
    wall.now = run.clock.now - 3600.0
    run.events._clock = wall
    run.steps(11, 30)
    assert read_events(run.folder)[-1]["step"] > 25


def test_a_life_whose_first_line_was_lost_is_one_all_the_same(run: Run) -> None:
    run.live(1)
    run.steps(1, 5)
    run.clock.now += 10.0
    run.live(1)
    run.steps(1, 5)
    run.events.end()
    events = read_events(run.folder)
    whole = goodput(events)
    firsts = [number for number, event in enumerate(events) if event["event"] == "life"]
    without_second = goodput([event for number, event in enumerate(events) if number != firsts[1]])
    assert (without_second.lives, without_second.productive, without_second.wall) == (2, whole.productive, whole.wall)
    assert without_second.restart == pytest.approx(whole.restart)
    without_first = goodput(events[1:])
    assert (without_first.lives, without_first.restart) == (2, pytest.approx(whole.restart - 3.0))


def test_what_an_older_life_still_says_when_another_has_begun_does_not_count(run: Run) -> None:
    run.live(1)
    run.steps(1, 5)
    older = run.events
    run.live(1)
    run.steps(1, 10)
    run.events.event("all of it is written")
    before = goodput(read_events(run.folder))
    older.step_done(record(12))
    append_event(run.folder, 1, "hang", run.clock.now, text="rank 1", culprits=[1], step=6)
    assert goodput(read_events(run.folder)) == before
