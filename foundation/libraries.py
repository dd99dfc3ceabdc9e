"""Which of the optional GPU libraries are here, found without importing any."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

APEX_PARTS = {
    "FusedAdam": "amp_C",
    "weight-gradient accumulation": "fused_weight_gradient_mlp_cuda",
    "fused norms": "fused_layer_norm_cuda",
}
"""What NVIDIA apex can be built with, and the extension module that each part is in."""


def package_present(name: str) -> bool:
    """Whether the package `name` can be imported; a mere folder of that name (as wandb leaves behind) is none."""
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None


def transformer_engine_version() -> str | None:
    """The version of Transformer Engine, "unknown" where it does not tell; None where it is not installed."""
    if not package_present("transformer_engine"):
        return None
    for distribution in ("transformer-engine", "transformer_engine"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


def nvidia_apex_is_here() -> bool | None:
    """Whether the package `apex` is NVIDIA's; None where there is none.

    Told by its files: PyPI's apex is an unrelated package, and importing it would run it.
    """
    spec = importlib.util.find_spec("apex")
    if spec is None or spec.origin is None:
        return None
    return (Path(spec.origin).parent / "optimizers" / "fused_adam.py").is_file()


def apex_parts() -> frozenset[str]:
    """Those of APEX_PARTS that NVIDIA's apex was built with; none where it is not here."""
    if not nvidia_apex_is_here():
        return frozenset()
    return frozenset(name for name, module in APEX_PARTS.items() if package_present(module))
