"""The thread that ends a hung run and says who holds it up.

Collectives block the main thread inside C++, so another thread has to judge; it writes this rank's heartbeat, reads the
others' only when this rank has not got on for a while, and ends the process where the run hangs. A rank that is stopped
or dead cannot end itself: its silence is what the others see, and its launcher ends it when they leave.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from foundation.errors import WorkError
from foundation.files import write_text
from training.survival.config import WatchdogConfig
from training.survival.heartbeat import Beat, Details, Who, read_beat, write_beat
from training.survival.network import unreachable
from training.survival.place import details, is_waiting, main_frame
from training.survival.processes import end_stopped, state_of
from training.survival.pulse import SLOW, Phase, Pulse
from training.survival.verdict import Observed, Verdict, judge

VERDICT = "verdict.json"
SMALL_WORLD = 64
"""Up to so many ranks each one watches all others before it judges; in larger worlds one a node does."""
SAMPLE_SECONDS = 0.1
GONE_AFTER = 3
"""Heartbeats in a row that find no folder: on a network file system a new folder is not seen everywhere at once."""

Leave = Callable[[str], None]
"""Ends this process with a message."""


@dataclass
class _Seen:
    """Another rank's heartbeat, and when it was last a new one."""

    beat: Beat | None
    at: float


class Watchdog:
    """`with Watchdog(...)`: watches this rank and, when it hangs, the others.

    Args:
        folder: of this life's heartbeats, on the file system that all ranks share.
        who: this rank.
        world_size: ranks.
        leave: called in the watching thread; does not return in a real run.
        decided: told of the verdict where this rank is the judge.
        whereabouts: where this rank's main thread is, in the run's numbers of ranks.
        samples: whether to sample what the main thread does, for `compute_share`.
    """

    def __init__(
        self,
        pulse: Pulse,
        config: WatchdogConfig,
        folder: Path,
        who: Who,
        world_size: int,
        leave: Leave,
        *,
        decided: Callable[[Verdict], None] = lambda _: None,
        whereabouts: Callable[[], Details] = details,
        samples: bool = False,
    ) -> None:
        self._pulse, self._config, self._folder = pulse, config, folder
        self._who, self._world_size, self._leave = who, world_size, leave
        self._decided, self._whereabouts, self._samples = decided, whereabouts, samples
        self._beats = self._missed = 0
        self._seen: dict[int, _Seen] = {}
        self._excused_until = 0.0
        self._details: Details | None = None
        self._asleep = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._working = self._looks = 0

    def __enter__(self) -> Watchdog:
        if self._config.enabled:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._asleep.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def take_compute_share(self) -> float | None:
        """The share of time since the last call in which the main thread was at work, not waiting for other ranks.

        None where it is not sampled: on GPUs the main thread waits for its own device as well.
        """
        working, looks = self._working, self._looks
        self._working = self._looks = 0
        return working / looks if looks else None

    def _watch(self) -> None:
        clock, heartbeat = self._pulse.clock, self._config.heartbeat_seconds
        pause = min(SAMPLE_SECONDS, heartbeat) if self._samples else heartbeat
        before = clock()
        due = before
        while not self._asleep.wait(pause):
            now = clock()
            if now - before > pause + self._config.silence_seconds:
                # This process itself stood still: what it did not see in that time says nothing of the others.
                self._excused_until = now
                self._seen.clear()
            before = now
            if self._samples:
                self._sample()
            if now >= due:
                due = now + heartbeat
                said = self.look(now)
                if said is not None:
                    self._leave(said)
                    return

    def _sample(self) -> None:
        if self._pulse.position.phase in SLOW:
            return
        self._looks += 1
        self._working += not is_waiting(main_frame())

    def look(self, now: float) -> str | None:
        """One heartbeat, and one look at the others where this rank hangs; what ends the run, if something does."""
        position = self._pulse.position
        limit = self._limit(position.phase)
        stalled = now - max(position.since, self._excused_until)
        if stalled < 0.5 * limit:
            self._details = None
            self._seen.clear()
        elif self._details is None:
            self._details = self._whereabouts()
            if self._who.local_rank == 0 and self._who.address:
                # In a thread of its own: a node that does not answer takes seconds, and heartbeats must go on.
                threading.Thread(target=self._look_for_cut_off_nodes, args=(self._details,), daemon=True).start()
        if not self._beat(position.step, position.phase, stalled):
            return f"this life of the run is over: another one has begun (its folder {self._folder} is gone)"
        if self._details is None:
            return None
        told = self._verdict_of_others()
        if told is not None:
            return told
        patience = limit * (1.0 if self._is_early() else 1.5)
        if self._is_early() or stalled >= limit:
            self._observe(now)
            if stalled >= patience + self._turn() * 2 * self._config.heartbeat_seconds and self._all_hang(limit, now):
                return self._judge(stalled, now)
        return None

    def _limit(self, phase: Phase) -> float:
        return self._config.slow_timeout_seconds if phase in SLOW else self._config.timeout_seconds

    def _beat(self, step: int, phase: Phase, stalled: float) -> bool:
        """False where this life's folder is gone."""
        self._beats += 1
        try:
            write_beat(self._folder, Beat(self._who, self._beats, step, phase, stalled, self._details))
        except FileNotFoundError:
            self._missed += 1
            return self._missed < GONE_AFTER or self._folder.is_dir()
        except OSError:  # a full disk must not end a run that gets on
            return True
        self._missed = 0
        return True

    def _is_early(self) -> bool:
        return self._world_size <= SMALL_WORLD or self._who.local_rank == 0

    def _turn(self) -> int:
        """Rank 0 judges first; others when it does not."""
        return 0 if self._who.rank == 0 else (1 if self._who.local_rank == 0 else 2)

    def _observe(self, now: float) -> None:
        for rank in range(self._world_size):
            beat, known = read_beat(self._folder, rank), self._seen.get(rank)
            is_new = known is None or known.beat is None or (beat is not None and beat.number != known.beat.number)
            if is_new and (beat is not None or known is None):
                self._seen[rank] = _Seen(beat, now)

    def _all_hang(self, limit: float, now: float) -> bool:
        """Whether nobody gets on: every rank says so, or says nothing; one that gets on is waited for, not for ever."""
        others = [seen.beat for rank, seen in self._seen.items() if rank != self._who.rank
                  and now - seen.at < self._config.silence_seconds]  # fmt: skip
        moving = [beat for beat in others if beat is not None and self._gets_on(beat)]
        stalled = now - max(self._pulse.position.since, self._excused_until)
        return not moving or stalled >= 3 * max(limit, *(self._limit(beat.phase) for beat in moving))

    def _gets_on(self, beat: Beat) -> bool:
        """Whether a rank may still take its time: one that loads or saves has the patience that this has."""
        return beat.details is None or (beat.phase in SLOW and beat.stalled < self._limit(beat.phase))

    def _judge(self, stalled: float, now: float) -> str:
        observed = []
        for rank in range(self._world_size):
            seen = self._seen[rank]
            process = None if seen.beat is None else state_of(seen.beat.who, self._who.processes)
            own = rank == self._who.rank
            observed.append(Observed(rank, seen.beat, 0.0 if own else now - seen.at, None if own else process))
        verdict = judge(observed, self._who.rank, stalled, self._config.silence_seconds)
        self._publish(verdict)
        self._asleep.wait(3 * self._config.heartbeat_seconds)  # the others read it before the launcher ends them
        for rank in verdict.culprits:
            beat = self._seen[rank].beat
            if beat is not None and rank != self._who.rank:
                end_stopped(beat.who, self._who.processes)
        return verdict.render()

    def _publish(self, verdict: Verdict) -> None:
        """On a disk that is full, which may be why the run hangs, it cannot: it ends all the same, and others judge."""
        values: dict[str, Any] = asdict(verdict) | {"text": verdict.render()}
        with suppress(OSError):
            write_text(self._folder / VERDICT, json.dumps(values) + "\n")
        with suppress(OSError, WorkError):
            self._decided(verdict)

    def _verdict_of_others(self) -> str | None:
        try:
            return str(json.loads((self._folder / VERDICT).read_text())["text"])
        except (OSError, ValueError, KeyError):  # there is none, or the file system does not answer
            return None

    def _look_for_cut_off_nodes(self, said: Details) -> None:
        """Add to `said` the nodes that this one cannot connect to; one rank of each node asks."""
        places: dict[str, tuple[str, int]] = {}
        for rank in range(self._world_size):
            beat = read_beat(self._folder, rank)
            if beat is not None and beat.who.node != self._who.node and beat.who.port:
                places.setdefault(beat.who.node, (beat.who.address, beat.who.port))
        missed = tuple(unreachable(places))
        if self._details is said:
            self._details = replace(said, unreachable=missed)
