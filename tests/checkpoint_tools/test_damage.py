"""Damaged checkpoints: found and named before anything with a final name is there."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from checkpoint_tools import copying
from checkpoint_tools.catalog import Piece, StoredTensor, cover_fault
from checkpoint_tools.convert import Manner, convert
from checkpoint_tools.copying import DonePart
from checkpoint_tools.dtypes import FP32
from checkpoint_tools.formats.detect import open_checkpoint
from checkpoint_tools.manifest import MANIFEST, read_manifest
from checkpoint_tools.planning import Form
from checkpoint_tools.record import RECORD
from checkpoint_tools.soundness import Soundness, check
from checkpoint_tools.verify import Difference
from foundation.errors import WorkError
from launch.cli import main
from tests.checkpoint_tools.models import converted, file_tensors, same_bits, saved_model

ALONE = Manner(processes=1)


FORMATS = ("hf", "distributed", "megatron")


def biggest(folder: Path) -> Path:
    """The file with the most tensors in it."""
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as handle:
        handle.seek(offset)
        byte = handle.read(1)[0]
        handle.seek(offset)
        handle.write(bytes([byte ^ 0x10]))


def tensor_byte(folder: Path) -> tuple[Path, int]:
    """A byte in the middle of a weight."""
    catalog = open_checkpoint(folder)
    piece = catalog.tensors["decoder.layers.2.mlp.linear_fc2.weight"].pieces[0]
    return catalog.folder / piece.file, piece.offset + 100


@pytest.mark.parametrize("kind", FORMATS)
def test_a_flipped_byte_is_found_and_named(sources: Path, tmp_path: Path, kind: str) -> None:
    """In a folder of transformers, too, where the converter left its record."""
    converted(sources / "distributed", tmp_path / "damaged", kind, **({"tp": 2} if kind == "megatron" else {}))
    assert check(tmp_path / "damaged").faults == ()
    flip(*tensor_byte(tmp_path / "damaged"))
    faults = check(tmp_path / "damaged").faults
    assert len(faults) == 1 and ("linear_fc2" in faults[0] or "distcp" in faults[0])
    to = "hf" if kind != "hf" else "distributed"
    with pytest.raises(WorkError, match=r"linear_fc2.weight is not what was written|distcp"):
        convert(tmp_path / "damaged", tmp_path / "out", Form(to), ALONE)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_that_is_cut_off_is_found_before_anything_is_written(sources: Path, tmp_path: Path, kind: str) -> None:
    shutil.copytree(sources / kind, tmp_path / "cut")
    path = biggest(tmp_path / "cut")
    os.truncate(path, path.stat().st_size - 200)
    with pytest.raises(WorkError, match=path.name.split("_optim")[0]):
        convert(tmp_path / "cut", tmp_path / "out", Form("hf" if kind != "hf" else "distributed"), ALONE)
    assert check(tmp_path / "cut").faults
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut"]


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    model = saved_model("llama3", tmp_path / "hf")
    shutil.rmtree(tmp_path / "hf")
    model.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    shard = sorted((tmp_path / "hf").glob("*.safetensors"))[2]
    shard.unlink()
    with pytest.raises(WorkError, match=shard.name):
        convert(tmp_path / "hf", tmp_path / "out", Form("distributed"), ALONE)


def test_a_missing_distcp_is_named(sources: Path, tmp_path: Path) -> None:
    shutil.copytree(sources / "distributed", tmp_path / "less")
    (tmp_path / "less" / "__0_0.distcp").unlink()
    with pytest.raises(WorkError, match=r"__0_0.distcp"):
        convert(tmp_path / "less", tmp_path / "out", Form("hf"), ALONE)


def test_a_missing_rank_file_is_named(sources: Path, tmp_path: Path) -> None:
    shutil.copytree(sources / "megatron", tmp_path / "less")
    shutil.rmtree(tmp_path / "less" / "release" / "mp_rank_01_001")
    with pytest.raises(WorkError, match=r"mp_rank_01_001"):
        convert(tmp_path / "less", tmp_path / "out", Form("hf"), ALONE)
    shutil.rmtree(tmp_path / "less" / "release" / "mp_rank_00_001")
    with pytest.raises(WorkError, match=r"pipeline_model_parallel_size"):
        convert(tmp_path / "less", tmp_path / "out", Form("hf"), ALONE)


@pytest.mark.parametrize(
    ("kind", "lost"),
    [
        ("distributed", (".metadata",)),
        ("distributed", (".metadata", "conversion.json")),
        ("distributed", (".metadata", "conversion.json", MANIFEST)),
        ("distributed", ("conversion.json", MANIFEST)),
        ("distributed", ("common.pt",)),
        ("distributed", ("__0_0.distcp",)),
        ("hf", ("config.json",)),
        ("hf", ("model.safetensors",)),
        ("megatron", ("mp_rank_00_000", "mp_rank_00_001", "mp_rank_01_000", "mp_rank_01_001")),
        ("megatron", ("mp_rank_01_000",)),
    ],
)
def test_a_checkpoint_of_ours_that_lacks_a_file_is_damaged(
    sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, lost: tuple[str, ...]
) -> None:
    """Exit code 3, and no word of a wrong request; an empty folder, and one that is not there, are wrong requests."""
    if kind == "hf":
        converted(sources / "distributed", tmp_path / "less", kind)
    else:
        shutil.copytree(sources / kind, tmp_path / "less")
    (tmp_path / "less" / "tokenizer").mkdir(exist_ok=True)  # as every checkpoint of a training has it
    holds = tmp_path / "less" / "release" if kind == "megatron" else tmp_path / "less"
    for path in (holds / name for name in lost):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    capsys.readouterr()
    assert main(["ckpt", "verify", str(tmp_path / "less")]) == 3
    said = capsys.readouterr().err
    assert any(name in said for name in (*lost, "mp_rank_*")) and "cure:" not in said
    (tmp_path / "empty").mkdir()
    for nothing in ("empty", "nowhere"):
        assert main(["ckpt", "verify", str(tmp_path / nothing)]) == 2


def test_what_the_disk_changes_is_found_before_the_target_has_its_name(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte that changes after it was written: the copy that is read back differs."""
    flushed = copying._flushed

    def spoil(done: DonePart, descriptors: list[int]) -> DonePart:
        os.pwrite(descriptors[0], b"\x55", os.fstat(descriptors[0]).st_size // 2)
        return flushed(done, descriptors)

    monkeypatch.setattr(copying, "_flushed", spoil)
    with pytest.raises(Difference, match="do not read back"):
        convert(sources / "distributed", tmp_path / "out", Form("hf"), ALONE)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    convert(sources / "distributed", tmp_path / "out", Form("hf"), Manner(resume=True, processes=1))
    assert same_bits(file_tensors(sources / "hf"), file_tensors(tmp_path / "out")) == []


@pytest.mark.parametrize("where", [{"row": -4}, {"column": -4}, {"rows": -4, "columns": -4}])
def test_a_part_before_the_beginning_is_no_part(where: dict[str, int]) -> None:
    """Its rows would be read from another place than they lie at."""
    piece = replace(Piece("file", 0, 0, 4, 0, 4), **where)
    assert cover_fault(StoredTensor("name", (4, 4), FP32, (piece,))) is not None


def test_files_with_hashes_are_read_once(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As training writes them: the manifest has a hash of each file, and nothing one of tensors."""
    shutil.copytree(sources / "distributed", tmp_path / "trained")
    (tmp_path / "trained" / RECORD).unlink()
    manifest = read_manifest(tmp_path / "trained")
    files = {name: record for name, record in manifest.files.items() if name != RECORD}
    (tmp_path / "trained" / MANIFEST).write_text(manifest.model_copy(update={"files": files}).model_dump_json())

    def again(*_: object) -> int:
        raise AssertionError("tensors are read once more")

    monkeypatch.setattr(os, "preadv", again)
    assert check(tmp_path / "trained", processes=1) == Soundness(tmp_path / "trained", (), "files")
