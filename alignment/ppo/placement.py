"""Which ranks of a run do what. Imports no torch: a login node answers in a moment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from alignment.ppo.config import Role
from parallel.layout import ParallelLayout


@dataclass(frozen=True)
class Placement:
    """Which ranks of the run do what.

    Attributes:
        stations: roles of each.
        ranks: how many ranks each has; they are numbered through.
        layouts: of every role, over the ranks of its station.
    """

    stations: tuple[tuple[Role, ...], ...]
    ranks: tuple[int, ...]
    layouts: Mapping[Role, ParallelLayout]

    def station_of(self, role: Role) -> int:
        """Number of the station of `role`."""
        return next(number for number, station in enumerate(self.stations) if role in station)

    def leader(self, station: int) -> int:
        """Rank in the run of a station's first rank."""
        return sum(self.ranks[:station])

    def holder(self, role: Role, replica: int) -> int:
        """Rank in the run that speaks for a replica of `role`."""
        return self.leader(self.station_of(role)) + holder_of(self.layouts[role], replica)

    def station_at(self, rank: int) -> int:
        """Number of the station of a rank of the run."""
        return next(number for number in range(len(self.ranks)) if rank < self.leader(number) + self.ranks[number])

    def explain(self) -> str:
        """All stations, for people."""
        parts = []
        for roles, ranks in zip(self.stations, self.ranks, strict=True):
            played = ", ".join(f"{role} {self.layouts[role].describe()}" for role in roles)
            parts.append(f"{played} on {ranks} rank{'s' if ranks > 1 else ''}")
        return "; ".join(parts)

    def describe(self, rank: int) -> str:
        """A rank's roles, for messages."""
        return ", ".join(self.stations[self.station_at(rank)])


def holder_of(layout: ParallelLayout, replica: int) -> int:
    """The rank in its station that speaks for `replica`."""
    return next(
        rank
        for rank in range(layout.world_size)
        if (here := layout.coordinates(rank)).dp == replica and here.tp == 0 and here.pp == layout.pp - 1
    )
