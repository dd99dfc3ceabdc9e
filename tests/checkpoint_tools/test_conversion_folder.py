"""The folder that a conversion grows in: flushed before it is trusted, worked on by one, and no name that it cannot
take."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from checkpoint_tools.convert import Manner, convert
from checkpoint_tools.copying import DonePart
from checkpoint_tools.journal import Unfinished
from checkpoint_tools.planning import Form
from checkpoint_tools.soundness import check
from foundation.errors import OrthantError, RequestError

ALONE = Manner(processes=1)
FORMATS = ("hf", "distributed", "megatron")

Flushed = list[tuple[int, frozenset[str]]]


@pytest.fixture
def flushed(monkeypatch: pytest.MonkeyPatch) -> Flushed:
    """(inode, names in it where it is a folder) of all that is flushed, in order."""
    seen: Flushed = []

    def noting(flush: Callable[[int], None]) -> Callable[[int], None]:
        def noted(descriptor: int) -> None:
            path = Path(f"/proc/self/fd/{descriptor}").resolve()
            seen.append((path.stat().st_ino, frozenset(one.name for one in path.glob("*"))))
            flush(descriptor)

        return noted

    monkeypatch.setattr(os, "fsync", noting(os.fsync))
    monkeypatch.setattr(os, "fdatasync", noting(os.fdatasync))
    return seen


@pytest.mark.parametrize("to", FORMATS)
def test_every_file_lies_on_the_disk_before_the_target_has_its_name(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flushed: Flushed, to: Any
) -> None:
    shutil.copytree(sources / "hf", tmp_path / "hf")
    (tmp_path / "hf/tokenizer_config.json").write_text("{}")
    rename, left = Path.rename, []

    def noted(self: Path, target: Path) -> Path:
        if target == tmp_path / "out":
            left.extend(path for path in self.rglob("*") if path.stat().st_ino not in {inode for inode, _ in flushed})
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", noted)
    convert(tmp_path / "hf", tmp_path / "out", Form(to), ALONE)
    assert left == [] and (tmp_path / "out").is_dir()


@pytest.mark.parametrize("to", FORMATS)
def test_files_have_their_names_on_the_disk_before_a_part_is_written_down(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flushed: Flushed, to: Any
) -> None:
    """A power cut would take the file away, and the journal would say that what was in it is done."""
    done, lost = Unfinished.done, []

    def noted(self: Unfinished, part: DonePart) -> None:
        for folder in (self.folder, *(path for path in self.folder.rglob("*") if path.is_dir())):
            names = {path.name for path in folder.iterdir() if path.suffix in ("", ".distcp", ".safetensors", ".pt")}
            kept = [listed for inode, listed in flushed if inode == folder.stat().st_ino]
            lost.extend(names - {"lock"} - frozenset().union(*kept))
        done(self, part)

    monkeypatch.setattr(Unfinished, "done", noted)
    convert(sources / "hf", tmp_path / "out", Form(to), ALONE)
    assert lost == []


def test_what_lies_there_without_a_journal_is_no_part_of_the_target(sources: Path, tmp_path: Path) -> None:
    """The target has gaps, between tensors and where rows pad the vocabulary: they are zero, whatever lay there."""
    unfinished = tmp_path / ".out.unfinished"
    unfinished.mkdir()
    (unfinished / "__0_0.distcp").write_bytes(b"\xff" * 3_000_000)
    convert(sources / "hf", tmp_path / "out", Form("distributed"), Manner(resume=True, processes=1))
    assert check(tmp_path / "out", processes=1).faults == ()


@pytest.mark.parametrize("change", [Path.unlink, lambda path: os.truncate(path, 1000)])
def test_a_done_part_whose_file_is_gone_is_copied_again(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("checkpoint_tools.convert.write_beside", killed)
    with pytest.raises(KeyboardInterrupt):
        convert(sources / "distributed", tmp_path / "out", Form("hf"), ALONE)
    monkeypatch.undo()
    change(tmp_path / ".out.unfinished/model.safetensors")
    convert(sources / "distributed", tmp_path / "out", Form("hf"), Manner(resume=True, verify="none", processes=1))
    assert check(tmp_path / "out", processes=1).faults == ()


def test_two_do_not_work_on_one_target(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one would remove what the first has just written beside the tensors."""
    said: list[bytes] = []
    flush = Unfinished.finish

    def with_a_second(self: Unfinished) -> None:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                convert(sources / "hf", tmp_path / "out", Form("hf"), Manner(resume=True, processes=1))
                os.write(writer, b"worked on it too")
            except OrthantError as error:
                os.write(writer, f"{type(error).__name__} {error}".encode())
            finally:
                os._exit(0)
        os.close(writer)
        os.waitpid(child, 0)
        said.append(os.read(reader, 10_000))
        os.close(reader)
        flush(self)

    monkeypatch.setattr(Unfinished, "finish", with_a_second)
    convert(sources / "hf", tmp_path / "out", Form("hf"), ALONE)
    assert said[0].startswith(b"RequestError another process is at work")
    assert check(tmp_path / "out", processes=1).faults == () and not list(tmp_path.glob(".*"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("config.json", "conversion.json", "generation_config.json", "model.safetensors")
    }


def link_to_nothing(folder: Path) -> Path:
    (folder / "out").symlink_to(folder / "nowhere")
    return folder / "out"


def link_to_a_folder(folder: Path) -> Path:
    (folder / "elsewhere").mkdir()
    (folder / "out").symlink_to(folder / "elsewhere")
    return folder / "out"


def link_to_itself(folder: Path) -> Path:
    (folder / "out").symlink_to(folder / "out")
    return folder / "out"


def below_a_file(folder: Path) -> Path:
    (folder / "file").write_text("")
    return folder / "file" / "out"


@pytest.mark.parametrize(
    "place",
    [
        link_to_nothing,
        link_to_a_folder,
        link_to_itself,
        below_a_file,
        lambda folder: folder / "x" / "..",
        lambda _: Path(),
    ],
)
def test_a_name_that_cannot_be_taken_is_refused_first(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Any
) -> None:
    """Found at the end, the whole work is done for nothing."""
    (tmp_path / "x").mkdir()
    monkeypatch.chdir(tmp_path / "x")
    target = place(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RequestError, match="cannot be the name|is no folder"):
        convert(sources / "hf", target, Form("distributed"), ALONE)
    assert sorted(tmp_path.rglob("*")) == before
