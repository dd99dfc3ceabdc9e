"""What this machine has, found without importing anything heavy."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def gpu_present(root: Path = Path("/")) -> bool:
    """Whether an NVIDIA GPU is here, by the files that its driver makes (`root` stands in for / in tests)."""
    return any((root / "dev").glob("nvidia[0-9]*")) or (root / "proc/driver/nvidia").exists()


def package_present(name: str) -> bool:
    """Whether the package `name` can be imported; a mere folder of that name (as wandb leaves behind) is none."""
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None
