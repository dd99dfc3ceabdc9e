"""Conversions that are killed, or that the disk has no room for: what is done counts, and the bytes are the same."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint_tools.convert import Manner, convert
from checkpoint_tools.copying import DonePart
from checkpoint_tools.formats.rank_cuts import RankGrid
from checkpoint_tools.journal import JOURNAL, Unfinished
from checkpoint_tools.planning import Form
from checkpoint_tools.record import RECORD
from checkpoint_tools.soundness import check
from foundation.errors import RequestError, WorkError
from tests.checkpoint_tools.models import converted, saved_model

ALONE = Manner(processes=1)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


FORMS = {
    "hf": ("distributed", Form("hf")),
    "distributed": ("hf", Form("distributed")),
    "megatron": ("hf", Form("megatron", RankGrid(tp=2, pp=2))),
}


@pytest.mark.parametrize("to", FORMS)
def test_resumed_after_any_part_it_gives_the_same_bytes(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    monkeypatch.setattr("checkpoint_tools.target.PART_BYTES", 10_000)
    monkeypatch.setattr("checkpoint_tools.formats.distributed_target.LEAST_FILE_BYTES", 10_000)
    source, form = FORMS[to]
    whole = convert(sources / source, tmp_path / "unbroken", form, ALONE)
    assert whole.parts >= 5
    written = Unfinished.done

    class Killed(Exception):
        pass

    def die_after(self: Unfinished, part: DonePart) -> None:
        written(self, part)
        raise Killed

    for _ in range(whole.parts - 1):
        monkeypatch.setattr(Unfinished, "done", die_after)
        with pytest.raises(Killed):
            convert(sources / source, tmp_path / "out", form, Manner(resume=True, processes=1))
        assert not (tmp_path / "out").exists()
    monkeypatch.setattr(Unfinished, "done", written)
    report = convert(sources / source, tmp_path / "out", form, Manner(resume=True, processes=1))
    assert report.resumed == whole.parts - 1
    assert contents(tmp_path / "out") == contents(tmp_path / "unbroken")
    assert not list(tmp_path.glob(".*"))


def test_killed_with_all_its_processes_and_resumed(tmp_path: Path) -> None:
    """kill -9 of the command while its processes copy: none is left, and --resume gives an unbroken run's bytes."""
    saved_model("llama3", tmp_path / "hf", torch.bfloat16, hidden_size=256, intermediate_size=2048, vocab_size=40_000)
    command = [sys.executable, "-P", "-m", "launch", "convert", str(tmp_path / "hf")]
    options = ["--to", "distributed", "--processes", "2"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    begun = subprocess.Popen(
        [*command, str(tmp_path / "out"), *options], env=environment, stderr=subprocess.DEVNULL, start_new_session=True
    )
    journal = tmp_path / ".out.unfinished" / JOURNAL
    deadline = time.monotonic() + 300
    while begun.poll() is None and time.monotonic() < deadline:
        if journal.is_file() and journal.read_bytes().count(b"\n") >= 2:
            break
        time.sleep(0.001)
    begun.send_signal(signal.SIGKILL)
    begun.wait()
    assert not (tmp_path / "out").exists() or begun.returncode == 0
    assert _gone(begun.pid)
    subprocess.run([*command, str(tmp_path / "out"), *options, "--resume"], env=environment, check=True)
    subprocess.run([*command, str(tmp_path / "unbroken"), *options], env=environment, check=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "unbroken")


def _gone(session: int) -> bool:
    """Whether no process of a session is left, within two minutes."""
    for _ in range(2400):
        left = [stat for stat in Path("/proc").glob("[0-9]*/stat") if _session(stat) == session]
        if not left:
            return True
        time.sleep(0.05)
    return False


def _session(stat: Path) -> int | None:
    try:
        fields = stat.read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[3])


