"""Calibrate the planner: `python -m benchmarks.planner.calibrate` writes launch/planner/data/coefficients.json."""

from __future__ import annotations

import json
from dataclasses import asdict

from benchmarks.planner.measurements import measurements, trials
from benchmarks.planner.room import PRIORS as MEMORY_PRIORS
from benchmarks.planner.room import calibrate_memory
from benchmarks.planner.speed import PRIORS as TIME_PRIORS
from benchmarks.planner.speed import calibrate
from foundation.files import write_text
from launch.planner.coefficients import FILE


def main() -> None:
    """Fit both models to all rows and write what was found beside what was expected."""
    rows = measurements()
    time = asdict(calibrate(rows))
    memory = asdict(calibrate_memory(trials(), [one for one in rows if one.memory_gib is not None]))
    values = {
        "about": f"Written by python -m benchmarks.planner.calibrate from {len(rows)} measurements and "
        f"{len(trials())} trials of memory.",
        "time": {name: float(f"{value:.5g}") for name, value in time.items()},
        "memory": {name: float(f"{value:.5g}") for name, value in memory.items()},
    }
    write_text(FILE, json.dumps(values, indent=1) + "\n")
    for name, prior in (TIME_PRIORS | MEMORY_PRIORS).items():
        print(f"{name:32s} expected {prior.value:9.4g}  found {(time | memory)[name]:9.4g}")


if __name__ == "__main__":
    main()
