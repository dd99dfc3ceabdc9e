"""Fused kernels: Transformer Engine and NVIDIA apex."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from packaging.requirements import Requirement

from launch.diagnosis.asking import import_trouble, version_of
from launch.diagnosis.finding import Finding
from launch.diagnosis.packages import requirements
from launch.machine import gpu_present, package_present


def transformer_engine() -> Finding:
    """Transformer Engine: fused and FP8 kernels on GPUs; optional."""
    pins = requirements("gpu") or [Requirement("transformer-engine[pytorch]")]
    fix = f"{sys.executable} -m pip install --no-build-isolation '{pins[0]}'"
    if not package_present("transformer_engine"):
        without = "the torch kernels run in its place"
        if gpu_present():
            return Finding("kernels", "Transformer Engine", "missing", f"not installed: no FP8, {without}", fix)
        return Finding(
            "kernels", "Transformer Engine", "note", f"not installed, and without a GPU of no use; {without}"
        )
    trouble = import_trouble("transformer_engine.pytorch")
    if trouble is not None:
        return Finding("kernels", "Transformer Engine", "broken", trouble, fix, needed=gpu_present())
    version = version_of("transformer-engine") or "unknown version"
    return Finding("kernels", "Transformer Engine", "ok", version)


def apex() -> Finding:
    """NVIDIA apex, told from the unrelated PyPI package of that name by what it holds; optional."""
    build = (
        f"{sys.executable} -m pip install --no-build-isolation --config-settings=--build-option=--cpp_ext "
        "--config-settings=--build-option=--cuda_ext git+https://github.com/NVIDIA/apex"
    )
    spec = importlib.util.find_spec("apex")
    if spec is None or spec.origin is None:
        if gpu_present():
            return Finding("kernels", "apex", "missing", "not installed: torch's optimizer and norms are used", build)
        return Finding("kernels", "apex", "note", "not installed, and without a GPU of no use")
    # By its files: importing the unrelated package would run it.
    if not (Path(spec.origin).parent / "optimizers" / "fused_adam.py").is_file():
        found = "a package named apex that is not NVIDIA's (PyPI's apex is unrelated)"
        return Finding("kernels", "apex", "broken", found, f"{sys.executable} -m pip uninstall apex; then {build}")
    parts = {"FusedAdam": "amp_C", "weight-gradient accumulation": "fused_weight_gradient_mlp_cuda",
             "fused norms": "fused_layer_norm_cuda"}  # fmt: skip
    built = [name for name, module in parts.items() if package_present(module)]
    lacking = [name for name in parts if name not in built]
    if lacking:
        found = f"NVIDIA's, built without {', '.join(lacking)}"
        return Finding("kernels", "apex", "missing", found, build)
    return Finding("kernels", "apex", "ok", f"NVIDIA's, with {', '.join(built)}")
