"""torch's profiler over chosen steps of chosen ranks, and what its trace says."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from foundation.files import write_text
from training.profiling.intervals import Interval, length, union, without

FOLDER = Path("profile")
OPERATIONS = 25
"""Of the summary, by time of their own."""
COMPUTATION = ("aten::", "mkldnn::")
"""How names of a CPU's operators begin. Others, such as autograd's, hold waits in them."""
COMMUNICATION = ("gloo:", "nccl:", "nccldevkernel")
"""How names of what exchanges begin, in small letters."""
HISTORY = 1_000_000
"""Allocations that a memory snapshot of a GPU goes back."""


class Tracer:
    """Profiles a window of steps on this rank.

    Writes below RUN/profile, for steps A to B of rank R:
        trace-rank-R-steps-A-B.json: a Chrome trace, for https://ui.perfetto.dev.
        summary-rank-R-steps-A-B.json: what `summary_of` finds in it.
        memory-rank-R-steps-A-B.pickle: on a GPU, the allocator's history, for https://pytorch.org/memory_viz.
    A run that ends inside the window leaves none of them.
    """

    def __init__(self, folder: Path, steps: range, rank: int) -> None:
        self._folder, self._steps, self._rank = folder / FOLDER, steps, rank
        self._profile: Any = None
        self._first = 0
        self._seconds = 0.0

    def begin(self, step: int) -> None:
        if step not in self._steps:
            return
        if self._profile is None:
            self._first, self._seconds = step, 0.0
            activities = [ProfilerActivity.CPU]
            if self._on_gpu():
                activities.append(ProfilerActivity.CUDA)
                torch.cuda.memory._record_memory_history(max_entries=HISTORY)
            self._profile = profile(activities=activities, profile_memory=True)
            self._profile.start()
        self._began = time.perf_counter()

    def end(self, step: int) -> None:
        if step not in self._steps or self._profile is None:
            return
        if self._on_gpu():
            torch.cuda.synchronize()
        self._seconds += time.perf_counter() - self._began
        if step == self._steps[-1]:
            self._profile.stop()
            self._write(step)
            self._profile = None

    def _write(self, last: int) -> None:
        name = f"rank-{self._rank:05d}-steps-{self._first}-{last}"
        self._folder.mkdir(parents=True, exist_ok=True)
        trace = self._folder / f"trace-{name}.json"
        hidden = trace.with_name(f".{trace.name}")
        self._profile.export_chrome_trace(str(hidden))
        allocated = allocations(json.loads(hidden.read_text(encoding="utf-8")))
        hidden.replace(trace)
        if self._on_gpu():
            torch.cuda.memory._dump_snapshot(str(self._folder / f"memory-{name}.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        steps = last - self._first + 1
        summary = {
            "rank": self._rank,
            "first_step": self._first,
            "last_step": last,
            "seconds": self._seconds,
            **summary_of(self._profile),
            "allocated": allocated,
            "trace": trace.name,
        }
        write_text(self._folder / f"summary-{name}.json", json.dumps({**summary, "steps": steps}, indent=1) + "\n")

    @staticmethod
    def _on_gpu() -> bool:
        from parallel.platform import current_platform

        return current_platform().device_type == "cuda"


def summary_of(profiled: Any) -> dict[str, Any]:
    """What a finished profile says, in seconds.

    `communicating` is the time with at least one collective or exchange under way, the wait for the other ranks
    included; `exposed` is the part of it in which this rank computed nothing meanwhile. `exchanges` counts them.
    """
    exchanges, computing = busy_times(profiled.events())
    communicating = union(exchanges)
    on_gpu = any(average.self_device_time_total > 0 for average in profiled.key_averages())
    rows = []
    for average in profiled.key_averages():
        own = average.self_device_time_total if on_gpu else average.self_cpu_time_total
        rows.append(
            {
                "name": average.key,
                "calls": average.count,
                "self_seconds": own / 1e6,
                "allocated_bytes": average.self_device_memory_usage if on_gpu else average.self_cpu_memory_usage,
                "communication": is_communication(average.key),
            }
        )
    rows.sort(key=lambda row: -float(row["self_seconds"]))
    return {
        "communicating": length(communicating) / 1e6,
        "exposed": length(without(communicating, computing)) / 1e6,
        "exchanges": len(exchanges),
        "operations": rows[:OPERATIONS],
    }


def busy_times(events: Iterable[Any]) -> tuple[list[Interval], list[Interval]]:
    """(exchanges with other ranks, computation) in microseconds: of the GPU's kernels where there are any, otherwise of
    operators."""
    events = list(events)
    kernels = [event for event in events if event.device_type.name == "CUDA"]
    exchanges: list[Interval] = []
    computing: list[Interval] = []
    for event in kernels or events:
        span = (event.time_range.start, event.time_range.end)
        if is_communication(event.name):
            exchanges.append(span)
        elif kernels or event.name.startswith(COMPUTATION):
            computing.append(span)
    return exchanges, computing


def is_communication(name: str) -> bool:
    """Whether an operation exchanges with other ranks."""
    return name.lower().startswith(COMMUNICATION)


def allocations(trace: dict[str, Any], points: int = 400) -> list[list[float]]:
    """[seconds since the first, bytes] that were allocated on the device in use, at most so many points: of every
    stretch the highest."""
    found = [event for event in trace["traceEvents"] if event.get("name") == "[memory]"]
    devices = {event["args"]["Device Type"] for event in found}
    kept = [event for event in found if event["args"]["Device Type"] == max(devices)]
    kept.sort(key=lambda event: float(event["ts"]))
    if not kept:
        return []
    first, size = float(kept[0]["ts"]), -(-len(kept) // points)
    highest = [
        max(kept[start : start + size], key=lambda event: float(event["args"]["Total Allocated"]))
        for start in range(0, len(kept), size)
    ]
    return [[round((float(e["ts"]) - first) / 1e6, 6), float(e["args"]["Total Allocated"])] for e in highest]
