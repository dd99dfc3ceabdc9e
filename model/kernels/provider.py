"""Which modules the decoder is built from: core's `BackendSpecProvider`, each module from the library chosen for it."""

from __future__ import annotations

import importlib
from typing import Any

from megatron.core.models.backends import LocalSpecProvider
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules

from model.config import ModelConfig
from model.kernels.activation import EngineSwiGLU, SwiGLU
from model.kernels.attention import TorchAttention
from model.kernels.choice import Available, KernelChoice, choose_kernels
from model.kernels.fp8_linear import Fp8ColumnParallelLinear, Fp8RowParallelLinear
from model.kernels.linear import CpuColumnParallelLinear, CpuRowParallelLinear, has_onednn
from model.kernels.norm import ApexRMSNorm, RMSNorm
from parallel.platform import current_platform


class Provider(LocalSpecProvider):  # type: ignore[misc]
    """Torch's are core's own tensor-parallel linear layers with torch's fused attention and RMSNorm, on CPU and GPU."""

    def __init__(self, kernels: KernelChoice, *, fp8: bool = False) -> None:
        self._kernels, self._fp8 = kernels, fp8
        self._engine: Any = None
        if "transformer_engine" in (kernels.linear, kernels.norm, kernels.attention):
            found = importlib.import_module("megatron.core.extensions.transformer_engine_spec_provider")
            self._engine = found.TESpecProvider()

    def in_fp8(self) -> Provider:
        """The same with torch's FP8 products in linear layers."""
        return Provider(self._kernels, fp8=True)

    def column_parallel_linear(self) -> type:
        own = Fp8ColumnParallelLinear if self._fp8 else ColumnParallelLinear
        return self._linear("column_parallel_linear", CpuColumnParallelLinear, own)

    def row_parallel_linear(self) -> type:
        own = Fp8RowParallelLinear if self._fp8 else RowParallelLinear
        return self._linear("row_parallel_linear", CpuRowParallelLinear, own)

    def _linear(self, name: str, on_cpu: type, otherwise: type) -> type:
        if self._kernels.uses_transformer_engine:
            found: type = getattr(self._engine, name)()
            return found
        return on_cpu if _on_cpu() and not self._fp8 else otherwise

    def fuse_layernorm_and_linear(self) -> bool:
        return self._kernels.linear == self._kernels.norm == "transformer_engine"

    def column_parallel_layer_norm_linear(self) -> type | None:
        if not self.fuse_layernorm_and_linear():
            return None
        fused: type = self._engine.column_parallel_layer_norm_linear()
        return fused

    def grouped_mlp_modules(
        self, moe_use_grouped_gemm: bool, moe_use_legacy_grouped_gemm: bool
    ) -> tuple[type, MLPSubmodules | None]:
        base: Any = self._engine if self._kernels.uses_transformer_engine else super()
        module, submodules = base.grouped_mlp_modules(moe_use_grouped_gemm, moe_use_legacy_grouped_gemm)
        if submodules is None:
            return module, None
        own = not self._kernels.uses_transformer_engine
        return module, MLPSubmodules(
            linear_fc1=self.column_parallel_linear() if own else submodules.linear_fc1,
            linear_fc2=self.row_parallel_linear() if own else submodules.linear_fc2,
            activation_func=self.activation_func(),
        )

    def activation_func(self) -> type:
        return SwiGLU if self._kernels.swiglu == "torch" else EngineSwiGLU

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        if self._kernels.norm == "transformer_engine":
            found: type = self._engine.layer_norm(rms_norm=rms_norm, for_qk=for_qk)
            return found
        return ApexRMSNorm if self._kernels.norm == "apex" else RMSNorm

    def core_attention(self) -> type:
        if self._kernels.attention == "torch":
            return TorchAttention
        found: type = self._engine.core_attention()
        return found


def kernels_here(model: ModelConfig) -> KernelChoice:
    """The libraries that `model` is computed with in this process.

    Raises:
        ConfigError: one is asked for by name and cannot be had here.
    """
    return choose_kernels(model, Available.here(on_gpu=current_platform().device_type == "cuda"))


def _on_cpu() -> bool:
    return current_platform().device_type == "cpu" and has_onednn()


def output_linear() -> type:
    """The class of the layer before the logits; Transformer Engine's own cannot share the embedding's weights."""
    return CpuColumnParallelLinear if _on_cpu() else ColumnParallelLinear
