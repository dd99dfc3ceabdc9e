"""`orthant report RUN [--out report.html] [--json]`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from foundation.files import refuse_unwritable, write_text
from launch.report.page import Parts, page
from launch.report.pipeline import as_values, read_timeline
from launch.report.profile import profile_parts, read_summaries, timeline_part
from launch.report.roles import roles_part
from launch.report.run import happenings, read_run, summary
from launch.report.times import Times, times
from launch.terminal import tell


def report(folder: Path, *, out: Path | None, as_json: bool) -> None:
    """Write the page of a run, RUN/report.html where `out` is None, or print its figures.

    Raises:
        RequestError: the folder holds no run, or the page cannot be written.
    """
    run = read_run(folder)
    happened = happenings(run)
    figures, spent = summary(run, happened), times(run.events)
    pipeline, profiles = read_timeline(folder), read_summaries(folder)
    if as_json:
        recorded = {"pipeline": as_values(pipeline), "profiles": [_figures(profile) for profile in profiles]}
        print(json.dumps({**figures, "goodput": _as_values(spent), **recorded}, indent=2))
        if out is None:
            return
    target = out or folder / "report.html"
    refuse_unwritable(target, "--out")
    parts = Parts(timeline_part(pipeline), profile_parts(profiles), roles_part(folder))
    write_text(target, page(run, figures, happened, spent, parts))
    tell(f"{target}: {_line(figures, spent)}")


def _figures(profile: dict[str, Any]) -> dict[str, Any]:
    """A profile without its curve."""
    return {name: value for name, value in profile.items() if name != "allocated"}


def _as_values(spent: Times | None) -> dict[str, Any] | None:
    if spent is None:
        return None
    return {"share": spent.goodput, "wall_seconds": spent.wall, "lives": spent.lives, "seconds": dict(spent.seconds)}


def _line(figures: dict[str, Any], spent: Times | None) -> str:
    said = f"step {figures['step']}, {figures['restarts']} restarts"
    return said if spent is None else f"{said}, {spent.goodput:.1%} of {spent.wall:.0f} s productive"
