"""`make prove AREA=scaling`: scaling over shaped links, pipelines' bubbles, the planner's times; 20 minutes.

    python -m benchmarks.prove.scaling [1gbit] [200mbit] [bubbles] [planner] [--keep DIR]

runs parts and keeps other figures. The links need root, Debian's Slurm and cgroups: four nodes, each held to 0.45 of a
core. Writes benchmarks/results/scaling.json. Prints which bars are met; exits with 3 where one is not.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from benchmarks.record import RESULTS, surroundings, write_result

LINKS = ("1gbit", "200mbit")
PARTS = (*LINKS, "bubbles", "planner")
QUIET, LOOK_SECONDS, PATIENCE_SECONDS = 0.1, 3.0, 60.0
WITHIN, BUBBLE_POINTS, PLANNER_WITHIN = 0.15, 0.05, 0.20


def main() -> int:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="all of them by default")
    parser.add_argument("--keep", type=Path, help="where the runs' folders are kept")
    asked = parser.parse_args()
    path = RESULTS / "scaling.json"
    kept = json.loads(path.read_text())["parts"] if asked.parts and path.is_file() else {}
    found: dict[str, Any] = {part: kept[part] for part in PARTS if part in kept}
    for part in asked.parts or PARTS:
        busy = wait_for_quiet()
        with tempfile.TemporaryDirectory(prefix="orthant-scaling-", dir="/var/tmp") as folder:
            found[part] = {
                "surroundings": surroundings(),
                "busy_before": busy,
                **_run(part, Path(folder), asked.keep),
            }
        print(json.dumps(found[part], indent=1), flush=True)
    bars = list(_bars(found))
    write_result("scaling", {"parts": found, "bars": bars})
    for bar in bars:
        print(f"{'met   ' if bar['met'] else 'MISSED'}  {bar['what']}: {bar['found']}")
    return 0 if all(bar["met"] for bar in bars) else 3


def wait_for_quiet() -> float:
    """Share of this machine's cores that is busy over LOOK_SECONDS, once that is below QUIET or PATIENCE is over."""
    end = time.monotonic() + PATIENCE_SECONDS
    while (busy := psutil.cpu_percent(LOOK_SECONDS) / 100) > QUIET and time.monotonic() < end:
        pass
    return busy


def _run(part: str, folder: Path, keep: Path | None) -> dict[str, Any]:
    if part in LINKS:
        from benchmarks.prove._scaling_cluster import series

        return series(part, folder, keep)
    if part == "bubbles":
        from benchmarks.prove._scaling_bubbles import bubbles

        return bubbles(folder, keep)
    from benchmarks.prove._scaling_planner import planned

    return planned()


def _bars(found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for link in LINKS:
        if link in found:
            error = found[link]["largest_predicted_from_the_others"]["error"]
            what = f"{link}: 4 nodes predicted from 1 and 2, error at most {WITHIN:.0%}"
            yield {"what": what, "found": f"{error:+.1%}", "met": abs(error) <= WITHIN}
            said = found[link]["limit"]
            yield {"what": f"{link}: the report names the link", "found": said, "met": said.startswith("the link")}
    for name, one in found.get("bubbles", {}).get("layouts", {}).items():
        apart = one["bubble_measured"] - one["bubble_ideal"]
        what = f"{name}: bubble within {BUBBLE_POINTS * 100:.0f} points of (p - 1) / (m v) = {one['bubble_ideal']:.1%}"
        yield {"what": what, "found": f"{one['bubble_measured']:.1%}", "met": abs(apart) <= BUBBLE_POINTS}
    for name, one in found.get("planner", {}).get("layouts", {}).items():
        what = f"planner, {name}: step time within {PLANNER_WITHIN:.0%}, calibrated on one rank"
        yield {"what": what, "found": f"{one['error']:+.1%}", "met": abs(one["error"]) <= PLANNER_WITHIN}
    for name, one in found.get("planner", {}).get("blind", {}).items():
        what = f"planner, {name}, not looked at before: step time within {PLANNER_WITHIN:.0%}"
        yield {"what": what, "found": f"{one['error']:+.1%}", "met": abs(one["error"]) <= PLANNER_WITHIN}


if __name__ == "__main__":
    sys.exit(main())
