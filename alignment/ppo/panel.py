"""The judges of one station at work on groups as they arrive."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist

from alignment.ppo.config import Role
from alignment.ppo.judges import Judge, is_holder
from alignment.ppo.links import Message
from alignment.ppo.passes import shared
from alignment.ppo.rows import Rollout
from alignment.ppo.station import JUDGES, Station
from alignment.ppo.timeline import Timeline

ByGroup = list[torch.Tensor]


class Panel:
    """Judges every group that arrives: the i-th one on replica i % dp of each role.

    Args:
        judges: those at this station.
        groups: of an iteration.
    """

    def __init__(self, station: Station, judges: Mapping[Role, Judge], groups: int, timeline: Timeline) -> None:
        self._station, self._judges, self._groups, self._timeline = station, judges, groups, timeline
        self._own: dict[Role, list[tuple[int, torch.Tensor]]] = {role: [] for role in judges}
        self._actor = station.placement.leader(station.placement.station_of("actor"))
        self._is_with_actor = "actor" in station.roles

    def arrived(self, place: int, group: int, rollout: Rollout) -> None:
        """Judge the group that arrived as number `place`; what is found goes to the actor's station."""
        for role, judge in self._judges.items():
            layout = judge.layout
            if layout.coordinates(dist.get_rank()).dp != place % layout.dp:
                continue
            with self._station.grids.use(layout), self._timeline.busy(role, "judge"):
                found = judge.judge(rollout)
            if found is None or not is_holder(layout):
                continue
            if self._is_with_actor:
                self._own[role].append((group, found))
            else:
                self._station.links.send(self._actor, JUDGES[role], Message({"group": group}, {"values": found}))

    def collected(self, role: Role) -> ByGroup:
        """What `role` made of an iteration's groups, in their order, on every rank of the actor's station.
        Collective over it."""
        found: dict[int, torch.Tensor] = {}
        if role in self._judges:
            found |= dict(shared(self._own[role]))
            self._own[role] = []
        else:
            layout = self._station.layout(role)
            for place in range(self._groups):
                source = self._station.placement.holder(role, place % layout.dp)
                message = self._station.hear(source, JUDGES[role])
                found[int(message.notes["group"])] = message.tensors["values"]
        return [found[group] for group in range(self._groups)]
