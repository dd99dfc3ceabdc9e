"""Commands on the CPU and on cards of a null GPU that computes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

COMPUTES = (Path(sys.prefix) / "null_gpu.txt").exists() and bool(os.environ.get("ORTHANT_NULL_GPU_COMPUTE"))
ROOT = Path(__file__).parents[2]


def orthant(device: str, cards: int, *words: str) -> None:
    """Run the command on the CPU or on so many cards, which round no factor to TF32."""
    environment = os.environ | {"ORTHANT_NULL_GPU_DEVICES": str(cards), "OMP_NUM_THREADS": "1"}
    environment |= {"NVIDIA_TF32_OVERRIDE": "0"} | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})
    command = [sys.executable, "-m", "launch", *words]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def steps(run: Path) -> list[dict[str, Any]]:
    """What the run wrote of its steps."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "grad_norm" in row]
