"""What everything runs on: torch and megatron-core."""

from __future__ import annotations

import sys
from importlib import import_module

from launch.diagnosis.asking import import_trouble
from launch.diagnosis.finding import Finding
from launch.diagnosis.packages import requirements
from launch.machine import gpu_present


def torch_runs() -> Finding:
    """torch imports and, where a GPU is, reaches it."""
    trouble = import_trouble("torch")
    if trouble is not None:
        fix = f"{sys.executable} -m pip install --force-reinstall torch"
        return Finding("runtime", "torch", "broken", trouble, fix, needed=True)
    import torch

    built = "for CPU" if torch.version.cuda is None else f"for CUDA {torch.version.cuda}"
    if gpu_present() and not torch.cuda.is_available():
        why = "it was built for CPU" if torch.version.cuda is None else "it does not reach the driver"
        return Finding(
            "runtime",
            "torch",
            "broken",
            f"{torch.__version__} ({built}); a GPU is here and {why}",
            "install the torch build for your CUDA: https://pytorch.org/get-started/locally, give the job or container "
            "its GPUs, or export CUDA_VISIBLE_DEVICES= where the CPU is meant",
            needed=True,
        )
    return Finding("runtime", "torch", "ok", f"{torch.__version__} ({built})", needed=True)


def megatron_core_runs() -> Finding:
    """megatron-core imports."""
    trouble = import_trouble("megatron.core")
    if trouble is None:
        core = import_module("megatron.core")
        return Finding("runtime", "megatron-core", "ok", f"{core.__version__} imports", needed=True)
    pinned = next((str(one) for one in requirements() if one.name == "megatron-core"), "megatron-core")
    fix = f"{sys.executable} -m pip install --force-reinstall '{pinned}'"
    return Finding("runtime", "megatron-core", "broken", trouble, fix, needed=True)
