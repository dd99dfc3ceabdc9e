"""The GPUs."""

from __future__ import annotations

import subprocess

from launch.diagnosis.finding import Finding
from launch.machine import VISIBLE, gpu_present, gpus_hidden


def gpus() -> list[Finding]:
    """The NVIDIA GPUs, as the driver names them."""
    if gpus_hidden():
        return [Finding("GPU", "NVIDIA GPU", "note", f"hidden by {VISIBLE}: everything runs on the CPU platform")]
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
    except FileNotFoundError:  # whether the GPU can be used is torch's to say
        text = "the driver is here, and nvidia-smi is not: chips are not told apart"
        fix = "install the driver's tools, or NVIDIA_DRIVER_CAPABILITIES=compute,utility for the container"
        return [Finding("GPU", "NVIDIA GPU", "missing", text, fix)]
    except (OSError, subprocess.TimeoutExpired) as error:
        fix = "install the driver's tools, or give the container the GPUs (--gpus all)"
        return [Finding("GPU", "NVIDIA GPU", "broken", f"the driver is here; nvidia-smi: {error}", fix, needed=True)]
    lines = answer.stdout.strip().splitlines()
    if answer.returncode or not lines:
        why = (answer.stderr or answer.stdout).strip().splitlines() or ["no answer"]
        fix = "reload the driver (nvidia-modprobe), or reboot"
        return [Finding("GPU", "NVIDIA GPU", "broken", f"nvidia-smi: {why[0]}", fix, needed=True)]
    return [Finding("GPU", f"GPU {index}", "ok", line) for index, line in enumerate(lines)]
