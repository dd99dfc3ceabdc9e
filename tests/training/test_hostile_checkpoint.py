"""Checkpoints that hold programs in place of data: none runs, each is refused in one message."""

from __future__ import annotations

import io
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo, _StoragePrefix

from foundation.errors import WorkError
from parallel.layout import ParallelLayout
from tests.ranks import RankPool
from tests.training.test_checkpoint import run_at
from tests.training.trainer_cases import Run
from training.checkpoint.programs import look_through, refuse_programs


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


def behind_a_class(checkpoint: Path, program: Program) -> None:
    """As `in_bytes`, under a key that `.metadata` gives a harmless name, after it made all keys equal."""
    in_bytes(checkpoint, program)
    path, buffer = checkpoint / ".metadata", io.BytesIO()
    described = pickle.loads(path.read_bytes())
    hidden = next(key for key, info in described.storage_data.items() if info.relative_path == "__9_0.distcp")
    writer: Any = pickle._Pickler(buffer, 4)
    writer.write(pickle.PROTO + b"\x04")
    writer.save(described)
    for target, state in (
        (metadata.MetadataIndex, (None, {"__eq__": _StoragePrefix})),
        (hidden, {"fqn": "decoder.final_layernorm.weight", "offset": None, "index": None}),
    ):
        writer.save(target)
        writer.save(state)
        writer.write(pickle.BUILD + pickle.POP)
    writer.write(pickle.STOP)
    path.write_bytes(buffer.getvalue())


@pytest.mark.parametrize("hide", [in_metadata, in_common, in_bytes, behind_a_class])
def test_no_program_runs(good: Path, tmp_path: Path, hide: Callable[[Path, Program], None]) -> None:
    checkpoint = shutil.copytree(good, tmp_path / "checkpoint")
    touched = tmp_path / "touched"
    hide(checkpoint, Program(touched))
    with pytest.raises(WorkError, match="holds more than data, or is damaged") as refused:
        refuse_programs(checkpoint)
    assert "nothing of it was run" in str(refused.value)
    assert not touched.exists()


def test_classes_are_as_they_were_before(good: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(good, tmp_path / "checkpoint")
    behind_a_class(checkpoint, Program(tmp_path / "touched"))
    with pytest.raises(WorkError, match="it changes MetadataIndex.__eq__"):
        refuse_programs(checkpoint)
    assert metadata.MetadataIndex("a") == metadata.MetadataIndex("a") != metadata.MetadataIndex("b")


def test_bytes_that_core_would_transform_first_are_refused(good: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(good, tmp_path / "checkpoint")
    path = checkpoint / ".metadata"
    described = pickle.loads(path.read_bytes())
    next(iter(described.storage_data.values())).transform_descriptors = ["zstd"]
    path.write_bytes(pickle.dumps(described))
    with pytest.raises(WorkError, match="is stored transformed"):
        refuse_programs(checkpoint)


@pytest.mark.parametrize("place", ["../elsewhere", "/etc/passwd", ".metadata", "sub/__0_0.distcp"])
def test_bytes_that_lie_elsewhere_are_refused(good: Path, tmp_path: Path, place: str) -> None:
    checkpoint = shutil.copytree(good, tmp_path / "checkpoint")
    path = checkpoint / ".metadata"
    described = pickle.loads(path.read_bytes())
    next(iter(described.storage_data.values())).relative_path = place
    path.write_bytes(pickle.dumps(described))
    with pytest.raises(WorkError, match="is no file of this folder"):
        refuse_programs(checkpoint)


NOTHING = (
    {},
    5,
    metadata.Metadata({}, storage_data=None),
    metadata.Metadata({}, storage_data={"a": 1}),
    metadata.Metadata({5: 5}, storage_data={}),  # type: ignore[dict-item]  (wrong on purpose)
)


@pytest.mark.parametrize("held", NOTHING)
def test_metadata_that_describes_nothing_is_refused(good: Path, tmp_path: Path, held: object) -> None:
    checkpoint = shutil.copytree(good, tmp_path / "checkpoint")
    (checkpoint / ".metadata").write_bytes(pickle.dumps(held))
    with pytest.raises(WorkError, match="metadata holds more than data, or is damaged"):
        refuse_programs(checkpoint)


def test_every_file_is_opened_once_by_one_rank(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many entries lie in it, and alike ones are looked at; the last of each file hides a program."""
    checkpoint = shutil.copytree(good, tmp_path / "checkpoint")
    described = pickle.loads((checkpoint / ".metadata").read_bytes())
    for file in ("__8_0.distcp", "__9_0.distcp"):
        for number, value in enumerate([[None]] * 20 + [Program(tmp_path / "touched")]):
            name, at = f"{file[2]}._extra_state/shard_{number}_21", io.BytesIO()
            torch.save(value, at)
            with open(checkpoint / file, "ab") as handle:
                described.state_dict_metadata[name] = metadata.BytesStorageMetadata()
                place = _StorageInfo(file, handle.tell(), handle.write(at.getvalue()))
                described.storage_data[metadata.MetadataIndex(name)] = place
    (checkpoint / ".metadata").write_bytes(pickle.dumps(described))
    opened: list[str] = []
    path_open = Path.open

    def noted(path: Path, *arguments: Any, **options: Any) -> Any:
        opened.append(path.name)
        return path_open(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", noted)
    refused: set[str] = set()
    for rank in range(4):
        try:
            refuse_programs(checkpoint, rank, 4)
        except WorkError as error:
            refused |= {file for file in ("__8_0.distcp", "__9_0.distcp") if file in str(error)}
    files = [name for name in opened if name.endswith(".distcp")]
    assert len(set(files)) == len(files) and refused == {"__8_0.distcp", "__9_0.distcp"}
    assert not (tmp_path / "touched").exists()


def look_through_there(places: list[Path]) -> str:
    """What this rank is told where it sees the checkpoint at its own one of `places`."""
    try:
        look_through(places[dist.get_rank()])
    except WorkError as error:
        return str(error)
    return "nothing"


def test_what_one_rank_cannot_read_ends_all(ranks: RankPool, good: Path, tmp_path: Path) -> None:
    """Core waits for a rank that ended alone until the watchdog ends the run."""
    said = ranks.run(2, look_through_there, [tmp_path / "unseen", good], timeout=60)
    assert said[0] == said[1] and f"{tmp_path / 'unseen' / '.metadata'} can't be read" in said[0]
    assert ranks.run(2, look_through_there, [good, good]) == ["nothing", "nothing"]


def test_our_own_checkpoints_are_data(good: Path) -> None:
    before = sorted(path.name for path in good.iterdir())
    refuse_programs(good)  # raises nothing
    assert sorted(path.name for path in good.iterdir()) == before and ".metadata" in before
