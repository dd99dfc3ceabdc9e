"""The observers that a configuration asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from parallel.layout import ParallelLayout
from training.profiling.config import ProfileConfig
from training.profiling.observer import Observer


def observers_of(
    profile: ProfileConfig, folder: Path, core: Any, layout: ParallelLayout, rank: int, node: str, micro_batches: int
) -> list[Observer]:
    """For this rank; none where nothing is asked for.

    Args:
        folder: of the run.
        core: the configuration that core's schedules read.
        micro_batches: of a replica in a step.
    """
    found: list[Observer] = []
    if profile.network:
        from training.profiling.network import NetworkProbe

        found.append(NetworkProbe(folder, node))
    if profile.timeline is not None:
        from training.profiling.timeline import TimelineRecorder

        found.append(TimelineRecorder(core, folder, profile.timeline_steps(), layout, rank, micro_batches))
    if profile.steps is not None and rank in profile.profiled_ranks():
        from training.profiling.tracing import Tracer

        found.append(Tracer(folder, profile.profiled_steps(), rank))
    return found
