"""`python -m benchmarks.node_change`: how far a run drifts that comes back with one rank in place of two.

240 steps of the run of tests/cluster/test_faults.py are trained unbroken on two ranks; from its checkpoint of step 50
it goes on with one rank, and, as the measure of what a rounding does, with the same two ranks and weights of which each
was moved once by at most half a rounding of fp32. Differences are relative to the unbroken run.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.record import ROOT, write_result
from tests.cluster.faulty import NUDGE
from tests.cluster.hurt_run import Shape, figures, write_config

FROM, STEPS, WINDOW = 50, 240, 40


def train(folder: Path, ranks: int) -> list[dict[str, Any]]:
    """Run, or go on, in folder/run; the figures."""
    config = write_config(folder, Shape(steps=STEPS, timeout=60.0))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    rank = ["-m", "tests.cluster.faulty", "-m", "launch", "train", str(config), "checkpoint.keep_last=100"]
    subprocess.run([*launcher, *rank], cwd=folder, env=environment, capture_output=True, timeout=280, check=True)
    found = figures(folder / "run")
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    return found


def back_at(whole: Path, folder: Path) -> Path:
    """A copy of a finished run as it was after step FROM."""
    shutil.copytree(whole, folder)
    checkpoints = folder / "run" / "checkpoints"
    for checkpoint in checkpoints.glob("step_*"):
        if int(checkpoint.name.removeprefix("step_")) > FROM:
            shutil.rmtree(checkpoint)
    (checkpoints / "latest").write_text(f"step_{FROM:08d}\n")
    return folder


def drift(found: list[dict[str, Any]], whole: list[dict[str, Any]]) -> dict[str, Any]:
    """Largest relative differences, by windows of steps."""
    assert found[:FROM] == whole[:FROM]
    differences = {
        name: [abs(one[name] - other[name]) / abs(other[name]) for one, other in zip(found, whole, strict=True)]
        for name in ("loss", "grad_norm")
    }
    windows = range(FROM, STEPS, WINDOW)
    by_window = {
        name: {f"{at + 1}-{min(at + WINDOW, STEPS)}": max(values[at : at + WINDOW]) for at in windows}
        for name, values in differences.items()
    }
    return {**{f"most_{name}": max(values) for name, values in differences.items()}, **by_window}


def main() -> int:
    """Run, print, write benchmarks/results/node_change.json."""
    with tempfile.TemporaryDirectory(prefix="node-change-") as place:
        folder = Path(place)
        (folder / "whole").mkdir()
        whole = train(folder / "whole", 2)
        one_rank = train(back_at(folder / "whole", folder / "one"), 1)
        nudged = back_at(folder / "whole", folder / "nudged")
        for rank in (0, 1):
            (nudged / "run" / NUDGE.format(rank=rank)).touch()
        result = {
            "steps": STEPS,
            "changed_after_step": FROM,
            "one_rank_in_place_of_two": drift(one_rank, whole),
            "two_ranks_with_weights_moved_by_half_a_rounding": drift(train(nudged, 2), whole),
        }
    path = write_result("node_change", result)
    print(json.dumps(result, indent=1), path, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
