"""What FP8 layers keep, in checkpoints: at every layout, without it, and never as a program."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from model.kernels.amax_state import EXTRA, TENSORS, is_extra_state, made_anew, read_state, written_state
from parallel.layout import ParallelLayout
from tests.ranks import RankPool
from tests.training.amax_cases import HISTORY, engine_bytes, read_with_engine, train_with_engine
from tests.training.test_checkpoint import run_at
from tests.training.trainer_cases import Run


def test_scales_and_histories_are_read_without_the_library() -> None:
    state = read_state(engine_bytes(3))
    assert state is not None and set(state) == {*TENSORS, EXTRA}
    assert torch.equal(state["amax_history_fwd"], torch.full((HISTORY, 3), 13.0))
    assert state[EXTRA] == {"fp8_checkpoint": True, "num_gemms": 1, "shape": (1, 2)}
    again = read_state(written_state(state))
    assert again is not None and all(torch.equal(again[name], state[name]) for name in TENSORS)


def test_no_state() -> None:
    for given in (None, torch.zeros(0, dtype=torch.uint8), written_state(None)):
        assert read_state(given) is None


class Program:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def test_a_program_inside_is_refused_and_not_run(tmp_path: Path) -> None:
    with pytest.raises(pickle.UnpicklingError, match="mkdir"):
        read_state(engine_bytes(0, more=Program(tmp_path / "touched")))
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    "given", [torch.ones(3, dtype=torch.uint8), torch.ones(3), b"", written_state(None)[:-1], torch.zeros(64).byte()]
)
def test_damaged_bytes_are_refused(given: Any) -> None:
    with pytest.raises(pickle.UnpicklingError):
        read_state(given)


def test_other_recipes_and_lengths_begin_anew() -> None:
    for core in (
        SimpleNamespace(fp8=None, fp8_recipe="delayed", fp8_amax_history_len=HISTORY),
        SimpleNamespace(fp8="hybrid", fp8_recipe="tensorwise", fp8_amax_history_len=HISTORY),
        SimpleNamespace(fp8="hybrid", fp8_recipe="delayed", fp8_amax_history_len=HISTORY + 1),
    ):
        assert read_state(made_anew(engine_bytes(0), core)) is None


def test_names() -> None:
    assert is_extra_state("decoder.layers.mlp.linear_fc1._extra_state/shard_3_32")
    assert is_extra_state("decoder.layers.0.self_attention.core_attention._extra_state")
    assert is_extra_state("decoder.layers.self_attention.linear_qkv.layer_norm__extra_state/shard_0_4")
    assert not is_extra_state("decoder.layers.mlp.linear_fc1.weight")


def test_every_layout_gets_its_layers_histories(ranks: RankPool, token_file: Path, tmp_path: Path) -> None:
    run = Run(tmp_path, token_file, ParallelLayout(tensor_model_parallel_size=2), steps=2)
    ranks.run(2, train_with_engine, run)
    elsewhere = run.but(layout=ParallelLayout(pipeline_model_parallel_size=2))
    first, last = ranks.run(2, read_with_engine, elsewhere, delayed=True)
    assert first == {0: {10.0}, 1: {11.0}} and last == {2: {12.0}, 3: {13.0}}
    plain = ranks.run(1, read_with_engine, run.but(layout=ParallelLayout()), delayed=False)[0]
    assert plain == {layer: {-1.0} for layer in range(4)}
    run_at(ranks, run.but(layout=ParallelLayout(), steps=3))  # torch's layers train on from it, and save without it
    begun = ranks.run(2, read_with_engine, elsewhere, delayed=True)
    assert begun[0] == first
