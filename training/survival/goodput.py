"""How much of a run's time was worth it, from its events. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from training.survival.pulse import PRODUCTIVE


@dataclass(frozen=True)
class Goodput:
    """Seconds of a run's wall clock, from its first life's start to its last sign.

    Attributes:
        productive: in steps that stayed.
        checkpoint: the run stood still to save.
        evaluation: on held-out data.
        restart: between lives, and from a life's start to its first step (building the model, loading).
        lost: in steps that had to be done again, and in hangs.
        other: what no event explains.
        lives: starts of the run.
        steps: done and kept.
    """

    productive: float
    checkpoint: float
    evaluation: float
    restart: float
    lost: float
    other: float
    lives: int
    steps: int

    @property
    def wall(self) -> float:
        """All of it."""
        return self.productive + self.checkpoint + self.evaluation + self.restart + self.lost + self.other

    @property
    def share(self) -> float:
        """Productive time over wall time (goodput); 0 for a run that has not begun."""
        return self.productive / self.wall if self.wall else 0.0


@dataclass
class _Stretch:
    """Steps after `first` up to `last`, and the productive seconds that they took."""

    first: int
    last: int
    seconds: float


class _Account:
    """Adds up the events of a run, oldest first."""

    def __init__(self) -> None:
        self.kept: list[_Stretch] = []
        self.lost = self.restart = self.checkpoint = self.evaluation = 0.0
        self.lives = self.step = self._life = 0
        self._spent: dict[str, float] = {}
        self._began = self._last = 0.0
        self._starting = False

    def take(self, event: Mapping[str, Any]) -> None:
        kind, now, life = event["event"], float(event["time"]), int(event["life"])
        if life < self._life:  # it has not noticed yet that another one has begun
            return
        if life > self._life:  # by its number: the line that says so may be lost
            self._live(life, now)
        if kind == "begin":
            self.restart += max(0.0, now - self._began)
            self._starting = False
            self._back_to(int(event["first_step"]) - 1)
            self._spent = dict(event["seconds"])
        elif kind == "progress":
            self._advance(int(event["step"]), event["seconds"])
        elif kind == "rolled_back":
            # What was spent since the last step that was done belongs to the one that went wrong.
            self.lost += max(0.0, self._productive(event["seconds"]) - self._productive(self._spent))
            self.lost += max(0.0, event["seconds"].get("load", 0.0) - self._spent.get("load", 0.0))
            self._spent = dict(event["seconds"])
            self._back_to(int(event["to_step"]))
        elif kind == "hang":
            self.lost += max(0.0, now - self._last)
        self._last = now

    def _live(self, life: int, now: float) -> None:
        if self.lives:
            self.restart += max(0.0, now - self._last)
        self.lives += 1
        self._life, self._began, self._starting, self._spent = life, now, True, {}

    def close(self) -> None:
        """A last life that never reached its first step was a restart."""
        if self._starting:
            self.restart += max(0.0, self._last - self._began)

    def _advance(self, step: int, seconds: Mapping[str, float]) -> None:
        gained = self._productive(seconds) - self._productive(self._spent)
        self.checkpoint += seconds.get("save", 0.0) - self._spent.get("save", 0.0)
        self.evaluation += seconds.get("evaluation", 0.0) - self._spent.get("evaluation", 0.0)
        if step > self.step:
            self.kept.append(_Stretch(self.step, step, gained))
            self._spent = {**seconds, "load": self._spent.get("load", 0.0)}  # loading is a rollback's
            self.step = step
        else:  # time of a step that is not done yet is counted when it is
            self._spent = {**seconds, **{name: self._spent.get(name, 0.0) for name in (*PRODUCTIVE, "load")}}

    def _back_to(self, step: int) -> None:
        """Steps after `step` are lost."""
        while self.kept and self.kept[-1].last > step:
            stretch = self.kept.pop()
            share = min(1.0, (stretch.last - step) / (stretch.last - stretch.first))
            self.lost += share * stretch.seconds
            if share < 1.0:
                self.kept.append(_Stretch(stretch.first, step, (1 - share) * stretch.seconds))
        self.step = step

    @staticmethod
    def _productive(seconds: Mapping[str, float]) -> float:
        return sum(seconds.get(name, 0.0) for name in PRODUCTIVE)


def goodput(events: Sequence[Mapping[str, Any]]) -> Goodput:
    """What the events of a run say (see `training.survival.events`)."""
    account = _Account()
    for event in events:
        account.take(event)
    account.close()
    wall = float(events[-1]["time"]) - float(events[0]["time"]) if events else 0.0
    productive = sum(stretch.seconds for stretch in account.kept)
    known = productive + account.checkpoint + account.evaluation + account.restart + account.lost
    return Goodput(
        productive=productive,
        checkpoint=account.checkpoint,
        evaluation=account.evaluation,
        restart=account.restart,
        lost=account.lost,
        other=max(0.0, wall - known),
        lives=account.lives,
        steps=account.step,
    )
