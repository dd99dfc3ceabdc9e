"""Where a rank of a run of stations is, for the watchdog: in a message's exchange or in its station's collectives."""

from __future__ import annotations

from dataclasses import replace
from types import FrameType

from alignment.ppo.links import Links
from alignment.ppo.station import Station
from training.survival.heartbeat import Details, Wait
from training.survival.place import details, frames_of, main_frame, shown

EXCHANGE = Links._try.__code__


def whereabouts(station: Station) -> Details:
    """What this rank tells the others once it has not got on for a while; ranks are numbered as in the run.

    torch.distributed counts the ranks of this station from 0, and gives groups of every station the same names.
    """
    frame = main_frame()
    found = details(frame)
    named = f"station {station.number}, group "
    wait = _message(station, frame)
    if wait is None and found.wait is not None:
        first = station.placement.leader(station.number)
        ranks = tuple(first + rank for rank in found.wait.ranks)
        wait = replace(found.wait, group=named + found.wait.group, ranks=ranks)
    return replace(found, wait=wait, sequences={named + name: count for name, count in found.sequences.items()})


def _message(station: Station, frame: FrameType | None) -> Wait | None:
    """The exchange of a message that a main thread waits in."""
    frames = frames_of(frame)
    for place, inner in enumerate(frames):
        if inner.f_code is EXCHANGE:
            other = int(inner.f_locals["other"])
            file = inner.f_code.co_filename
            asked_by = next((one for one in frames[place:] if one.f_code.co_filename != file), inner)
            what = f"an exchange with rank {other} ({station.placement.describe(other)})"
            return Wait(what, shown(asked_by))
    return None
