"""RMSNorm for the torch provider."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch.nn.functional import rms_norm


class RMSNorm(torch.nn.Module):
    """y = x / rms(x) * weight over the last axis (Zhang & Sennrich 2019), statistics in fp32.

    Stands where core's specs build norms: takes `config`, `hidden_size`, `eps`. Core's own torch norm refuses sequence
    parallelism, because the gradient of a replicated weight over a split sequence has to be summed; the mark on the
    weight is what core's `finalize_model_grads` looks for.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_unused: Any) -> None:
        super().__init__()
        self.eps = eps
        ones = torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight = torch.nn.Parameter(ones)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., hidden_size] -> the same shape and dtype."""
        return rms_norm(hidden, (hidden.shape[-1],), self.weight, self.eps)


class ApexRMSNorm(RMSNorm):
    """The same by NVIDIA apex's fused kernel, forward and backward."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., hidden_size] -> the same shape and dtype."""
        fused = importlib.import_module("apex.normalization.fused_layer_norm").fused_rms_norm_affine
        normalised: torch.Tensor = fused(hidden, self.weight, (hidden.shape[-1],), self.eps)
        return normalised