def test_what_is_unfinished_is_not_overwritten_or_mixed(sources: Path, tmp_path: Path) -> None:
    unfinished = Unfinished(tmp_path / "out")
    unfinished.begin("another plan", resume=False)
    with pytest.raises(RequestError, match="--resume"):
        convert(sources / "hf", tmp_path / "out", Form("distributed"), ALONE)
    with pytest.raises(RequestError, match="another one"):
        convert(sources / "hf", tmp_path / "out", Form("distributed"), Manner(resume=True, processes=1))


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_filesystem_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """And a disk that fails while it is asked for one is not taken for such."""

    def none(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", none)
    said: list[str] = []
    unfinished = Unfinished(tmp_path / "out", said.append)
    assert unfinished.begin("plan", resume=False) == {}
    (line,) = said
    assert line.startswith(f"{unfinished.folder}: this file system has no locks") and "no other conversion" in line
    number = errno.EIO
    with pytest.raises(OSError, match="Input/output"):
        Unfinished(tmp_path / "other", said.append).begin("plan", resume=False)


def test_a_line_that_a_kill_cut_off_does_not_count(tmp_path: Path) -> None:
    unfinished = Unfinished(tmp_path / "out")
    unfinished.begin("plan", resume=False)
    unfinished.done(DonePart(0, {"a": "1"}))
    with (unfinished.folder / JOURNAL).open("ab") as handle:
        handle.write(b'{"number": 1, "hash')
    assert list(Unfinished(tmp_path / "out").begin("plan", resume=True)) == [0]
    unfinished.done(DonePart(2, {"b": "2"}))
    assert list(Unfinished(tmp_path / "out").begin("plan", resume=True)) == [0, 2]


def test_what_a_kill_leaves_beside_the_tensors_is_no_part_of_the_target(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while conversion.json was written: its temporary file stays in the unfinished folder."""

    def killed(source: Any, target: Any, folder: Path, done: Any, plan: str) -> None:
        (folder / f".{RECORD}.0123456789abcdef.tmp").write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr("checkpoint_tools.convert.write_beside", killed)
    with pytest.raises(KeyboardInterrupt):
        convert(sources / "hf", tmp_path / "out", Form("distributed"), ALONE)
    monkeypatch.undo()
    convert(sources / "hf", tmp_path / "out", Form("distributed"), Manner(resume=True, processes=1))
    assert contents(tmp_path / "out") == contents(sources / "distributed")


def test_resume_of_what_is_finished_does_nothing(sources: Path, tmp_path: Path) -> None:
    """A batch script may always say --resume."""
    converted(sources / "hf", tmp_path / "out", "distributed")
    before = contents(tmp_path / "out")
    convert(sources / "hf", tmp_path / "out", Form("distributed"), Manner(resume=True, processes=1))
    assert contents(tmp_path / "out") == before
    with pytest.raises(RequestError, match="is there already"):
        convert(sources / "hf", tmp_path / "out", Form("distributed"), ALONE)


def test_a_disk_without_room_is_found_before_anything_is_written(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Small:
        f_bavail, f_frsize = 10, 512

    monkeypatch.setattr(os, "statvfs", lambda _: Small)
    with pytest.raises(WorkError, match="free"):
        convert(sources / "hf", tmp_path / "new" / "out", Form("distributed"), ALONE)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_meanwhile(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwritev", full)
    with pytest.raises(WorkError, match=r"No space left(.|\n)*--resume"):
        convert(sources / "hf", tmp_path / "out", Form("distributed"), ALONE)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    convert(sources / "hf", tmp_path / "out", Form("distributed"), Manner(resume=True, processes=1))
    assert check(tmp_path / "out").faults == ()


def test_a_folder_that_may_not_be_written(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Path.mkdir

    def refused(self: Path, *arguments: Any, **options: Any) -> None:
        if self.name.startswith(".out"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))
        made(self, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(WorkError, match=r"Read-only file system(.|\n)*permissions"):
        convert(sources / "hf", tmp_path / "out", Form("distributed"), ALONE)
