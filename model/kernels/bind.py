"""Give core's own names the functions of a choice of kernels.

Core looks for Transformer Engine and apex when it is imported and keeps what it found in module names. Where a choice
differs from that (torch's by name, or no library at all) these names are rebound; both kinds compute the same.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from megatron.core.models.common.embeddings import rope_utils

from model.kernels import weight_gradient
from model.kernels.choice import KernelChoice, Library
from model.kernels.rotation import transformer_engine_where_shared, use_in_core

ADAM = {
    "transformer_engine": "transformer_engine.pytorch.optimizers",
    "apex": "apex.optimizers",
    "torch": "parallel.fused_adam",
}
"""Where each library has its FusedAdam."""


def bind_to_core(kernels: KernelChoice) -> None:
    """Make core compute with `kernels` in this process. Idempotent; the last choice holds."""
    _bind_adam(kernels.adam)
    _bind_l2norm(kernels.l2norm)
    _bind_rope(kernels.rope)
    _bind_accumulation(kernels.weight_gradient)


def _core(module: str) -> Any:
    return importlib.import_module(f"megatron.core.{module}")


def _bind_adam(library: Library) -> None:
    adam = importlib.import_module(ADAM[library]).FusedAdam
    optimizer, distributed = _core("optimizer"), _core("optimizer.distrib_optimizer")
    if optimizer.Adam is adam and distributed.Adam is adam:
        return
    optimizer.Adam = distributed.Adam = adam
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distributed.HAVE_APEX_OR_TE = True
    # Ours keeps to the contract of apex's: `step` in the group, moments plain tensors.
    distributed.USING_TE_OPTIMIZER = library == "transformer_engine"
    distributed.USING_APEX_OPTIMIZER = library != "transformer_engine"


def _bind_l2norm(library: Library) -> None:
    clipping = _core("optimizer.clip_grads")
    if library == "transformer_engine":
        found = importlib.import_module("transformer_engine.pytorch.optimizers")
        applier, norm, scale = found.multi_tensor_applier, found.multi_tensor_l2norm, found.multi_tensor_scale
    elif library == "apex":
        kernels = importlib.import_module("amp_C")
        applier = importlib.import_module("apex.multi_tensor_apply").multi_tensor_applier
        norm, scale = kernels.multi_tensor_l2norm, kernels.multi_tensor_scale
    else:
        applier, norm, scale = _apply, _l2_norm, _scale
    clipping.l2_norm_impl = norm
    for module in (clipping, _core("optimizer.optimizer")):
        module.multi_tensor_applier, module.multi_tensor_scale_impl = applier, scale


def _apply(operation: Any, overflow: torch.Tensor, tensors: list[list[torch.Tensor]], *options: Any) -> Any:
    return operation(0, overflow, tensors, *options)


def _l2_norm(_chunk: int, _overflow: torch.Tensor, tensors: list[list[torch.Tensor]], _per_tensor: bool) -> Any:
    """Contract of amp_C.multi_tensor_l2norm; core's own stand-in asks the GPU for each tensor's norm by itself."""
    (wanted,) = tensors
    return torch.stack(torch._foreach_norm(wanted)).float().norm().view(1), None


def _scale(_chunk: int, _overflow: torch.Tensor, tensors: list[list[torch.Tensor]], factor: float) -> None:
    """Contract of amp_C.multi_tensor_scale: tensors[1] = tensors[0] * factor."""
    source, target = tensors
    if all(one is other for one, other in zip(source, target, strict=True)):
        torch._foreach_mul_(target, factor)
    else:
        torch._foreach_copy_(target, torch._foreach_mul(source, factor))


def _bind_rope(library: Library) -> None:
    if library == "transformer_engine":
        transformer_engine_where_shared(importlib.import_module("megatron.core.extensions.transformer_engine"))
    else:
        use_in_core()
    assert rope_utils.fused_apply_rotary_pos_emb is not None


def _bind_accumulation(library: Library | None) -> None:
    """Of core's own linear layers, the output layer among them; Transformer Engine's have theirs inside."""
    layers = _core("tensor_parallel.layers")
    if library == "apex":
        layers.fused_weight_gradient_mlp_cuda = importlib.import_module("fused_weight_gradient_mlp_cuda")
        layers._grad_accum_fusion_available = True
    elif library is not None:
        layers.fused_weight_gradient_mlp_cuda = weight_gradient
        layers._grad_accum_fusion_available = True
