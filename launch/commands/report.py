"""`orthant report RUN [--out report.html] [--json]`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from foundation.files import refuse_unwritable, write_text
from launch.report.page import page
from launch.report.run import happenings, read_run, summary
from launch.report.times import Times, times


def report(folder: Path, *, out: Path | None, as_json: bool) -> None:
    """Write the page of a run, RUN/report.html where `out` is None, or print its figures.

    Raises:
        RequestError: the folder holds no run, or the page cannot be written.
    """
    run = read_run(folder)
    happened = happenings(run)
    figures, spent = summary(run, happened), times(run.events)
    if as_json:
        print(json.dumps({**figures, "goodput": _as_values(spent)}, indent=2))
        if out is None:
            return
    target = out or folder / "report.html"
    refuse_unwritable(target, "--out")
    write_text(target, page(run, figures, happened, spent))
    print(f"{target}: {_line(figures, spent)}", file=sys.stderr)


def _as_values(spent: Times | None) -> dict[str, Any] | None:
    if spent is None:
        return None
    return {"share": spent.goodput, "wall_seconds": spent.wall, "lives": spent.lives, "seconds": dict(spent.seconds)}


def _line(figures: dict[str, Any], spent: Times | None) -> str:
    said = f"step {figures['step']}, {figures['restarts']} restarts"
    return said if spent is None else f"{said}, {spent.goodput:.1%} of {spent.wall:.0f} s productive"
