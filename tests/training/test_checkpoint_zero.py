"""Checkpoints of ZeRO-2 and 3 read at other layouts, and theirs read at ZeRO-2 and 3: bit for bit, both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from parallel.layout import ParallelLayout
from tests.ranks import RankPool
from tests.training.test_checkpoint import TIED, begin_from, compare_tensors, load_and_save, run_at
from tests.training.trainer_cases import Run

ZERO_3 = ParallelLayout(data_parallel_size=2, zero_stage=3)
ZERO_2 = ParallelLayout(data_parallel_size=4, zero_stage=2)
FSDP_2 = ParallelLayout(data_parallel_size=2, zero_stage=3, zero_implementation="fsdp2")
TP2_ZERO_3 = ParallelLayout(tensor_model_parallel_size=2, data_parallel_size=2, sequence_parallel=True, zero_stage=3)
PP2_FSDP_2 = ParallelLayout(
    pipeline_model_parallel_size=2, data_parallel_size=2, zero_stage=2, zero_implementation="fsdp2"
)
ONE = ParallelLayout()
ZERO_1 = ParallelLayout(data_parallel_size=2, overlap_grad_reduce=True, bucket_size=5000)
TP2 = ParallelLayout(tensor_model_parallel_size=2)


@pytest.mark.parametrize(
    ("saved_at", "loaded_at", "model"),
    [
        (ZERO_3, TP2, {}),
        (ZERO_3, ONE, TIED),
        (ZERO_2, FSDP_2, TIED),
        (TP2, ZERO_3, {"qk_layernorm": True}),
        (ONE, ZERO_2, TIED),
        (ZERO_1, PP2_FSDP_2, TIED),
        (PP2_FSDP_2, TP2_ZERO_3, TIED),
    ],
    ids=lambda value: "" if isinstance(value, dict) else f"{value.describe()} ZeRO{value.zero_stage}",
)
def test_layouts_read_each_other(
    ranks: RankPool,
    tmp_path: Path,
    token_file: Path,
    saved_at: ParallelLayout,
    loaded_at: ParallelLayout,
    model: dict[str, Any],
) -> None:
    source = Run(tmp_path / "source", token_file, saved_at, steps=5, model=model)
    whole = run_at(ranks, source)
    first = source.folder / "checkpoints/step_00000003"

    again = source.but(folder=begin_from(source, 3, tmp_path / "again"), layout=loaded_at)
    ranks.run(loaded_at.world_size, load_and_save, again)
    second = again.folder / "checkpoints/step_00000004"
    different, moments = ranks.run(1, compare_tensors, first, second)[0]
    assert different == [] and moments > 10

    goes_on = run_at(ranks, source.but(folder=begin_from(source, 3, tmp_path / "goes on"), layout=loaded_at))
    assert goes_on.begun_at == 4
    for step in (4, 5):
        assert goes_on.losses[step] == pytest.approx(whole.losses[step], rel=1e-6), step
