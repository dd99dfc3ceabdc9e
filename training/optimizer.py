"""Core's optimizer for our config: AdamW, sharded under ZeRO, stepped in parts so that a guard can look first."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as CoreOptimizerConfig
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from parallel.data_parallel import WrappedChunk
from parallel.layout import ParallelLayout
from training.config import OptimizerConfig


def build_optimizer(
    config: OptimizerConfig, wrapped: list[WrappedChunk], core: Any, layout: ParallelLayout
) -> MegatronOptimizer:
    """AdamW over fp32 master weights; norms and biases get no weight decay (core marks their groups)."""
    optimizer = get_megatron_optimizer(
        CoreOptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.adam_beta1,
            adam_beta2=config.adam_beta2,
            adam_eps=config.adam_eps,
            clip_grad=config.clip_grad,
            bf16=core.bf16,
            params_dtype=core.params_dtype,
            use_distributed_optimizer=layout.distributed_optimizer,
            overlap_param_gather=layout.overlap_param_gather,
        ),
        wrapped,
    )
    # Megatron-FSDP's comes bare where there is one model chunk.
    return optimizer if isinstance(optimizer, ChainedOptimizer) else ChainedOptimizer([optimizer])


def set_learning_rate(optimizer: MegatronOptimizer, rate: float, weight_decay: float) -> None:
    """Set both for the coming step. Core leaves the groups' `wd_mult` to whoever schedules: it is applied here."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_mult"]
        group["weight_decay"] = weight_decay * group["wd_mult"]


def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """Hand reduced gradients to the optimizer; the L2 norm of all of them, each counted once over the whole grid."""
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())


@torch.no_grad()
def apply_gradients(optimizer: MegatronOptimizer, norm: float, clip_grad: float) -> None:
    """Scale gradients down to `clip_grad` where `norm` is above it (0: never), and step."""
    if clip_grad > 0:
        for part in optimizer.chained_optimizers:
            parameters = part.get_parameters()
            if parameters:
                clip_grad_by_total_norm_fp32(parameters, max_norm=clip_grad, total_norm=norm)
    optimizer.step_with_ready_grads()
