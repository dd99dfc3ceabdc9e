"""A folder of checkpoints and their manifests: names, what is kept, what is whole, and damage told apart."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from checkpoint_tools.manifest import MANIFEST, damage, read_manifest, record_file
from foundation.errors import WorkError
from tests.training.trainer_cases import Run
from training.checkpoint.folder import CheckpointFolder
from training.checkpoint.store import _copy_tokenizer
from training.config import CheckpointConfig


def write(folder: CheckpointFolder, step: int) -> Path:
    """A checkpoint that is only a manifest."""
    (folder.begin(step) / MANIFEST).write_text("{}")
    return folder.finish(step)


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "kept"),
    [
        (3, None, [60, 50, 40]),
        (1, None, [60]),
        (2, 20, [60, 50, 40, 20]),
        (1, 30, [60, 30]),
        (10, 20, [60, 50, 40, 30, 20, 10]),
    ],
)
def test_what_is_kept(tmp_path: Path, keep_last: int, keep_every: int | None, kept: list[int]) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    config = CheckpointConfig(interval=10, keep_last=keep_last, keep_every=keep_every)
    for step in range(10, 70, 10):
        write(folder, step)
        folder.remove_superseded(config, step)
    assert folder.steps() == kept


def test_what_was_just_saved_stays_where_later_steps_lie(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    for step in (100, 200, 300, 150):
        write(folder, step)
    folder.remove_superseded(CheckpointConfig(interval=10, keep_last=1), 150)
    assert folder.steps() == [300, 200, 150]


def test_damaged_checkpoints_lose_their_names(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    for step in (100, 200, 300):
        write(folder, step)
    for _ in range(2):
        folder.set_aside([300, 200], 100)
        assert folder.steps() == [100] and folder.latest() == folder.of_step(100)
        assert (tmp_path / "checkpoints/damaged_step_00000300").is_dir()
        write(folder, 200)
        write(folder, 300)


def test_latest_names_the_newest_whole_checkpoint(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    assert folder.latest() is None and folder.steps() == []
    for step in (9, 100, 20):
        assert write(folder, step).name == f"step_{step:08d}"
    assert folder.latest() == folder.of_step(20)  # the one written last, as after a rollback
    shutil.rmtree(folder.of_step(20))
    assert folder.latest() == folder.of_step(100)
    (folder.path / "latest").unlink()
    assert folder.latest() == folder.of_step(100)


def test_what_is_not_a_whole_checkpoint_is_not_listed(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    write(folder, 5)
    folder.begin(6)
    (tmp_path / "step_00000007").mkdir()  # no manifest
    (tmp_path / "step_8").mkdir()
    (tmp_path / "step_8" / MANIFEST).write_text("{}")
    (tmp_path / "notes.txt").write_text("")
    assert folder.steps() == [5]


def test_what_was_left_unfinished_is_removed(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    (folder.begin(6) / "half").write_text("x")
    unfinished = folder.begin(9)
    assert not folder.unfinished(6).exists() and list(unfinished.iterdir()) == []
    (folder.begin(9) / MANIFEST).write_text("{}")  # the same step again
    folder.finish(9)
    assert not list(tmp_path.glob(".*"))


def test_one_that_is_half_removed_has_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill while tensors were removed left a folder that has its manifest, and counts as whole."""
    folder = CheckpointFolder(tmp_path / "checkpoints")
    for step in (10, 20):
        write(folder, step)

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        folder.remove_superseded(CheckpointConfig(interval=10, keep_last=1), 20)
    assert folder.steps() == [20]
    monkeypatch.undo()
    write(folder, 30)
    assert sorted(path.name for path in folder.path.iterdir()) == ["latest", "step_00000020", "step_00000030"]


def test_one_that_is_replaced_stays_until_the_new_one_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    write(folder, 10)
    (folder.begin(10) / MANIFEST).write_text("new")
    named: list[str] = []
    monkeypatch.setattr(shutil, "rmtree", lambda _: named.append((folder.of_step(10) / MANIFEST).read_text()))
    folder.finish(10)
    assert named == ["new"] and folder.steps() == [10]


def test_a_kill_between_the_two_names_loses_neither(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The only checkpoint of a run is written once more, and the process ends when it has given its name away."""
    folder = CheckpointFolder(tmp_path / "checkpoints")
    (write(folder, 10) / "old").write_text("whole")
    (folder.begin(10) / MANIFEST).write_text("new")
    rename, renamed = Path.rename, list[Path]()

    def killed(path: Path, target: Path) -> Path:
        if renamed:
            raise KeyboardInterrupt
        renamed.append(path)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        folder.finish(10)
    monkeypatch.undo()
    assert renamed == [folder.of_step(10)] and folder.steps() == [] and folder.has_saved()
    assert folder.restored_steps() == [10] and (folder.of_step(10) / "old").read_text() == "whole"
    assert folder.latest() == folder.of_step(10)


def test_a_kill_while_the_replaced_one_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    write(folder, 10)
    (folder.begin(10) / MANIFEST).write_text("new")

    def killed(_: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        folder.finish(10)
    monkeypatch.undo()
    assert folder.restored_steps() == [10] and (folder.of_step(10) / MANIFEST).read_text() == "new"
    assert sorted(path.name for path in folder.path.iterdir()) == ["latest", "step_00000010"]


def test_the_same_step_again_replaces_the_first(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    (write(folder, 6) / "old").write_text("x")
    write(folder, 6)
    assert [path.name for path in folder.of_step(6).iterdir()] == [MANIFEST]


# --- the manifest ----------------------------------------------------------------------------------------------------


def test_manifest_round_trip(tmp_path: Path) -> None:
    run = Run(
        tmp_path, tmp_path / "corpus", model={"rope_scaling": {"kind": "linear", "factor": 2.0}, "window_size": 5}
    )
    (tmp_path / "data").write_bytes(b"abc")
    manifest = run.manifest().model_copy(
        update={
            "step": 7,
            "guards": {"good_losses": [1.25], "skips_in_a_row": 0},
            "files": {"data": record_file(tmp_path / "data")},
        }
    )
    (tmp_path / MANIFEST).write_text(manifest.model_dump_json(indent=2))
    assert read_manifest(tmp_path) == manifest
    assert manifest.files["data"].sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_manifest_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(WorkError, match="has no manifest.json"):
        read_manifest(tmp_path)
    for text in ("", "{", "[]", '{"step": 1}'):
        (tmp_path / MANIFEST).write_text(text)
        with pytest.raises(WorkError, match="is damaged"):
            read_manifest(tmp_path)


def test_damage_is_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    record = record_file(path)
    assert damage(tmp_path, "file", record) is None
    path.write_bytes(b"0123456780")
    assert "sha256 differs" in str(damage(tmp_path, "file", record))
    path.write_bytes(b"01234")
    assert "has 5 bytes, not 10" in str(damage(tmp_path, "file", record))
    path.unlink()
    assert "is missing" in str(damage(tmp_path, "file", record))


def test_the_folder_of_the_tokenizer_lies_on_the_disk_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    flushed: list[frozenset[str]] = []

    def noted(descriptor: int) -> None:
        flushed.append(frozenset(path.name for path in Path(f"/proc/self/fd/{descriptor}").resolve().glob("*")))

    monkeypatch.setattr(os, "fsync", noted)
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    manifest = Run(tmp_path, tmp_path / "corpus").manifest()
    _copy_tokenizer(manifest.model_copy(update={"tokenizer_path": str(tmp_path / "tokenizer.json")}), checkpoint)
    assert frozenset({"tokenizer.json"}) in flushed
