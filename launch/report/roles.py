"""When the roles of a PPO run were at work, from RUN/timeline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.report.timeline_chart import Box, rows_chart
from launch.run_records import read_lines

FILES = "timeline/station_*.jsonl"
SHOWN = 2
"""The newest whole iterations that are drawn."""
COLOURS = {
    "actor": "forward",
    "critic": "backward",
    "reference": "gradients",
    "reward": "lost",
    "generation": "restart",
}


def roles_part(folder: Path) -> dict[str, Any] | None:
    """The section of a run's page; None for a run without roles."""
    import markupsafe

    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for file in sorted(folder.glob(FILES)):
        for span in read_lines(file, ("role", "what", "iteration", "begin", "end")):
            rows.setdefault((file.stem.removeprefix("station_"), str(span["role"])), []).append(span)
    spans = [span for found in rows.values() for span in found]
    if not spans:
        return None
    newest = sorted({int(span["iteration"]) for span in spans})[-SHOWN:]
    shown = [span for span in spans if span["iteration"] in newest]
    # An iteration that was run again after a crash is there twice: what is near its last moment is the newest.
    begin, end = _newest_stretch(shown)
    alone = len({station for station, _ in rows}) == 1
    drawn = [
        (
            role if alone else f"{role}, station {station}",
            [_box(span, begin) for span in found if begin <= span["begin"] <= end],
        )
        for (station, role), found in sorted(rows.items())
    ]
    first, last = newest[0] + 1, newest[-1] + 1  # as metrics.jsonl counts them
    return {
        "title": f"Roles, iterations {first} to {last}" if first < last else f"Roles, iteration {first}",
        "svg": markupsafe.Markup(
            rows_chart("when each role was at work", drawn, end - begin, 90.0 if alone else 190.0)
        ),
        "key": [(COLOURS.get(role, "rest"), role) for role in sorted({role for _, role in rows})],
    }


def _newest_stretch(spans: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """From the first begin to the last end, cut at a pause longer than all that is at work after it."""
    ordered = sorted(spans, key=lambda span: float(span["begin"]))
    begin, reached = float(ordered[0]["begin"]), float(ordered[0]["end"])
    last = max(float(span["end"]) for span in ordered)
    for span in ordered[1:]:
        if float(span["begin"]) - reached > last - float(span["begin"]):
            begin = float(span["begin"])
        reached = max(reached, float(span["end"]))
    return begin, last


def _box(span: dict[str, Any], zero: float) -> Box:
    seconds = float(span["end"]) - float(span["begin"])
    said = f"{span['role']}: {span['what']}, iteration {int(span['iteration']) + 1}, {seconds:.3g} s"
    return Box(
        COLOURS.get(str(span["role"]), "rest"),
        float(span["begin"]) - zero,
        float(span["end"]) - zero,
        said,
        str(span["what"]),
    )
