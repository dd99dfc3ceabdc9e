"""Which ranks compute slower than their equals."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Pace:
    """How fast a rank computed.

    Attributes:
        node: host name.
        stage: of the pipeline: ranks of one stage have equal work.
        seconds: of computation a step; waiting for other ranks is left out.
    """

    rank: int
    node: str
    stage: int
    seconds: float


@dataclass(frozen=True)
class SlowRank:
    """A rank that takes `times` as long as the median of the others it is compared with."""

    pace: Pace
    times: float

    def render(self) -> str:
        """For people."""
        return (
            f"rank {self.pace.rank} on {self.pace.node} computes {self.pace.seconds:.3f} s a step, {self.times:.2f} x"
        )


def slow_ranks(paces: Sequence[Pace], factor: float) -> list[SlowRank]:
    """Ranks whose computation takes more than `factor` times the median of the others of their stage.

    A rank that is alone in its stage is compared with all others: an uneven pipeline shows as a slow rank.
    """
    stages: Mapping[int, list[Pace]] = {
        stage: [pace for pace in paces if pace.stage == stage] for stage in {pace.stage for pace in paces}
    }
    found = []
    for pace in paces:
        equals = stages[pace.stage] if len(stages[pace.stage]) > 1 else paces
        others = [other.seconds for other in equals if other.rank != pace.rank]
        usual = statistics.median(others) if others else 0.0
        if usual > 0 and pace.seconds > factor * usual:
            found.append(SlowRank(pace, pace.seconds / usual))
    return sorted(found, key=lambda slow: -slow.times)
