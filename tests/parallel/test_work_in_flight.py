"""Ranks end in peace with gathers in flight."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_the_end_of_a_process_waits_for_gathers_that_nobody_asked_for(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.parallel.gather_and_end", str(rank), str(tmp_path / "store")],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
