"""Which modules the decoder is built from: core's `BackendSpecProvider`, one provider for each library."""

from __future__ import annotations

import importlib.util
from typing import Literal

from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider

from foundation.errors import ConfigError
from model.kernels.attention import TorchAttention
from model.kernels.norm import RMSNorm

Kernels = Literal["torch", "transformer_engine"]


class TorchProvider(LocalSpecProvider):  # type: ignore[misc]
    """Core's own tensor-parallel linear layers with torch's fused attention and RMSNorm. Runs on CPU and GPU."""

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        return RMSNorm

    def core_attention(self) -> type:
        return TorchAttention


def transformer_engine_is_here() -> bool:
    """Whether Transformer Engine can be imported, without importing it."""
    return importlib.util.find_spec("transformer_engine") is not None


def choose_kernels(wanted: str, *, on_gpu: bool) -> Kernels:
    """Resolve `model.kernels`: "auto" takes Transformer Engine where it and a GPU are, else torch.

    Raises:
        ConfigError: Transformer Engine is asked for and cannot run here.
    """
    usable = on_gpu and transformer_engine_is_here()
    if wanted == "transformer_engine" and not usable:
        lacking = "a GPU" if not on_gpu else "the package transformer-engine"
        raise ConfigError(
            "model.kernels", wanted, rule=f"needs {lacking}, which is not here", cure="model.kernels=torch"
        )
    if wanted == "torch" or not usable:
        return "torch"
    return "transformer_engine"


def kernel_provider(kernels: Kernels) -> BackendSpecProvider:
    """The provider named `kernels`."""
    if kernels == "torch":
        return TorchProvider()
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    return TESpecProvider()
