"""A value that is not finite is found with its rank and its tensor's name in the whole model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from model.config import ModelConfig
from parallel.groups import ProcessGroups
from parallel.layout import ParallelLayout
from tests.ranks import RankPool
from tests.training.trainer_cases import MODEL, VOCAB_SIZE, poison
from training.batch import DeviceBatch
from training.config import OptimizerConfig, TrainingConfig
from training.diagnosis import first_bad_tensor
from training.state import build_state
from training.step import BatchShape, run_batches

TP2 = ParallelLayout(tensor_model_parallel_size=2)
PP2 = ParallelLayout(pipeline_model_parallel_size=2)
QKV = "decoder.layers.1.self_attention.linear_qkv.weight"
LAST = "decoder.layers.3.mlp.linear_fc2.weight"


def diagnose(layout: ParallelLayout, faults: list[dict[str, Any]]) -> str:
    """What every rank says after faults were put in; a fault's `rank` and what `poison` takes."""
    training = TrainingConfig(train_steps=1, global_batch_size=2, seq_length=16)
    with ProcessGroups(layout, 1):
        state = build_state(ModelConfig.model_validate(MODEL), layout, training, OptimizerConfig(lr=1e-3), VOCAB_SIZE)
        for chunk in state.wrapped:
            chunk.zero_grad_buffer()
        for fault in faults:
            if fault["rank"] == torch.distributed.get_rank():
                poison(state, **{name: value for name, value in fault.items() if name != "rank"})
        return first_bad_tensor(state)


@pytest.mark.parametrize(
    ("layout", "faults", "said"),
    [
        (TP2, [{"rank": 1, "name": QKV, "count": 3}], f"rank 1: gradient of {QKV} has 3 of "),
        (TP2, [{"rank": 0, "name": QKV, "value": float("-inf")}], f"rank 0: gradient of {QKV} has 1 of "),
        (PP2, [{"rank": 1, "name": LAST, "weight": True}], f"rank 1: weight {LAST} has 1 of 1,536 values"),
        (
            PP2,
            [{"rank": 0, "name": QKV}, {"rank": 1, "name": LAST, "weight": True}],
            f"rank 1: weight {LAST}",
        ),
        (PP2, [{"rank": 1, "name": LAST}, {"rank": 0, "name": QKV}], f"rank 0: gradient of {QKV}"),
        (TP2, [], "no weight or gradient is bad: the loss alone is"),
    ],
    ids=["gradient", "inf", "weight", "weights come before gradients", "earlier ranks first", "nothing"],
)
def test_names_rank_and_tensor(ranks: RankPool, layout: ParallelLayout, faults: list[Any], said: str) -> None:
    first, second = ranks.run(2, diagnose, layout, faults)
    assert first == second and first.startswith(said)


OUTPUT = "decoder.layers.2.mlp.linear_fc1"


def diagnose_outputs(layout: ParallelLayout) -> str:
    """Layer 2's first product overflows, and every gradient before it is bad too."""
    training = TrainingConfig(train_steps=1, global_batch_size=2, seq_length=16)
    with ProcessGroups(layout, 1):
        state = build_state(ModelConfig.model_validate(MODEL), layout, training, OptimizerConfig(lr=1e-3), VOCAB_SIZE)
        for chunk in state.wrapped:
            chunk.zero_grad_buffer()
        for layer in state.chunks[0].decoder.layers:
            if layer.layer_number == 3:
                layer.mlp.linear_fc1.register_forward_hook(lambda _, inputs, output: (output[0] * torch.inf, output[1]))
        if torch.distributed.get_rank() == 0:
            poison(state, name="decoder.layers.0.mlp.linear_fc2.weight")
        tokens = torch.arange(32).view(2, 16) % VOCAB_SIZE
        batch = DeviceBatch(tokens, tokens, torch.ones(2, 16), None, None)

        def forward() -> None:
            run_batches(state.wrapped, [iter([batch])], BatchShape(1, 2, 16), forward_only=True)

        return first_bad_tensor(state, forward)


@pytest.mark.parametrize(("layout", "rank"), [(TP2, 0), (PP2, 1)])
def test_names_the_first_output(ranks: RankPool, layout: ParallelLayout, rank: int) -> None:
    first, second = ranks.run(2, diagnose_outputs, layout)
    assert first == second and first.startswith(f"rank {rank}: output of {OUTPUT} has ")
