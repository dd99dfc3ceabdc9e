"""A training step to be predicted: architecture, batch, layout, hardware and the software's options, all resolved."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

from foundation.accelerators import Device
from launch.planner.architecture import Architecture
from parallel.config import even_split

Arithmetic = Literal["fp32", "bf16", "fp8", "fp4"]
Recomputation = Literal["none", "selective", "operators", "full"]
"""What the backward pass computes again: nothing, attention's inside, every other product and all else, layers."""

AttentionKernel = Literal["flash", "flash1", "fused", "unfused"]
"""flash: tiled, second generation or later. flash1: its first. fused: scale, mask and softmax in one kernel, scores in
memory. unfused: each on its own."""


@dataclass(frozen=True)
class Job:
    """One configuration.

    Attributes:
        zero: ZeRO stage; `shard` is how many ranks one copy of what it shards is spread over.
        micro_batch_size, global_batch_size, seq_length: in sequences and tokens.
        arithmetic: of matrix products.
        main_grad_bytes: of one gradient where it is added up.
        gradient_passes: 2 where gradients of a sharded optimizer are reduced to all ranks, 1 where to their owner.
        sequence_parallel: whether norms and residuals are cut over tensor-parallel ranks.
        fused_norms: whether a norm is one kernel.
        fused_elements: whether rotation, activation and additions are fused kernels (or compiled ones).
        overlap: whether gradients and parameters travel while layers compute.
        adapters_only: whether only low-rank adapters are trained (LoRA).
        expert_tensor: tensor-parallel ranks that cut each expert.
        tokens_kept: share of routed tokens that reach their expert (below 1 where a capacity drops some).
        own_kernels: whether Orthant computes the layers with torch's operators alone.
        loss: who computes it: torch on logits gathered from tensor-parallel ranks, core on each rank's, one kernel, or
            Orthant's own.
        weights_in_fp8_too: whether matrices of layers lie beside their bf16 weights in fp8, and turned once more, as
            Transformer Engine keeps them from a step's first micro-batch on.
        only_master_weights: whether ZeRO-3 keeps fp32 weights alone and rounds what it gathers (PyTorch's FSDP).
        year: of the software, e.g. 2024.5; what experts need beside their products got quicker.
    """

    architecture: Architecture
    device: Device
    num_gpus: int
    tp: int
    pp: int
    vpp: int
    cp: int
    ep: int
    dp: int
    zero: int
    shard: int
    micro_batch_size: int
    global_batch_size: int
    seq_length: int
    arithmetic: Arithmetic = "bf16"
    recompute: Recomputation = "none"
    attention: AttentionKernel = "flash"
    main_grad_bytes: int = 4
    gradient_passes: int = 1
    sequence_parallel: bool = True
    fused_norms: bool = True
    fused_elements: bool = True
    overlap: bool = True
    adapters_only: bool = False
    expert_tensor: int = 1
    tokens_kept: float = 1.0
    own_kernels: bool = False
    loss: Literal["gathered", "vocab_parallel", "fused", "own"] = "vocab_parallel"
    weights_in_fp8_too: bool = False
    only_master_weights: bool = False
    year: float = 2026.0
    stage_layers: tuple[int, ...] | None = None

    @property
    def micro_batches(self) -> int:
        """Of one replica in a step; at least 1."""
        return max(1, round(self.global_batch_size / (self.micro_batch_size * self.dp)))

    @property
    def tokens_per_step(self) -> int:
        """Of all replicas."""
        return self.micro_batches * self.micro_batch_size * self.dp * self.seq_length

    @property
    def local_tokens(self) -> float:
        """Of one micro-batch on one context-parallel rank."""
        return self.micro_batch_size * self.seq_length / self.cp

    @property
    def value_bytes(self) -> int:
        """Of one activation or weight, as it is computed with and sent."""
        return 4 if self.arithmetic == "fp32" else 2

    def layers_of(self, stage: int) -> int:
        """Layers of a stage; where they do not divide, inner stages hold one more."""
        if self.stage_layers is None:
            return _even(self.architecture.layers, self.pp)[stage]
        return self.stage_layers[stage]

    @property
    def norm_ranks(self) -> int:
        """Ranks that the residual stream's tokens are cut over."""
        return self.tp if self.sequence_parallel else 1


@cache
def _even(layers: int, stages: int) -> tuple[int, ...]:
    return tuple(even_split(layers, stages))
