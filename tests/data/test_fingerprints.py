"""Remembered hashes: kept while a file stays as it is, and never believed after it changed."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from data.fingerprints import ContentHashes, combined


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_a_settled_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.fingerprints._SETTLED_NS", -(10**12))
    path, memory = tmp_path / "a", tmp_path / "memory.json"
    path.write_text("one")
    hashes = ContentHashes(memory)
    assert hashes.of(path) == digest("one")
    hashes.save()
    with monkeypatch.context() as patch:
        patch.setattr("hashlib.file_digest", None)
        assert ContentHashes(memory).of(path) == digest("one")

    stat = path.stat()
    time.sleep(0.05)  # let the file system's clock move on
    path.write_text("two")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # size and time as they were
    assert ContentHashes(memory).of(path) == digest("two")


def test_a_file_that_just_changed_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its time stamp could stay the same through another change."""
    monkeypatch.setattr("data.fingerprints._SETTLED_NS", 300 * 10**9)  # "just", also where the machine stands still
    path, memory = tmp_path / "a", tmp_path / "memory.json"
    path.write_text("one")
    hashes = ContentHashes(memory)
    hashes.of(path)
    hashes.save()
    assert memory.read_text().strip() == "{}"


def test_a_damaged_memory_costs_only_time(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("one")
    for damage in ("{", "[]", ""):
        (tmp_path / "memory.json").write_text(damage)
        assert ContentHashes(tmp_path / "memory.json").of(tmp_path / "a") == digest("one")


def test_parts_do_not_run_into_each_other() -> None:
    assert len({combined(parts) for parts in (["ab", "c"], ["a", "bc"], ["abc"], ["abc", ""], [])}) == 5
