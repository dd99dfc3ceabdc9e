"""A run's configuration at one layout, as a job of the planner."""

from __future__ import annotations

from launch.config import RunConfig
from launch.planner.architecture import from_model_config
from launch.planner.hardware import Device
from launch.planner.job import Job
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
        overlap=layout.overlap_grad_reduce or layout.fully_sharded,
        expert_tensor=layout.tp,
        stage_layers=layout.pipeline_layers,
    )
