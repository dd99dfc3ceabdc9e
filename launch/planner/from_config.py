"""A run's configuration at one layout, as a job of the planner."""

from __future__ import annotations

from dataclasses import dataclass

from foundation.accelerators import Device, find_device
from launch.config import RunConfig
from launch.planner.activations import saved_by_autograd
from launch.planner.architecture import from_model_config
from launch.planner.coefficients import memory_coefficients
from launch.planner.job import Job
from launch.planner.memory import stage_memory
from parallel.layout import ParallelLayout


def job_of(config: RunConfig, layout: ParallelLayout, device: Device, vocab_size: int) -> Job:
    """What a step of `config` is at `layout` on `device`.

    Args:
        config: its model, batch, precision and recomputation; its `parallel` section is not looked at.
        layout: the grid.
        device: what it would run on.
        vocab_size: true vocabulary.
    """
    training, model = config.training, config.model
    fused = model.kernels != "torch" and device.generation != "cpu"
    return Job(
        architecture=from_model_config(model, model.padded_vocab_size(vocab_size, layout.tp)),
        device=device,
        num_gpus=layout.world_size,
        tp=layout.tp,
        pp=layout.pp,
        vpp=layout.vpp,
        cp=layout.cp,
        ep=layout.ep,
        dp=layout.dp,
        zero=layout.zero_stage,
        shard=layout.dp * layout.cp,
        micro_batch_size=training.micro_batch_size,
        global_batch_size=training.global_batch_size,
        seq_length=training.seq_length,
        arithmetic=training.precision,
        recompute=training.recompute_granularity,
        main_grad_bytes=4 if layout.grad_reduce_in_fp32 or training.precision == "fp32" else 2,
        sequence_parallel=layout.sequence_parallel,
        fused_norms=fused,
        fused_elements=fused,
        own_kernels=not fused,
        loss="own",
        weights_in_fp8_too=training.precision == "fp8" and fused,
        overlap=layout.overlap_grad_reduce or layout.fully_sharded,
        expert_tensor=layout.tp,
        stage_layers=layout.pipeline_layers,
    )


@dataclass(frozen=True)
class PlannedBytes:
    """What a rank of a stage is predicted to hold under torch's kernels, to be held against what it holds."""

    parameters: float
    weights: float
    gradients: float
    optimizer: float
    activations: float
    """Kept by autograd at most, logits included."""


def planned_bytes(
    config: RunConfig, layout: ParallelLayout, vocab_size: int, stage: int, micro_batches: int
) -> PlannedBytes:
    """Of `micro_batches` of each replica on CPU ranks."""
    training = config.training
    batch = micro_batches * layout.dp * training.micro_batch_size
    precision = "bf16" if training.precision == "fp8" else training.precision
    changes = {"global_batch_size": batch, "precision": precision}
    asked = config.model_copy(update={"training": training.model_copy(update=changes)})
    job = job_of(asked, layout, find_device("cpu"), vocab_size)
    memory = stage_memory(job, stage)
    return PlannedBytes(
        parameters=memory.parameters,
        weights=memory.weights,
        gradients=memory.gradients,
        optimizer=memory.optimizer,
        activations=saved_by_autograd(job, stage, memory_coefficients()),
    )
