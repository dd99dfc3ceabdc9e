"""Checkpoints that hold programs in place of data: none runs, each is refused in one message."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo

from foundation.errors import WorkError
from parallel.layout import ParallelLayout
from tests.ranks import RankPool
from tests.training.test_checkpoint import run_at
from tests.training.trainer_cases import Run
from training.checkpoint.programs import refuse_programs


class Program:
    """Unpickled, it would make the folder `touched`."""

    def __init__(self, touched: Path) -> None:
        self.touched = touched

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.touched),)


@pytest.fixture(scope="module")
def good(ranks: RankPool, token_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    run_at(ranks, Run(folder, token_file, ParallelLayout(), steps=2))
    return folder / "checkpoints/step_00000002"


def in_metadata(checkpoint: Path, program: Program) -> None:
    path = checkpoint / ".metadata"
    described = pickle.loads(path.read_bytes())
    described.planner_data = program
    path.write_bytes(pickle.dumps(described))


def in_common(checkpoint: Path, program: Program) -> None:
    torch.save({"args": program}, checkpoint / "common.pt")


def in_bytes(checkpoint: Path, program: Program) -> None:
    """As the state of an FP8 layer would lie there."""
    path = checkpoint / ".metadata"
    described = pickle.loads(path.read_bytes())
    torch.save(program, checkpoint / "__9_0.distcp")
    name = "decoder.layers.0.mlp.linear_fc1._extra_state/shard_0_1"
    described.state_dict_metadata[name] = metadata.BytesStorageMetadata()
    length = (checkpoint / "__9_0.distcp").stat().st_size
    described.storage_data[metadata.MetadataIndex(name)] = _StorageInfo("__9_0.distcp", 0, length)
    path.write_bytes(pickle.dumps(described))


@pytest.mark.parametrize("hide", [in_metadata, in_common, in_bytes])
def test_no_program_runs(good: Path, tmp_path: Path, hide: Callable[[Path, Program], None]) -> None:
    checkpoint = shutil.copytree(good, tmp_path / "checkpoint")
    touched = tmp_path / "touched"
    hide(checkpoint, Program(touched))
    with pytest.raises(WorkError, match="holds more than data, or is damaged") as refused:
        refuse_programs(checkpoint)
    assert "nothing of it was run" in str(refused.value)
    assert not touched.exists()


def test_our_own_checkpoints_are_data(good: Path) -> None:
    refuse_programs(good)
