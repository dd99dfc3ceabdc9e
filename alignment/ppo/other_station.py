"""What a station without the actor does: follow orders."""

from __future__ import annotations

from alignment.ppo.cast import Cast
from alignment.ppo.controller import Order
from alignment.ppo.critic_turn import critic_learns
from alignment.ppo.links import Kind, Message
from alignment.ppo.panel import Panel
from alignment.ppo.rows import Rollout
from alignment.ppo.sampling import arriving
from alignment.ppo.station import Station
from alignment.ppo.timeline import Timeline


class OtherStation:
    """Samples, judges and fits values as rank 0 orders."""

    def __init__(self, station: Station, cast: Cast, timeline: Timeline) -> None:
        self._station, self._cast, self._timeline = station, cast, timeline
        self._panel = Panel(station, cast.judges, cast.groups, timeline)
        self._controller = station.placement.leader(station.placement.station_of("actor"))

    def run(self) -> None:
        """Until rank 0 says that there is no more. Collective over the station."""
        self._resume()
        while True:
            notes = self._station.hear(self._controller, Kind.ORDER).notes
            stamps = notes.pop("stamps")
            order = Order(**notes)
            if order.stop:
                break
            self._timeline.iteration = order.batch
            self._play(order, stamps)
            self._timeline.taken()
        self._station.links.finish()

    def _play(self, order: Order, stamps: dict[str, int]) -> None:
        cast, station = self._cast, self._station
        if cast.sampler is not None:
            cast.sampler.take_weights(stamps, order.version)
            arrivals = iter(cast.sampler.sample(order, keep=cast.keeps_answers_of(order.batch)))
        else:
            arrivals = arriving(station, cast.groups)
        groups: dict[int, Rollout] = {}
        for place, (group, rollout) in enumerate(arrivals):
            groups[group] = rollout
            self._panel.arrived(place, group, rollout)
        if cast.critic is not None:
            self._learn(order.batch, Rollout.joined([groups[group] for group in sorted(groups)]))

    def _learn(self, batch: int, rollout: Rollout) -> None:
        cast, station = self._cast, self._station
        message = station.hear(self._controller, Kind.RETURNS)
        figures = critic_learns(station, cast, self._timeline, rollout, message.tensors, batch)
        busy = {f"busy_{role}": seconds for role, seconds in self._timeline.taken().items()}
        station.tell(station.placement.station_of("actor"), Kind.CRITIC, Message(figures | busy))
        if message.notes["save"] and cast.critic is not None and cast.critic_kept is not None:
            with station.grids.use(cast.critic.state.layout):
                cast.critic_kept.save(cast.critic, batch + 1, int(message.notes["tokens"]), {})

    def _resume(self) -> None:
        cast, station = self._cast, self._station
        if cast.critic is None or cast.critic_kept is None:
            return
        with station.grids.use(cast.critic.state.layout):
            found = cast.critic_kept.newest(may_resume=cast.sections.checkpoint.resume)
            station.tell(0, Kind.PLAN, Message({"step": 0 if found is None else found[0]}))
            step = int(station.hear(self._controller, Kind.PLAN).notes["step"])
            if step:
                cast.critic_kept.load(cast.critic, step)
