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
from training.config import OptimizerConfig, TrainingConfig
from training.diagnosis import first_bad_tensor
from training.state import build_state

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
