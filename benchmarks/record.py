"""Where a measurement was taken, and how it is written down."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from foundation.files import write_text

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
LIBRARIES = ("torch", "megatron-core", "numpy", "orthant")


def surroundings() -> dict[str, Any]:
    """Commit, versions, machine and time. `clean` says whether the commit alone is what ran, other results aside.

    Where the sources travelled without their history, ORTHANT_COMMIT says what they are (scripts/gpu_machine.sh).
    """
    told = os.environ.get("ORTHANT_COMMIT")
    return {
        "commit": told or _git("rev-parse", "HEAD"),
        "clean": "changes" not in told
        if told
        else not _git("status", "--porcelain", "--untracked-files=no", "--", ".", f":!{RESULTS.relative_to(ROOT)}"),
        "versions": {name: _version(name) for name in LIBRARIES} | {"python": platform.python_version()},
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def write_result(name: str, result: dict[str, Any]) -> Path:
    """Write benchmarks/results/NAME.json, with the surroundings."""
    path = RESULTS / f"{name}.json"
    write_text(path, json.dumps({"surroundings": surroundings(), **result}, indent=1) + "\n")
    return path


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:  # sources alone, on a path
        return None


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()
