"""The critic, as the actor's station deals with it: on the same ranks, at another station, or not there at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from alignment.ppo.algorithm import Lesson
from alignment.ppo.cast import Cast
from alignment.ppo.learner import Update, mean
from alignment.ppo.links import Kind, Message
from alignment.ppo.rows import Rollout, Tensors
from alignment.ppo.station import Station
from alignment.ppo.timeline import Timeline
from parallel.data_parallel import gather_updated_parameters


def critic_learns(
    station: Station, cast: Cast, timeline: Timeline, rollout: Rollout, given: Tensors, iteration: int
) -> dict[str, float]:
    """All epochs over a batch; the figures. Collective over the station."""
    critic = cast.critic
    assert critic is not None
    updates: list[Update] = []
    with station.grids.use(critic.state.layout), timeline.busy("critic", "learn"):
        for epoch in range(cast.ppo.epochs):
            updates += critic.epoch(rollout, given, cast.ppo.mini_batches, iteration, epoch)
        gather_updated_parameters(critic.state.wrapped, critic.state.layout)
    return {
        "value_loss": mean([one.loss.mean for one in updates]),
        "value_grad_norm": mean([one.gradient_norm for one in updates]),
        "value_clip_fraction": mean([one.loss.further["value_clip_fraction"] for one in updates]),
        "critic_lr": critic.rate(iteration),
    }


class CriticTurn(Protocol):
    """The critic's part of an iteration. Every method is collective over the actor's station."""

    @property
    def ends_later(self) -> bool:
        """Whether it may still learn when the actor has."""

    def before_actor(self, lesson: Lesson, notes: dict[str, Any]) -> None:
        """The actor is about to learn. `notes`: whether to save afterwards, and the run's tokens."""

    def after_actor(self, lesson: Lesson, notes: dict[str, Any], iteration: int) -> dict[str, float]:
        """The actor has learned; figures that are known by then."""

    def late_figures(self) -> dict[str, float]:
        """The rest of the figures of the last iteration."""

    def save(self, done: int, tokens: int) -> None:
        """Before the actor's own checkpoint, which is the last to appear."""

    def meet(self, done: int) -> int:
        """Load the newest state that the critic has as well as the actor, who has `done`; its number."""


@dataclass(frozen=True)
class NoCritic:
    """The algorithm has none."""

    ends_later = False

    def before_actor(self, lesson: Lesson, notes: dict[str, Any]) -> None: ...

    def after_actor(self, lesson: Lesson, notes: dict[str, Any], iteration: int) -> dict[str, float]:
        return {}

    def late_figures(self) -> dict[str, float]:
        return {}

    def save(self, done: int, tokens: int) -> None: ...

    def meet(self, done: int) -> int:
        return done


@dataclass(frozen=True)
class CriticHere:
    """On the actor's ranks: it learns after the actor."""

    station: Station
    cast: Cast
    timeline: Timeline

    ends_later = False

    def before_actor(self, lesson: Lesson, notes: dict[str, Any]) -> None: ...

    def after_actor(self, lesson: Lesson, notes: dict[str, Any], iteration: int) -> dict[str, float]:
        return critic_learns(self.station, self.cast, self.timeline, lesson.rollout, lesson.critic, iteration)

    def late_figures(self) -> dict[str, float]:
        return {}

    def save(self, done: int, tokens: int) -> None:
        critic, kept = self.cast.critic, self.cast.critic_kept
        assert critic is not None and kept is not None
        with self.station.grids.use(critic.state.layout):
            kept.save(critic, done, tokens, {})

    def meet(self, done: int) -> int:
        critic, kept = self.cast.critic, self.cast.critic_kept
        assert critic is not None and kept is not None
        with self.station.grids.use(critic.state.layout):
            found = kept.newest(may_resume=self.cast.sections.checkpoint.resume)
            done = min(done, 0 if found is None else found[0])
            if done:
                kept.load(critic, done)
        return done


@dataclass(frozen=True)
class CriticElsewhere:
    """At another station, which has sampled or received the same answers and lacks returns alone.

    Attributes:
        stream: it learns at the same time as the actor; else after it.
    """

    station: Station
    stream: bool

    @property
    def ends_later(self) -> bool:
        return self.stream

    def before_actor(self, lesson: Lesson, notes: dict[str, Any]) -> None:
        if self.stream:
            self._send(lesson, notes)

    def after_actor(self, lesson: Lesson, notes: dict[str, Any], iteration: int) -> dict[str, float]:
        if not self.stream:
            self._send(lesson, notes)
        return {}

    def late_figures(self) -> dict[str, float]:
        return self.station.hear(self.station.placement.leader(self._number), Kind.CRITIC).notes

    def save(self, done: int, tokens: int) -> None:
        """It was told with the returns."""

    def meet(self, done: int) -> int:
        leader = self.station.placement.leader(self._number)
        done = min(done, int(self.station.hear(leader, Kind.PLAN).notes["step"]))
        self.station.tell(self._number, Kind.PLAN, Message({"step": done}))
        return done

    @property
    def _number(self) -> int:
        return self.station.placement.station_of("critic")

    def _send(self, lesson: Lesson, notes: dict[str, Any]) -> None:
        self.station.tell(self._number, Kind.RETURNS, Message(notes, lesson.critic))


def critic_turn(station: Station, cast: Cast, timeline: Timeline) -> CriticTurn:
    """Of a run, seen from the actor's station."""
    if "critic" not in station.placement.layouts:
        return NoCritic()
    if cast.critic is not None:
        return CriticHere(station, cast, timeline)
    return CriticElsewhere(station, cast.ppo.stream)
