"""Which modules the decoder is built from: core's `BackendSpecProvider`, one provider for each library."""

from __future__ import annotations

import importlib.util
from typing import Literal

from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules

from foundation.errors import ConfigError
from model.kernels.activation import SwiGLU
from model.kernels.attention import TorchAttention
from model.kernels.linear import CpuColumnParallelLinear, CpuRowParallelLinear, has_onednn
from model.kernels.norm import RMSNorm
from parallel.platform import current_platform

Kernels = Literal["torch", "transformer_engine"]


class TorchProvider(LocalSpecProvider):  # type: ignore[misc]
    """Core's own tensor-parallel linear layers with torch's fused attention and RMSNorm. Runs on CPU and GPU."""

    def column_parallel_linear(self) -> type:
        return CpuColumnParallelLinear if _on_cpu() else ColumnParallelLinear

    def row_parallel_linear(self) -> type:
        return CpuRowParallelLinear if _on_cpu() else RowParallelLinear

    def grouped_mlp_modules(
        self, moe_use_grouped_gemm: bool, moe_use_legacy_grouped_gemm: bool
    ) -> tuple[type, MLPSubmodules | None]:
        module, submodules = super().grouped_mlp_modules(moe_use_grouped_gemm, moe_use_legacy_grouped_gemm)
        if submodules is None:
            return module, None
        return module, MLPSubmodules(
            linear_fc1=self.column_parallel_linear(),
            linear_fc2=self.row_parallel_linear(),
            activation_func=self.activation_func(),
        )

    def activation_func(self) -> type:
        return SwiGLU

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        return RMSNorm

    def core_attention(self) -> type:
        return TorchAttention


def _on_cpu() -> bool:
    return current_platform().device_type == "cpu" and has_onednn()


def output_linear(kernels: Kernels) -> type:
    """The class of the layer before the logits; Transformer Engine's own cannot share the embedding's weights."""
    return TorchProvider().column_parallel_linear() if kernels == "torch" else ColumnParallelLinear


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
