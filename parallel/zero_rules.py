"""What ZeRO-2 and 3 compose with. Every refusal here was tried: core goes wrong there, mostly without a word."""

from __future__ import annotations

from typing import TYPE_CHECKING

from foundation.errors import ConfigError

if TYPE_CHECKING:
    from parallel.layout import ParallelLayout


def check_zero(layout: ParallelLayout) -> None:
    """Refuse what the ZeRO stage of `layout` cannot be combined with.

    Raises:
        ConfigError: the rule that is broken.
    """
    if not layout.fully_sharded:
        _implementation_is_asked_for_nothing(layout)
        return
    _experts_are_not_split(layout)
    if layout.zero_implementation == "fsdp2":
        _fsdp2_has_no_buckets(layout)
        return
    _megatron_fsdp_has_replicas(layout)
    _megatron_fsdp_has_one_stage(layout)
    _megatron_fsdp_reduces_in_fp32_over_tensor_ranks(layout)


def _implementation_is_asked_for_nothing(layout: ParallelLayout) -> None:
    if layout.zero_implementation != "megatron_fsdp":
        raise ConfigError(
            "parallel.zero_implementation",
            layout.zero_implementation,
            rule=f"shards gradients and weights, and parallel.zero_stage {layout.zero_stage} shards neither",
            cure="parallel.zero_stage=3, or no parallel.zero_implementation",
        )


def _experts_are_not_split(layout: ParallelLayout) -> None:
    """Megatron-FSDP's gradients of experts come out wrong by several times themselves; FSDP2 fails."""
    if layout.ep > 1:
        raise ConfigError(
            "parallel.zero_stage",
            layout.zero_stage,
            rule=f"is 0 or 1 with parallel.expert_model_parallel_size {layout.ep}: experts' gradients would not be "
            "reduced over the right ranks",
            cure="parallel.zero_stage=1, or parallel.expert_model_parallel_size=1",
        )


def _fsdp2_has_no_buckets(layout: ParallelLayout) -> None:
    if layout.bucket_size is not None:
        raise ConfigError(
            "parallel.bucket_size",
            layout.bucket_size,
            rule="is not heard by parallel.zero_implementation fsdp2, which sends a layer at a time",
            cure="parallel.bucket_size=null",
        )


def _megatron_fsdp_has_replicas(layout: ParallelLayout) -> None:
    """Alone, core adds each micro-batch's gradients to what it has reduced once more, silently."""
    if layout.dp * layout.cp == 1:
        raise ConfigError(
            "parallel.zero_stage",
            layout.zero_stage,
            rule="shards over replicas and context-parallel ranks, and there is one",
            cure="parallel.zero_stage=1, or parallel.data_parallel_size=2 or more",
        )


def _megatron_fsdp_has_one_stage(layout: ParallelLayout) -> None:
    """mcore_fsdp_adapter.py:365-410 takes the whole world for one pipeline stage."""
    if layout.pp > 1:
        raise ConfigError(
            "parallel.pipeline_model_parallel_size",
            layout.pp,
            rule=f"is 1 with parallel.zero_stage {layout.zero_stage} by megatron_fsdp",
            cure="parallel.zero_implementation=fsdp2, or parallel.zero_stage=1",
        )


def _megatron_fsdp_reduces_in_fp32_over_tensor_ranks(layout: ParallelLayout) -> None:
    """finalize_model_grads.py sums gradients of norms over tensor-parallel ranks into a copy, which is then dropped."""
    if layout.tp > 1 and not layout.grad_reduce_in_fp32:
        raise ConfigError(
            "parallel.grad_reduce_in_fp32",
            False,
            rule=f"is true with parallel.zero_stage {layout.zero_stage} by megatron_fsdp and "
            f"parallel.tensor_model_parallel_size {layout.tp}: core would drop the sums of norms' gradients",
            cure="parallel.grad_reduce_in_fp32=true",
        )
