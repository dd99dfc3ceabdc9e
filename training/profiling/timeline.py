"""The pipeline's timeline of chosen steps: RUN/profile/timeline/step-N-stage-P.json, of the first replica's stages."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from foundation.files import write_text
from parallel.layout import ParallelLayout
from training.profiling.spans import Clock, DeviceClock, HostClock, Spans
from training.survival.processes import own_processes

FOLDER = Path("profile") / "timeline"
ALIGNMENTS = 9
"""Barriers by which clocks of several nodes are compared."""


class TimelineRecorder:
    """Writes when each pass of a step ran.

    Args:
        config: core's, which its schedules read; its `timers` are set during the steps and None otherwise.
        folder: of the run.
        steps: to record.
        rank: this one; ranks that are not a stage of the first replica take part in the comparison of clocks alone.
        micro_batches: of a replica in a step.
    """

    def __init__(
        self, config: Any, folder: Path, steps: range, layout: ParallelLayout, rank: int, micro_batches: int
    ) -> None:
        self._config, self._folder, self._steps, self._rank = config, folder, steps, rank
        self._layout, self._micro_batches = layout, micro_batches
        place = layout.coordinates(rank)
        self._stage = place.pp
        self._records = place.tp == place.cp == place.dp == 0
        self._clock: Clock | None = None
        self._spans: Spans | None = None
        self._behind = 0.0
        self._begun: Any = None

    def begin(self, step: int) -> None:
        if step not in self._steps:
            return
        if self._clock is None:
            self._clock = DeviceClock() if self._on_gpu() else HostClock()
            self._spans = Spans(self._clock)
            self._behind = seconds_ahead_of_rank_0()
        if self._records:
            self._config.timers = self._spans
        self._begun = self._clock.mark()

    def end(self, step: int) -> None:
        if step not in self._steps or self._clock is None or self._spans is None:
            return
        ended = self._clock.mark()
        self._config.timers = None
        if self._records:
            begin, end = self._clock.seconds([self._begun, ended])
            self._write(step, begin, end)

    def _write(self, step: int, begin: float, end: float) -> None:
        assert self._spans is not None
        spans: dict[str, list[list[float]]] = {"forward": [], "backward": [], "schedule": []}
        for span in self._spans.take():
            spans[span.kind].append([self._common(span.begin), self._common(span.end)])
        record = {
            "step": step,
            "rank": self._rank,
            "stage": self._stage,
            "stages": self._layout.pp,
            "chunks": self._layout.vpp,
            "micro_batches": self._micro_batches,
            "begin": self._common(begin),
            "end": self._common(end),
            **spans,
        }
        write_text(self._folder / FOLDER / f"step-{step:07d}-stage-{self._stage:04d}.json", json.dumps(record) + "\n")

    def _common(self, seconds: float) -> float:
        return round(seconds - self._behind, 6)

    @staticmethod
    def _on_gpu() -> bool:
        from parallel.platform import current_platform

        return current_platform().device_type == "cuda"


def seconds_ahead_of_rank_0() -> float:
    """How far the clock of this rank's node is ahead of rank 0's; 0 on the same machine. Collective.

    Ranks leave a barrier at nearly the same moment: the median of several tells to about the time of one message.
    """
    machines: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(machines, own_processes().rpartition(" ")[0])
    if len(set(machines)) == 1:
        return 0.0
    device = torch.device(torch.cuda.current_device())
    found = []
    for _ in range(ALIGNMENTS):
        dist.barrier()
        mine = torch.tensor([time.time()], dtype=torch.float64, device=device)
        first = mine.clone()
        dist.broadcast(first, 0)
        found.append(float(mine - first))
    return statistics.median(found)
