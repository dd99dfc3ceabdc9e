"""Stations: ranks that some roles share, a world of their own in torch.distributed, and their messages to others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from alignment.ppo.config import Role
from alignment.ppo.links import Kind, Links, Message
from alignment.ppo.placement import Placement
from parallel.grids import Grids
from parallel.layout import ParallelLayout
from training.checkpoint.agreement import from_rank_0

JUDGES: dict[Role, Kind] = {"reference": Kind.REFERENCE, "reward": Kind.REWARD, "critic": Kind.VALUES}
"""Roles that judge, and what they send."""


@dataclass(frozen=True)
class Station:
    """The station of this rank.

    Attributes:
        links: between all ranks of the run.
        grids: of the layouts here.
    """

    placement: Placement
    number: int
    links: Links
    grids: Grids

    @property
    def is_leader(self) -> bool:
        """Whether this rank sends and receives for its station."""
        return dist.get_rank() == 0

    @property
    def roles(self) -> tuple[Role, ...]:
        """What this station does."""
        return self.placement.stations[self.number]

    @property
    def others(self) -> list[int]:
        """Numbers of the other stations."""
        return [number for number in range(len(self.placement.stations)) if number != self.number]

    def layout(self, role: Role) -> ParallelLayout:
        """Of a role, here or elsewhere."""
        return self.placement.layouts[role]

    def tell(self, station: int, kind: Kind, message: Message) -> None:
        """From this station's leader to another's."""
        if self.is_leader:
            self.links.send(self.placement.leader(station), kind, message)

    def hear(self, source: int, kind: Kind) -> Message:
        """The next message of rank `source` of the run, on every rank here. Collective over the station."""
        holder: list[Any] = [None]
        if self.is_leader:
            holder[0] = self.links.receive(source, kind)
        if dist.get_world_size() > 1:
            dist.broadcast_object_list(holder, src=0)
        message: Message = holder[0]
        return message

    def agreed(self, ask: Callable[[], tuple[int, str]]) -> tuple[int, str]:
        """What `ask` returns on rank 0 of the run, on every rank of it. Collective over the run."""
        if self.number != 0:
            number, text = self.hear(0, Kind.LIFE).notes["agreed"]
            return number, text
        found: tuple[int, str] = from_rank_0(ask)
        for station in self.others:
            self.tell(station, Kind.LIFE, Message({"agreed": found}))
        return found
