"""Predicted bytes beside those that real ranks hold, and rules of the memory model."""

from __future__ import annotations

from dataclasses import replace

import pytest

from foundation.accelerators import find_device
from launch.config import config_from
from launch.planner.coefficients import memory_coefficients
from launch.planner.from_config import job_of
from launch.planner.memory import fullest_stage, stage_memory
from launch.planner.table import understand
from parallel.layout import ParallelLayout
from tests.launch.planner.memory_cases import of_this_rank, settings
from tests.launch.planner.test_table import row
from tests.ranks import RankPool

STATES, ACTIVATIONS = 0.03, 0.15
"""Relative errors that are allowed."""

LAYOUTS = {
    "one": (1, "tp=1", ()),
    "bf16 dp2": (2, "dp=2", ("training.precision=bf16",)),
    "tp2 pp2": (4, "tp=2 pp=2", ()),
    "vpp2 recomputed": (2, "pp=2 vpp=2", ("training.recompute_granularity=full",)),
    "zero3": (2, "dp=2 zero=3", ()),
    "norms of queries and keys": (
        1, "tp=1", ("model.qk_layernorm=true", "model.kv_channels=64", "training.precision=bf16"),
    ),
    "experts": (4, "tp=2 ep=2 dp=2", ("model.num_experts=4", "training.micro_batch_size=4")),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_ranks_hold_what_is_predicted(ranks: RankPool, name: str) -> None:
    world_size, parallel, more = LAYOUTS[name]
    for rank, compared in enumerate(ranks.run(world_size, of_this_rank, settings(parallel, *more))):
        for kind, (planned, held) in compared.items():
            bound = ACTIVATIONS if kind == "activations" else STATES
            assert planned == pytest.approx(held, rel=bound), f"rank {rank}: {kind}"


@pytest.mark.parametrize(
    ("kernels", "precision", "allocated_gib"),
    [("transformer_engine", "bf16", 98.65), ("torch", "bf16", 99.87), ("transformer_engine", "fp8", 102.40),
     ("torch", "fp8", 98.49)],
)  # fmt: skip
def test_a_gpu_holds_what_is_predicted(kernels: str, precision: str, allocated_gib: float) -> None:
    """Beside what torch's allocator gave at most in four micro-batches of 16 layers of Llama 3.1 8B, 2 x 4,096 tokens.

    Measured with the CUDA build of torch on a device whose kernels compute nothing: sizes are a GPU's, times are not.
    """
    config = config_from(
        {
            "run": {"folder": "/nonexistent"},
            "model": {"num_layers": 16, "hidden_size": 4096, "ffn_hidden_size": 14336, "num_attention_heads": 32,
                      "num_query_groups": 8, "vocab_size": 128256, "max_position_embeddings": 4096, "kernels": kernels},
            "data": {"sources": ["orthant:demo"], "tokenizer": {"kind": "byte-bpe", "vocab_size": 512}},
            "training": {"train_steps": 1000, "global_batch_size": 8, "micro_batch_size": 2, "seq_length": 4096,
                         "precision": precision},
            "optimizer": {"lr": 1e-4},
        }
    )  # fmt: skip
    planned = fullest_stage(job_of(config, ParallelLayout(), find_device("h200"), 128256))
    states = planned.weights + planned.gradients + planned.optimizer
    held = states + planned.activations + planned.logits + planned.working
    assert held / 2**30 == pytest.approx(allocated_gib, rel=0.03)
    assert planned.activations + planned.logits == pytest.approx(allocated_gib * 2**30 - states, rel=ACTIVATIONS)


def test_ranks_on_cpu_hold_no_memory_of_communicators() -> None:
    job = understand(row(gpu="cpu")).job
    assert stage_memory(job, 0).framework == stage_memory(replace(job, tp=1, pp=1, dp=1), 0).framework


def test_later_stages_hold_fewer_micro_batches() -> None:
    job = understand(row(pp="4", recompute="none")).job
    held = [stage_memory(job, stage).activations for stage in range(4)]
    assert held == sorted(held, reverse=True)
    assert held[1] / held[3] == pytest.approx(3, rel=0.01)


@pytest.mark.parametrize(("zero", "shared"), [(0, 1.0), (1, 12 / 16), (3, 1.0)])
def test_zero_divides_what_it_shards(zero: int, shared: float) -> None:
    job = replace(understand(row(tp="1", pp="1", num_gpus="8")).job, zero=zero, main_grad_bytes=2)
    one, eight = replace(job, dp=1, shard=1), replace(job, dp=8, shard=8)

    def states(of: object) -> float:
        memory = stage_memory(of, 0)  # type: ignore[arg-type]
        return memory.weights + memory.gradients + memory.optimizer

    kept = {0: 1.0, 1: 1 - shared * 7 / 8, 3: 1 / 8}[zero]
    assert states(eight) / states(one) == pytest.approx(kept, rel=1e-6)


def test_everything_grows_with_what_it_is_made_of() -> None:
    job, known = understand(row(recompute="none")).job, memory_coefficients()
    base = fullest_stage(job, known)
    assert fullest_stage(replace(job, micro_batch_size=2), known).activations > 1.9 * base.activations
    assert fullest_stage(replace(job, arithmetic="fp8"), known).activations < base.activations
    assert fullest_stage(replace(job, attention="unfused"), known).activations > base.activations
    assert fullest_stage(replace(job, sequence_parallel=False), known).activations > base.activations
    assert fullest_stage(replace(job, tp=8), known).total < base.total
    assert find_device("h200").memory_gib > find_device("h100").memory_gib
