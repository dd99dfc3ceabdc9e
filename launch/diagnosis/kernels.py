"""Fused kernels: Transformer Engine and NVIDIA apex."""

from __future__ import annotations

import sys

from packaging.requirements import Requirement

from foundation.libraries import APEX_PARTS, apex_parts, nvidia_apex_is_here
from launch.diagnosis.asking import import_trouble, version_of
from launch.diagnosis.finding import Finding
from launch.diagnosis.packages import requirements
from launch.machine import gpu_present, package_present
from model.config import ModelConfig
from model.kernels.choice import Available, choose_kernels


def transformer_engine() -> Finding:
    """Transformer Engine: fused and FP8 kernels on GPUs; optional."""
    pins = requirements("gpu") or [Requirement("transformer-engine[core_cu13,pytorch]")]
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
    nvidia = nvidia_apex_is_here()
    if nvidia is None:
        if gpu_present():
            return Finding("kernels", "apex", "missing", "not installed: torch's optimizer and norms are used", build)
        return Finding("kernels", "apex", "note", "not installed, and without a GPU of no use")
    if not nvidia:
        found = "a package named apex that is not NVIDIA's (PyPI's apex is unrelated)"
        return Finding("kernels", "apex", "broken", found, f"{sys.executable} -m pip uninstall apex; then {build}")
    built = apex_parts()
    lacking = [name for name in APEX_PARTS if name not in built]
    if lacking:
        found = f"NVIDIA's, built without {', '.join(lacking)}"
        return Finding("kernels", "apex", "missing", found, build)
    return Finding("kernels", "apex", "ok", f"NVIDIA's, with {', '.join(APEX_PARTS)}")


def chosen_kernels() -> Finding:
    """The library of each operation that `model.kernels=auto` comes to here."""
    model = ModelConfig(num_layers=1, hidden_size=2, ffn_hidden_size=2, num_attention_heads=1)
    chosen = choose_kernels(model, Available.here(on_gpu=gpu_present()))
    return Finding("kernels", "model.kernels=auto", "ok", chosen.describe())
