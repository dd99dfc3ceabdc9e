"""What this machine has, found without importing anything heavy."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from foundation.libraries import package_present

__all__ = ["compute_capability", "gpu_present", "gpus_hidden", "package_present"]

VISIBLE = "CUDA_VISIBLE_DEVICES"


def gpus_hidden(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether CUDA_VISIBLE_DEVICES hides every GPU from CUDA, and so from torch: everything then runs on the CPU."""
    return environment.get(VISIBLE, "0").strip() in ("", "-1", "NoDevFiles")


def gpu_present(root: Path = Path("/")) -> bool:
    """Whether an NVIDIA GPU is here that is not hidden, by the files that its driver makes (`root`: / in tests)."""
    if gpus_hidden():
        return False
    return any((root / "dev").glob("nvidia[0-9]*")) or (root / "proc/driver/nvidia").exists()


@cache
def compute_capability() -> tuple[int, int] | None:
    """The lowest compute capability of this machine's GPUs; None where the driver does not tell."""
    try:
        answer = subprocess.run(
            ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.findall(r"^(\d+)\.(\d+)$", answer.stdout, re.MULTILINE) if answer.returncode == 0 else []
    return min(((int(major), int(minor)) for major, minor in found), default=None)
