"""Runs and cells of the parity tests. Imported by rank processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from data.batches import MicroBatch
from model.config import ModelConfig
from parallel.layout import ParallelLayout
from training.config import TrainingSections
from training.parity import Bounds, ParityRecord, record_run

STEPS = 5
SMALL = {
    "num_layers": 4,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "max_position_embeddings": 64,
    "init_method_std": 0.1,
    "make_vocab_size_divisible_by": 1,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": SMALL | {"rope_scaling": {"kind": "llama3", "factor": 8.0, "original_max_position_embeddings": 16}},
    "tied_biased": SMALL | {"share_embeddings_and_output_weights": True, "add_qkv_bias": True},
    "accumulating": SMALL
    | {
        "share_embeddings_and_output_weights": True,
        "add_qkv_bias": True,
        "kernel_overrides": {"weight_gradient": "torch"},
    },
    "qk_norm": SMALL | {"qk_layernorm": True, "kv_channels": 24},
    "windowed": SMALL | {"window_size": 7},
    "dropout": SMALL | {"hidden_dropout": 0.2},
    "all_dropout": SMALL | {"hidden_dropout": 0.2, "attention_dropout": 0.1},
    "yarn": SMALL | {"rope_scaling": {"kind": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    "threes": SMALL | {"num_layers": 6, "num_attention_heads": 6, "num_query_groups": 3, "hidden_size": 96},
    "six_layers": SMALL | {"num_layers": 6, "share_embeddings_and_output_weights": True},
}
VOCAB_SIZE = 99
"""Odd, so that no layout but one rank divides it."""
OTHER_ROUNDINGS = Bounds(loss=2e-3, gradient=4e-2, weight=3e-2)
"""bf16 where matrices are split: partial sums are rounded to 8 bits (2**-8 = 4e-3) at other places, some ten times on
the way through four layers and back. One rank's bf16 gradients are 2e-2 to 3e-2 away from its fp32 ones, its
losses 6e-4, its weights after five steps 1e-2: two roundings of one function can be no closer than that."""
SAME_ROUNDINGS = Bounds(loss=2e-3, gradient=1e-6, weight=3e-2)
"""bf16 where only the batch or the layers are split: every bf16 operation of the first step is the same, sums over
ranks are fp32, and gradients are 2e-9 apart. After it a master weight may fall to the other side of a bf16 rounding,
and from there on they are two roundings of one function, as above. Whether one does is up to the processor: with
torch's kernels for AVX512 the worst bias ends 1e-3 apart, with oneDNN's for AVX2 9e-3, and a loss 3e-4."""


def layout(**sizes: Any) -> ParallelLayout:
    names = {
        "tp": "tensor_model_parallel_size",
        "cp": "context_parallel_size",
        "pp": "pipeline_model_parallel_size",
        "dp": "data_parallel_size",
        "ep": "expert_model_parallel_size",
        "vpp": "virtual_pipeline_model_parallel_size",
    }
    return ParallelLayout(**{names.get(name, name): value for name, value in sizes.items()})


LAYOUTS = {
    "one": layout(),
    "tp2": layout(tp=2),
    "tp2_pp2_no_sp": layout(tp=2, pp=2),
    "tp2_sp": layout(tp=2, sequence_parallel=True),
    "tp4": layout(tp=4),
    "tp4_sp": layout(tp=4, sequence_parallel=True),
    "pp2": layout(pp=2),
    "pp4_uneven": layout(pp=4, pipeline_layers=(1, 2, 2, 1)),
    "tp2_pp2": layout(tp=2, pp=2, sequence_parallel=True),
    "dp2": layout(dp=2, zero_stage=0),
    "dp2_zero1": layout(dp=2, zero_stage=1),
    "dp2_overlap": layout(dp=2, zero_stage=0, overlap_grad_reduce=True, bucket_size=20_000),
    "tp2_dp2_overlap": layout(
        tp=2, dp=2, sequence_parallel=True, overlap_grad_reduce=True, overlap_param_gather=True, bucket_size=20_000
    ),
    "pp2_vpp2": layout(pp=2, vpp=2),
    "tp2_pp2_vpp2": layout(tp=2, pp=2, vpp=2, sequence_parallel=True),
    "pp2_vpp2_dp2": layout(pp=2, vpp=2, dp=2, overlap_grad_reduce=True, overlap_param_gather=True, bucket_size=20_000),
    "cp2": layout(cp=2),
    "cp4": layout(cp=4),
    "tp2_cp2": layout(tp=2, cp=2, sequence_parallel=True),
    "cp2_pp2": layout(cp=2, pp=2),
    "cp2_dp2": layout(cp=2, dp=2),
    "tp2_cp2_pp2": layout(tp=2, cp=2, pp=2, sequence_parallel=True),
    "tp3": layout(tp=3),
    "pp3": layout(pp=3),
    "pp4": layout(pp=4),
    "dp4": layout(dp=4),
    "tp2_pp2_dp2": layout(tp=2, pp=2, dp=2, sequence_parallel=True),
}


def sections(precision: str = "fp32", micro_batch_size: int = 1, recompute: str = "none") -> TrainingSections:
    """A short run with everything on that a normalisation could miss: clipping, decay, a warm-up.

    adam_eps is above the rounding of a gradient (1e-2 * 2**-24): below it Adam makes a full step of whatever sign
    rounding gives to a gradient that should be 0, and one such weight moves all that comes after.
    """
    return TrainingSections.model_validate(
        {
            "training": {
                "train_steps": 20,
                "global_batch_size": 8,
                "micro_batch_size": micro_batch_size,
                "seq_length": 32,
                "precision": precision,
                "recompute_granularity": recompute,
            },
            "optimizer": {"lr": 3e-3, "clip_grad": 1.0, "adam_eps": 1e-6},
            "schedule": {"kind": "cosine", "warmup_steps": 2},
        }
    )


class UnevenBatches:
    """Random tokens; every micro-batch counts another number of them; optionally documents kept apart."""

    def __init__(self, micro_batch_size: int = 1, documents: bool = False, reset: bool = False) -> None:
        self.micro_batch_size, self.documents, self.reset = micro_batch_size, documents, reset

    def __call__(self, step: int, rank: int, ranks: int) -> Iterator[MicroBatch]:
        size, length = self.micro_batch_size, 32
        for number in range(rank, 8 // size, ranks):
            draw = np.random.default_rng([step, number])
            rows = draw.integers(0, VOCAB_SIZE, (size, length + 1))
            mask = (draw.random((size, length)) < 0.2 + 0.1 * (number % 8)).astype(np.float32)
            borders = [sorted(draw.choice(np.arange(1, length), 2, replace=False)) for _ in range(size)]
            lengths = [np.diff([0, *row, length]) for row in borders]
            positions = [np.concatenate([np.arange(n) for n in row]) for row in lengths]
            apart = self.documents or self.reset
            yield MicroBatch(
                tokens=rows[:, :-1],
                labels=rows[:, 1:],
                loss_mask=mask,
                position_ids=np.stack(positions) if apart else np.broadcast_to(np.arange(length), (size, length)),
                document_lengths=tuple(int(n) for row in lengths for n in row) if self.documents else None,
            )


def run_case(
    model: str,
    layout: ParallelLayout,
    precision: str = "fp32",
    micro_batch_size: int = 1,
    documents: bool = False,
    reset: bool = False,
    recompute: str = "none",
    steps: int = STEPS,
) -> ParityRecord | None:
    """One cell, on the ranks of a pool."""
    return record_run(
        ModelConfig.model_validate(MODELS[model]),
        layout,
        sections(precision, micro_batch_size, recompute),
        VOCAB_SIZE,
        UnevenBatches(micro_batch_size, documents, reset),
        steps,
    )
