"""What the watchdog hears of ranks whose station is a world of its own: ranks and groups as the run counts them."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from alignment.ppo.config import ROLES
from alignment.ppo.links import Kind, Message
from alignment.ppo.placement import Placement
from alignment.ppo.station import Station
from alignment.ppo.whereabouts import whereabouts
from parallel.grids import Grids
from parallel.layout import ParallelLayout
from tests.alignment.ppo.cases import rejoin
from tests.ranks import RankPool
from training.survival.heartbeat import Details


def looked_at(folder: Path) -> tuple[Details, tuple[int, str]]:
    """Where this rank is while ranks 0 and 1 wait for a message of rank 2, which is at work until both were seen to."""
    layouts = dict.fromkeys(ROLES, ParallelLayout())
    placement = Placement((("actor", "generation"), ("critic", "reference", "reward")), (2, 1), layouts)
    links = rejoin(placement, 60.0)
    station = Station(placement, placement.station_at(links.rank), links, Grids([], 1))
    seen: list[Details] = []
    watch = threading.Thread(target=lambda: seen.append(_once_waiting(station, folder / str(links.rank))))
    if station.number == 0:
        watch.start()
        assert station.hear(2, Kind.PLAN).notes == {"step": 3}
        watch.join()
    else:
        while len(list(folder.iterdir())) < 2:
            sum(range(1000))
        seen.append(whereabouts(station))
        links.send(0, Kind.PLAN, Message({"step": 3}))
    agreed = station.agreed(lambda: (7, "a folder"))  # asked on rank 0 alone
    if station.number == 0:
        station.hear(2, Kind.PLAN)  # rank 2 has heard
    else:
        links.send(0, Kind.PLAN, Message())
    links.finish()
    return seen[0], agreed


def _once_waiting(station: Station, seen: Path) -> Details:
    while (details := whereabouts(station)).wait is None:
        time.sleep(0.01)
    seen.touch()
    return details


def test_ranks_are_named_as_the_run_counts_them(ranks: RankPool, tmp_path: Path) -> None:
    leader, second, other = ranks.run(3, looked_at, tmp_path)
    assert [agreed for _, agreed in (leader, second, other)] == [(7, "a folder")] * 3
    waits = [details.wait for details, _ in (leader, second, other)]
    assert waits[0] is not None and waits[1] is not None and waits[2] is None
    assert waits[0].operation == "an exchange with rank 2 (critic, reference, reward)"
    assert waits[0].asked_by.startswith("ppo/station.py:")
    assert waits[1].operation == "broadcast_object_list" and waits[1].ranks == (0, 1)
    assert waits[1].group.startswith("station 0, group ")
    assert all(name.startswith("station 1, group ") for name in other[0].sequences)
