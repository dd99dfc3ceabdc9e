"""The GPUs."""

from __future__ import annotations

import subprocess

from launch.diagnosis.finding import Finding
from launch.machine import gpu_present


def gpus() -> list[Finding]:
    """The NVIDIA GPUs, as the driver names them."""
    if not gpu_present():
        return [Finding("GPU", "NVIDIA GPU", "note", "none: everything runs on the CPU platform")]
    try:
        answer = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        fix = "install the driver's tools, or give the container the GPUs (--gpus all)"
        return [Finding("GPU", "NVIDIA GPU", "broken", f"the driver is here; nvidia-smi: {error}", fix, needed=True)]
    lines = answer.stdout.strip().splitlines()
    if answer.returncode or not lines:
        why = (answer.stderr or answer.stdout).strip().splitlines() or ["no answer"]
        fix = "reload the driver (nvidia-modprobe), or reboot"
        return [Finding("GPU", "NVIDIA GPU", "broken", f"nvidia-smi: {why[0]}", fix, needed=True)]
    return [Finding("GPU", f"GPU {index}", "ok", line) for index, line in enumerate(lines)]
