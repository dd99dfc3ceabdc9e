"""The parts of a run's page that `profile` in its configuration asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.progress import percent
from launch.report.chart import Curve
from launch.report.page import NO_FIGURE, chart
from launch.report.pipeline import KINDS, PipelineStep, median_step
from launch.report.timeline_chart import MOST_STAGES, timeline_chart
from launch.run_records import read_object

SUMMARIES = "profile/summary-*.json"
NEEDED = (
    *("rank", "first_step", "last_step", "steps", "seconds", "communicating", "exposed"),
    *("operations", "allocated", "trace"),
)
"""Of every summary."""
ROWS = 12


def timeline_part(steps: Sequence[PipelineStep]) -> dict[str, Any] | None:
    """The section of the recorded step of median length, with a row for each one; None without any."""
    import markupsafe

    if not steps:
        return None
    shown = median_step(steps)
    note = (
        "Measured: the time that the stage with most work waits for another's pass, over its time in passes. Idle: "
        f"with communication. Ideal: (p - 1) / (m v) for p = {len(shown.stages)} stages, m = {shown.micro_batches} "
        f"micro-batches, v = {shown.chunks} chunks of a stage. The other columns are shares of all stages' time."
    )
    if len(shown.stages) > MOST_STAGES:
        note += f" The first {MOST_STAGES} stages are drawn."
    pipelined = len(shown.stages) > 1
    return {
        "step": f"{shown.step:,}",
        "title": f"bubble {percent(shown.bubble)} measured, {percent(shown.ideal_bubble)} ideal"
        if pipelined
        else "one stage, no bubble",
        "key": list(KINDS.items()),
        "svg": markupsafe.Markup(timeline_chart(shown)),
        "header": ["step", "ms", "measured", "ideal", "idle", *KINDS],
        "rows": [
            [
                str(step.step),
                f"{step.seconds * 1e3:,.1f}",
                percent(step.bubble) if pipelined else NO_FIGURE,
                percent(step.ideal_bubble) if pipelined else NO_FIGURE,
                percent(step.idle) if pipelined else NO_FIGURE,
                *(percent(step.share(kind)) for kind in KINDS),
            ]
            for step in steps
        ],
        "note": note if pipelined else "Shares are of the whole step.",
    }


def read_summaries(folder: Path) -> list[dict[str, Any]]:
    """What torch's profiler found in a run, by step and rank.

    Raises:
        RequestError: a summary is damaged.
    """
    found = [read_object(file, NEEDED) for file in folder.glob(SUMMARIES)]
    return sorted(found, key=lambda summary: (summary["first_step"], summary["last_step"], summary["rank"]))


def profile_parts(summaries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A section for each profile."""
    return [_part(summary) for summary in summaries]


def _part(summary: Mapping[str, Any]) -> dict[str, Any]:
    seconds = float(summary["seconds"]) or 1.0
    steps = f"steps {summary['first_step']} to {summary['last_step']}"
    curve = [(float(when) * 1e3, float(size) / 2**20) for when, size in summary["allocated"]]
    drawn = chart("memory", [Curve("allocated", tuple(curve))], from_zero=True).svg if len(curve) > 1 else ""
    said = (
        f"{seconds / summary['steps']:.3g} s a step under the profiler. Communication was under way for "
        f"{percent(summary['communicating'] / seconds)} of it, exposed (nothing computed meanwhile) for "
        f"{percent(summary['exposed'] / seconds)}. The trace for ui.perfetto.dev: {summary['trace']}."
    )
    if curve:
        peak = max(size for _, size in curve)
        said += f" Memory allocated since the first of them, MiB over milliseconds: {peak:,.1f} MiB at most."
    return {
        "title": f"Profile of rank {summary['rank']}, {steps}",
        "said": said,
        "memory": drawn,
        "rows": [
            {
                "name": row["name"],
                "calls": f"{row['calls']:,}",
                "time": f"{row['self_seconds'] * 1e3:,.1f} ms",
                "share": percent(row["self_seconds"] / seconds),
                "allocated": f"{row['allocated_bytes'] / 2**20:,.1f} MiB",
                "communication": row["communication"],
            }
            for row in summary["operations"][:ROWS]
        ],
    }
